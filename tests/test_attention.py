"""Where the decoder looked: support/attention.py, --attention and --trace of sample.py."""

import re
from dataclasses import replace

import pytest
import torch
from common import call, errors, save, tiny_config
from PIL import Image

import sample
from lab import attention as lab_attention
from model import PRESETS, VLM, Decoder, rotary_angles, rotate
from sample import Answer
from support import attention
from support.attention import Look, attention_weights
from support.chat import Chat
from support.flags import AskConfig
from support.picture_files import open_image


@pytest.fixture
def chat(tiny, tok):
    """A chat with a tiny model; chat.looked_at has the tiles of each run of its tower."""
    vlm = VLM.from_pretrained(tiny)
    chat = Chat(vlm, tok, AskConfig(max_new_tokens=12))
    chat.looked_at = []
    vlm.vision.register_forward_hook(lambda tower, pixels, features: chat.looked_at.append(len(pixels[0])))
    return chat


def show(chat, world, i=0):
    file = world / f"images/val_{i:05d}.png"
    chat.show([file], [open_image(file)])


def ask(chat, question):
    return "".join(chat.ask(question))


@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_the_weights_give_what_the_layer_gives(tok, n_kv_head):
    torch.manual_seed(0)
    cfg = replace(tiny_config(tok).decoder, n_kv_head=n_kv_head)
    attn = Decoder(cfg).layers[0].self_attn
    x = torch.randn(1, 9, cfg.n_embd)
    rope = rotary_angles(torch.arange(9)[None], cfg)
    v = attn.v_proj(x).view(9, n_kv_head, cfg.head_dim).transpose(0, 1).repeat_interleave(2 // n_kv_head, 0)
    for rows in torch.arange(9), torch.tensor([3, 8]):
        weights = attention_weights(attn, x, rope, rows)                    # (H, K, T)
        y = attn.o_proj((weights @ v).transpose(0, 1).flatten(1))
        assert torch.allclose(y, attn(x, rope)[0, rows], atol=1e-6)


def test_the_tower_runs_once_a_picture_whatever_turns_and_words(chat, world):
    show(chat, world, 0)
    for i in range(3):
        ask(chat, "What is it?")
        look = Look(chat)
        for word in range(len(look.words)):
            look.draw(word)
        if i == 1:
            show(chat, world, 1)
    assert chat.looked_at == [1, 1]


@torch.no_grad()
def test_one_pass_over_the_answer_finds_what_its_steps_attended_to(chat, world):
    """Of two layers the second is the later half."""
    attn = chat.vlm.decoder.layers[1].self_attn
    read = []                        # q (H, tokens, d) and k of the prompt, and then of each token

    def keep(attn, inputs):
        x, rope = inputs[:2]
        heads = 1, x.shape[1], -1, attn.head_dim
        q_and_k = [proj(x).view(heads).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj)]
        read.append([rotate(y, *rope)[0] for y in q_and_k])

    show(chat, world)
    hook = attn.register_forward_pre_hook(keep)
    ask(chat, "What is it?")
    hook.remove()
    last, _ = read[-1]
    k = torch.cat([k for _, k in read], dim=1)
    weights = (last @ k.transpose(1, 2) / attn.head_dim**0.5).softmax(-1).mean(0)
    found = attention.mean_weights(chat.vlm.decoder, chat.history.x, torch.tensor([k.shape[1] - 1]))
    assert torch.allclose(found, weights, atol=1e-5)


def test_a_word_is_what_its_tokens_looked_at_without_the_punctuation_after_it(chat, world, tok, monkeypatch):
    show(chat, world)
    ask(chat, "What is it?")
    ids = tok.encode("A cat, EXIT.") + [tok.eos]
    chat.answer = Answer("A cat, EXIT.", True, ids)
    n_prompt = len(chat.prompt[0])
    chat.history.x = torch.zeros(1, n_prompt + len(ids) - 1, 32)

    def each_row_its_number(decoder, x, rows):
        return rows[:, None].float().expand(-1, x.shape[1])

    monkeypatch.setattr(attention, "mean_weights", each_row_its_number)
    heat = Look(chat).heat
    pieces = [tok.piece(i) for i in ids]
    rows = range(n_prompt - 1, n_prompt - 1 + len(ids))
    exit_tokens = [row for row, piece in zip(rows, pieces) if set(piece) & set("EXIT")]
    first = [tok.image == i for i in chat.prompt[0]][::-1].index(True)      # tokens after the picture
    mean = sum(range(n_prompt - first, n_prompt + len(ids) - 1)) / (first + len(ids) - 1)
    wanted = [n_prompt - 1, rows[pieces.index("▁cat")], sum(exit_tokens) / len(exit_tokens)]
    assert heat[:, 0].tolist() == pytest.approx([max(0, row - mean) for row in wanted], rel=1e-5)


@pytest.mark.parametrize("mode", ["pad", "internvl", "hd"])
def test_a_patch_that_was_looked_at_is_bright_in_its_tile(tok, mode):
    torch.manual_seed(0)
    vlm = VLM(tiny_config(tok, image_mode=mode)).eval()
    chat = Chat(vlm, tok, AskConfig(max_new_tokens=4))
    white = Image.new("RGB", (64, 32) if mode != "pad" else (32, 32), "white")
    chat.show(["white"], [white])
    ask(chat, "What?")
    look = Look(chat)
    tiles, layout = chat.pictures[0]
    assert (len(tiles) > 1) == (mode != "pad")
    for m in range(0, len(layout), 5):
        tile, place = layout[m].tolist()
        if tile < 0:                                                        # the end of a row
            continue
        look.heat = torch.zeros(1, len(layout))
        look.heat[0, m] = 1
        shown = look.draw(0, side=32).convert("L")
        assert shown.size == (32 * len(tiles), 32)
        x, y = place % 4 * 8, place // 4 * 8
        lit = shown.crop((32 * tile + x, y, 32 * tile + x + 8, y + 8)).resize((1, 1)).getpixel((0, 0))
        assert lit > 1.5 * shown.resize((1, 1)).getpixel((0, 0))


def test_boxes_of_the_answer_are_drawn(chat, world):
    show(chat, world)
    ask(chat, "Where?")
    chat.answer = Answer("[0.25, 0.50, 0.75, 1.00] and (0.5, 0, 0.25, 0.2)", False, [])
    look = Look(chat)
    look.heat = torch.zeros(9, 16)
    image = look.draw(0, side=100)
    assert image.getpixel((25, 75)) == image.getpixel((50, 50)) == (255, 48, 48)
    assert image.getpixel((25, 10)) == (255, 48, 48)
    assert image.getpixel((90, 30)) != (255, 48, 48)


@pytest.fixture
def run(tiny, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", tiny, "--image", world / "images/val_00000.png", "--max-new-tokens", 8]
    return lambda *more: sample.run_program(lambda: sample.main([str(f) for f in (*flags, *more)]))


def test_sample_writes_a_sheet_of_all_words(run, tmp_path, capfd):
    assert run("--prompt", "What?", "--attention", "look.png") == 0
    n_word = len(capfd.readouterr().out.split())
    with Image.open("look.png") as sheet:
        assert sheet.size == (250 * min(n_word, 5), 274 * -(-n_word // 5))


def test_a_lack_of_memory_is_not_said_of_the_disk(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(attention, "mean_weights", fail)
    with pytest.raises(RuntimeError, match="not enough memory"):
        run("--prompt", "What?", "--attention", "look.png")


def test_attention_without_a_picture_is_an_error_of_one_line(tiny, capfd):
    flags = ["--model", str(tiny), "--prompt", "What?", "--attention", "look.png"]
    assert sample.run_program(lambda: sample.main(flags)) == 1
    assert errors(capfd) == ["error: --attention needs a picture to look at: give --image, too"]


def test_a_trace_tells_the_way_in_its_order_with_likeliest_tokens(run, capfd):
    assert run("--prompt", "What?", "--trace") == 0
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if " ms  " in line]
    names = [re.match(r" *(\w+( \d)?) ", line)[1] for line in lines]
    before = ["picture", "tower 1", "connector", "prompt", "layer 1", "layer 2"]
    assert names == [*before, *[f"token {k}" for k in range(1, 6)]]
    assert "(1, 3, 32, 32) -> (1, 16, 32)" in lines[1]
    assert "16 of them visual" in lines[3]
    for line in lines[-5:]:
        chances = [float(p) for p in re.findall(r"([\d.]+)%", line)]
        assert len(chances) == 5 and chances == sorted(chances, reverse=True) and sum(chances) <= 100.3
    assert len(captured.out.splitlines()) == 1


def test_the_lab_counts_peaks_and_shares_on_the_thing(tok, tmp_path, monkeypatch, capfd):
    is_thing = torch.zeros(2, 64, dtype=torch.bool)
    is_thing[:, 10] = True
    heats = torch.zeros(2, 64)
    heats[0, 10], heats[1, 11], heats[1, 10] = 1, 3, 1
    lab_attention.tell("two", heats, is_thing)
    assert capfd.readouterr().out.split() == ["two", "50.0%", "62.5%"]

    preset = PRESETS["toy"]
    decoder = replace(preset.decoder, vocab_size=tok.vocab_size)
    vlm = VLM(replace(preset, decoder=decoder, image_token=tok.image, pad_token=tok.pad))
    save(vlm, tok, tmp_path / "random")
    monkeypatch.setattr(lab_attention, "N_QUESTION", 3)
    assert call(lab_attention.main, "--model", tmp_path / "random", "--max-new-tokens", 4) == 0
    assert "mean of all" in capfd.readouterr().out

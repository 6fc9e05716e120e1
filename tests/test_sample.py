"""What sample.py says, to whom and how it ends. Every name is a claim; the model is tiny and random."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from common import ROOT, call, errors

import model
import sample
from conversation import encode_prompt
from model import VLM
from support.cli import UserError, run_program
from support.data_files import Records, picture_paths
from support.picture_files import open_image
from support.weights import newest_run
from vision import cut_tiles

NO_IMAGE = "nothing to answer: give --image, --prompt or both"


@pytest.fixture
def ask(tiny, world, tmp_path, monkeypatch):
    """ask("--prompt", "What?") in a folder with a.png, b.png and the model in out/tiny -> exit code."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/tiny").symlink_to(tiny)
    for name, i in ("a.png", 0), ("b.png", 1):
        Path(name).symlink_to(world / f"images/val_{i:05d}.png")
    return lambda *flags: run_program(lambda: sample.main([str(word) for word in flags]))


@pytest.fixture
def chat(ask, monkeypatch):
    """chat([question, ...], *flags): the user types these on a terminal, then Ctrl-D."""

    def chat(typed, *flags):
        typed = iter(typed)

        def type_line(prompt):
            print(prompt, end="")
            line = next(typed, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
        monkeypatch.setattr("builtins.input", type_line)
        return ask(*flags)

    return chat


def expected(model, tok, turns, pictures, n):
    """The oracle: generate, all at once."""
    vlm = VLM.from_pretrained(model)
    tiles = [cut_tiles(open_image(p), vlm.cfg.vision, "pad") for p in pictures]
    tokens = torch.tensor([encode_prompt(tok, turns, "vicuna_v1", [len(layout) for _, layout in tiles])])
    ids = vlm.generate(tokens, torch.cat([t for t, _ in tiles]) if tiles else None, n)[0].tolist()
    return tok.decode(ids[: ids.index(tok.eos)] if tok.eos in ids else ids).strip()


@pytest.fixture
def talkative(tiny, monkeypatch):
    """Every sequence ends after 6 tokens at most: the random model seldom ends by itself."""
    original = VLM.stream

    def stream(self, **given):
        stream.seen.append((given["tokens"], given["pixels"]))
        for step, new in enumerate(original(self, **given)):
            yield new if step < 6 else torch.tensor([self.cfg.eos_token])
            if step == 6:
                return

    stream.seen = []
    monkeypatch.setattr(VLM, "stream", stream)
    return stream.seen


def test_one_question_gets_the_greedy_answer_of_the_newest_run(ask, tiny, tok, capfd):
    assert ask("--image", "a.png", "--prompt", "What color?", "--max-new-tokens", 20) == 0
    assert (
        capfd.readouterr().out
        == expected(tiny, tok, [("human", "<image>\nWhat color?")], ["a.png"], 20) + "\n"
    )


def test_in_python_it_gets_the_same(ask, tiny, tok):
    vlm, own_tok = sample.open_asked(sample.ModelConfig())  # ask: in a folder with this run
    said = sample.answer_one(vlm, own_tok, "What differs?", ["a.png", "b.png"], 20)
    assert said == expected(tiny, tok, [("human", "<image><image>\nWhat differs?")], ["a.png", "b.png"], 20)


def test_several_pictures_are_given_in_their_order(ask, tiny, tok, capfd):
    answers = []
    for names in (["a.png", "b.png"], ["b.png", "a.png"]):
        assert ask("--image", *names, "--prompt", "What differs?", "--max-new-tokens", 20) == 0
        answers.append(capfd.readouterr().out)
        assert (
            answers[-1] == expected(tiny, tok, [("human", "<image><image>\nWhat differs?")], names, 20) + "\n"
        )
    assert answers[0] != answers[1]


def test_a_prompt_may_say_where_its_pictures_stand_and_a_second_image_flag_adds(ask, tiny, tok, capfd):
    text = "Is <image> like <image>?"
    assert ask("--image", "a.png", "--image", "b.png", "--prompt", text, "--max-new-tokens", 20) == 0
    assert capfd.readouterr().out == expected(tiny, tok, [("human", text)], ["a.png", "b.png"], 20) + "\n"
    assert ask("--image", "a.png", "--prompt", text) == 1
    assert "2 <image> for 1 picture" in errors(capfd)[-1]


def test_a_question_needs_no_picture(ask, tiny, tok, capfd):
    assert ask("--prompt", "How many?", "--max-new-tokens", 8) == 0
    assert capfd.readouterr().out == expected(tiny, tok, [("human", "How many?")], [], 8) + "\n"


def test_the_answer_is_printed_while_it_is_written(ask, monkeypatch, capfd):
    shown, original = [], VLM.stream

    def stream(*args, **flags):
        for new in original(*args, **flags):
            shown.append(capfd.readouterr().out)
            yield new

    monkeypatch.setattr(VLM, "stream", stream)
    assert ask("--prompt", "How many?", "--max-new-tokens", 10, "--temperature", 3) == 0
    assert sum(map(bool, shown)) > 3


def test_temperature_draws_by_seed(ask, capfd):
    said = []
    for flags in (
        [],
        ["--temperature", 2],
        ["--temperature", 2],
        ["--temperature", 2, "--seed", 1],
        ["--temperature", 2, "--top-k", 1],
    ):
        assert ask("--prompt", "How many?", "--max-new-tokens", 12, *flags) == 0
        said.append(capfd.readouterr().out)
    assert said[1] == said[2] and len({said[0], said[1], said[3]}) == 3 and said[4] == said[0]


def test_an_answer_that_is_cut_off_says_so(ask, talkative, capfd):
    assert ask("--prompt", "How many?", "--max-new-tokens", 3) == 0
    assert "[cut off after 3 tokens; raise --max-new-tokens]" in capfd.readouterr().err
    assert ask("--prompt", "How many?", "--max-new-tokens", 30) == 0
    assert "cut off" not in capfd.readouterr().err


def test_an_answer_that_fills_the_models_context_says_so(ask, capfd):
    assert ask("--prompt", "How many things are there? " * 50, "--max-new-tokens", 5000) == 0
    assert "these are all 512 the model takes" in capfd.readouterr().err


def test_without_a_prompt_and_a_terminal_the_picture_is_described_and_nothing_is_asked(
    ask, monkeypatch, capfd
):
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert ask("--image", "a.png", "--max-new-tokens", 5) == 0
    said = capfd.readouterr().out
    assert said.startswith(f"> {sample.DESCRIBE}\n") and len(said.splitlines()) == 2


def test_piped_questions_are_asked_one_by_one_and_each_answer_is_a_line(ask, talkative, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What color?\nHow many?\n"))
    assert ask() == 0 and len(talkative) == 2
    assert len(capfd.readouterr().out.splitlines()) == 2


def test_on_a_terminal_one_goes_on_asking_arrow_up_brings_the_last_question_and_ctrl_c_stops_an_answer(ask):
    def own_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)     # a shell's background job ignores it

    keyboard, terminal = pty.openpty()
    command = [sys.executable, ROOT / "sample.py", "--image", "a.png", "--max-new-tokens", "400"]
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    child = subprocess.Popen(
        [*command, "--temperature", "3"], **streams, start_new_session=True, preexec_fn=own_terminal)
    os.close(terminal)
    shown = b""

    def until(text):
        nonlocal shown
        while text not in shown:
            assert select.select([keyboard], [], [], 60)[0], shown
            shown += os.read(keyboard, 4096)
        shown = shown.partition(text)[2]

    def stop_answer():
        os.read(keyboard, 1)             # it begins
        os.write(keyboard, b"\x03")
        until(b"[stopped]")
        until(b"> ")

    until(f"> {sample.DESCRIBE}\r\n".encode())
    stop_answer()
    os.write(keyboard, b"What is it?\n")
    until(b"it?\r\n")
    stop_answer()
    os.write(keyboard, b"\x1b[A\n")      # arrow up
    until(b"What is it?\r\n")
    stop_answer()
    os.write(keyboard, b"\x04")
    with contextlib.suppress(OSError):
        until(b"never")
    assert child.wait() == 0


def test_a_chat_asks_with_all_earlier_turns_and_one_picture(chat, talkative, tok, capfd):
    assert chat(["What color?", ""], "--image", "a.png") == 0
    (first, pixels), (second, again) = talkative
    said = capfd.readouterr().out.splitlines()[1]
    turns = [("human", f"<image>\n{sample.DESCRIBE}"), ("gpt", said), ("human", "What color?")]
    assert second[0].tolist() == encode_prompt(tok, turns, "vicuna_v1", [16])
    assert torch.equal(pixels, again)
    assert len(pixels) == 1
    assert first[0].tolist() == encode_prompt(tok, turns[:1], "vicuna_v1", [16])


def test_a_chat_without_a_picture_begins_with_a_question(chat, talkative):
    assert chat(["Hello?", "Who?"]) == 0 and len(talkative) == 2 and len(talkative[0][1]) == 0
    assert chat([]) == 0 and len(talkative) == 2


def test_an_image_marker_that_is_typed_or_answered_stays_text(chat, tok, monkeypatch):
    prompts = []

    def stream(self, tokens, **flags):
        prompts.append(tokens[0].tolist())
        yield from (torch.tensor([i]) for i in [*tok.encode("An <image>."), tok.eos])

    monkeypatch.setattr(VLM, "stream", stream)
    assert chat(["Is <image> a word?", "<image>"], "--image", "a.png", "--prompt", "") == 0
    begin = encode_prompt(tok, [("human", f"<image>\n{sample.DESCRIBE}")], "vicuna_v1", [16])

    def later(*turns):
        """Ids of later turns where <image> is a word: in a conversation without pictures."""
        opening = [("human", "Q")]
        n_opening = len(encode_prompt(tok, opening, "vicuna_v1", []))
        return encode_prompt(tok, [*opening, *turns], "vicuna_v1", [])[n_opening:]

    first, second = ("gpt", "An <image>."), ("human", "Is <image> a word?")
    assert prompts == [
        begin,
        begin + later(first, second),
        begin + later(first, second, first, ("human", "<image>")),
    ]
    assert all(ids.count(tok.image) == 16 for ids in prompts)


def test_a_chat_survives_an_empty_answer(chat, tok, monkeypatch, capfd):
    prompts = []

    def stream(self, tokens, **flags):
        prompts.append(tokens[0].tolist())
        yield torch.tensor([tok.eos])

    monkeypatch.setattr(VLM, "stream", stream)
    assert chat(["One?", "Two?"]) == 0
    assert "empty answer" in capfd.readouterr().err
    assert prompts == [encode_prompt(tok, [("human", q)], "vicuna_v1", []) for q in ("One?", "Two?")]


def test_a_picture_that_is_shown_later_stands_in_front_of_the_next_question(chat, talkative, tok, capfd):
    assert chat(["/image", "/image none.png", "/image b.png", "Which?"], "--image", "a.png") == 0
    said = capfd.readouterr()
    assert "error: /image is no command; there are /image FILE, /reset, /save FILE" in said.err
    assert "error: none.png: no such picture" in said.err
    turns = [("human", f"<image>\n{sample.DESCRIBE}"), ("gpt", said.out.splitlines()[1])]
    turns.append(("human", "<image>\nWhich?"))
    (_, first), (tokens, both) = talkative
    assert tokens[0].tolist() == encode_prompt(tok, turns, "vicuna_v1", [16, 16])
    assert torch.equal(both[:1], first) and len(both) == 2


def test_reset_forgets_turns_and_pictures(chat, talkative, tok):
    assert chat(["/reset", "Who?", "/image b.png", "What?"], "--image", "a.png") == 0
    prompts = [tokens[0].tolist() for tokens, _ in talkative]
    assert prompts[1] == encode_prompt(tok, [("human", "Who?")], "vicuna_v1", [])
    assert prompts[2].count(tok.image) == 16


def test_a_saved_chat_is_a_record_that_trains(chat, talkative, tok):
    typed = ["Is <image> a word?", "/image b.png", "And?", "/image a.png", "/save saved/chat.json"]
    assert chat(typed, "--image", "a.png") == 0
    record = Records("saved/chat.json", ".")[0]
    assert [path.name for path in picture_paths(record)] == ["a.png", "b.png"]
    prompt = encode_prompt(tok, record["turns"][:-1], "vicuna_v1", [16, 16])
    assert prompt == talkative[-1][0][0].tolist()


def test_ctrl_c_stops_the_answer_and_not_the_chat(chat, monkeypatch, tok, capfd):
    """It comes after two tokens of the first answer, and before any of the second."""
    original, prompts = VLM.stream, []

    def stream(self, **given):
        prompts.append(given["tokens"][0].tolist())
        for step, new in enumerate(original(self, **given)):
            yield new
            if len(prompts) == 1 and step == 1:
                raise KeyboardInterrupt

    def prefill(*given):
        if len(prompts) == 2:
            raise KeyboardInterrupt
        return original_prefill(*given)

    original_prefill = model.prefill
    monkeypatch.setattr(VLM, "stream", stream)
    monkeypatch.setattr(model, "prefill", prefill)
    assert chat(["Two?", "Three?"], "--image", "a.png", "--max-new-tokens", 6) == 0
    captured = capfd.readouterr()
    assert captured.err.count("[stopped]") == 2
    begun = captured.out.splitlines()[1]
    turns = [("human", f"<image>\n{sample.DESCRIBE}"), ("gpt", begun), ("human", "Three?")]
    assert prompts[2] == encode_prompt(tok, turns, "vicuna_v1", [16])
    third = captured.out.split("> ")[-2].strip()
    monkeypatch.setattr(VLM, "stream", original)
    assert third == expected("out/tiny", tok, turns, ["a.png"], 6)


def test_without_a_chat_ctrl_c_ends_the_program(ask, monkeypatch):
    def stream(self, **given):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(VLM, "stream", stream)
    assert ask("--prompt", "What?") == 130


def test_a_mistyped_command_is_no_question(chat, talkative, capfd):
    assert chat(["/imgae a.png"]) == 0
    assert "/imgae a.png is no command; there are /image FILE, /reset, /save FILE" in capfd.readouterr().err
    assert not talkative


def test_a_chat_that_grows_too_long_says_so_and_can_be_saved_and_begun_anew(chat, talkative, capfd):
    assert chat([*["How many things are there? " * 30] * 5, "/save chat.json", "/reset", "What?"]) == 0
    assert "the model takes 512 with its answer" in capfd.readouterr().err
    assert json.loads(Path("chat.json").read_text())[0]["conversations"]
    prompt, _ = talkative[-1]
    assert prompt.shape[1] < 100                         # "What?" was asked, of a new chat


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--temperature", -1], "--temperature -1.0: must be at least 0"),
        (["--temperature", "nan"], "--temperature nan: must be at least 0"),
        (["--top-p", 0], "--top-p 0.0: must be above 0"),
        (["--top-p", 1.5], "--top-p 1.5: must be at most 1"),
        (["--top-k", -1], "--top-k -1: must be at least 0"),
        (["--max-new-tokens", 0], "--max-new-tokens 0: must be at least 1"),
        (["--image", "none.png"], "none.png: no such picture; check the path"),
        (["--image", "text.png"], "text.png: cannot be read"),
        (["--model", "none"], "none/config.json: not found"),
        (["--device", "foo"], "--device foo: PyTorch sees cpu here; choose one"),
        (["--image-mode", "padd"], "did you mean pad?"),
        (["--template", "vicuna"], "did you mean vicuna_v1?"),
        (["--prompt", "many words " * 400], "the model takes 512"),
        (["--prompt", ""], NO_IMAGE),
        (["--top-p", "high"], "argument --top-p: invalid float"),
        (["--imgae", "a.png"], "did you mean --image?"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_exit_code_1(ask, capfd, monkeypatch, flags, words):
    Path("text.png").write_text("no picture")
    monkeypatch.setattr(sys, "stdin", None)
    assert ask("--prompt", "What?", *flags) == 1
    error = errors(capfd)
    assert len(error) == 1 and error[0].startswith("error: ") and words in error[0], error


def test_a_missing_picture_of_the_command_line_has_no_image_root_to_check(ask, capfd):
    assert ask("--image", "none.png") == 1 and "--image-root" not in errors(capfd)[-1]


def test_the_bare_name_of_a_run_is_led_to_its_folder(ask, capfd):
    Path("out/mine").mkdir(parents=True)
    Path("out/mine/config.json").write_text("{}")
    assert ask("--model", "mine") == 1 and "did you mean out/mine?" in errors(capfd)[-1]


# ---- many prompts at once ----


@pytest.fixture
def questions(ask):
    """A file of 100 questions as LLaVA has them, about two pictures and about none."""
    rows = []
    for i in range(100):
        image = {"image": ("a.png", "b.png")[i % 2]} if i % 5 else {}
        rows.append({"question_id": 100 - i, "text": "What is it? " * (1 + i % 7)} | image)
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_a_file_of_questions_becomes_one_of_answers_in_its_order(ask, questions, tiny, tok, capfd):
    assert ask("--file", "q.jsonl", "--out", "a.jsonl", "--max-new-tokens", 8) == 0
    answers = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in answers] == [row["question_id"] for row in questions]
    assert [row["prompt"] for row in answers] == [row["text"] for row in questions]
    for i in 0, 1, 7:
        pictures = [questions[i]["image"]] if i else []
        turns = [("human", "<image>\n" * len(pictures) + questions[i]["text"])]
        assert answers[i]["text"] == expected(tiny, tok, turns, pictures, 8)
    assert "100 answers are in a.jsonl" in capfd.readouterr().out
    assert ask("--file", "q.jsonl", "--out", "a.jsonl") == 1
    assert "is there already" in errors(capfd)[-1]


@pytest.mark.parametrize("flags", [[], ["--temperature", 2, "--top-k", 9]], ids=["greedy", "drawn"])
def test_a_file_of_answers_that_was_interrupted_ends_the_same(ask, questions, monkeypatch, flags, capfd):
    flags = ["--file", "q.jsonl", "--max-new-tokens", 8, *flags]
    assert ask(*flags, "--out", "whole.jsonl") == 0
    original, n_batch = VLM.generate, []

    def generate(self, *args, **options):
        n_batch.append(1)
        if len(n_batch) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(VLM, "generate", generate)
    assert ask(*flags, "--out", "half.jsonl") == 130
    assert not Path("half.jsonl").exists()
    assert ask(*flags, "--out", "half.jsonl", "--resume") == 0
    assert len(n_batch) == 2 + 2  # of three batches the first was kept
    assert Path("half.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert sorted(path.name for path in Path().glob("half*")) == ["half.jsonl"]


def test_what_is_wrong_with_a_file_of_questions_is_said_before_a_model_is_read(ask, capfd):
    Path("q.jsonl").write_text('{"question_id": 3, "image": "none.png", "text": "What?"}\n')
    assert ask("--file", "q.jsonl", "--out", "a.jsonl", "--model", "none") == 1
    assert re.search("line 1 .id '3'.: .*none.png: no such picture", errors(capfd)[-1])
    file = ["--file", "q.jsonl"]
    for flags in file, ["--resume"], [*file, "--out", "a.jsonl", "--trace"]:
        assert ask(*flags) == 1
        assert "--file FILE and --out FILE go together" in errors(capfd)[-1]


def make_prompts(vlm, tok, world):
    a, b = (sample.cut_picture(vlm, open_image(world / f"images/val_{i:05d}.png")) for i in (0, 1))
    asked = [
        ([a], "What is in the image, on the left or on the right of it?"),
        ([], "How many?"),
        ([a, b], "Which?"),
        ([b], "What?"),
    ]
    return [sample.encode_question(vlm, tok, text, pictures) for pictures, text in asked]


def test_answers_in_batches_are_those_of_each_prompt_alone_in_their_order(tiny, tok, world):
    vlm = VLM.from_pretrained(tiny)
    prompts = make_prompts(vlm, tok, world)
    together = sample.answer(vlm, tok, prompts, max_new_tokens=12)
    assert together == [sample.answer(vlm, tok, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == sample.answer(vlm, tok, prompts, max_new_tokens=12, batch_size=2)
    assert len({said.text for said in together}) > 1
    assert not all(said.whole for said in together)


def test_the_tower_looks_once_at_a_picture_that_prompts_share(tiny, tok, world):
    vlm = VLM.from_pretrained(tiny)
    prompts = make_prompts(vlm, tok, world)
    looked_at = []
    vlm.vision.register_forward_hook(lambda tower, pixels, features: looked_at.append(len(pixels[0])))
    sample.answer(vlm, tok, prompts, max_new_tokens=2)
    assert looked_at == [2]  # of four runs of visual tokens


def test_draws_follow_the_seed(tiny, tok, world):
    vlm = VLM.from_pretrained(tiny)
    prompts = make_prompts(vlm, tok, world)
    draws = [sample.answer(vlm, tok, prompts, 12, 2, seed, temperature=2.0) for seed in (0, 0, 5)]
    assert draws[0] == draws[1] != draws[2]


def test_an_answer_ends_at_its_stop_be_it_a_token_or_a_string(tok):
    hello = tok.encode("Hello.")
    assert sample.read_answer(tok, "vicuna_v1", hello) == ("Hello.", False, hello)
    assert sample.read_answer(tok, "vicuna_v1", hello + [tok.eos, tok.pad]) == (
        "Hello.",
        True,
        hello + [tok.eos],
    )
    marked = tok.encode("Hello.###Human")
    assert sample.read_answer(tok, "llava_v0", marked) == ("Hello.", True, marked)


def test_an_answer_ends_at_the_models_context_and_says_so(tiny, tok):
    vlm = VLM.from_pretrained(tiny)
    prompt = sample.encode_question(vlm, tok, "How many things are there? " * 50)
    assert sample.answer(vlm, tok, [prompt], max_new_tokens=10_000)[0].whole is False
    prompt = sample.encode_question(vlm, tok, "How many things are there? " * 100)
    with pytest.raises(UserError, match="leaves no room for an answer"):
        sample.answer(vlm, tok, [prompt], max_new_tokens=10)


def test_the_newest_finished_run_answers_and_no_unfinished_one(tmp_path):
    def finish(name, time):
        config = tmp_path / name / "config.json"
        config.parent.mkdir(parents=True)
        config.write_text("{}")
        os.utime(config, (time, time))

    finish("b/checkpoint-000100", 5)
    with pytest.raises(UserError, match="no finished run under .*train one"):
        newest_run(tmp_path)
    finish("old", 1)
    finish("new", 2)
    assert newest_run(tmp_path) == str(tmp_path / "new")


def test_help_gives_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"(default {value})" in shown for value in ("0.0", "1.0", "256", "auto"))


def test_nothing_asked_is_said(tiny, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert call(sample.main, "--model", tiny) == 1
    assert "nothing was asked" in errors(capfd)[-1]

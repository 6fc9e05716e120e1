"""The decoder and the whole model against transformers', generation against itself, and model directories,
good and damaged."""

import io
import json
import math
import os
import resource
import string
from dataclasses import replace

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from common import ROOT, in_child
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from conversation import Tokenizer, encode_prompt
from model import (
    PRESETS,
    VLM,
    Connector,
    Decoder,
    DecoderConfig,
    Sampling,
    VLMConfig,
    pick_token,
    rotary_angles,
    rotate,
)
from support.cache import KVHistory
from support.cli import UserError, run_program
from support.configs import decoder_config, read_config, vision_config
from support.distributed import add_blank_tile
from support.export import TO_LLAMA, TO_LLAVA, clip_json, llama_json, llava_config
from support.io import read_json, write_whole
from support.log_probs import TokenLogProbs, token_log_probs
from support.processor import save_processor
from support.start import init_weights
from support.weights import load_decoder, load_vision, rename
from vision import VisionConfig, ViT, cut_tiles

transformers = pytest.importorskip("transformers")
LLAMA = ROOT.parent / "shared" / "tokenizers" / "llama2.model"
IMAGE, PAD, EOS, IGNORE = 80, 81, 2, -100
TINY = VLMConfig(
    VisionConfig(
        image_size=28, patch_size=14, n_embd=32, n_layer=3, n_head=2, n_hidden=64
    ),  # 4 visual tokens
    DecoderConfig(
        vocab_size=96,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        head_dim=16,
        n_hidden=48,
        block_size=64,
        rope_theta=500.0,
    ),
    image_token=IMAGE,
    pad_token=PAD,
)


def lively(module):
    """Random weights large enough that a wrong mask, angle or order changes every number."""
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return module.eval()


@pytest.fixture(scope="module")
def vlm():
    return lively(VLM(TINY))


def pictures(n):
    return torch.randint(
        0, 256, (n, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)
    )


def prompt(length, n_picture=0):
    """<s>, then the pictures' image tokens, each picture after one word, then words."""
    words = torch.randint(3, IMAGE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return [1] + [i for word in words[:n_picture] for i in [word] + [IMAGE] * 4] + words[n_picture:]


# ---- the decoder --------


@torch.no_grad()
@pytest.mark.parametrize(
    "n_kv_head, head_dim", [(4, 8), (2, 8), (1, 16)]
)  # 4 heads, 32 channels: 16 is not 32 / 4
def test_the_decoder_equals_llama_with_few_or_many_key_value_heads(n_kv_head, head_dim):
    cfg = replace(TINY.decoder, n_kv_head=n_kv_head, head_dim=head_dim)
    ours, tokens = lively(Decoder(cfg)), torch.tensor([prompt(20), prompt(21)[:21]])
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_json(cfg))).eval()
    theirs.load_state_dict({rename(name, TO_LLAMA): p for name, p in ours.state_dict().items()}, strict=True)
    assert theirs.config.rope_parameters["rope_theta"] == 500
    assert_close(ours.lm_head(ours(ours.embed_tokens(tokens))), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_equals_the_sum_written_out_here():
    cfg = TINY.decoder
    attn, x = lively(model.CausalAttention(cfg)), torch.randn(1, 6, 32)
    rope = rotary_angles(torch.arange(6)[None], cfg)
    projections = attn.q_proj, attn.k_proj, attn.v_proj
    q, k, v = (proj(x)[0].view(6, -1, 16) for proj in projections)  # (T, H, d)
    turn = lambda z, at: rotate(z, *(r[0, 0, at] for r in rope))
    heads = torch.zeros(6, 4, 16)
    for h in range(4):
        shared = h // 2  # a head of keys and values for two of queries
        for t in range(6):
            dots = [turn(q[t, h], t) @ turn(k[s, shared], s) for s in range(t + 1)]
            score = torch.stack(dots) / math.sqrt(16)
            heads[t, h] = score.softmax(0) @ v[: t + 1, shared]
    assert_close(attn(x, rope)[0], attn.o_proj(heads.flatten(1)))


def test_rotary_positions_turn_pairs_so_that_only_the_distance_counts():
    cfg, (a, b) = replace(TINY.decoder, head_dim=4, rope_theta=100.0), torch.randn(2, 4)
    cos, sin = (r[0, 0] for r in rotary_angles(torch.arange(9)[None], cfg))
    dot = lambda m, n: rotate(a, cos[m], sin[m]) @ rotate(b, cos[n], sin[n])
    assert_close(dot(2, 5), dot(5, 8))
    fast = complex(a[0], a[2]) * complex(math.cos(3), math.sin(3))
    slow = complex(a[1], a[3]) * complex(math.cos(0.3), math.sin(0.3))  # 100^(-2/4) = 0.1
    turned = torch.tensor([fast.real, slow.real, fast.imag, slow.imag])
    assert_close(rotate(a, cos[3], sin[3]), turned)


def test_rms_norm_divides_by_the_root_of_the_mean_square():
    norm = Decoder(replace(TINY.decoder, n_embd=2, norm_eps=0.0)).norm
    assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / math.sqrt(12.5))
    x = torch.tensor([300.0, 400.0], dtype=torch.float16)               # the square of 300 is none in float16
    assert norm.half()(x).isfinite().all()


def test_the_published_models_have_their_published_numbers_of_parameters():
    size = lambda module: sum(p.numel() for p in module.parameters())
    with torch.device("meta"):
        for name, decoder, connector in (
            ("llava-1.5-7b", 6_738_415_616, 20_979_712),
            ("llava-1.5-13b", 13_015_864_320, 31_467_520),
        ):
            cfg = PRESETS[name]
            assert size(Decoder(replace(cfg.decoder, vocab_size=32000))) == decoder
            assert size(Connector(cfg)) == connector
        assert size(VLM(PRESETS["llava-1.5-7b"])) == 6_738_415_616 + 2 * 64 * 4096 + 20_979_712 + 303_507_456


@pytest.mark.parametrize("change", [
    dict(n_kv_head=3),
    dict(head_dim=7),
    dict(head_dim=0),
])
def test_an_impossible_decoder_is_refused(change):
    with pytest.raises(UserError):
        replace(TINY.decoder, **change)


# ---- the whole model --------


@pytest.fixture(scope="module")
def llava(vlm):
    """transformers' LLaVA with the weights of `vlm`."""
    with torch.random.fork_rng():
        theirs = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(**llava_config(TINY, "float32"))
        ).eval()
    theirs.load_state_dict(
        {family(rename(name, TO_LLAVA), "D"): p for name, p in vlm.state_dict().items()}, strict=True
    )
    return theirs


def family(name, to):
    """A public tensor name of family A -> B, C or D, by the table in transformers' history."""
    if to in "BD":
        name = name.replace("vision_tower.vision_model.", "vision_tower.")
    if to in "CD":
        name = name.replace("language_model.lm_head", "lm_head").replace(
            "language_model.model.", "language_model."
        )
        name = name if name.startswith("lm_head") else "model." + name
    return name


@torch.no_grad()
def test_logits_and_loss_equal_transformers_llava(vlm, llava):
    tokens = torch.tensor([prompt(12, 1), prompt(8, 2)])  # 17 tokens each
    labels = tokens.masked_fill(tokens == IMAGE, IGNORE)
    labels[:, :7] = IGNORE
    mean, std = (torch.tensor(x)[:, None, None] for x in (TINY.vision.mean, TINY.vision.std))
    pixels = (pictures(3) / 255 - mean) / std
    mask = torch.ones_like(tokens)
    theirs = llava(input_ids=tokens, pixel_values=pixels, attention_mask=mask, labels=labels)
    assert_close(vlm(tokens, pictures(3)), theirs.logits, rtol=1e-4, atol=1e-4)
    assert_close(vlm(tokens, pictures(3), labels), theirs.loss, rtol=1e-4, atol=1e-4)
    features = 10 * torch.randn(2, 4, 32)  # large enough to tell the exact GELU from the approximate
    assert_close(vlm.connector(features), llava.model.multi_modal_projector(features).flatten(0, 1))


@torch.no_grad()
def test_the_loss_is_the_mean_over_supervised_tokens_and_padding_costs_nothing(vlm):
    rows = [prompt(6, 1), prompt(9, 0), prompt(3, 2)]
    shown = [[0], [], [1, 2]]
    tokens, labels = torch.full((3, 16), PAD), torch.full((3, 16), IGNORE)
    log_p = []
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        log_p.append(vlm(torch.tensor([row]), pictures(3)[shown[i]]).log_softmax(-1)[0])
    costs = []
    for i, t in (0, 8), (0, 10), (1, 1), (2, len(rows[2]) - 1):
        labels[i, t] = rows[i][t]
        costs.append(-log_p[i][t - 1, rows[i][t]])  # token t is predicted at t - 1
    assert_close(vlm(tokens, pictures(3), labels), torch.stack(costs).mean())


def test_a_batch_with_nothing_supervised_is_an_error(vlm):
    tokens = torch.tensor([prompt(5)])
    labels = torch.full_like(tokens, IGNORE)
    labels[0, 0] = 1  # the first token has no one before it to predict it
    with pytest.raises(ValueError, match="no supervised token"):
        vlm(tokens, None, labels)


@pytest.mark.parametrize(
    "n, says",
    [
        (0, "4 image tokens in the batch, 0 visual tokens"),
        (2, "4 image tokens in the batch, 8 visual tokens"),
    ],
)
def test_pictures_that_do_not_match_their_tokens_are_counted_in_the_error(vlm, n, says):
    with pytest.raises(ValueError, match=says):
        vlm(torch.tensor([prompt(5, 1)]), pictures(n))


def test_gradients_reach_every_part_but_the_layers_that_are_never_run():
    vlm = lively(VLM(TINY)).train()
    tokens = torch.tensor([prompt(9, 1)])
    vlm(tokens, pictures(1), tokens).backward()
    still = {name for name, p in vlm.named_parameters() if p.grad is None}
    last_block = {f"vision.blocks.2.{name}" for name, _ in vlm.vision.blocks[2].named_parameters()}
    assert still == {"vision.norm.weight", "vision.norm.bias"} | last_block


@pytest.mark.parametrize("mode", ["pad", "hd"])
def test_a_batch_of_words_alone_still_touches_tower_and_connector_where_several_processes_train(mode):
    vlm = lively(VLM(replace(TINY, image_mode=mode))).train()
    tokens = torch.tensor([prompt(9)])
    batch = tokens, torch.empty(0, 3, 28, 28), tokens, torch.empty(0, 2, dtype=torch.int64)
    alone = vlm(*batch)
    vlm.register_forward_pre_hook(add_blank_tile)
    assert_close(vlm(*batch), alone)
    vlm(*batch).backward()
    assert all(p.grad is not None for p in vlm.connector.parameters())
    assert not vlm.vision.patch.weight.grad.any()


# ---- log-probabilities without logits --------


def in_float64(h, W, targets, weights):
    """Plain autograd as the judge: log-probabilities, and both gradients of their weighted sum."""
    h, W = h.detach().double().requires_grad_(), W.detach().double().requires_grad_()
    log_probs = F.linear(h, W).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return log_probs, *torch.autograd.grad((log_probs * weights).sum(), [h, W])


def far_from(found, exact):
    """The largest error, as a share of the largest number: what float32 can promise of a sum."""
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("slice_size, n_kept", [(2**23, 8), (100 * 50, 8), (100 * 50, 2), (1, 0)])
def test_log_probs_and_both_gradients_are_those_of_autograd(monkeypatch, slice_size, n_kept):
    """In one slice, in seven that are kept, in seven of which two are, and row by row, each computed twice.
    """
    monkeypatch.setattr(TokenLogProbs, "slice_size", {"cpu": slice_size})
    monkeypatch.setattr(TokenLogProbs, "n_kept", n_kept)
    torch.manual_seed(0)
    h, W = torch.randn(601, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (601,))
    weights = torch.randn(601)  # every token has its own, as in DPO
    exact = in_float64(h, W, targets, weights)

    log_probs = token_log_probs(h, W, targets)
    grads = torch.autograd.grad((log_probs * weights).sum(), [h, W])
    for found, right in zip([log_probs, *grads], exact):
        assert far_from(found, right) < 1e-5


def test_a_frozen_head_gets_no_gradient_and_without_grad_nothing_is_kept():
    h, W = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    targets = torch.tensor([1, 2, 3, 4, 8])
    token_log_probs(h, W, targets).sum().backward()
    assert h.grad is not None and W.grad is None
    with torch.no_grad():
        assert not token_log_probs(h, W, targets).requires_grad


def test_huge_logits_give_finite_log_probs_and_nan_stays_nan():
    W, target = torch.eye(3), torch.tensor([0])
    assert token_log_probs(torch.tensor([[0.0, 1e4, 0.0]]), W, target).item() == -1e4
    assert token_log_probs(torch.tensor([[0.0, math.nan, 0.0]]), W, target).isnan()


def test_under_autocast_the_head_runs_in_bfloat16_and_its_gradient_stays_float32():
    torch.manual_seed(0)
    h, W = torch.randn(64, 32, requires_grad=True), torch.randn(500, 32, requires_grad=True)
    targets = torch.randint(0, 500, (64,))
    exact = in_float64(h, W, targets, 1)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = token_log_probs(h, W, targets)
    log_probs.sum().backward()
    assert log_probs.dtype == W.grad.dtype == torch.float32
    assert far_from(log_probs, exact[0]) < 0.01  # bfloat16 keeps eight bits: 0.004 of each number
    assert far_from(W.grad, exact[2]) < 0.02


def test_no_tensor_of_the_size_of_all_logits_is_ever_made(monkeypatch):
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    monkeypatch.setattr(TokenLogProbs, "slice_size", {"cpu": 2**18})
    h, W = torch.randn(2048, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    with Watch():
        token_log_probs(h, W, torch.randint(0, 1000, (2048,))).sum().backward()
    assert max(sizes) <= 2**18 < 2048 * 1000 / 7


# ---- generation --------


@torch.no_grad()
def uncached(vlm, row, pixels, n):
    """Greedy decoding that computes the whole sequence anew for each token."""
    new = []
    while len(new) < n and EOS not in new:
        new.append(int(vlm(torch.tensor([row + new]), pixels)[0, -1, :IMAGE].argmax()))
    return new


def test_cached_decoding_equals_uncached(vlm):
    row = prompt(6, 1)
    new = vlm.generate(torch.tensor([row]), pictures(1), max_new_tokens=12)[0].tolist()
    assert new == uncached(vlm, row, pictures(1), 12)
    assert len(set(new)) > 3  # a model that repeats itself would prove little


@torch.no_grad()
def test_a_cached_step_computes_what_the_whole_sequence_would_in_rows_of_unequal_length(vlm):
    decoder, x, lengths = vlm.decoder, 3 * torch.randn(3, 9, 32), torch.tensor([7, 2, 5])
    cache = decoder.new_cache(3, 12)
    decoder(x[:, :7], cache=cache)  # rows 1 and 2 leave keys of padding behind
    places = torch.arange(12)
    is_seen = (places < lengths[:, None]) | (places >= 7)
    for step in range(2):
        new = torch.stack([x[i, n + step] for i, n in enumerate(lengths)])
        mask = is_seen[:, None, None, : 8 + step]
        h = decoder(new[:, None], (lengths + step)[:, None], mask, cache=cache)[:, 0]
        for i, n in enumerate(lengths):
            assert_close(h[i], decoder(x[i : i + 1, : n + step + 1])[0, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_rest_of_a_prompt_is_read_against_a_cache_that_holds_its_beginning(vlm):
    decoder, x = vlm.decoder, 3 * torch.randn(2, 9, 32)
    cache = decoder.new_cache(2, 12)
    decoder(x[:, :4], cache=cache)
    positions = torch.arange(4, 9)
    mask = torch.arange(9) <= positions[:, None]  # (T, keys)
    rest = decoder(x[:, 4:], positions[None], mask[None, None], cache=cache)
    assert_close(rest, decoder(x)[:, 4:], rtol=1e-4, atol=1e-5)


def lengths_read(vlm, monkeypatch):
    """How many rows and tokens the decoder reads at a time, as it goes on."""
    read = []
    original = vlm.decoder.forward

    def forward(x, *more, **options):
        read.append(x.shape[:2])
        return original(x, *more, **options)

    monkeypatch.setattr(vlm.decoder, "forward", forward)
    return read


def test_neighbours_that_ask_about_one_picture_read_it_once_and_are_answered_as_if_alone(vlm, monkeypatch):
    picture = prompt(6, 1)
    rows = [[*picture, 7, 8], [*picture, 9], [*picture, 7, 9]]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    tiles = 0, 0, 1  # the third's is its own
    layout = torch.tensor([[tile, patch] for tile in tiles for patch in range(4)])
    read = lengths_read(vlm, monkeypatch)
    new = vlm.generate(tokens, pictures(2), 8, layout=layout, lengths=[len(row) for row in rows])
    end = max(i for i, token in enumerate(picture) if token == IMAGE) + 1
    assert read[0] == (2, end) and read[1] == (3, longest - end)
    for row, tile, ids in zip(rows, tiles, new.tolist()):
        alone = uncached(vlm, row, pictures(2)[tile : tile + 1], 8)
        assert ids == alone + [PAD] * (8 - len(alone))


def test_a_second_question_of_a_chat_costs_its_own_tokens_and_the_tower_looks_once(vlm, monkeypatch):
    looks = []
    hook = vlm.vision.register_forward_hook(lambda tower, inputs, out: looks.append(len(inputs[0])))
    history, first = KVHistory(), prompt(6, 1)
    said = vlm.generate(torch.tensor([first]), pictures(1), 5, history=history)[0].tolist()
    second = [*first, *said, 7, 8, 9]
    read = lengths_read(vlm, monkeypatch)
    new = vlm.generate(torch.tensor([second]), pictures(1), 5, history=history)[0].tolist()
    assert read[0] == (1, 4)  # the last word of the answer was never read, and three are new
    hook.remove()
    assert looks == [1]
    assert new == uncached(vlm, second, pictures(1), 5)


def test_a_batch_of_unequal_prompts_and_pictures_gives_what_single_calls_give(vlm):
    rows = [prompt(6, 1), prompt(11, 0), prompt(3, 2), prompt(1, 0)]
    which = [[0], [], [1, 2], []]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    batch = vlm.generate(tokens, pictures(3), max_new_tokens=10, lengths=[len(row) for row in rows])
    for row, own, new in zip(rows, which, batch):
        alone = vlm.generate(torch.tensor([row]), pictures(3)[own], max_new_tokens=10)[0]
        assert new.tolist()[: len(alone)] == alone.tolist()


def test_a_row_stops_at_the_end_token_and_is_padded_while_others_go_on(vlm, monkeypatch):
    said = [[5, EOS, 7, 7], [5, 6, 7, EOS]]
    steps = iter(torch.tensor(said).T)
    monkeypatch.setattr(model, "pick_token", lambda *_: next(steps))
    tokens = torch.tensor([prompt(5), prompt(5)])
    assert vlm.generate(tokens, max_new_tokens=9).tolist() == [[5, EOS, PAD, PAD], [5, 6, 7, EOS]]


def test_an_answer_ends_at_any_of_the_stop_ids_it_is_given(vlm, monkeypatch):
    said = [[5, 9, 7, 7], [5, 6, EOS, 7]]  # 9 as <|im_end|>
    steps = iter(torch.tensor(said).T)
    monkeypatch.setattr(model, "pick_token", lambda *_: next(steps))
    new = vlm.generate(torch.tensor([prompt(5)] * 2), max_new_tokens=9, stop=[EOS, 9])
    assert new.tolist() == [[5, 9, PAD], [5, 6, EOS]]


def test_image_tokens_and_padding_are_never_said(vlm):
    loud = lively(VLM(TINY))
    with torch.no_grad():
        loud.decoder.lm_head.weight[IMAGE:] *= 100
    for n in range(4, 9):
        ids = loud.generate(torch.tensor([prompt(n)]), max_new_tokens=8, temperature=2.0, seed=n)
        assert ids.max() < IMAGE


def draws(n=2000, **limits):
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1])).expand(n, -1)
    sampling = Sampling(**{"temperature": 1.0} | limits)
    drawn = pick_token(logits, sampling, torch.Generator().manual_seed(0))
    return torch.bincount(drawn, minlength=4) / n


def test_answers_are_drawn_as_temperature_top_k_and_top_p_say():
    def is_near(found, *shares):
        assert_close(found, torch.tensor(shares), rtol=0, atol=0.04)

    is_near(draws(), 0.5, 0.25, 0.15, 0.1)
    is_near(draws(top_k=2), 2 / 3, 1 / 3, 0, 0)
    is_near(draws(top_p=0.74), 2 / 3, 1 / 3, 0, 0)  # 0.5 is not yet 0.74, 0.75 is
    is_near(draws(top_p=0.76), 5 / 9, 2.5 / 9, 1.5 / 9, 0)
    is_near(draws(temperature=0.5), 0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345)
    likeliest = torch.tensor([1.0, 0, 0, 0])
    for temperature in 0.0, 1e-40, 1e-320:  # the last is 0 as a float32
        assert_close(draws(temperature=temperature), likeliest)
    for top_p in 0.01, 1e-320:
        assert_close(draws(top_p=top_p), likeliest)


def test_the_seed_settles_the_draws(vlm):
    def say(seed):
        tokens = torch.tensor([prompt(6, 1)])
        return vlm.generate(tokens, pictures(1), max_new_tokens=12, temperature=1.5, seed=seed).tolist()

    assert say(3) == say(3) != say(4)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(max_new_tokens=0),
        dict(max_new_tokens=60),
        dict(temperature=-1.0),
        dict(temperature=math.nan),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(top_k=-1),
    ],
)
def test_impossible_wishes_for_generation_are_refused(vlm, wrong):
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        vlm.generate(torch.tensor([prompt(6)]), **wrong)


# ---- model directories --------


@pytest.fixture
def saved(vlm, tmp_path):
    vlm.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_saved_is_what_is_opened(vlm, saved):
    again = VLM.from_pretrained(saved)
    assert again.cfg == vlm.cfg and same(again, vlm)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert VLM.from_pretrained(saved, dtype=torch.bfloat16).decoder.lm_head.weight.dtype == torch.bfloat16
    again.to(torch.bfloat16).save_pretrained(saved)  # over the file it was read from
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    assert same(VLM.from_pretrained(saved, dtype=torch.bfloat16), again)


def test_the_linear_connector_of_llava_v1_is_saved_and_opened_too(tmp_path):
    linear = lively(VLM(replace(TINY, connector="linear", image_mode="crop", template="plain")))
    linear.save_pretrained(tmp_path)
    assert VLM.from_pretrained(tmp_path).cfg == linear.cfg and same(VLM.from_pretrained(tmp_path), linear)


@pytest.mark.parametrize("to", "ABCD")
def test_all_four_families_of_tensor_names_open(vlm, saved, to):
    tensors = {family(name, to): t for name, t in load_file(saved / "model.safetensors").items()}
    assert to == "A" or tensors.keys() != load_file(saved / "model.safetensors").keys()
    save_file(tensors, saved / "model.safetensors")
    assert same(VLM.from_pretrained(saved), vlm)


def test_shards_and_leftover_buffers_open(vlm, saved):
    names = sorted(tensors := load_file(saved / "model.safetensors"))
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, saved / file)
    (saved / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (saved / "model.safetensors").unlink()
    assert same(VLM.from_pretrained(saved), vlm)
    (saved / files[names[0]]).unlink()
    with pytest.raises(UserError, match=files[names[0]]):
        VLM.from_pretrained(saved)


def test_a_directory_that_transformers_wrote_opens(vlm, llava, tmp_path):
    llava.save_pretrained(tmp_path)
    assert same(VLM.from_pretrained(tmp_path), vlm)
    assert VLM.from_pretrained(tmp_path).cfg.decoder == TINY.decoder


def test_a_clip_and_a_llama_directory_open_as_tower_and_decoder(tmp_path):
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=clip_json(TINY.vision),
            text_config=dict(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=9
            ),
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    vision = ViT(vision_config(read_json(tmp_path / "clip" / "config.json")))
    load_vision(vision, tmp_path / "clip")
    assert vision.cfg == TINY.vision
    assert torch.equal(vision.patch.weight, clip.vision_model.embeddings.patch_embedding.weight)

    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**llama_json(replace(TINY.decoder, vocab_size=80)))
    )
    llama.save_pretrained(tmp_path / "llama")
    cfg = decoder_config(read_json(tmp_path / "llama" / "config.json"))
    decoder = Decoder(replace(cfg, vocab_size=96))  # 16 new rows for <image> and <pad>
    load_decoder(decoder, tmp_path / "llama")
    assert_close(decoder.lm_head.weight[:80], llama.lm_head.weight)
    assert_close(decoder.lm_head.weight[80:], llama.lm_head.weight.mean(0).expand(16, -1))


# ---- what transformers makes of our directories --------

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory):
    file, raw = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", io.BytesIO()
    text = "A chat between USER: and ASSISTANT: What is this? A red cat on a bus, two  spaces. "
    text += " ".join(string.printable[:95])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20),
        model_writer=raw,
        model_type="bpe",
        vocab_size=500,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    file.write_bytes(raw.getvalue())
    return file


def with_tokenizer(tok, **changes):
    decoder = replace(TINY.decoder, vocab_size=tok.vocab_size, block_size=512)
    return replace(
        TINY,
        decoder=decoder,
        image_token=tok.image,
        pad_token=tok.pad,
        bos_token=tok.bos,
        eos_token=tok.eos,
        **changes,
    )


@torch.no_grad()
@pytest.mark.parametrize("mode", ["pad", "crop", "resize"])
def test_transformers_opens_what_we_save_and_says_the_same(tmp_path, tiny_tokenizer, mode):
    tok = Tokenizer(tiny_tokenizer)
    ours = lively(VLM(with_tokenizer(tok, image_mode=mode)))
    save_processor(tmp_path, tok.path, ours.cfg)
    ours.save_pretrained(tmp_path)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    question = "<image>\nWhat is this?  Is it 12,50 €, naïve or a cat?"
    text = f"{SYSTEM} USER: {question} ASSISTANT:"
    for size in (28, 28), (60, 31), (31, 60):
        picture = Image.effect_noise(size, 90).convert("RGB")
        pixels, layout = cut_tiles(picture, ours.cfg.vision, mode)
        tokens = torch.tensor([encode_prompt(tok, [("human", question)], "vicuna_v1", [len(layout)])])
        inputs = processor(images=picture, text=text, return_tensors="pt")
        assert inputs["input_ids"].tolist() == tokens.tolist()
        assert_close(ours(tokens, pixels), theirs(**inputs).logits, rtol=1e-4, atol=1e-4)
        answer = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[:, tokens.shape[1] :]
        assert ours.generate(tokens, pixels, max_new_tokens=8).tolist() == answer.tolist()


@pytest.mark.parametrize("file", ["tiny", "llama"])
def test_transformers_tokenizer_gives_our_ids_for_any_text_and_later_turns(tmp_path, tiny_tokenizer, file):
    if file == "llama" and not LLAMA.exists():
        pytest.skip(f"needs {LLAMA}")
    tok = Tokenizer(tiny_tokenizer if file == "tiny" else LLAMA)
    save_processor(tmp_path, tok.path, with_tokenizer(tok))
    (tmp_path / "config.json").write_text(json.dumps(llava_config(with_tokenizer(tok), "float32")))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "",
        " ",
        "  two  spaces ",
        "a\n\n b\n  c",
        "naïve café 你好 🙂👩‍👩‍👧",
        "x = [0.12, 0.98]\t####",
        "    code(){}  aaaa",
        "12,345.67 € 1999",
    ):
        assert theirs(text)["input_ids"] == [tok.bos] + (tok.encode(text) if text else []), text
        assert theirs.decode(tok.encode(text)) == text
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Where is it?")]
    pictures = "<image>" * 4
    text = f"{SYSTEM} USER: {pictures}\nWhat? ASSISTANT: A cat.</s>USER: Where is it? ASSISTANT:"
    assert theirs(text)["input_ids"] == encode_prompt(tok, turns, "vicuna_v1", [4])
    names = ["<s>", "</s>", "<image>", "<pad>"]
    assert theirs.convert_tokens_to_ids(names) == [tok.bos, tok.eos, tok.image, tok.pad]


# ---- damaged directories --------


def change_config(directory, part=None, **changes):
    config = json.loads((directory / "config.json").read_text())
    (config[part] if part else config).update(changes)
    (directory / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value != "absent"})
    )


def change_tensors(directory, **changes):
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: t for name, t in (tensors | changes).items() if t is not None}
    save_file(tensors, directory / "model.safetensors")


NORM = "language_model.model.norm.weight"
DAMAGES = {
    "a folder that is no model": (
        lambda d: [f.unlink() for f in d.iterdir()],
        "config.json: not found, so .* is not a model directory",
    ),
    "a config that is a list": (
        lambda d: (d / "config.json").write_text("[1]"),
        "config.json: a list, not a JSON object",
    ),
    "a config that is no JSON": (lambda d: (d / "config.json").write_text('{"a":'), "config.json: damaged"),
    "a config that is no text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\x00"),
        r"config.json: damaged or of another kind .UnicodeDecodeError: 'utf-8' codec",
    ),
    "a config in a folder": (
        lambda d: [(d / "config.json").unlink(), (d / "config.json").mkdir()],
        "config.json: cannot be read",
    ),
    "another architecture": (
        lambda d: change_config(d, model_type="qwen2_vl"),
        "model_type is 'qwen2_vl'; only llava",
    ),
    "another language model": (
        lambda d: change_config(d, "text_config", model_type="qwen2"),
        "model_type is 'qwen2'; only llama",
    ),
    "another tower": (
        lambda d: change_config(d, "vision_config", model_type="siglip_vision_model"),
        "only 'clip_vision_model'",
    ),
    "stretched positions": (
        lambda d: change_config(d, "text_config", rope_scaling={"type": "linear", "factor": 4.0}),
        "type is 'linear'",
    ),
    "new stretched positions": (
        lambda d: change_config(d, "text_config", rope_parameters={"rope_type": "llama3"}),
        "rope_type is 'llama3'",
    ),
    "class token wanted": (
        lambda d: change_config(d, vision_feature_select_strategy="full"),
        "'full'; only 'default'",
    ),
    "no vision_config": (
        lambda d: change_config(d, vision_config="absent"),
        "config.json: .*KeyError: 'vision_config'",
    ),
    "a text_config of text": (
        lambda d: change_config(d, text_config="llama"),
        "config.json: damaged or of another kind",
    ),
    "a size in words": (
        lambda d: change_config(d, "text_config", hidden_size="big"),
        "config.json: damaged or of another kind",
    ),
    "a size of zero": (
        lambda d: change_config(d, "vision_config", num_attention_heads=0),
        "num_attention_heads is 0; it must be 1 to 16777216",
    ),
    "a tower of too many layers": (
        lambda d: change_config(d, "vision_config", num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000; it must be 1 to 1000",
    ),
    "a tile that is too large": (
        lambda d: change_config(d, "vision_config", image_size=10**9),
        "image_size is 1000000000",
    ),
    "a patch of nothing": (
        lambda d: change_config(d, "vision_config", patch_size=0),
        "patch_size is 0",
    ),
    "a decoder of too many layers": (
        lambda d: change_config(d, "text_config", num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000",
    ),
    "a decoder of no width": (lambda d: change_config(d, "text_config", hidden_size=0), "hidden_size is 0"),
    "a decoder without heads": (
        lambda d: change_config(d, "text_config", num_attention_heads=0),
        "num_attention_heads is 0",
    ),
    "angles that are no number": (
        lambda d: change_config(d, "text_config", rope_theta=math.nan),
        "rope_theta is nan",
    ),
    "angles that are yes": (
        lambda d: change_config(d, "text_config", rope_theta=True),
        "rope_theta is True, not float",
    ),
    "two colors": (
        lambda d: (d / "preprocessor_config.json").write_text('{"image_mean": [0, 1]}'),
        "image_mean .* of preprocessor_config.json must be three numbers",
    ),
    "an eps below 0": (lambda d: change_config(d, "text_config", rms_norm_eps=-1.0), "norm_eps is -1.0"),
    "a token beyond any table": (
        lambda d: change_config(d, pad_token_id=2**30),
        "pad_token_id is 1073741824",
    ),
    "several layers": (
        lambda d: change_config(d, vision_feature_layer=[-2, -5]),
        "config.json: damaged or of another kind",
    ),
    "a layer that is not there": (
        lambda d: change_config(d, vision_feature_layer=9),
        "feature layer 9 does not exist",
    ),
    "heads that do not divide": (
        lambda d: change_config(d, "vision_config", num_attention_heads=5),
        "5 heads",
    ),
    "an unknown activation": (
        lambda d: change_config(d, "vision_config", hidden_act="relu"),
        "'relu' is unknown",
    ),
    "an image token among words": (
        lambda d: change_config(d, image_token_index=-200),
        "image token -200 lies among the words",
    ),
    "an image token before </s>": (
        lambda d: change_config(d, image_token_index=1),
        "image token 1 lies among the words",
    ),
    "an unknown image mode": (
        lambda d: change_config(d, image_aspect_ratio="anyres_max_9"),
        "'anyres_max_9' is unknown",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds none of model.safetensors"),
    "cut weights": (lambda d: os.truncate(d / "model.safetensors", 5000), "model.safetensors: damaged"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors: damaged"),
    "an index without a map": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        "model.safetensors.index.json: damaged",
    ),
    "a missing tensor": (
        lambda d: change_tensors(d, **{NORM: None}),
        "1 missing, 0 unused, such as decoder.norm.weight",
    ),
    "an unused tensor": (
        lambda d: change_tensors(d, image_newline=torch.zeros(3)),
        "0 missing, 1 unused, such as connector.row_end",
    ),
    "a wrong shape": (
        lambda d: change_tensors(d, **{NORM: torch.zeros(31)}),
        r"decoder.norm.weight has shape \(31,\), the config asks for \(32,\)",
    ),
    "quantised weights": (
        lambda d: change_tensors(d, **{NORM: torch.zeros(32, dtype=torch.int8)}),
        "decoder.norm.weight is torch.int8",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_one_clear_error(saved, damage):
    spoil, says = DAMAGES[damage]
    spoil(saved)
    with pytest.raises(UserError, match=f"{saved}.*{says}"):
        VLM.from_pretrained(saved)


def test_absent_fields_of_the_public_config_mean_vicuna_7b_and_clip(saved):
    """llava-hf/llava-1.5-7b-hf lists only what deviates from the defaults."""
    config = {
        "model_type": "llava",
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
    }
    (saved / "config.json").write_text(json.dumps(config))
    assert read_config(saved, {}, []) == PRESETS["llava-1.5-7b"]


# ---- writing --------


def full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(vlm, saved, monkeypatch, fails):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    monkeypatch.setattr(os, fails, full_disk)
    with pytest.raises(UserError, match="model.safetensors: could not be written .*No space left"):
        vlm.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_file_limit_of_the_system_leaves_the_old_file_and_nothing_else(saved, capfd):
    """The real thing, in a process of its own that may write 20 kB a file."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def save_in_little_space():
        # Python ignores the signal that comes with it.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        VLM.from_pretrained(saved).save_pretrained(saved)

    assert in_child(lambda: run_program(save_in_little_space)) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "model.safetensors: could not be written" in said
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_place_where_no_folder_can_be_is_named(vlm, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        vlm.save_pretrained(tmp_path / "file")
    with pytest.raises(UserError, match="file"):
        write_whole(tmp_path / "file" / "deeper" / "a", lambda tmp: tmp.write_text("x"))


def test_fresh_weights_keep_the_scale_of_what_passes_through_them():
    torch.manual_seed(0)
    linear = init_weights(torch.nn.Sequential(torch.nn.Linear(256, 512)))[0]
    passed = F.linear(torch.randn(64, 256), linear.weight)
    assert passed.std().item() == pytest.approx(1, abs=0.05)
    assert not linear.bias.any()

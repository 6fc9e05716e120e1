"""What is fast must be the same: tools/bench.py, and what the model leaves out because nobody reads it."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from model import VLM
from support.cli import UserError, parse
from support.plan import count_flops
from support.start import init_weights
from tools import bench
from train import TrainConfig


@pytest.fixture(scope="module")
def work():
    return small_work("10m", n_layer=2)._replace(rows=2)


def small_work(preset, n_layer):
    """The work of a preset with fewer blocks in the decoder."""
    work = bench.plan_work(bench.BenchConfig("train", preset))
    decoder = replace(work.cfg.decoder, n_layer=n_layer)
    return work._replace(cfg=replace(work.cfg, decoder=decoder))


@pytest.fixture(scope="module")
def vlm(work):
    torch.manual_seed(0)
    return init_weights(VLM(work.cfg))


def test_the_last_block_gives_the_rows_asked_for_as_if_all_were_computed(vlm):
    x = torch.randn(3, 9, 256, requires_grad=True)
    rows = torch.tensor([0, 4, 13, 26, 26])              # of 27; one of them twice
    of_all = vlm.decoder(x).flatten(0, 1)[rows]
    of_some = vlm.decoder(x, wanted=rows)
    assert_close(of_some, of_all, rtol=1e-5, atol=1e-5)
    expected, = torch.autograd.grad(of_all.sin().sum(), x)
    grad, = torch.autograd.grad(of_some.sin().sum(), x)
    assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_the_flops_of_a_planned_step_are_about_those_that_a_counter_sees(vlm, work):
    """--dry-run's, where all tokens are supervised. Neither counts attention; the plan omits the patches."""
    tokens, _, pixels = bench.random_batch(bench.BenchConfig("train"), work)
    vlm.vision.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        vlm(tokens, pixels, tokens).backward()

    decoder, vision = work.cfg.decoder, work.cfg.vision
    B, T = tokens.shape
    head_gradient = 2 * decoder.vocab_size * decoder.n_embd * B * T     # summed in place: it is not seen
    patches = 2 * 3 * vision.patch_size**2 * vision.n_embd * B * vision.n_token
    planned = count_flops(TrainConfig(), vlm, T, 1) * B
    assert planned == pytest.approx(counter.get_total_flops() + head_gradient - patches, rel=0.03)


@pytest.fixture
def compare(monkeypatch):
    """compare("mpo", ...) -> how well both sides of a tiny model agree."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "N_STEP", 1)
    monkeypatch.setattr(bench, "N_NEW", 4)
    monkeypatch.setitem(bench.SIZES, "10m", small_work("10m", n_layer=1)._replace(words=12))

    def compare(program, *flags):
        cfg = parse(bench.BenchConfig, [program, "--peer", "transformers", "--rows", "1", *flags])
        seconds, outputs = bench.run_in_turn(cfg, bench.plan_work(cfg))
        assert list(seconds) == ["plainvlm", "transformers"]
        assert all(len(times) == 1 for times in seconds.values())
        return bench.check_agreement(cfg, *outputs.values())

    return compare


@pytest.mark.parametrize("flags", ["train", "mpo", "mpo --no-precomputed", "train --dtype bfloat16"])
def test_a_step_of_both_sides_has_the_same_loss(compare, flags):
    assert "the losses agree" in compare(*flags.split())


def test_other_losses_are_not_compared():
    with pytest.raises(UserError, match="two different things"):
        bench.check_agreement(bench.BenchConfig("train"), [1.0, 2.0], [1.0, 2.1])


def test_both_sides_give_the_same_answer(compare):
    assert compare("sample") == "100% of the tokens are the same"


def test_memory_is_that_of_a_process_of_its_own():
    peak, before = bench.measure_memory(bench.BenchConfig("train", rows=1), "plainvlm")
    assert 0 < before < peak

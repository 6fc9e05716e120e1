"""What is fast must be the same: tools/bench.py, and what the model leaves out because nobody reads it."""

import json

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from model import IGNORE, VLM, init_weights
from support.cli import parse, run
from tools import bench


@pytest.fixture(scope="module")
def work():
    return bench.plan_work(parse(bench.BenchConfig, ["train", "--layers", "2", "--rows", "2"]))


@pytest.fixture(scope="module")
def vlm(work):
    torch.manual_seed(0)
    return init_weights(VLM(work.cfg))


def test_the_last_block_gives_the_rows_asked_for_as_if_all_were_computed(vlm):
    x = torch.randn(3, 9, 256, requires_grad=True)
    rows = torch.tensor([0, 4, 13, 26, 26])              # of 27; one of them twice
    of_all = vlm.decoder(x).flatten(0, 1)[rows]
    of_some = vlm.decoder(x, rows=rows)
    assert_close(of_some, of_all, rtol=1e-5, atol=1e-5)
    expected, = torch.autograd.grad(of_all.sin().sum(), x)
    grad, = torch.autograd.grad(of_some.sin().sum(), x)
    assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_the_flops_of_a_step_are_those_that_a_counter_sees(vlm, work):
    """But attention on a CPU and sums in place, which it does not see; and the formula omits the patches."""
    tokens, labels, pixels = bench.random_batch(work, torch.device("cpu"))
    vlm.vision.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        vlm(tokens, pixels, labels).backward()

    decoder, vision = work.cfg.decoder, work.cfg.vision
    B, T = tokens.shape
    N = vision.n_token + 1                               # with the class token
    attention = 6 * decoder.n_layer * decoder.n_embd * T * B * T
    attention += 4 * vision.depth * vision.n_embd * N * B * N
    head_gradient = 2 * decoder.vocab_size * decoder.n_embd * B * work.n_answer
    patches = 2 * 3 * vision.patch_size**2 * vision.n_embd * B * vision.n_token
    seen = bench.count_flops(work) - attention - head_gradient
    assert seen == pytest.approx(counter.get_total_flops() - patches, rel=0.02)


def test_compiled_blocks_are_traced_twice_whatever_the_lengths_and_the_supervised_tokens(vlm):
    """Once as an inner block, once as the last. (A batch of one row is a case of its own for PyTorch.)

    aot_eager: the graphs and guards of --compile without the minute that C++ takes.
    """
    try:
        for block in vlm.decoder.layers:
            block.compile(dynamic=True, backend="aot_eager")
        torch._dynamo.reset()
        before = counters["stats"]["unique_graphs"]
        for B, T, n_supervised in (2, 16, 8), (3, 20, 17), (5, 37, 3), (4, 9, 30):
            tokens = torch.randint(3, 2000, (B, T))
            labels = tokens.clone()
            labels.flatten()[:-n_supervised] = IGNORE
            vlm(tokens, None, labels).backward()
        assert counters["stats"]["unique_graphs"] - before == 2
        assert not counters["graph_break"]
    finally:
        for block in vlm.decoder.layers:
            block._compiled_call_impl = None


def run_bench(tmp_path, flags):
    pytest.importorskip("transformers")
    flags += " --peer transformers --rows 1 --layers 1 --repeats 1 --no-memory"
    assert run(lambda: bench.main([*flags.split(), "--out", str(tmp_path / "b")])) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    assert set(result["sides"]) == {"plainvlm", "transformers"}
    assert result["ratio"] > 0
    assert result["command"].startswith("python -m tools.bench " + flags)
    return result


def test_a_step_of_both_sides_has_the_same_loss(tmp_path):
    assert run_bench(tmp_path, "train --words 12")["agreement"] < 1e-3


def test_both_sides_give_the_same_answer(tmp_path):
    assert run_bench(tmp_path, "sample --words 12 --new-tokens 4")["agreement"] == 1


@pytest.mark.parametrize("reference, times", [("--precomputed", 1), ("--no-precomputed", 2)])
def test_a_pair_in_one_row_costs_what_it_costs_in_two(tmp_path, reference, times):
    result = run_bench(tmp_path, f"mpo --words 4 --supervised 5 {reference}")
    assert result["agreement"] < 1e-3
    sides = result["sides"]
    assert sides["plainvlm"]["tokens"] == times * (256 + 4 + 2 * 5)
    assert sides["transformers"]["tokens"] == 2 * 2 * (256 + 4 + 5)


def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    cfg = parse(bench.BenchConfig, ["train", "--layers", "1", "--rows", "1"])
    found = bench.measure_memory(cfg, "plainvlm")
    assert 0 < found["step_bytes"] < found["peak_bytes"]

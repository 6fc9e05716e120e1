"""What is fast must be the same: the tests of bench.py's programs, and of what the model leaves out because nobody reads it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import tools.bench as bench
from support.cli import run
from model import VLM, init_weights
import tools.bench as tools_bench


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(0)
    return init_weights(VLM(tools_bench.setting(tools_bench.read(["train", "--layers", "2"]))[0]))


def test_the_last_block_gives_the_rows_asked_for_as_if_all_were_computed(vlm):
    x, rows = torch.randn(3, 9, 256), torch.tensor([0, 4, 13, 26, 26])      # of 27; one of them twice
    found = []
    for few in (None, rows):
        y, x.grad = x.requires_grad_(), None
        h = vlm.decoder(y) if few is None else vlm.decoder(y, rows=few)
        h = h.flatten(0, 1)[rows] if few is None else h
        h.sin().sum().backward()
        found.append((h.detach(), x.grad))
    assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_the_flops_of_a_step_are_those_that_a_counter_sees(vlm):
    """All but attention, which the counter does not know on a CPU, and the patch embedding, which the formula leaves out."""
    args = tools_bench.read(["train", "--layers", "2", "--rows", "2"])
    cfg, (rows, words, supervised) = tools_bench.setting(args)
    tokens, labels, pixels = tools_bench.batch_of(cfg, args, rows, words, supervised, torch.device("cpu"))
    vlm.vision.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        vlm(tokens, pixels, labels).backward()
    d, v, T = cfg.decoder, cfg.vision, tokens.shape[1]
    attention = 6 * d.n_layer * d.n_embd * T * rows * T + 4 * 65 * v.n_embd * v.depth * rows * 65
    patches = 2 * 3 * v.patch_size**2 * v.n_embd * rows * v.n_token
    assert tools_bench.flops_of(cfg, rows, T, supervised, 1) - attention == pytest.approx(counter.get_total_flops() - patches, rel=0.02)


def test_compiled_blocks_are_traced_twice_whatever_the_lengths_and_the_number_of_supervised_tokens(vlm):
    """Once as an inner block, once as the last; a batch of one row, not here, is a case of its own for PyTorch. aot_eager: the graphs and guards
    of --compile without the minute that C++ takes."""
    try:
        for block in vlm.decoder.layers:
            block.compile(dynamic=True, backend="aot_eager")
        torch._dynamo.reset()
        before = counters["stats"]["unique_graphs"]
        for B, T, supervised in (2, 16, 8), (3, 20, 17), (5, 37, 3), (4, 9, 30):
            tokens = torch.randint(3, 2000, (B, T))
            labels = torch.where(torch.arange(B * T).view(B, T) >= B * T - supervised, tokens, -100)
            vlm(tokens, None, labels).backward()
        assert counters["stats"]["unique_graphs"] - before == 2 and not counters["graph_break"]
    finally:
        for block in vlm.decoder.layers:
            block._compiled_call_impl = None


def result(tmp_path, *flags):
    assert run(lambda: tools_bench.main([*flags, "--out", str(tmp_path / "b")])) == 0
    return json.loads((tmp_path / "b.json").read_text())


@pytest.mark.parametrize("reference", ["--precomputed", "--no-precomputed"])
def test_a_pair_in_one_row_costs_what_it_costs_in_two(tmp_path, reference):
    pytest.importorskip("transformers")
    r = result(tmp_path, "mpo", "--peer", "transformers", reference, "--rows", "1", "--words", "4", "--supervised", "5", "--layers", "1", "--repeats", "1", "--no-memory")
    assert r["agreement"] < 1e-3 and r["ratio"] > 0
    here, there = (r["sides"][name]["tokens"] for name in ("plainvlm", "transformers"))
    assert here == (256 + 4 + 2 * 5) * (1 if reference == "--precomputed" else 2) and there == 2 * 2 * (256 + 4 + 5)


def test_the_data_path_is_timed_beside_a_step_and_a_row_says_its_command(tmp_path, capsys):
    r = result(tmp_path, "data", "--records", "2000", "--rows", "1", "--layers", "1", "--repeats", "1")
    assert r["records"] == 2000 and r["times"] == pytest.approx(r["rate"] / r["step_rate"])
    said = capsys.readouterr().out
    assert said.startswith("$ python -m tools.bench data --records 2000") and "On a GPU: not measured" in said

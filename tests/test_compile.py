"""What --compile promises: the same run, one graph for all lengths. Traced here, run without a compiler."""

import pytest
import torch
from common import losses
from torch._dynamo.utils import counters


@pytest.mark.parametrize(
    "flags", [[], ["--recompute", 2, "--lora-r", 2]], ids=["plain", "recomputed with a LoRA"]
)
def test_a_compiled_run_is_the_same_and_new_lengths_and_answers_make_no_new_graph(
    go, world, monkeypatch, flags
):
    compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: compile(module, backend="eager", **options)
    )
    torch.compiler.reset()
    counters.clear()
    lengths, forward = set(), torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, x: lengths.add(tuple(x.shape)) or forward(self, x)
    )
    flags = [
        "--token-budget",
        300,
        "--batch-size",
        8,
        "--val",
        world / "val.jsonl",
        "--eval-every",
        4,
        "--final-eval",
        "--eval-limit",
        4,
        *flags,
    ]
    assert go(*flags, out="written") == 0
    seen = len(lengths)
    assert go("--compile", *flags, out="compiled") == 0 and len(lengths) == seen > 5
    torch.testing.assert_close(losses("compiled"), losses("written"), rtol=1e-5, atol=1e-5)
    assert (
        not counters["graph_break"] and counters["stats"]["unique_graphs"] == 3
    )  # a block of the tower, one of the decoder, its last one

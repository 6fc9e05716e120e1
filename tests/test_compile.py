"""What --compile promises: the same run, one graph for all lengths. Traced here, run without a compiler."""

import shutil

import pytest
import torch
from common import losses
from torch._dynamo.utils import counters

from support.distributed import compiles
from train import TrainConfig


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
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)  # the backend here needs none
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


@pytest.mark.parametrize("asked, device, expected", [
    (None, "cpu", False), (None, "cuda", True), (True, "cpu", True), (False, "cuda", False)])
def test_auto_compiles_on_a_gpu_alone(monkeypatch, asked, device, expected):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    assert compiles(TrainConfig(compile=asked), torch.device(device)) is expected


def test_without_a_compiler_a_line_says_so_and_training_goes_on(go, monkeypatch, capfd):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert go("--compile", out="plain") == 0
    assert "no C++ compiler is found" in capfd.readouterr().out

"""Functions that several files of tests share; what pytest hands to a test is in conftest.py."""

import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

from safetensors.torch import load_file

from model import DecoderConfig, VLMConfig
from support.cli import run_program
from support.processor import save_processor
from vision import VisionConfig

ROOT = Path(__file__).parents[1]
fork = multiprocessing.get_context("fork").Process
# A run of seconds, without a look at held-out questions.
QUICK = (
    "--batch-size 4 --max-steps 4 --save-every 2 --lr 3e-3 --eval-every 0 --no-final-eval "
    "--workers 0 --device cpu"
).split()
TOWER = VisionConfig(image_size=32, patch_size=8, n_embd=32, n_layer=2, n_head=2, n_hidden=64)


def tiny_config(tok, block_size=512, vision=TOWER, **changes):
    decoder = DecoderConfig(
        tok.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, head_dim=16, n_hidden=64,
        block_size=block_size)
    return VLMConfig(vision, decoder, image_token=tok.image, pad_token=tok.pad, **changes)


def save(vlm, tok, directory):
    save_processor(directory, tok.path, vlm.cfg)
    vlm.save_pretrained(directory)
    return directory


def trained_tensors(vlm):
    """{name: tensor} of what trains"""
    return {name: p.detach() for name, p in vlm.named_parameters() if p.requires_grad}


def call(program, *flags):
    """-> exit code of a program's main with these flags, of any type."""
    return run_program(lambda: program([str(flag) for flag in flags]))


def in_child(function):
    """Run it in a forked process and wait; -> its exit code, minus the signal that killed it."""
    child = fork(target=lambda: os._exit(function() or 0))
    child.start()
    child.join()
    return child.exitcode


def run_python(words, folder):
    """`python WORDS` in a copy of the repository -> exit code. For a fork: the process is spoiled by it.

    The libraries are those that are imported here; the copy's own files are imported anew.
    """
    own = {path.stem for path in ROOT.iterdir()}
    for name in list(sys.modules):
        if name.partition(".")[0] in own:
            del sys.modules[name]
    sys.path = [str(folder), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    sys.stdin = open(os.devnull)
    os.chdir(folder)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def losses(out):
    """Of every step of a run, in order."""
    return [line["loss"] for line in map(json.loads, open(Path(out) / "log.jsonl")) if "loss" in line]


def weights(out):
    return load_file(Path(out) / "model.safetensors")


def errors(capfd):
    """The lines on stderr that tell of something wrong."""
    return [line for line in capfd.readouterr().err.strip().splitlines() if not line.startswith("loaded")]

"""Functions that several files of tests share; what pytest hands to a test is in conftest.py."""

import json
import multiprocessing
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


def call(program, *flags):
    """-> exit code of a program's main with these flags, of any type."""
    return run_program(lambda: program([str(flag) for flag in flags]))


def losses(out):
    """Of every step of a run, in order."""
    return [line["loss"] for line in map(json.loads, open(Path(out) / "log.jsonl")) if "loss" in line]


def weights(out):
    return load_file(Path(out) / "model.safetensors")


def errors(capfd):
    """The lines on stderr that tell of something wrong."""
    return [line for line in capfd.readouterr().err.strip().splitlines() if not line.startswith("loaded")]

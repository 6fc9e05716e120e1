"""The toy's own towers, decoders and connector, from nothing: what LLaVA's second stage starts from.

    python -m lab.ingredients --out made                    # all of them; some hours
    python -m lab.ingredients --out made --only connector   # one of them, over what is there

Without --out they are written over those in assets/.

lab/clip.py, lab/vicuna.py, lab/base.py, lab/dino.py and lab/connector.py say what each is taught. No (kind,
color) pair of toyworld.UNSEEN is ever drawn. The decoders have read of them; toy-clip, toy-connector and the
finetune have never met them.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from conversation import Tokenizer
from lab.base import make_base
from lab.clip import make_clip
from lab.connector import make_connector
from lab.dino import make_dino
from lab.vicuna import make_vicuna, sayings
from support.cli import arg, parse, run_program
from tools.tokenizer import train_tokenizer


@dataclass
class IngredientsConfig:
    out: str = arg("assets", "folder to write to")
    clip_steps: int = arg(4000, "steps of 48 pictures", at_least=1)
    vicuna_steps: int = arg(5500, "steps of 32 texts", at_least=1)
    base_steps: int = arg(2200, "steps of 32 texts", at_least=1)
    dino_steps: int = arg(1100, "steps of 16 pictures, through two windows each", at_least=1)
    connector_steps: int = arg(8000, "steps of 32 pictures", at_least=1)
    only: str = arg(
        "", "make one of them; empty: all", choices=("clip", "vicuna", "base", "dino", "connector"))
    parts: float = arg(0.0, "share of the pictures that show a part of a scene, as tiles do", at_most=1)
    seed: int = arg(0, "of the weights and the scenes")


def main(argv=None):
    cfg = parse(IngredientsConfig, argv, description=__doc__)
    out = Path(cfg.out)
    vocabulary = out / "toy-vicuna/tokenizer.model"
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    if not cfg.only or not vocabulary.exists():
        train_tokenizer(vocabulary, sayings(), 896, required=",]")

    tok = Tokenizer(vocabulary)
    for name, make, n_step in (
        ("clip", partial(make_clip, parts=cfg.parts), cfg.clip_steps),
        ("vicuna", make_vicuna, cfg.vicuna_steps),
        ("base", make_base, cfg.base_steps),
        ("dino", make_dino, cfg.dino_steps),
        ("connector", partial(make_connector, parts=cfg.parts), cfg.connector_steps),
    ):
        if cfg.only in ("", name):
            torch.manual_seed(cfg.seed)
            make(out, tok, n_step, cfg.seed)


if __name__ == "__main__":
    sys.exit(run_program(main))

"""The toy's own towers, decoders and connector, from nothing: what LLaVA's second stage starts from.

    python -m lab.ingredients --out made                    # all of them; some hours
    python -m lab.ingredients --out made --only connector   # one of them, over what is there

Without --out they are written over those in assets/.

lab/clip.py, lab/vicuna.py, lab/base.py, lab/dino.py and lab/connector.py say what each is taught. No (kind,
color) pair of toyworld.UNSEEN is ever drawn. The decoders have read of them; toy-clip, toy-connector and the
finetune have never met them.
"""

import sys
from dataclasses import dataclass, replace
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

PARTS = {                            # what makes each, and in how many steps
    "clip": (make_clip, 4000),       # of 48 pictures
    "vicuna": (make_vicuna, 5500),   # of 32 texts
    "base": (make_base, 2200),       # of 32 texts
    "dino": (make_dino, 1100),       # of 16 pictures, through two windows each
    "connector": (make_connector, 8000),                         # of 32 pictures
}


@dataclass
class IngredientsConfig:
    out: str = arg("assets", "folder to write to")
    only: str = arg("", "make one of them; empty: all", choices=tuple(PARTS))
    steps: int = arg(0, "of training for each part; 0: its own number, some thousands")
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
    for name in [cfg.only] if cfg.only else PARTS:
        make, n_step = PARTS[name]
        torch.manual_seed(cfg.seed)
        make(out / f"toy-{name}", tok, replace(cfg, steps=cfg.steps or n_step))


if __name__ == "__main__":
    sys.exit(run_program(main))

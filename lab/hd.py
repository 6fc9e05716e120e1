"""Pictures of one tile and of several: LLaVA-1.5-HD's finding in miniature (arXiv:2310.03744v2, A.1).

    python -m lab.hd                 # three ways, three seeds, one table: out/hd
    python -m lab.hd --speed         # training tokens/s with tiles and without

The toy world with words that one tile of 96 px cannot show is learned with `pad`, with LLaVA-1.5-HD's
tiles, and with these but without the global view, at the same budget of training tokens. Signs of a 192
px picture are as large as those of the usual 96 px world where two by two tiles show it, half as large in
one tile. The table has held-out accuracy, mean and standard deviation over seeds. Runs that are finished
are not repeated.
"""

import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import toyworld
import train
from conversation import Tokenizer
from data import Examples, Records
from lab.common import patch_owners
from model import IGNORE, PRESETS, VLM
from support.cli import arg, parse, run
from support.io import read_json, write_json
from support.start import set_image_mode
from vision import TILINGS, cut_tiles, join_pictures

SIZE = 192                           # side of the pictures, in pixels: 2 x 2 tiles
BATCH_SIZE = 8
WAYS = {                             # name -> image mode, and what is changed in its tiling
    "pad": ("pad", {}),
    "hd": ("hd", {}),
    "hd, no global view": ("hd", {"global_view": "none"}),
}


@dataclass
class HDConfig:
    out: str = arg("out/hd", "folder to write to")
    tokens: int = arg(3_000_000, "training tokens of each run", at_least=1)
    seeds: int = arg(3, "runs of each way", at_least=1)
    pictures: int = arg(6000, "training pictures", at_least=BATCH_SIZE)
    eval_limit: int = arg(0, "answer only this many of the held-out questions; 0: all", at_least=0)
    speed: bool = arg(False, "instead: the time of a step with tiles and without")


def main(argv=None):
    cfg = parse(HDConfig, argv, description=__doc__)
    if cfg.speed:
        return measure_speed()
    out = Path(cfg.out)
    world = out / f"world-{cfg.pictures}"
    toyworld.write_world(world, cfg.pictures, 240, SIZE, 0, words=0.5)
    print(f"kinds that a patch tells before training: {kinds_told(world, SIZE // 2):.1%} in one tile, "
          f"{kinds_told(world, SIZE):.1%} in 2 x 2, where things are twice as large")

    tables = {}
    for way, (mode, changes) in WAYS.items():
        length = mean_length(world, mode, changes)
        steps = max(1, round(cfg.tokens / length / BATCH_SIZE))
        print(f"{way}: {length:.0f} tokens a record, {steps} steps", flush=True)
        tables[way] = []
        for seed in range(cfg.seeds):
            name = way.replace(", ", "-").replace(" ", "-")
            run_dir = out / f"{name}-{steps}x{BATCH_SIZE}-{seed}"
            if not (run_dir / "results.json").exists():
                train_one_way(cfg, run_dir, WAYS[way], steps, seed)
            tables[way].append(read_json(run_dir / "results.json")["table"])

    print(f"\nheld-out accuracy, mean +- standard deviation of {cfg.seeds} seeds, "
          f"{cfg.tokens:,} training tokens each")
    print_table(tables)
    write_json(out / "hd.json", {"tokens": cfg.tokens, "pictures": cfg.pictures, "tables": tables}, indent=1)
    return 0


def mean_length(world, mode, changes):
    """Tokens a record, of about 200 of them."""
    tower = PRESETS["toy"].vision
    if changes:
        tower = replace(tower, tiling=replace(TILINGS[mode], **changes))
    records = Records(world / "train.json", world)
    tok = Tokenizer(train.TOY["llm"])
    examples = Examples(records, tok, "vicuna_v1", tower, mode, PRESETS["toy"].decoder.block_size)
    some = range(0, len(examples), max(1, len(examples) // 200))
    return statistics.mean(len(examples[i]["tokens"]) for i in some)


def train_one_way(cfg, run_dir, way, steps, seed):
    mode, changes = way
    flags = {
        "stage": "finetune",
        "data": run_dir.parent / f"world-{cfg.pictures}/train.json",
        "image-mode": mode,
        "batch-size": BATCH_SIZE,
        "max-steps": steps,
        "lr": 1e-3,
        "seed": seed,
        "out": run_dir,
        "eval-every": 0,
        "save-every": 0,
        "eval-limit": cfg.eval_limit,
    }
    flags |= {name.replace("_", "-"): value for name, value in changes.items()}
    if code := train.main([word for name, value in flags.items() for word in (f"--{name}", str(value))]):
        sys.exit(code)


def print_table(tables):
    print(f"{'':14}" + "".join(f"{way:>23}" for way in tables))
    for category in tables["pad"][0]:
        cells = []
        for runs in tables.values():
            shares = [table[category]["accuracy"] for table in runs]
            spread = statistics.stdev(shares) if len(shares) > 1 else 0
            cells.append(f"{statistics.mean(shares):15.1%} +- {spread:4.1%}")
        print(f"{category:14}" + "".join(cells))


@torch.no_grad()
def kinds_told(world, size, n=128, S=96):
    """How often a patch of a held-out thing tells its kind, in pictures of `size` px, cut into tiles.

    That is: how often is the visual token, as tower and
    connector are before training, nearer to the word for the kind than to every other kind's?"""
    vlm, tok = train.build(train.parse_flags(["--data", str(world / "train.json")]))
    words = vlm.decoder.embed_tokens.weight[[tok.encode(kind)[0] for kind in toyworld.KINDS]]
    words = words - words.mean(0)
    rng = random.Random(1)
    k = size // S                    # tiles a side
    right = []
    for _ in range(n):
        scene = toyworld.random_scene(rng, held_out=True)
        picture = toyworld.draw_scene(scene, size)
        tiles = []
        for top in range(0, size, S):
            for left in range(0, size, S):
                tile = picture.crop((left, top, left + S, top + S))
                tiles.append(cut_tiles(tile, vlm.cfg.vision, "pad")[0])

        # The patches of all tiles, row by row.
        visual = vlm.connector(vlm.vision(torch.cat(tiles)).flatten(0, 1)) @ words.T
        visual = visual.view(k, k, 8, 8, -1).transpose(1, 2).reshape(64 * k * k, -1)
        guesses = visual.argmax(-1)
        owners = patch_owners(scene, 8 * k)
        for part, thing in enumerate(scene.things):
            right += (guesses[owners == part] == toyworld.KINDS.index(thing.kind)).tolist()
    return statistics.mean(right)


# ---- speed ----


def measure_speed(B=8, rounds=15):
    """A training step of the toy: HD against as many pictures of one tile, at the same length.

    In processor time, which is the same on a busy machine.
    """
    vlm = VLM(PRESETS["toy"])
    vlm.vision.requires_grad_(False)
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    visual = {}                      # mode -> pixels, layout
    for mode, n in ("pad", 5), ("hd", 1):
        visual[mode] = join_pictures([cut_tiles(picture, vlm.cfg.vision, mode)] * (n * B))
    T = 64 + max(len(layout) for _, layout in visual.values()) // B

    # In turns, so that what else runs here slows them alike.
    seconds = {"pad": [], "hd": [], "tower": []}
    for _ in range(rounds):
        for mode, (pixels, layout) in visual.items():
            set_image_mode(vlm, mode)
            tokens = torch.full((B, T), 5)
            tokens[:, 1 : 1 + len(layout) // B] = vlm.cfg.image_token
            labels = torch.where(tokens == 5, tokens, IGNORE)
            labels[:, : T - 40] = IGNORE                 # as many supervised tokens in both
            began = time.process_time()
            vlm(tokens, pixels, labels, layout).backward()
            seconds[mode].append(time.process_time() - began)
            vlm.zero_grad(set_to_none=True)
        with torch.no_grad():
            began = time.process_time()
            vlm.vision(pixels)
            seconds["tower"].append(time.process_time() - began)

    tower = statistics.median(seconds["tower"])
    print(f"{B} records of {T} tokens, {len(pixels)} tiles a step, {rounds} rounds, "
          f"medians of processor seconds; the tower alone takes {tower:.3f}")
    for mode in visual:
        step = statistics.median(seconds[mode])
        print(f"{mode:4} {step:.3f} a step: {B * T / step:,.0f} tokens/s with the tower, "
              f"{B * T / (step - tower):,.0f} in connector and decoder")
    whole = statistics.median(hd / pad for pad, hd in zip(seconds["pad"], seconds["hd"]))
    rest = statistics.median((hd - tower) / (pad - tower) for pad, hd in zip(seconds["pad"], seconds["hd"]))
    print(f"hd/pad, median of the rounds: {whole:.3f} of the time of a step, {rest:.3f} without the tower")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

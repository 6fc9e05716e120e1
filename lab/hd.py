"""Pictures of one tile and of several: LLaVA-1.5-HD's finding in miniature (arXiv:2310.03744v2, A.1).

    python -m lab.run hd             # three ways to see, three seeds, one table
    python -m lab.hd                 # training tokens/s with tiles and without

The toy world with words that one tile of 96 px cannot show is learned with `pad`, with LLaVA-1.5-HD's
tiles, and with these but without the global view, at the same budget of training tokens. Signs of a 192
px picture are as large as those of the usual 96 px world where two by two tiles show it, half as large in
one tile.
"""

import random
import statistics
import sys
import time
from itertools import product

import numpy as np
import torch
from PIL import Image

import toyworld
import train
from data import Records
from lab.common import patch_owners
from model import IGNORE, PRESETS, VLM
from support.cli import run_program
from support.io import read_json
from support.plan import look_at_records
from support.start import build, set_image_mode
from vision import cut_tiles, join_tiles

SIZE = 192                           # side of the pictures, in pixels: 2 x 2 tiles
BATCH_SIZE = 8
WAYS = {
    "pad": ["--image-mode", "pad"],
    "hd": ["--image-mode", "hd"],
    "hd, no global view": ["--image-mode", "hd", "--global-view", "none"],
}
CLAIMS = {
    "tiles read small words that one tile cannot show": (("hd", "reading"), ("pad", "reading")),
    "and answer more questions over all": (("hd", "all"), ("pad", "all")),
    "the global view is needed": (("hd", "all"), ("hd, no global view", "all")),
}


def make_rows(folder, seed, quick):
    n_token, n_picture = (60_000, 64) if quick else (3_000_000, 6000)    # of training, in each run
    world = folder / "world"
    toyworld.write_world(world, n_picture, 24 if quick else 240, SIZE, 0, words=0.5)
    data = ["--data", world / "train.json"]
    if seed == 0:
        print(f"kinds that a patch tells before training: {kinds_told(data, SIZE // 2):.1%} in one tile, "
              f"{kinds_told(data, SIZE):.1%} in 2 x 2, where things are twice as large")

    rows = {}
    for way, flags in WAYS.items():
        length = mean_length(data + flags)
        n_step = max(1, round(n_token / length / BATCH_SIZE))
        if seed == 0:
            print(f"{way}: {length:.0f} tokens a record, {n_step} steps", flush=True)
        flags = [*data, *flags, "--batch-size", BATCH_SIZE, "--max-steps", n_step, "--lr", 1e-3]
        flags += ["--seed", seed, "--eval-every", 0, "--save-every", 0]
        rows[way] = [(train, folder / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}", flags)]
    return rows


def score(model, quick):
    """The table that train.py made at the end of the run."""
    results = read_json(model / "results.json")
    groups = results["categories"] | {"all": results}
    return {category: figures["score"] / 100 for category, figures in groups.items()}


def mean_length(flags):
    """Tokens a record."""
    cfg = train.parse_flags(flags)
    task = train.Answering(cfg, Records(cfg.data, cfg.image_root), *build(cfg, device="meta"))
    return look_at_records(task.examples)[:, 0].mean().item()


@torch.no_grad()
def kinds_told(data, size, n=128, S=96):
    """How often a patch of a held-out thing tells its kind, in pictures of `size` px, cut into tiles.

    That is: how often is the visual token, as tower and connector are before training, nearer to the word
    for the kind than to every other kind's?
    """
    vlm, tok = build(train.parse_flags(data))
    words = vlm.decoder.embed_tokens.weight[[tok.encode(kind)[0] for kind in toyworld.KINDS]]
    words = words - words.mean(0)
    rng = random.Random(1)
    k = size // S                    # tiles a side
    right = []
    for _ in range(n):
        scene = toyworld.random_scene(rng, held_out=True)
        picture = toyworld.draw_scene(scene, size)
        corners = product(range(0, size, S), repeat=2)
        tiles = [picture.crop((left, top, left + S, top + S)) for top, left in corners]
        pixels = torch.cat([cut_tiles(tile, vlm.cfg.vision, "pad")[0] for tile in tiles])

        # The patches of all tiles, row by row.
        visual = vlm.connector(vlm.vision(pixels).flatten(0, 1)) @ words.T
        guesses = visual.argmax(-1).view(k, k, 8, 8).transpose(1, 2).flatten()
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
        visual[mode] = join_tiles([cut_tiles(picture, vlm.cfg.vision, mode) for _ in range(n * B)])
    T = 64 + max(len(layout) for _, layout in visual.values()) // B

    # In turns, so that what else runs here slows them alike.
    seconds = {"pad": [], "hd": []}
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

    print(f"{B} records of {T} tokens, {len(pixels)} tiles a step, medians of {rounds} rounds")
    for mode in seconds:
        print(f"{mode:4} {B * T / statistics.median(seconds[mode]):,.0f} tokens/s of processor time")
    ratio = statistics.median(hd / pad for pad, hd in zip(seconds["pad"], seconds["hd"]))
    print(f"hd/pad: {ratio:.3f} of the time of a step")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(measure_speed))

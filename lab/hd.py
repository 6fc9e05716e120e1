"""Pictures of one tile and of several: LLaVA-1.5-HD's finding in miniature (arXiv:2310.03744v2, A.1).

    python -m lab.run hd             # three ways to see, three seeds, one table

The toy world with words that one tile of 96 px cannot show is learned with `pad`, with LLaVA-1.5-HD's
tiles, and with these but without the global view, at the same budget of training tokens. Signs of a 192
px picture are as large as those of the usual 96 px world where two by two tiles show it, half as large in
one tile.
"""

import toyworld
import train
from data import Records
from lab.common import kinds_told, run_folder
from support.io import read_json
from support.plan import look_at_records
from support.start import build

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

    rows = {}
    for way, flags in WAYS.items():
        flags = ["--data", world / "train.json", *flags]
        cfg = train.parse_flags(flags)
        examples = train.Answering(cfg, Records(cfg.data), *build(cfg, device="meta")).examples
        length = look_at_records(examples)[:, 0].mean().item()
        n_step = max(1, round(n_token / length / BATCH_SIZE))
        if seed == 0:
            print(f"{way}: {length:.0f} tokens a record, {n_step} steps", flush=True)
        flags += ["--batch-size", BATCH_SIZE, "--max-steps", n_step, "--lr", 1e-3, "--seed", seed]
        flags += ["--eval-every", 0, "--save-every", 0]
        rows[way] = [(train, run_folder(folder, way, seed), flags)]

    # The global view is a tile like that of pad. What the tower was not made for are the others.
    for way in ("pad", "hd, no global view"):
        if seed == 0:
            share = kinds_told(*build(train.parse_flags(WAYS[way])), SIZE, 2 if quick else 128)
            print(f"before training {share:.1%} of the patches tell their kind: {way}", flush=True)
    return rows


def score(model, quick):
    """The table that train.py made at the end of the run."""
    results = read_json(model / "results.json")
    groups = results["categories"] | {"all": results}
    return {category: figures["score"] / 100 for category, figures in groups.items()}

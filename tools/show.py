"""Look at training data as training with the same flags would meet it.

    python -m tools.show FILE [flags of train.py]          # a record, token by token; its tiles in show.png
    python -m tools.show check FILE [flags of train.py]    # missing and broken pictures, lengths, labels
    python -m tools.show tokenizer FILE --out DIR          # tools/tokenizer.py: the records' words as tokens

FILE is what --data of train.py takes, pairs for mpo.py included: FILE,FILE and a meta.json, too. Only configs
and the tokenizer of --model are read.
"""

import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Subset

from data import Examples, Records
from model import IGNORE
from mpo import PairExamples
from support.cli import Bar, UserError, arg, run_program
from support.distributed import in_loader_process
from support.start import build
from tools import tokenizer
from train import Answering, TrainConfig, draw_toy_world, parse_flags

GREY = "#303030"


@dataclass
class ShowConfig(TrainConfig):
    data: str = arg(
        "", "JSON list or JSON lines; FILE,FILE; a meta.json as MMPR's; empty: the toy's", positional=True)
    index: int = arg(0, "which record to show, counted from 0")
    id: str = arg("", "which record to show, by its id")
    out: str = arg("show.png", "file for its tiles, as the network meets them")
    limit: int = arg(0, "records to check at most, 0 for all", at_least=0)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["tokenizer"]:
        return tokenizer.main(argv[1:])
    if argv[:1] == ["check"]:
        return check_records(parse_flags(argv[1:], ShowConfig, __doc__))
    return show_record(parse_flags(argv, ShowConfig, __doc__))


def open_examples(cfg, bad):
    cfg.bad_records = bad
    cfg.data = cfg.data or draw_toy_world(cfg.stage)
    records = Records(cfg.data, cfg.image_root)
    if cfg.split_questions:
        records.split_questions()
    vlm, tok = build(cfg, device="meta")
    return Shown(**vars(Answering(cfg, records, vlm, tok).examples))


class Shown(PairExamples):
    """Conversations as train.py takes them, pairs as mpo.py does."""

    def encode(self, record, n_visual):
        Kind = PairExamples if "chosen" in record else Examples
        return Kind.encode(self, record, n_visual)


# ---- one record ----


def show_record(cfg):
    """Print a record token by token, and save its tiles as the network sees them."""
    examples = open_examples(cfg, bad="stop")
    records, tok, tower = examples.records, examples.tok, examples.vision_cfg
    i = find_record(records, cfg.id) if cfg.id else cfg.index
    if not 0 <= i < len(records):
        raise UserError(f"{cfg.data}: no record {i}; it holds {len(records)}, counted from 0")
    example = examples[i]
    tokens = example["tokens"].tolist()
    labels = example["labels"].tolist()

    print(records[i]["where"])
    size = f"{tower.image_size} px in patches of {tower.patch_size} px"
    print(f"template {examples.template}, pictures {size}, mode {examples.image_mode}")
    print_tokens(tok, tokens, labels)
    n_label = sum(label != IGNORE for label in labels)
    n_visual = tokens.count(tok.image)
    print(f"{len(tokens)} tokens, {n_visual} of them visual, {n_label} supervised (those with a label)")
    if not len(example["pixels"]):
        return 0

    # Its pictures one below the other, each with the positions of its tokens in the text.
    positions = [k for k, token in enumerate(tokens) if token == tok.image]
    drawn, start = [], 0
    for name, n in zip(records[i]["images"], example["n_visual"]):
        layout = example["layout"][start : start + n]
        seen = layout[layout[:, 0] >= 0]
        n_tile = len(seen[:, 0].unique())
        print(f"{name}: {n_tile} tiles, {n} visual tokens, {n - len(seen)} of them row ends")
        drawn.append(draw_picture(example["pixels"], layout, positions[start : start + n], tower))
        start += n
    sheet = stack_images(drawn)
    zoom = -(-600 // sheet.width)  # the toy's tiles are small
    try:
        sheet.resize((zoom * sheet.width, zoom * sheet.height), Image.Resampling.NEAREST).save(cfg.out)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {cfg.out}: cannot be written ({error}); let it end in .png") from None
    print(f"tiles saved as {cfg.out}")
    return 0


def find_record(records, id):
    """Index of the first record with this id; the file is read up to it."""
    for i in range(len(records)):
        if records[i]["id"] == id:
            return i
    raise UserError(f"no record has the id {id!r}; use --index 0 to see the first one and its id")


def print_tokens(tok, tokens, labels):
    """A line for each token; those of a picture share one."""
    print(f"{'position':>11} {'id':>6} {'label':>6}  piece")
    for _, same in groupby(range(len(tokens)), lambda k: -1 if tokens[k] == tok.image else k):
        places = list(same)
        first, n = places[0], len(places)
        where = str(first) if n == 1 else f"{first}..{places[-1]}"
        times = "" if n == 1 else f" x {n}"
        label = "." if labels[first] == IGNORE else labels[first]
        print(f"{where:>11} {tokens[first]:>6} {label:>6}  {tok.piece(tokens[first])}{times}")


def draw_picture(pixels, layout, positions, cfg, width=1600):
    """One picture as the network meets it: its tiles in the order of their tokens, dropped patches dark.

    pixels (n, 3, S, S) of the record, layout (M, 2) of the picture, positions (M,) of its tokens in the text.
    Beside each tile, or each row that a row end closes (a red bar), stands where in the text it is.
    Tiles that share rows stand on one canvas.
    """
    rows = [tuple(row) for row in layout.tolist()]
    tiles = darken_dropped(pixels, rows, cfg)

    # A tile whose patches come in one run stands alone; what lies between such tiles shares rows.
    n = (cfg.grid // cfg.merge) ** 2
    cuts = {0, len(rows)}
    for start, (tile, _) in enumerate(rows):
        if tile >= 0 and rows[start : start + n] == [(tile, patch) for patch in range(n)]:
            cuts |= {start, start + n}
    cuts = sorted(cuts)
    blocks = []
    for start, end in zip(cuts, cuts[1:]):
        if any(tile >= 0 for tile, _ in rows[start:end]):  # of a very thin picture only row ends may be left
            blocks.append(draw_block(tiles, rows[start:end], positions[start:end], cfg))
    return stack_images(blocks, width)


def darken_dropped(pixels, rows, cfg):
    """-> (n, S, S, 3) uint8, in which patches that no visual token stands for are dark."""
    S, g, P = cfg.image_size, cfg.grid // cfg.merge, cfg.patch_size * cfg.merge
    seen = torch.zeros(len(pixels), 1, S, S, dtype=torch.bool)
    for tile, patch in rows:
        if tile >= 0:
            y, x = patch // g * P, patch % g * P
            seen[tile, :, y : y + P, x : x + P] = True
    return torch.where(seen, pixels, pixels // 4).permute(0, 2, 3, 1).numpy()


def draw_block(tiles, rows, positions, cfg):
    """Tiles on one canvas: a single one, or a grid of those that share rows."""
    g, P = cfg.grid // cfg.merge, cfg.patch_size * cfg.merge
    step = cfg.image_size + 2
    ends = [k for k, (tile, _) in enumerate(rows) if tile < 0]
    order = list(dict.fromkeys(tile for tile, _ in rows if tile >= 0))
    n_column = len({tile for tile, _ in rows[: ends[0]]}) if ends else 1
    n_row = -(-len(order) // n_column)
    block = Image.new("RGB", (n_column * step + (80 if ends else 2), n_row * step + 18), GREY)
    pen = ImageDraw.Draw(block)
    pen.text((2, 2), f"{positions[0]}..{positions[-1]}", fill="white", font_size=11)
    top = {}
    for i, tile in enumerate(order):
        top[tile] = 16 + i // n_column * step
        block.paste(Image.fromarray(tiles[tile]), (i % n_column * step, top[tile]))

    # A red bar for each row end, and which tokens the row has.
    x, begin = n_column * step, 0
    for end in ends:
        tile, patch = rows[end - 1]
        y = top[tile] + patch // g * P
        pen.rectangle((x + 1, y + 1, x + 6, y + P - 2), fill="#f03030")
        pen.text((x + 10, y), f"{positions[begin]}..{positions[end]}", fill="#d0d0d0", font_size=10)
        begin = end + 1
    return block


def stack_images(images, width=0):
    """Pictures one below the other, or beside each other as far as the width goes."""
    spots, x, y, bottom = [], 0, 0, 0
    for image in images:
        if x and x + image.width > width:
            x, y = 0, bottom
        spots.append((x, y))
        x += image.width
        bottom = max(bottom, y + image.height)
    right = max(x + image.width for (x, _), image in zip(spots, images))
    sheet = Image.new("RGB", (right, bottom), GREY)
    for spot, image in zip(spots, images):
        sheet.paste(image, spot)
    return sheet


# ---- all records ----


def check_records(cfg):
    """Read every record as training would, and say what is in the file and what is wrong with it."""
    examples = open_examples(cfg, bad="skip")
    n = min(cfg.limit or len(examples), len(examples))
    good = []
    problems = defaultdict(list)  # of a kind: what differs are names and numbers
    some = Subset(examples, range(n))
    loader = DataLoader(some, None, num_workers=cfg.workers, worker_init_fn=in_loader_process)
    for example in Bar(loader, "check", unit="record"):
        if "skipped" in example:
            kind = re.sub(r"'[^']*'|\S*/\S*|\d+", "", example["skipped"])
            problems[kind].append(example["skipped"])
            continue
        n_label = int((example["labels"] != IGNORE).sum())
        good.append((example["id"], len(example["tokens"]), n_label, len(example["n_visual"])))

    print(f"{cfg.data}: {n} records read, {len(good)} good, {n - len(good)} wrong")
    if good:
        ids, lengths, n_labels, n_pictures = zip(*good)
        low, mid, high, top = np.percentile(lengths, [0, 50, 95, 100], method="higher")
        pictures = ", ".join(f"{k}: {count} records" for k, count in sorted(Counter(n_pictures).items()))
        n_repeated = sum(count > 1 for count in Counter(ids).values())
        n_token, n_label = sum(lengths), sum(n_labels)
        print(f"  tokens per record    min {low}, median {mid}, 95% {high}, max {top}; {n_token:,} in all")
        print(f"  supervised           {n_label:,} tokens, {n_label / n_token:.1%}")
        print(f"  pictures per record  {pictures}")
        print(f"  ids used repeatedly  {n_repeated} (no fault: nothing is looked up by id)")
    for alike in problems.values():
        more = f" (and {len(alike) - 1} more of this kind)" if len(alike) > 1 else ""
        print(f"wrong: {alike[0]}{more}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_program(main))

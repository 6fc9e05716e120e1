"""Look at training data as training with the same flags would meet it.

    python -m tools.show FILE [flags of train.py]          # a record, token by token; its patches in show.png
    python -m tools.show check FILE [flags of train.py]    # missing and broken pictures, lengths, labels
    python -m tools.show tokenizer FILE --out DIR          # tools/tokenizer.py: the records' words as tokens

FILE is what --data of train.py takes, pairs for mpo.py included: FILE,FILE and a meta.json, too. Only configs
and the tokenizer of --model are read.
"""

import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader

from data import Examples
from model import IGNORE
from mpo import PairExamples
from support.cli import Bar, UserError, arg, run_program
from support.data_files import Records
from support.io import write_whole
from support.processes import in_loader_process
from support.start import build
from tools import tokenizer
from train import TrainConfig, draw_toy_world, make_examples, parse_flags


@dataclass
class ShowConfig(TrainConfig):
    data: str = arg(
        "", "JSON list or JSON lines; FILE,FILE; a meta.json as MMPR's; empty: the toy's", positional=True)
    index: int = arg(0, "which record to show, counted from 0")
    id: str = arg("", "which record to show, by its id")
    out: str = arg("show.png", "file for the patches of its visual tokens, as the network reads them")
    limit: int = arg(0, "records to check at most, 0 for all")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["tokenizer"]:
        return tokenizer.main(argv[1:])
    if argv[:1] == ["check"]:
        return check_records(parse_flags(argv[1:], ShowConfig, __doc__))
    return show_record(parse_flags(argv, ShowConfig, __doc__))


def open_examples(cfg):
    cfg.data = cfg.data or draw_toy_world(cfg.stage)
    records = Records(cfg.data, cfg.image_root)
    if cfg.split_questions:
        records.split_questions()
    vlm, tok = build(cfg, device="meta")
    return make_examples(Shown, cfg, records, vlm, tok)


class Shown(PairExamples):
    """Conversations as train.py takes them, pairs as mpo.py does."""

    def encode(self, record, n_visual):
        Kind = PairExamples if "chosen" in record else Examples
        return Kind.encode(self, record, n_visual)


# ---- one record ----


def show_record(cfg):
    """Print a record token by token, and draw its pictures as the network reads them."""
    examples = open_examples(cfg)
    tok, tower = examples.tok, examples.vision_cfg
    record = find_record(examples.records, cfg)
    example = examples.make_example(record)
    tokens, labels, n_visual = example["tokens"], example["labels"], example["n_visual"]

    print(record["where"])
    size = f"{tower.image_size} px in patches of {tower.patch_size} px"
    print(f"template {examples.template}, pictures {size}, mode {examples.image_mode}")
    print_tokens(tok, tokens.tolist(), labels.tolist(), n_visual)
    n_label = (labels != IGNORE).sum()
    print(f"{len(tokens)} tokens, {sum(n_visual)} of them visual, {n_label} supervised (those with a label)")
    if not n_visual:
        return 0

    layouts = example["layout"].split(n_visual)
    for name, layout in zip(record["images"], layouts):
        tiles = layout[:, 0]
        n_tile = len(tiles[tiles >= 0].unique())
        print(f"{name}: {n_tile} tiles, {len(tiles)} visual tokens, {(tiles < 0).sum()} of them row ends")
    positions = (tokens == tok.image).nonzero()[:, 0].tolist()
    sheet = draw_tokens(example["pixels"], example["layout"], positions, tower)
    zoom = -(-600 // sheet.width)  # the toy's tiles are small
    sheet = ImageOps.scale(sheet, zoom, Image.Resampling.NEAREST)
    write_whole(cfg.out, lambda tmp: sheet.save(tmp, "PNG"))
    print(f"its visual tokens are drawn in {cfg.out}")
    return 0


def find_record(records, cfg):
    """The record --index, or the first one with this --id: the file is read up to it."""
    if not cfg.id and cfg.index < len(records):
        return records[cfg.index]
    for record in records:
        if record["id"] == cfg.id:
            return record
    raise UserError(f"{cfg.data}: no record {cfg.id or cfg.index}; it holds {len(records)}, counted from 0")


def print_tokens(tok, tokens, labels, n_visual):
    """A line for each token; those of a picture share one."""
    print(f"{'position':>8} {'id':>6} {'label':>6}  piece")
    sizes = iter(n_visual)
    k = 0
    while k < len(tokens):
        n = next(sizes) if tokens[k] == tok.image else 1
        label = "." if labels[k] == IGNORE else labels[k]
        times = f" x {n}" if n > 1 else ""
        print(f"{k:>8} {tokens[k]:>6} {label:>6}  {tok.piece(tokens[k])}{times}")
        k += n


def draw_tokens(pixels, layout, positions, cfg):
    """Pictures as the network reads them: the patch of each visual token, and a red bar for a row end.

    pixels (n, 3, S, S), layout (M, 2), positions (M,) of the tokens in the text. They stand in rows, as in
    the pictures, and beside each row its positions. Patches that no token stands for are not there.
    """
    P = cfg.patch_size * cfg.merge
    squares = pixels.unfold(2, P, P).unfold(3, P, P)  # (n, 3, S / P, S / P, P, P)
    squares = squares.permute(0, 2, 3, 4, 5, 1).flatten(1, 2).numpy()  # (n, patches, P, P, 3)

    rows = []
    row_before = None  # of the tile; of neighbouring tiles it is the same, after a row end there is none
    for (tile, patch), position in zip(layout.tolist(), positions):
        row = patch // cfg.token_grid if tile >= 0 else row_before
        if row != row_before:
            rows.append([])
        rows[-1].append((tile, patch, position))
        row_before = row if tile >= 0 else None

    width = P * max(map(len, rows))
    sheet = Image.new("RGB", (width + 60, P * len(rows)), "#303030")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        y = P * i
        for column, (tile, patch, _) in enumerate(row):
            x = P * column
            if tile >= 0:
                sheet.paste(Image.fromarray(squares[tile, patch]), (x, y))
            else:
                pen.rectangle((x + 1, y + 1, x + 6, y + P - 2), fill="#f03030")
        pen.text((width + 4, y), f"{row[0][2]}..{row[-1][2]}", fill="white", font_size=10)
    return sheet


# ---- all records ----


def check_records(cfg):
    """Read every record as training would, and say what is in the file and what is wrong with it."""
    examples = open_examples(cfg)
    some = range(len(examples))[: cfg.limit or None]
    lengths = []
    n_label = 0
    n_pictures = Counter()
    problems = defaultdict(list)  # of a kind: what differs are names and numbers
    loader = DataLoader(
        examples, None, sampler=some, num_workers=cfg.workers, worker_init_fn=in_loader_process)
    for example in Bar(loader, "check", unit="record"):
        if "skipped" in example:
            kind = re.sub(r"'[^']*'|\S*/\S*|\d+", "", example["skipped"])
            problems[kind].append(example["skipped"])
            continue
        lengths.append(len(example["tokens"]))
        n_label += int((example["labels"] != IGNORE).sum())
        n_pictures[len(example["n_visual"])] += 1

    n_good = len(lengths)
    counts = f"{len(some)} records read, {n_good} good, {len(some) - n_good} wrong"
    print(f"{cfg.data}, as --model {cfg.model}: {counts}")
    if lengths:
        low, mid, high, top = np.percentile(lengths, [0, 50, 95, 100], method="higher")
        pictures = ", ".join(f"{k}: {count} records" for k, count in sorted(n_pictures.items()))
        n_token = sum(lengths)
        print(f"  tokens per record    min {low}, median {mid}, 95% {high}, max {top}; {n_token:,} in all")
        print(f"  supervised           {n_label:,} tokens, {n_label / n_token:.1%}")
        print(f"  pictures per record  {pictures}")
    for alike in problems.values():
        more = f" (and {len(alike) - 1} more of this kind)" if len(alike) > 1 else ""
        print(f"wrong: {alike[0]}{more}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_program(main))

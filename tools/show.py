"""tools.show: moved here; to be rewritten."""

from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
import argparse
import re
import sys

from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
import numpy as np
import torch

import vision
from conversation import TEMPLATES, Tokenizer, train_tokenizer
from data import Examples, Records
from model import IGNORE
from support.cli import UserError, parse_args, run
from support.io import read_json
from support.weights import default_template, picture_mode



def tokenizer(args):
    """Learn a tokenizer from the words of the records, for a decoder that starts from random weights (train.py --tokenizer)."""
    path, records, words = Path(args.out) / "tokenizer.model", Records(args.file), []
    if (path.parent / "config.json").exists():
        raise UserError(f"--out {args.out}: a model is there, and its tokenizer belongs to it; give another folder")
    for i in range(len(records)):
        words += [word for _, text in records[i]["turns"] for word in text.replace("<image>", " ").split()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(path, (word[k : k + 1000] for word in words for k in range(0, len(word), 1000)), args.vocab_size)   # it drops long lines
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror}); give another folder") from None
    plain = Counter(word for text in words for word in re.findall(r"\w+", text))
    tok, n = Tokenizer(path), plain.total()
    whole = sum(k for word, k in plain.items() if len(tok.encode(word)) == 1)
    print(f"{path}: {args.vocab_size} tokens; of {n:,} words in {len(records):,} records {whole / max(1, n):.1%} are one token")
    return 0



def show(args):
    """Print one record token by token, the supervised ones marked, and save its tiles as the network sees them."""
    records, examples = open_examples(args, bad="stop")
    i = args.index if args.id is None else find_record(records, args.id)
    if not 0 <= i < len(records):
        raise UserError(f"{args.file}: no record {i}; it holds {len(records)}, counted from 0")
    example, tok, cfg = examples[i], examples.tok, examples.vision_cfg
    tokens, labels = example["tokens"].tolist(), example["labels"].tolist()
    print(records[i]["where"])
    print(f"template {examples.template}, pictures {cfg.image_size} px in patches of {cfg.patch_size} px, mode {examples.image_mode}")
    print(f"{'position':>11} {'id':>6} {'label':>6}  piece")
    for _, run in groupby(range(len(tokens)), lambda k: -1 if tokens[k] == tok.image else k):   # a picture's tokens in one line
        at, n = next(run), 1 + sum(1 for _ in run)
        where, times = (f"{at}..{at + n - 1}", f" x {n}") if n > 1 else (at, "")
        print(f"{where:>11} {tokens[at]:>6} {labels[at] if labels[at] != IGNORE else '.':>6}  {tok.piece(tokens[at])}{times}")
    n_label = sum(label != IGNORE for label in labels)
    print(f"{len(tokens)} tokens, {tokens.count(tok.image)} of them visual, {n_label} supervised (those with a label)")
    if len(example["pixels"]):
        place, at, drawn = [k for k, token in enumerate(tokens) if token == tok.image], 0, []
        for name, n in zip(records[i]["images"], example["n_visual"]):
            layout, where = example["layout"][at : at + n], place[at : at + n]
            seen, at = layout[layout[:, 0] >= 0], at + n
            print(f"{name}: {len(seen[:, 0].unique())} tiles, {n} visual tokens, {n - len(seen)} of them row ends")
            drawn.append(draw_picture(example["pixels"], layout, where, cfg))
        try:
            stack(drawn).save(args.out)
        except (OSError, ValueError) as error:
            raise UserError(f"--out {args.out}: cannot be written ({error}); give a path that ends in .png") from None
        print(f"tiles saved as {args.out}")
    return 0



class Checked(Examples):
    """Examples that say how far they came, and whether <image> is a word in them."""

    def __getitem__(self, i):
        self.stage = "record"
        return super().__getitem__(i) | {"stage": self.stage}

    def cut_pictures(self, record):
        self.stage = "picture"
        return super().cut_pictures(record)

    def encode(self, record, n_visual):
        self.stage = "conversation"
        marker_is_text = not n_visual and any("<image>" in text for _, text in record["turns"])
        return super().encode(record, n_visual) | {"marker_is_text": marker_is_text}


def find_record(records, id):
    """Index of the first record with this id; the file is read up to it."""
    for i in range(len(records)):
        if records[i]["id"] == id:
            return i
    raise UserError(f"no record has the id {id!r}; use --index 0 to see the first one and its id")


def draw_picture(pixels, layout, place, cfg, width=1600):
    """One picture as the network meets it: its tiles in the order of their tokens, patches that were dropped as padding dark, a red bar for
    each row end, and where in the text each tile or row begins and ends. Tiles that share rows stand on one canvas.

    pixels (n, 3, S, S) of the record, layout (M, 2) of the picture, `place` (M,) the position of each of its tokens in the text.
    """
    S, g, P = cfg.image_size, cfg.grid // cfg.merge, cfg.patch_size * cfg.merge
    rows, n = [tuple(row) for row in layout.tolist()], g * g
    seen = torch.zeros(len(pixels), n, dtype=torch.bool)
    seen[[tile for tile, _ in rows if tile >= 0], [patch for tile, patch in rows if tile >= 0]] = True
    seen = seen.view(-1, g, 1, g, 1).expand(-1, g, P, g, P).reshape(-1, 1, g * P, g * P)
    seen = torch.nn.functional.pad(seen, (0, S - g * P, 0, S - g * P))
    tiles = torch.where(seen, pixels, pixels // 4).permute(0, 2, 3, 1).numpy()
    alone = {i for i, (tile, patch) in enumerate(rows) if tile >= 0 and not patch and rows[i : i + n] == [(tile, k) for k in range(n)]}
    cuts = sorted({0, len(rows)} | alone | {i + n for i in alone})
    blocks = []
    for start, end in zip(cuts, cuts[1:]):
        ends = [k for k in range(start, end) if rows[k][0] < 0]
        order = list(dict.fromkeys(tile for tile, _ in rows[start:end] if tile >= 0))
        columns = len({tile for tile, _ in rows[start : ends[0]]}) if ends else 1
        if not order:                                                       # a picture so thin that of its map only row ends are left
            continue
        corner = {tile: (i % columns * (S + 2), 16 + i // columns * (S + 2)) for i, tile in enumerate(order)}
        block = Image.new("RGB", (columns * (S + 2) + (80 if ends else 2), 18 + -(-len(order) // columns) * (S + 2)), "#303030")
        pen = ImageDraw.Draw(block)
        pen.text((2, 2), f"{place[start]}..{place[end - 1]}", fill="white", font_size=11)
        for tile, spot in corner.items():
            block.paste(Image.fromarray(tiles[tile]), spot)
        for begin, k in zip([start] + [k + 1 for k in ends], ends):
            (tile, patch), x = rows[k - 1], columns * (S + 2)
            y = corner[tile][1] + patch // g * P
            pen.rectangle((x + 1, y + 1, x + 6, y + P - 2), fill="#f03030")
            pen.text((x + 10, y), f"{place[begin]}..{place[k]}", fill="#d0d0d0", font_size=10)
        blocks.append(block)
    return stack(blocks, width)



def stack(images, width=0):
    """Pictures one below the other, or beside each other as far as the width goes."""
    spots, x, y, low = [], 0, 0, 0
    for image in images:
        if x and x + image.width > width:
            x, y = 0, low
        spots.append((x, y))
        x, low = x + image.width, max(low, y + image.height)
    sheet = Image.new("RGB", (max(x + image.width for (x, _), image in zip(spots, images)), low), "#303030")
    for spot, image in zip(spots, images):
        sheet.paste(image, spot)
    return sheet



def check(args):
    """Read every record as training would, and say what is in the file and what is wrong with it."""
    records, examples = open_examples(args, bad="skip")
    n = min(args.limit or len(records), len(records))
    problems, stages, ids, pictures, lengths, n_label, n_word = [], Counter(), Counter(), Counter(), [], 0, 0
    loader = DataLoader(Subset(examples, range(n)), batch_size=None, num_workers=args.workers)
    for example in tqdm(loader, desc="check", unit="record", disable=None):
        if "skipped" in example:
            problems.append(example["skipped"])
            stages[example["stage"]] += 1
            continue
        ids[example["id"]] += 1
        pictures[len(example["n_visual"])] += 1
        lengths.append(len(example["tokens"]))
        n_label += int((example["labels"] != IGNORE).sum())
        n_word += example["marker_is_text"]
    print(f"{args.file}: {n} records read, {len(lengths)} good, {len(problems)} wrong")
    if lengths:
        low, mid, high, top = np.percentile(lengths, [0, 50, 95, 100], method="higher")
        print(f"  tokens per record    min {low}, median {mid}, 95% {high}, max {top}; {sum(lengths):,} in all\n"
              f"  supervised           {n_label:,} tokens, {n_label / sum(lengths):.1%}\n"
              f"  pictures per record  {', '.join(f'{k}: {pictures[k]} records' for k in sorted(pictures))}")
    print(f"  ids used repeatedly  {sum(count > 1 for count in ids.values())} (no fault: nothing is looked up by id)\n"
          f"  <image> as a word    {n_word} records (no fault: they have no picture, so it stands for none)\n"
          f"  wrong                {stages['record']} unreadable records, {stages['picture']} with a missing or broken picture, "
          f"{stages['conversation']} with a conversation that cannot be used")
    for problem in problems[:20]:
        print(f"wrong: {problem}")
    if len(problems) > 20:
        print(f"... and {len(problems) - 20} more")
    return 1 if problems else 0



def open_examples(args, bad):
    """The file as training with this model would read it. A config.json that says nothing of pictures, as a language model's, means the toy's."""
    config, records = read_json(Path(args.model) / "config.json", {}), Records(args.file, args.image_root)
    if config.get("model_type") == "plainvlm":
        tower, mode = vision.VisionConfig(**config["vision"]), config["image_mode"]
    else:
        sizes = config.get("vision_config", {"image_size": 336, "patch_size": 14} if "mm_hidden_size" in config else {})
        tower = vision.VisionConfig(image_size=config.get("force_image_size") or sizes.get("image_size", 96), patch_size=sizes.get("patch_size", 12),
                                    merge=2 if config.get("model_type") == "internvl_chat" else 1)
        mode, tiling = picture_mode(config, tower.image_size)
        preset = args.image_mode == "internvl" and not sizes                # which train.py gives pixel shuffle
        tower = replace(tower, tiling=tiling, merge=2 if preset else tower.merge)
    template = args.template or default_template(config)
    return records, Checked(records, Tokenizer(args.model), template, tower, args.image_mode or mode, args.max_length, bad)



def main(argv=None):
    cli = argparse.ArgumentParser(prog="python -m tools.show", description="Look at training data as the model meets it.")
    programs = cli.add_subparsers(required=True, metavar="{show,check,tokenizer}")
    for program in (show, check):
        sub = programs.add_parser(program.__name__, help=program.__doc__, description=program.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(program=program)
        sub.add_argument("file", help="JSON list or JSONL of records")
        sub.add_argument("--image-root", help="folder that the picture names in FILE start from")
        sub.add_argument("--model", default=str(Path(__file__).parent / "assets" / "toy-vicuna"), help="folder with tokenizer.model and config.json")
        sub.add_argument("--template", default="", help=f"how turns become text: {', '.join(TEMPLATES)}; empty: the model's own")
        sub.add_argument("--image-mode", default="", choices=["", *vision.MODES], help="how a picture becomes tiles; empty: the model's own")
        sub.add_argument("--max-length", type=int, default=2048, help="tokens; a longer record counts as wrong")
        if program is show:
            sub.add_argument("--index", type=int, default=0, help="which record, counted from 0")
            sub.add_argument("--id", help="which record, by its id")
            sub.add_argument("--out", default="show.png", help="file for the tiles, as the network meets them")
        else:
            sub.add_argument("--limit", type=int, default=0, help="records to read at most, 0 for all")
            sub.add_argument("--workers", type=int, default=0, help="processes that open pictures beside this one")
    sub = programs.add_parser("tokenizer", help=tokenizer.__doc__, description=tokenizer.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sub.set_defaults(program=tokenizer)
    sub.add_argument("file", help="JSON list or JSONL of records")
    sub.add_argument("--vocab-size", type=int, default=512, help="tokens in all: 259 are bytes and marks, the others characters, parts of words and words")
    sub.add_argument("--out", required=True, help="folder for tokenizer.model")
    args = parse_args(cli, sys.argv[1:] if argv is None else argv)
    return args.program(args)


if __name__ == "__main__":
    sys.exit(run(main))

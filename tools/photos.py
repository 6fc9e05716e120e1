"""From your own photos to records: pictures and questions in LLaVA's format, a tenth of the photos held out.

    python -m tools.photos FOLDER --out DIR           # FOLDER/cat/1.jpg, FOLDER/dog/2.jpg, ...: what is it?
    python -m tools.photos FOLDER --out DIR --four    # four photos to a picture: what, where, count, exist
    python -m tools.photos TABLE.csv --out DIR        # your own questions: columns image, question, answer
    python train.py --model photo --data DIR/train.json

A kind is the name of a folder. DIR gets images/, train.json and val.jsonl, the held-out questions. What is
held out is drawn before anything is put together, the same in every run: no held-out photo is trained on.

A *page* is a picture to be, and what is asked about it: ([path of a photo, or of four from top left to bottom
right], [(category, question, answer), ...]).
"""

import csv
import io
import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps

from benchmarks.common import SHORT
from model import PRESETS
from support.cli import REQUIRED, Bar, UserError, arg, parse, run_program
from support.io import reading, write_json, write_json_lines, write_whole
from support.picture_files import open_image
from toyworld import llava_record, val_lines


@dataclass
class PhotosConfig:
    source: str = arg(REQUIRED, "folder of folders named by what they show, or a .csv", positional=True)
    out: str = arg(REQUIRED, "folder to write; not one with a train.json")
    four: bool = arg(False, "four photos to a picture")
    size: int = arg(PRESETS["photo"].vision.image_size,
        "longest side of a picture in pixels: that of the tower it is for", at_least=2)


PLACES = ("top left", "top right", "bottom left", "bottom right")


def main(argv=None):
    cfg = parse(PhotosConfig, argv, __doc__)
    source, out = Path(cfg.source), Path(cfg.out)
    if (out / "train.json").exists():
        raise UserError(f"--out {out}: a train.json is there; remove the folder, or give another")
    if source.suffix != ".csv":
        kinds = folder_pages(source)
    elif cfg.four:
        raise UserError("--four is for a folder of photos; a table brings its own questions")
    else:
        kinds = table_pages(source)

    # Of each kind a tenth is held out, at least one.
    rng = random.Random(0)
    train, val = {}, {}
    for kind, pages in kinds.items():
        if len(pages) < 2:
            raise UserError(f"{source}: {kind}: fewer than two photos; one is to train on, one to hold out")
        shuffled = rng.sample(pages, len(pages))
        n_held_out = max(1, len(pages) // 10)
        train[kind] = shuffled[n_held_out:]
        val[kind] = shuffled[:n_held_out]
    arrange = four_pages if cfg.four else all_pages

    # What train.py reads.
    bad = {}  # {photo: why it cannot be opened}
    train = write_pictures(out, "train", arrange(train, rng), cfg.size, bad)
    val = write_pictures(out, "val", arrange(val, rng), cfg.size, bad)
    if bad:
        first, *others = bad
        more = f". {len(bad)} photos cannot be used, such as {', '.join(others[:9])}" if others else ""
        raise UserError(f"{bad[first]}{more}")
    records = []
    for i, (name, asked) in enumerate(train):
        records.append(llava_record(f"train-{i}", name, [pair for _, *pair in asked]))
    questions = []
    for i, (name, asked) in enumerate(val):
        questions += val_lines(i, name, asked)
    write_json_lines(out / "val.jsonl", questions)
    write_json(out / "train.json", records, indent=1)  # last: a folder that has it is whole
    print(f"{out}: {len(train):,} pictures to train on; {len(val):,} held out, {len(questions):,} questions")
    return 0


# ---- what there is: {kind: a page of each photo} ----


def folder_pages(folder):
    pages = defaultdict(list)
    for path in sorted(folder.glob("[!.]*/[!.]*")):  # neither .git/config nor cat/._1.jpg
        if path.is_file():
            kind = path.parent.name.replace("_", " ")
            asked = [("what", f"What is in the picture?\n{SHORT}", kind)]
            pages[kind].append(([path], asked))
    if len(pages) < 2:
        raise UserError(f"{folder}: photos in {len(pages)} of its folders, at least two kinds are needed; "
                        f"expected {folder}/cat/1.jpg, {folder}/dog/2.jpg, ...")
    return pages


def table_pages(table):
    """The rows about one picture become one page. Names of pictures start at the table's folder."""
    asked = defaultdict(list)
    with reading(table, "save it as CSV in UTF-8"):
        rows = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"), newline=""))
        for row in rows:
            cells = [row.get(column) for column in ("image", "question", "answer")]
            if not all(cells):
                raise UserError(f"line {rows.line_num}: one of image, question, answer is missing; its first "
                                f"line names these columns, between commas: {', '.join(rows.fieldnames)}")
            image, question, answer = cells
            asked[image].append(("all", question, answer))
    return {"pictures": [([table.parent / image], questions) for image, questions in asked.items()]}


# ---- what is asked ----


def all_pages(kinds, rng):
    pages = [page for alike in kinds.values() for page in alike]
    return rng.sample(pages, len(pages))


def four_pages(kinds, rng):
    """As many as show each photo once on average; all kinds alike, however many photos they have."""
    pages = []
    n_photo = sum(map(len, kinds.values()))
    for _ in range(max(1, n_photo // 4)):
        # Out of a few kinds, else hardly one would be there twice.
        some = rng.sample(list(kinds), min(rng.randint(2, 6), len(kinds)))
        shown = rng.choices(some, k=4)
        asked = ask_four(shown, some, list(kinds), rng)
        photos = []
        for kind in shown:
            [photo], _ = rng.choice(kinds[kind])
            photos.append(photo)
        pages.append((photos, asked))
    return pages


def ask_four(shown, kinds, all_kinds, rng):
    """A question of each category about four photos, drawn from `kinds`; none of where if none is single."""
    place = rng.randrange(4)
    asked = [("what", f"What is at the {PLACES[place]}?", shown[place])]
    once = [kind for kind in shown if shown.count(kind) == 1]
    if once:
        kind = rng.choice(once)
        asked.append(("where", f"Where is the {kind}?", PLACES[shown.index(kind)]))
    kind = rng.choice(kinds)
    asked.append(("count", f"How many of the photos are of the kind {kind}?", str(shown.count(kind))))
    absent = [kind for kind in all_kinds if kind not in shown]
    kind = rng.choice(rng.choice([shown, absent or shown]))
    asked.append(("exist", f"Is any of the photos of the kind {kind}?", "yes" if kind in shown else "no"))
    return [(category, f"{question}\n{SHORT}", answer) for category, question, answer in asked]


# ---- what is written ----


def write_pictures(out, split, pages, size, bad):
    """-> [(name, what is asked) of each]. After a bad photo the others are only looked at."""
    made = []
    for i, (paths, asked) in enumerate(Bar(pages, f"{split} pictures", leave=False)):
        photos = []
        for path in paths:
            try:
                photos.append(open_image(path))
            except UserError as error:
                bad[str(path)] = error
        if not bad:
            name = f"images/{split}_{i:06d}.jpg"
            image = draw_page(photos, size)
            write_whole(out / name, partial(image.save, format="JPEG", quality=95))
            made.append((name, asked))
    return made


def draw_page(photos, size):
    """One photo, made smaller where it is too large; or four, each cut to a square."""
    if len(photos) == 1:
        photos[0].thumbnail((size, size))
        return photos[0]
    side = size // 2
    page = Image.new("RGB", (2 * side, 2 * side))
    for k, photo in enumerate(photos):
        page.paste(ImageOps.fit(photo, (side, side)), (k % 2 * side, k // 2 * side))
    return page


if __name__ == "__main__":
    sys.exit(run_program(main))

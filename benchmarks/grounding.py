"""A box for a sentence: RefCOCO, RefCOCO+, RefCOCOg, OCID-Ref.

    (a picture of a street)   Please provide the bounding box coordinate of the region this sentence
                              describes: "red car"
    box: [0.10, 0.10, 0.60, 0.60]      a model: "[0.12, 0.08, 0.58, 0.61]"      IoU 0.86: right

Boxes are [x1, y1, x2, y2], fractions of the picture's sides; right is IoU >= 0.5, and 0.25 for OCID-Ref.
LLaVA and Prismatic round the true box to two decimals, InternVL writes thousandths. One reader takes both:
the first four numbers in brackets. The official readers differ: Prismatic's takes a bare list of fractions
only, InternVL's reads a missing box as (0, 0, 0, 0); a model that was taught boxes gets the same figure from
all three.
"""

import json
from functools import partial

from benchmarks.common import Benchmark, find_split, iou, paper, question, read_box, read_each, split_files


def region_question(cfg, id, image, sentence, box, size, least, **more):
    """box: corners in pixels; size: the picture's width and height; least: the IoU that is enough."""
    internvl = cfg.family == "internvl"
    width, height = size
    if min(width, height) <= 0 or len(box) != 4:
        raise ValueError(f"box {box} in a picture of {width} x {height} pixels")
    sides = (width, height, width, height)
    truth = [round(x / side, 4 if internvl else 2) for x, side in zip(box, sides)]
    quoted = f"<ref>{sentence}</ref>" if internvl else f'"{sentence}"'
    text = f"Please provide the bounding box coordinate of the region this sentence describes: {quoted}"
    return question(id, image, text, "", truth, least=least, **more)


def region_box(text, item):
    return read_box(text)


def overlaps(box, item):
    return float(iou(box, item["truth"]) >= item["least"])


def read_refcoco(name, cfg):
    """InternVL's JSON lines, one sentence a line. (REFER's own pickles would have to be run to be read.)"""

    def make(number, row):
        id = str(row.get("sent_id", number))
        size = row["width"], row["height"]
        return region_question(cfg, id, row["image"], row["sent"], row["bbox"], size, 0.5)

    split = cfg.split or "val"
    _, path = find_split(cfg, {split: f"{name}_{split}.jsonl"})
    return read_each(path, make)


def read_ocid(cfg):
    def make(id, row):
        box = json.loads(row["bbox"]) if isinstance(row["bbox"], str) else row["bbox"]
        x1, y1, x2, y2 = box
        if not (x1 < x2 <= 640 and y1 < y2 <= 480):  # corners, whatever the dataset's note says
            raise ValueError(f'"bbox" is {box}; it must be [x1, y1, x2, y2] within 640 x 480 pixels')
        take = row["take_id"]
        clutter = "Minimum" if take <= 9 else "Medium" if take <= 16 else "Maximum"
        image = f"OCID-dataset/{row['scene_path']}"
        return region_question(cfg, str(id), image, row["sentence"], box, (640, 480), 0.25, category=clutter)

    _, path = find_split(cfg, split_files("{}_expressions.json", "val test train"))
    return read_each(path, make)


def refcoco(name, *figures):
    return Benchmark(
        partial(read_refcoco, name),
        region_box,
        overlaps,
        max_new_tokens=100,
        metric="accuracy % at IoU 0.5",
        paper=paper(*figures),
    )


BENCHMARKS = {
    "refcoco": refcoco("refcoco", 55.12, 66.75, 77.78, 79.39),
    "refcoco+": refcoco("refcoco+", 49.47, 61.36, 73.08, 75.55),
    "refcocog": refcoco("refcocog", 50.92, 60.85, 71.04, 72.73),
    "ocid-ref": Benchmark(
        read_ocid,
        region_box,
        overlaps,
        max_new_tokens=100,
        metric="accuracy % at IoU 0.25",
        paper=paper(35.07, 45.56, 54.12, 54.62),
    ),
}

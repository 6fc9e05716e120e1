"""A box for a sentence: RefCOCO, RefCOCO+, RefCOCOg, OCID-Ref.

    (a picture of a street)   Please provide the bounding box coordinate of the region this sentence
                              describes: "red car"
    box: [0.10, 0.10, 0.60, 0.60]      a model: "[0.12, 0.08, 0.58, 0.61]"      IoU 0.86: right

Accuracy: the share of boxes [x1, y1, x2, y2], in fractions of the picture's sides, whose intersection over
union with the true one is at least 0.5 (arXiv:1608.00272, arXiv:1511.02283), or 0.25 of OCID-Ref
(arXiv:2103.07679). LLaVA and Prismatic round the true box to two decimals, InternVL writes thousandths. One
reader takes both: the first four numbers in brackets. The official readers differ: Prismatic's takes a bare
list of fractions only, InternVL's reads a missing box as (0, 0, 0, 0); a model that was taught boxes gets the
same figure from all three.
"""

import json
from functools import partial

from benchmarks.common import Benchmark, iou, question, read_box, read_split


def ask_region(cfg, id, image, sentence, box, size, category=None):
    """box: corners in pixels; size: the picture's width and height."""
    width, height = size
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2 and width > 0 and height > 0):
        raise ValueError(f"box {box} in a picture of {width} x {height} pixels")
    internvl = cfg.family == "internvl"
    digits = 4 if internvl else 2
    quoted = f"<ref>{sentence}</ref>" if internvl else f'"{sentence}"'
    truth = [round(x / side, digits) for x, side in zip(box, size * 2)]
    text = f"Please provide the bounding box coordinate of the region this sentence describes: {quoted}"
    return question(str(id), image, text, "", truth, category, asked=sentence)


def ask_refcoco(cfg, number, row):
    """InternVL's JSON lines, one sentence a line. (REFER's own pickles would have to be run to be read.)"""
    size = row["width"], row["height"]
    return ask_region(cfg, number, row["image"] + "", row["sent"], row["bbox"], size)


def ask_ocid(cfg, id, row):
    box = json.loads(row["bbox"])
    if box[2] > 640 or box[3] > 480:  # they are corners, whatever the dataset's note says
        raise ValueError(f'"bbox" is {box}; it must be [x1, y1, x2, y2] within 640 x 480 pixels')
    take = row["take_id"]
    clutter = "Minimum" if take <= 9 else "Medium" if take <= 16 else "Maximum"
    image = f"OCID-dataset/{row['scene_path']}"
    return ask_region(cfg, id, image, row["sentence"], box, (640, 480), clutter)


def boxes(forms, splits, ask=ask_refcoco, least=0.5):
    """A benchmark of these files, whose boxes are right from this IoU on."""

    def overlaps(box, item):
        return float(iou(box, item["truth"]) >= least)

    read = partial(read_split, forms, splits, ask)
    return Benchmark(read, read_box, overlaps, max_new_tokens=100, metric=f"accuracy % at IoU {least}")


BENCHMARKS = {
    "refcoco": boxes("refcoco_{}.jsonl", "val testA testB"),
    "refcoco+": boxes("refcoco+_{}.jsonl", "val testA testB"),
    "refcocog": boxes("refcocog_{}.jsonl", "val test"),
    "ocid-ref": boxes("{}_expressions.json", "val test train", ask_ocid, 0.25),
}

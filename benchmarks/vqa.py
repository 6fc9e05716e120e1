"""Short answers in free words: VQAv2, VizWiz, TextVQA, GQA.

    (a picture of a hydrant)  What color is the hydrant?
                              Answer the question using a single word or phrase.
    ten people: red x 7, orange x 3      a model: "Red."      score 1.0

VQA accuracy (arXiv:1505.00468): an answer is right by min(1, people who gave it / 3), averaged over the ten
ways to leave one of ten people out. VQAv2 (arXiv:1612.00837), VizWiz (arXiv:1802.08218) and TextVQA
(arXiv:1904.08920) share it; which scorer normalises what before it compares is the whole difference. GQA
(arXiv:1902.09506) knows one answer, and counts those that are the same string.

--split: val, test-dev, test of VQAv2; val, test, train of VizWiz. Without labels there is no score, only the
file to hand in.
"""

import json
from functools import partial

from benchmarks.common import (
    CONTRACTIONS,
    INSUFFICIENT,
    SHORT,
    Benchmark,
    as_said,
    evalai,
    find_splits,
    load_records,
    normalise,
    one_line,
    question,
    read_each,
    read_split,
    rounded_percent,
    rows_by,
)
from support.io import reading

# ---- questions ----

VQAV2 = "v2_OpenEnded_mscoco_{0}2014_questions.json v2_OpenEnded_mscoco_{0}2015_questions.json"


def read_vqav2(cfg):
    split, path = find_splits(cfg, VQAV2, "val test-dev test")[0]
    annotations = "v2_mscoco_val2014_annotations.json"
    folder = "test2015"
    if split == "val":
        folder = "val2014"
        labels = rows_by(cfg, "question_id", annotations, "annotations")

    def ask(key, row):
        id = row["question_id"]
        image = f"{folder}/COCO_{folder}_{row['image_id']:012d}.jpg"
        truth = category = None
        if split == "val":
            with reading(annotations):
                truth = people(labels[id])
                category = labels[id]["answer_type"]
        return question(id, image, row["question"], SHORT, truth, category, file=path)

    return read_each(load_records(path, "questions"), ask)


def people(row):
    """What ten people answered."""
    return [answer["answer"] + "" for answer in row["answers"]]


def ask_vizwiz(cfg, key, row):
    image = row["image"]
    return question(
        image,
        f"{cfg.split}/{image}",
        row["question"],
        f"{INSUFFICIENT}\n{SHORT}",
        None if cfg.split == "test" else people(row),
        row.get("answer_type"),
    )


def read_textvqa(with_ocr, cfg):
    _, path = find_splits(cfg, "TextVQA_0.5.1_{}.json", "val")[0]
    if with_ocr:
        ocr = rows_by(cfg, "image_id", "TextVQA_Rosetta_OCR_v0.2_val.json", "data")

    def ask(key, row):
        image = row["image_id"]
        asked = row["question"]
        text = asked[:1].upper() + asked[1:]
        if with_ocr:
            text += "\nReference OCR token: " + ", ".join(ocr[image]["ocr_tokens"])
        answers = [answer + "" for answer in row["answers"]]
        return question(row["question_id"], f"train_images/{image}.jpg", text, SHORT, answers, asked=asked)

    return read_each(load_records(path, "data"), ask)


def ask_gqa(cfg, id, row):
    """Questions that are not balanced are asked, as the official scorer wants them all, and not scored."""
    return question(
        str(id),
        f"images/{row['imageId']}.jpg",
        row["question"],
        SHORT,
        row["answer"] if row["isBalanced"] else None,
        row["types"]["structural"],
    )


# ---- how answers are compared ----

# VizWiz's own copy of the scorer has backticks for apostrophes on both sides. So "dont" never meets an
# annotator's "don't" there, and a key with a backtick never fires, as backticks are punctuation and gone by
# then. These were forgotten:
FORGOTTEN_KEYS = ("couldn'tve", "hadn'tve")
FORGOTTEN_WORDS = "aint arent cant couldve couldnt weve wheres whove".split()
BACKTICKS = {
    key: word if key in FORGOTTEN_WORDS else word.replace("'", "`")
    for key, word in CONTRACTIONS.items()
    if "'" not in key or key in FORGOTTEN_KEYS
}


def vqav2_normal(text, item):
    """Both sides are normalised, unless all ten answers are identical: then they are compared verbatim."""
    answers = {one_line(answer) for answer in item["truth"] or []}
    return normalise(one_line(text)) if len(answers) > 1 else one_line(text)


def vizwiz_normal(text, item):
    return normalise(one_line(text), BACKTICKS)


def gqa_normal(text, item):
    """LLaVA's conversion of what a model says; the scorer then compares strings."""
    return text.rstrip(".").lower()


def is_agreed(people_normal, said, item):
    """right() of a benchmark whose scorer so normalises what people said."""
    return agreement(said, [people_normal(answer, item) for answer in item["truth"]])


def agreement(said, answers):
    """Mean over ten annotators of min(1, matches among the others / 3): 0, 0.3, 0.6, 0.9, 1 for 0 to 4."""
    n = answers.count(said)
    return sum(min(1, (n - (answer == said)) / 3) for answer in answers) / len(answers)


def score_gqa(units):
    """Rounded as the official scorer does, which divides before it multiplies."""
    return round(100 * (sum(unit[0]["score"] for unit in units) / len(units)), 2)


# ---- what is handed in ----


def submit_vqav2(items, records):
    """EvalAI takes all of test2015 or nothing: what was not asked of it gets an empty answer."""
    answers = {}
    if items[0]["truth"] is None:
        test2015 = items[0]["file"].with_name("v2_OpenEnded_mscoco_test2015_questions.json")
        if test2015.exists():
            answers = {row["question_id"]: "" for _, _, row in load_records(test2015, "questions")}
        print(f"vqav2_answers.json: empty where not asked; the server refuses less than all of {test2015}")
    answers |= {record["id"]: evalai(record["answer"] or "") for record in records}
    rows = [{"question_id": id, "answer": text} for id, text in answers.items()]
    return "vqav2_answers.json", json.dumps(rows)


def submit_vizwiz(items, records):
    rows = [{"image": record["id"], "answer": evalai(record["answer"] or "")} for record in records]
    return "vizwiz_upload.json", json.dumps(rows)


BENCHMARKS = {
    "vqav2": Benchmark(
        read_vqav2,
        vqav2_normal,
        partial(is_agreed, vqav2_normal),
        rounded_percent,
        submit=submit_vqav2,
        metric="VQA accuracy %",
        all_needed=True,
    ),
    "vizwiz": Benchmark(
        partial(read_split, "{}.json", "val test train", ask_vizwiz),
        vizwiz_normal,
        partial(is_agreed, as_said),
        rounded_percent,
        submit=submit_vizwiz,
        metric="VQA accuracy %",
    ),
    "textvqa": Benchmark(
        partial(read_textvqa, False),
        evalai,
        partial(is_agreed, evalai),
        metric="VQA accuracy %, without OCR tokens",
    ),
    "textvqa-ocr": Benchmark(
        partial(read_textvqa, True),
        evalai,
        partial(is_agreed, evalai),
        metric="VQA accuracy %, with OCR tokens",
    ),
    "gqa": Benchmark(
        partial(read_split, "{}_balanced_questions.json", "testdev", ask_gqa),
        gqa_normal,
        score=score_gqa,
        all_needed=True,
    ),
}

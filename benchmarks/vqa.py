"""Short answers in free words: VQAv2, VizWiz, TextVQA, GQA.

    (a picture of a hydrant)  What color is the hydrant?
                              Answer the question using a single word or phrase.
    ten people: red x 7, orange x 3      a model: "Red."      score 1.0

The three VQA scores are one formula over three normalisers; which scorer normalises what is the whole
difference. GQA has one answer, and compares strings.
"""

import json
from functools import partial

from benchmarks.common import (
    CONTRACTIONS,
    INSUFFICIENT,
    SHORT,
    Benchmark,
    evalai,
    find_file,
    find_split,
    load_records,
    main_file,
    normalise,
    one_line,
    paper,
    question,
    read_each,
    rounded_percent,
    split_files,
)
from support.cli import UserError

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


def agreement(said, answers):
    """Mean over ten annotators of min(1, matches among the others / 3): 0, 0.3, 0.6, 0.9, 1 for 0 to 4."""
    n = sum(answer == said for answer in answers)
    return sum(min(1, (n - (answer == said)) / 3) for answer in answers) / len(answers)


def vqav2_normal(text, item):
    """Both sides are normalised, unless all ten answers are identical: then they are compared verbatim."""
    answers = {one_line(answer) for answer in item["truth"] or []}
    return normalise(one_line(text)) if len(answers) > 1 else one_line(text)


def vqav2_agreement(said, item):
    return agreement(said, [vqav2_normal(answer, item) for answer in item["truth"]])


def textvqa_normal(text, item):
    return evalai(text)


def textvqa_agreement(said, item):
    return agreement(said, [evalai(answer) for answer in item["truth"]])


def vizwiz_normal(text, item):
    return normalise(one_line(text), BACKTICKS)


def vizwiz_agreement(said, item):
    """The model's side alone is normalised."""
    return agreement(said, item["truth"])


def vqav2_label(_, row):
    answers = [answer["answer"] + "" for answer in row["answers"]]
    return row["question_id"], (answers, row["answer_type"])


def read_vqav2(cfg):
    years = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}
    split, path = find_split(
        cfg, {split: f"v2_OpenEnded_mscoco_{year}_questions.json" for split, year in years.items()}
    )
    labels = {}
    if split == "val":
        annotations = find_file(cfg, "v2_mscoco_val2014_annotations.json")
        labels = dict(read_each(annotations, vqav2_label, under="annotations"))
    folder = "val2014" if split == "val" else "test2015"
    whole_test = (
        None
        if split == "val"
        else find_file(cfg, "v2_OpenEnded_mscoco_test2015_questions.json", optional=True)
    )

    def make(_, row):
        id = row["question_id"]
        if split == "val" and id not in labels:
            raise UserError(f"{path}: no annotation of question {id}; take both files from one download")
        truth, category = labels.get(id, (None, None))
        image = f"{folder}/COCO_{folder}_{row['image_id']:012d}.jpg"
        return question(id, image, row["question"], SHORT, truth, category=category, whole_test=whole_test)

    return read_each(path, make, under="questions")


def submit_vqav2(items, records):
    """EvalAI wants all of test2015; what was not asked gets an empty answer."""
    answers = {record["id"]: evalai(record["answer"] or "") for record in records}
    whole_test = items[0]["whole_test"]
    if whole_test:
        ids = [row["question_id"] for _, _, row in load_records(whole_test, "questions")]
    else:
        ids = list(answers)
        print(
            "vqav2_answers.json: the server refuses it without all questions of test2015; put their file "
            "beside this one"
        )
    rows = [{"question_id": id, "answer": answers.get(id, "")} for id in ids]
    return "vqav2_answers.json", json.dumps(rows, ensure_ascii=False)


def read_vizwiz(cfg):
    split, path = find_split(cfg, split_files("{}.json", "val test train"))

    def make(_, row):
        answers = [answer["answer"] + "" for answer in row.get("answers") or []]
        category = {0: "unanswerable", 1: "answerable"}.get(row.get("answerable"))
        suffix = f"{INSUFFICIENT}\n{SHORT}"
        return question(
            row["image"],
            f"{split}/{row['image']}",
            row["question"],
            suffix,
            answers or None,
            category=category,
        )

    return read_each(path, make)


def submit_vizwiz(items, records):
    rows = [{"image": record["id"], "answer": evalai(record["answer"] or "")} for record in records]
    return "vizwiz_upload.json", json.dumps(rows, ensure_ascii=False)


def read_textvqa(with_ocr, cfg):
    split, path = find_split(cfg, split_files("TextVQA_0.5.1_{}.json", "val test train"))
    folder = "test_images" if split == "test" else "train_images"
    ocr = {}
    if with_ocr:
        for _, _, row in load_records(find_file(cfg, f"TextVQA_Rosetta_OCR_v0.2_{split}.json"), "data"):
            ocr[row["image_id"]] = "\nReference OCR token: " + ", ".join(row["ocr_tokens"])

    def make(_, row):
        image, text = row["image_id"], row["question"]
        shown = text[:1].upper() + text[1:]
        if with_ocr:
            shown += ocr[image]
        answers = [answer + "" for answer in row.get("answers") or []]
        # LLaVA's answer files name the picture, not the question.
        return question(
            row["question_id"], f"{folder}/{image}.jpg", shown, SHORT, answers or None, asked=text
        )

    return read_each(path, make, under="data")


def read_gqa(cfg):
    """Questions that are not balanced are asked, as the official scorer wants them all, and not scored."""
    path = main_file(cfg, "testdev_balanced_questions.json", "testdev_balanced_questions_*.json")

    def make(id, row):
        truth = row["answer"] if row["isBalanced"] else None
        image = f"images/{row['imageId']}.jpg"
        return question(str(id), image, row["question"], SHORT, truth, category=row["types"]["structural"])

    return read_each(path, make)


def gqa_normal(text, item):
    """LLaVA's conversion of what a model says; the scorer then compares strings."""
    return text.rstrip(".").lower()


def score_gqa(units):
    """Rounded as the official scorer does, which divides before it multiplies."""
    return round(100 * (sum(unit[0]["score"] for unit in units) / len(units)), 2)


BENCHMARKS = {
    "vqav2": Benchmark(
        read_vqav2,
        vqav2_normal,
        vqav2_agreement,
        rounded_percent,
        submit=submit_vqav2,
        metric="VQA accuracy %",
        all_needed=True,
        paper=paper(78.5, 80.0, 80.97, 81.66),
    ),
    "gqa": Benchmark(
        read_gqa,
        gqa_normal,
        score=score_gqa,
        all_needed=True,
        paper=paper(62.0, 63.3, 65.27, 66.13),
    ),
    "vizwiz": Benchmark(
        read_vizwiz,
        vizwiz_normal,
        vizwiz_agreement,
        rounded_percent,
        submit=submit_vizwiz,
        metric="VQA accuracy %",
        paper=paper(50.0, 53.6, 52.82, 58.01),
    ),
    "textvqa": Benchmark(
        partial(read_textvqa, False),
        textvqa_normal,
        textvqa_agreement,
        metric="VQA accuracy %, without OCR tokens",
        paper=paper(46.13, 48.99, 55.64, 57.08),
    ),
    "textvqa-ocr": Benchmark(
        partial(read_textvqa, True),
        textvqa_normal,
        textvqa_agreement,
        metric="VQA accuracy %, with OCR tokens",
        paper=paper(58.2, 61.3, 59.71, 62.89),
    ),
}

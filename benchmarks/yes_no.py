"""Yes or no, true or false: POPE, MME, VSR.

    (a picture of a street)   Is there a dog in the image?
                              Answer the question using a single word or phrase.
    label: no      a model: "No, there is none."      read as: no

Each reads an answer by its own rule, and the rules disagree: "None" is yes for POPE and no for MME.
  POPE  arXiv:2305.10355. F1 with yes as the positive class, here the mean over its splits random, popular
        and adversarial; --split takes one. Its random split exists with 2,910 and with 3,000 questions
  MME   arXiv:2306.13394. Two questions a picture. Of each subtask acc + acc+, the shares of right questions
        and of pictures with both right, in percent. Ten subtasks sum to perception, of 2000 at most, four to
        cognition, of 800
  VSR   arXiv:2205.00363. Accuracy; saying True to everything gives 51.5%
"""

import re
from collections import Counter
from functools import partial

from benchmarks.common import (
    SHORT,
    Benchmark,
    by_category,
    find_splits,
    load_records,
    question,
    read_each,
    read_split,
    visible,
)
from support.cli import UserError
from support.io import reading

LABELS = {"yes": "yes", "no": "no"}  # no other will do

# ---- POPE ----

# Each split numbers from 1. LLaVA's one file of all splits adds these.
OFFSETS = {"random": 10_000_000, "popular": 20_000_000, "adversarial": 0}
POPE = "coco_pope_{0}.json aokvqa_pope_seem_{0}.json gqa_pope_seem_{0}.json"


def read_pope(cfg):
    files = find_splits(cfg, POPE, " ".join(OFFSETS))
    for split, path in files:
        yield from read_each(load_records(path), partial(ask_pope, split, len(files) > 1))


def ask_pope(split, is_merged, key, row):
    number = int(row["question_id"])
    merged = number + OFFSETS[split]
    image = row["image"]
    return question(
        merged if is_merged else number,
        f"val2014/{image}" if image.startswith("COCO_val2014") else image,
        row["text"],
        SHORT,
        LABELS[row["label"]],
        split,
        part=split,
        also=str(merged),
    )


def pope_label(text, item):
    """One of the words No, no, not before the first period -> no; all else, nothing too -> yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_figures(units):
    """Yes is the positive class. A missing answer is wrong: a false no, or a false yes."""
    count = Counter((record["truth"], record["score"] == 1) for (record,) in units)
    tp = count["yes", True]
    fn = count["yes", False]
    tn = count["no", True]
    fp = count["no", False]
    return {
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "accuracy": (tp + tn) / len(units),
        "precision": tp / max(tp + fp, 1),
        "recall": tp / max(tp + fn, 1),
        "f1": 2 * tp / max(2 * tp + fp + fn, 1),
        "yes_ratio": (tp + fp) / len(units),
    }


def score_pope(units):
    """The mean F1 of the splits."""
    splits = by_category(units).values()
    return 100 * sum(pope_figures(split)["f1"] for split in splits) / len(splits)


# ---- MME ----

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def read_mme(cfg):
    names = "existence.txt code_reasoning.txt existence code_reasoning"
    ((_, found),) = find_splits(cfg, names, "all")
    n_asked = Counter()
    for task in PERCEPTION + COGNITION:
        for image, text, label in mme_lines(found.parent, task):
            n_asked[image] += 1
            id = f"{image}#{n_asked[image]}"
            # LLaVA puts its own format prompt in the place of this sentence.
            text = re.sub(r"\s*Please answer yes or no\.\s*$", "", text)
            category = [task, "perception" if task in PERCEPTION else "cognition"]
            yield question(id, image, text, SHORT, label, category, unit=image)
    for image, n in n_asked.items():
        if n != 2:
            raise UserError(f"{found.parent}: {image} has {n} question(s); every picture of MME has two")


def mme_lines(root, task):
    """(picture, question, label) of each line of a subtask.

    They stand in one file of the official tool's Your_Results/, or in one for each picture of the release.
    """
    pictures = {path.stem: path.name for path in (root / task).rglob("*") if path.suffix != ".txt"}
    for path in visible([*root.glob(f"{task}.txt"), *(root / task).rglob("*.txt")]):
        with reading(path):
            for line in path.read_text(encoding="utf-8-sig").splitlines():
                cells = line.split("\t")
                if path.parent != root:
                    cells.insert(0, pictures.get(path.stem, f"{path.stem}.jpg"))
                if line.strip():
                    image, text, label = cells[:3]
                    yield f"{task}/{image.strip()}", text, LABELS[label.strip().lower()]


def mme_label(text, item):
    head = text.lower()[:4]
    return next((label for label in ("yes", "no") if label in head), None)


def mme_figures(units):
    """acc: the share of right questions; acc+: of pictures with both right."""
    n_right = [sum(record["score"] for record in pair) for pair in units]
    return {"acc": sum(n_right) / (2 * len(units)), "acc_plus": n_right.count(2) / len(units)}


def score_mme(units):
    """acc and acc+ in percent, summed over perception; over cognition, where that alone was asked."""
    parts = by_category(units)
    summed = PERCEPTION if "perception" in parts else COGNITION
    figures = [mme_figures(some) for task, some in parts.items() if task in summed]
    return sum(100 * task["acc"] + 100 * task["acc_plus"] for task in figures)


# ---- VSR ----


def ask_vsr(cfg, number, row):
    return question(
        str(number),
        row["image"] + "",
        'Based on the image, is this statement "True" or "False"? ' + row["caption"],
        'Respond with "True" or "False" directly.',
        {0: "False", 1: "True"}[row["label"]],
        row["relation"],
    )


def vsr_label(text, item):
    found = re.search(r"\b(true|false)\b", text, re.IGNORECASE)
    return found[1].capitalize() if found else None


BENCHMARKS = {
    "pope": Benchmark(
        read_pope,
        pope_label,
        score=score_pope,
        more=pope_figures,
        metric="mean F1 % of the splits",
    ),
    "mme": Benchmark(
        read_mme,
        mme_label,
        score=score_mme,
        more=mme_figures,
        metric="perception, of 2000",
    ),
    "vsr": Benchmark(
        # Of the two ways to split it the papers take the zero-shot one.
        partial(read_split, "zeroshot/{0}.jsonl {0}.jsonl", "test", ask_vsr),
        vsr_label,
    ),
}

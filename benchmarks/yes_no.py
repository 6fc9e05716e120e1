"""Yes or no, true or false: POPE, MME, VSR.

    (a picture of a street)   Is there a dog in the image?
                              Answer the question using a single word or phrase.
    label: no      a model: "No, there is none."      read as: no

Each reads an answer by its own rule, and the rules disagree: "None" is yes for POPE and no for MME.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.common import (
    SHORT,
    Benchmark,
    find_file,
    find_split,
    paper,
    question,
    read_each,
    split_files,
)
from support.cli import UserError, one_of
from support.io import reading

POPE_SPLITS = ("random", "popular", "adversarial")
POPE_SOURCES = ("coco", "gqa", "aokvqa", "gqa_pope_seem", "aokvqa_pope_seem")
# What LLaVA's one file of all splits adds to the ids
POPE_OFFSET = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}


def read_pope(cfg):
    """Each split numbers from 1; where several are asked, LLaVA's offsets tell them apart."""
    one_of("--split", cfg.split, POPE_SPLITS)
    splits = [cfg.split] if cfg.split else POPE_SPLITS
    files = {}
    if Path(cfg.data).is_file():
        named = [split for split in POPE_SPLITS if split in Path(cfg.data).name]
        files[(named or ["random"])[0]] = Path(cfg.data)
    else:
        for split in splits:
            names = [f"{source}_pope_{split}.json" for source in POPE_SOURCES]
            path = find_file(cfg, *names, optional=True)
            if path:
                files[split] = path
    if not files:
        find_file(cfg, f"coco_pope_{splits[0]}.json")  # says that it is missing

    for split, path in files.items():
        yield from read_each(path, lambda _, row, split=split: pope_question(row, split, len(files) > 1))


def pope_question(row, split, with_offset):
    id = int(row["question_id"]) + (POPE_OFFSET[split] if with_offset else 0)
    image = row["image"]
    if image.startswith("COCO_val2014"):
        image = f"val2014/{image}"
    if row["label"] not in ("yes", "no"):
        raise ValueError(f'"label" is {row["label"]!r}; it must be yes or no')
    # Two versions of POPE ask different questions under the same ids.
    return question(
        id,
        image,
        row["text"],
        SHORT,
        row["label"],
        category=split,
        asked=row["text"],
        candidates=("Yes", "No"),
    )


def pope_label(text, item):
    """One of the words No, no, not before the first period -> no; all else, nothing too -> yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_figures(units):
    """Yes is the positive class. A missing answer is wrong: a false no, or a false yes."""
    records = [record for (record,) in units]
    count = Counter((record["truth"], record["score"] == 1) for record in records)
    tp, fn = count["yes", True], count["yes", False]
    tn, fp = count["no", True], count["no", False]
    return {
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "accuracy": (tp + tn) / len(records),
        "precision": tp / max(tp + fp, 1),
        "recall": tp / max(tp + fn, 1),
        "f1": 2 * tp / max(2 * tp + fp + fn, 1),
        "yes_ratio": (tp + fp) / len(records),
    }


def units_by_category(units):
    found = defaultdict(list)
    for unit in units:
        category = unit[0]["category"]
        found[category if isinstance(category, str) else category[0]].append(unit)
    return found


def score_pope(units):
    """The mean F1 of the splits."""
    parts = [pope_figures(split) for split in units_by_category(units).values()]
    return 100 * sum(figures["f1"] for figures in parts) / len(parts)


PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def read_mme(cfg):
    """The release's folders (one text per picture), or the official tool's Your_Results/ (one text per
    subtask).
    """
    tasks = PERCEPTION + COGNITION
    root = find_file(cfg, "existence.txt", "code_reasoning.txt", "existence", "code_reasoning").parent
    asked = Counter()
    for task in tasks:
        for image, text, label in mme_lines(root, task):
            unit = f"{task}/{image}"
            asked[unit] += 1
            # LLaVA puts its own format prompt in the place of this sentence.
            text = re.sub(r"\s*Please answer yes or no\.\s*$", "", text)
            category = [task, "perception" if task in PERCEPTION else "cognition"]
            yield question(
                f"{unit}#{asked[unit]}", unit, text, SHORT, label, unit=unit, category=category, asked=text
            )
    odd = [unit for unit, n in asked.items() if n != 2]
    if odd:
        raise UserError(f"{root}: {odd[0]} has {asked[odd[0]]} question(s); every picture of MME has two")


def mme_lines(root, task):
    """(picture, question, label) of every line of a subtask."""
    texts = [root / f"{task}.txt", *sorted((root / task).glob("*.txt"))]
    texts += sorted((root / task / "questions_answers_YN").glob("*.txt"))
    for path in texts:
        if not path.is_file():
            continue
        with reading(path):
            for line in path.read_text(encoding="utf-8-sig").splitlines():
                cells = (
                    line.split("\t")
                    if path.stem == task
                    else [mme_picture(root / task, path), *line.split("\t")]
                )
                if line.strip():
                    image, text, label = cells[:3]
                    yield image.strip(), text, {"yes": "yes", "no": "no"}[label.strip().lower()]


def mme_picture(folder, text):
    names = [text.stem + end for end in (".jpg", ".png", ".jpeg")]
    there = [name for name in names if (text.parent / name).is_file() or (folder / "images" / name).is_file()]
    return (there or names)[0]


def mme_label(text, item):
    head = text.lower()[:4]
    return next((label for label in ("yes", "no") if label in head), None)


def mme_figures(units):
    """acc: the share of right questions; acc+: of pictures with both right."""
    n_right = [sum(record["score"] for record in pair) for pair in units]
    return {"acc": sum(n_right) / (2 * len(units)), "acc_plus": n_right.count(2) / len(units)}


def score_mme(units):
    """acc and acc+ in percent, summed over the subtasks of perception (2000 at most); where nothing of it was
    asked, over those of cognition (800)."""
    tasks = units_by_category(units)
    perception = [task for task in tasks if task in PERCEPTION]
    figures = [mme_figures(tasks[task]) for task in perception or tasks]
    return sum(100 * of_task["acc"] + 100 * of_task["acc_plus"] for of_task in figures)


def read_vsr(cfg):
    kinds = {}
    categories = find_file(cfg, "rel_meta_category_dict.txt", optional=True)
    for line in categories.read_text(encoding="utf-8").splitlines() if categories else ():
        kind, _, relations = line.partition(":")
        kinds |= {relation.strip(): kind.strip() for relation in relations.split(",")}

    def make(number, row):
        relation = row.get("relation")
        statement = f'Based on the image, is this statement "True" or "False"? {row["caption"]}'
        return question(
            str(row.get("id", number)),
            row["image"],
            statement,
            'Respond with "True" or "False" directly.',
            "True" if row["label"] == 1 else "False",
            category=kinds.get(relation, relation),
            candidates=("True", "False"),
        )

    _, path = find_split(cfg, split_files("{}.jsonl", "test dev train"))
    return read_each(path, make)


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
        paper=paper(
            85.9,
            85.9,
            **{"Prism-7B, accuracy": 88.12, "Prism-13B, accuracy": 88.07, "InternVL2-8B-MPO": 88.1},
        ),
    ),
    "mme": Benchmark(
        read_mme,
        mme_label,
        score=score_mme,
        more=mme_figures,
        metric="perception, of 2000",
        paper=paper(1510.7, 1531.3),
    ),
    "vsr": Benchmark(read_vsr, vsr_label, paper=paper(51.47, 69.07, 59.57, 72.18)),
}

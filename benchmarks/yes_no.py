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
    verdict,
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


def pope_label(text):
    """One of the words No, no, not before the first period -> no; all else, nothing too -> yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def judge_pope(item, text):
    return verdict(pope_label(text), item["truth"])


def pope_figures(records):
    """Yes is the positive class. A missing answer is wrong: a false no, or a false yes."""
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
        found[unit[0]["category"]].append(unit)
    return found


def pope_parts(units):
    splits = units_by_category(units)
    return {split: pope_figures([record for (record,) in splits[split]]) for split in splits}


def score_pope(units):
    """The mean F1 of the splits."""
    parts = pope_parts(units).values()
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
            yield question(
                f"{unit}#{asked[unit]}", unit, text, SHORT, label, unit=unit, category=task, asked=text
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


def mme_label(text):
    head = text.lower()[:4]
    if "yes" in head:
        return "yes"
    return "no" if "no" in head else "other"


def judge_mme(item, text):
    label = mme_label(text.replace("\t", " ").replace("\n", " "))
    return verdict(None if label == "other" else label, item["truth"])


def mme_parts(units):
    """acc: the share of right questions; acc+: of pictures with both right; and the sums of both."""
    parts = {}
    for task, pictures in units_by_category(units).items():
        n_right = [sum(record["score"] for record in pair) for pair in pictures]
        acc = sum(n_right) / (2 * len(pictures))
        acc_plus = n_right.count(2) / len(pictures)
        parts[task] = {"acc": acc, "acc_plus": acc_plus, "score": 100 * acc + 100 * acc_plus}
    for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        parts[name] = {"score": sum(parts[task]["score"] for task in tasks if task in parts)}
    return parts


def score_mme(units):
    """Perception, of 2000; where nothing of it was asked, Cognition, of 800."""
    parts = mme_parts(units)
    has_perception = any(task in parts for task in PERCEPTION)
    return parts["perception" if has_perception else "cognition"]["score"]


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


def judge_vsr(item, text):
    found = re.search(r"\b(true|false)\b", text, re.IGNORECASE)
    return verdict(found[1].capitalize() if found else None, item["truth"])


BENCHMARKS = {
    "pope": Benchmark(
        read_pope,
        judge_pope,
        score_pope,
        parts=pope_parts,
        metric="mean F1 % of the splits",
        paper=paper(
            85.9,
            85.9,
            **{"Prism-7B, accuracy": 88.12, "Prism-13B, accuracy": 88.07, "InternVL2-8B-MPO": 88.1},
        ),
    ),
    "mme": Benchmark(
        read_mme,
        judge_mme,
        score_mme,
        parts=mme_parts,
        metric="perception, of 2000",
        paper=paper(1510.7, 1531.3),
    ),
    "vsr": Benchmark(read_vsr, judge_vsr, paper=paper(51.47, 69.07, 59.57, 72.18)),
}

"""One letter of several options: ScienceQA, MMBench, SEED-Bench, AI2D; and TallyQA, which counts.

    (a picture of a brick)    Which is a solid?
                              A. water
                              B. brick
                              Answer with the option's letter from the given choices directly.
    label: B      a model: "B"

Accuracy: the share of questions that are answered with the label's letter. Every official script has its own
idea of which texts are a letter; the functions *_letter below are those.
  ScienceQA  arXiv:2209.09513. The papers quote questions with a picture alone, here the row `image context`
  MMBench    arXiv:2307.06281. Circular: a question counts if it is right in all rotations of its options
  SEED       arXiv:2307.16125. A video is asked by its middle frame; --split image leaves the videos out
  AI2D       arXiv:1603.07396. The test split. Raw pictures lack the letters that `letters drawn` questions
             speak of
  TallyQA    arXiv:1810.12440. The first number of an answer
"""

import base64
import csv
import io
import re
from functools import partial
from itertools import takewhile

from benchmarks.common import (
    LETTER,
    LETTERS,
    SHORT,
    Benchmark,
    count_in,
    find_file,
    find_splits,
    lettered,
    load_records,
    question,
    read_each,
    read_split,
)
from benchmarks.own import chosen_letter
from support.cli import one_of
from support.io import read_json, reading

# ---- ScienceQA ----


def read_scienceqa(cfg):
    splits = read_json(find_file(cfg, "pid_splits.json"))
    one_of("--split", cfg.split, list(splits))
    problems = read_json(find_file(cfg, "problems.json"))
    ids = splits[cfg.split or "test"]
    rows = [(f"problems.json, {id}", id, problems[str(id)]) for id in ids]
    return read_each(rows, ask_scienceqa)


def ask_scienceqa(id, row):
    hint = row["hint"]
    image = row["image"]
    context = f"Context: {hint}\n" if hint else ""
    # The official breakdown: a question counts under its subject, its grade and its context.
    category = [
        row["subject"],
        "grades 1-6" if int(row["grade"].removeprefix("grade")) <= 6 else "grades 7-12",
        hint and "text context",
        image and "image context",
        "" if hint or image else "no context",
    ]
    return question(
        id,
        image and f"images/{row['split']}/{id}/{image}",
        context + row["question"] + lettered(row["choices"]),
        LETTER,
        LETTERS[row["answer"]],
        category,
        row["choices"],
        asked=row["question"],
    )


def scienceqa_letter(text, item):
    """LLaVA's: the letter alone, `B. ...`, or exactly one `The answer is B` with a character behind it."""
    if re.match(r"[A-E](\Z|\. )", text):
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


# ---- MMBench ----

# Of one question the rows, in which the options are rotated, have numbers that differ by millions.
MMBENCH = (
    "mmbench_{0}_20230712.tsv mmbench_{0}_en_20231003.tsv MMBench_{1}_EN.tsv MMBench_{1}_EN_V11.tsv"
)
MMBENCH_CN = "mmbench_{0}_cn_20231003.tsv MMBench_{1}_CN.tsv MMBench_{1}_CN_V11.tsv"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def read_mmbench(files, suffix, cfg):
    _, path = find_splits(cfg, files, "dev test")[0]
    rows = load_records(path)
    pictures = {row["index"]: row["image"] for _, _, row in rows}

    def ask(key, row):
        index = int(float(row["index"]))
        hint = f"{row['hint']}\n" if row.get("hint") else ""
        choices = [row[letter] for letter in takewhile(row.get, "ABCD")]  # an empty cell ends them
        # Later releases keep a picture once, in one row of its group, and elsewhere that row's number.
        picture = pictures.get(row["image"], row["image"])
        return question(
            index,
            base64.b64decode(picture, validate=True),
            hint + row["question"] + lettered(choices),
            suffix,
            row.get("answer") or None,
            row.get("category"),
            choices,
            unit=index % 1_000_000,
            row=row,
        )

    return read_each(rows, ask)


def mmbench_letter(text, item):
    """VLMEvalKit's exact matching -> a letter, Z: that none fits, or None, where a judge would be asked."""
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    choices = item["choices"]
    letters = LETTERS[: len(choices)]

    # A letter that stands alone, near the end.
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    there = [letter for letter in letters if letter in words]
    if len(there) == 1 and words.index(there[0]) > len(words) - 5:
        return there[0]
    if not there and "Z" in words:
        return "Z"
    found = re.search(r"answer\s+is\s+\**([ABCD])", text, re.IGNORECASE)
    if found and found[1].upper() in letters:
        return found[1].upper()

    # The text of one option, in an answer that is not much longer than all of them.
    named = [letter for letter, choice in zip(letters, choices) if choice.lower() in text.lower()]
    is_short = len(text) <= 2 * len("".join(choices))
    return named[0] if is_short and len(named) == 1 else None


def score_mmbench(units):
    """Circular: a question counts if all of its rows are answered right."""
    return 100 * sum(all(record["score"] for record in unit) for unit in units) / len(units)


def submit_mmbench(items, records):
    """The server's table, without six of the columns and with `prediction` as the seventh.

    It wants .xlsx: pandas.read_csv("mmbench.tsv", sep="\\t").to_excel("mmbench.xlsx", index=False)
    """
    dropped = "hint category source image comment l2-category".split()
    columns = [name for name in items[0]["row"] if name not in dropped]
    columns.insert(6, "prediction")
    sheet = io.StringIO()
    table = csv.DictWriter(sheet, columns, delimiter="\t", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for item, record in zip(items, records):
        table.writerow(item["row"] | {"prediction": record["answer"] or ""})
    return "mmbench.tsv", sheet.getvalue().encode(errors="replace").decode()  # half surrogates


# ---- SEED-Bench ----


SEED_KINDS = (
    "Scene Understanding, Instance Identity, Instance Attributes, Instance Location, Instances Counting, "
    "Spatial Relation, Instance Interaction, Visual Reasoning, Text Understanding, Action Recognition, "
    "Action Prediction, Procedure Understanding"
)


def ask_seed(cfg, key, row):
    id = str(row["question_id"])
    kind = row["question_type_id"]
    media = "image"
    image = f"SEED-Bench-image/{row['data_id']}"
    if kind > 9:
        media = "video"
        image = f"SEED-Bench-video-image/{kind}_{id}.png"  # its middle frame
    if cfg.split not in ("all", media):
        return None
    choices = [row[f"choice_{letter}"] for letter in "abcd"]
    text = row["question"] + lettered(choices)
    category = [SEED_KINDS.split(", ")[kind - 1], media]
    return question(id, image, text, LETTER, row["answer"] + "", category, choices)


def seed_letter(text, item):
    """LLaVA compares the whole text."""
    return text if text in list("ABCD") else None


# ---- AI2D ----


def read_ai2d(cfg):
    """A file of questions for each picture of the test split."""
    _, path = find_splits(cfg, "ai2d_{}_ids.csv", "test")[0]
    folder = find_file(cfg, "questions")
    with reading(path):
        ids = path.read_text(encoding="utf-8-sig").split()
    for id in ids:
        rows = load_records(folder / f"{id}.png.json", "questions")
        yield from read_each(rows, partial(ask_ai2d, f"images/{id}.png"))


def ask_ai2d(image, text, row):
    choices = row["answerTexts"]
    return question(
        row["questionId"],
        image,
        text + lettered(choices),
        LETTER,
        LETTERS[row["correctAnswer"]],
        "letters drawn" if row["abcLabel"] else "no letters drawn",
        choices,
    )


def ai2d_letter(text, item):
    letter = chosen_letter(text)
    return letter and letter.upper()


# ---- TallyQA ----


def ask_tallyqa(cfg, key, row):
    return question(
        row["question_id"],
        row["image"] + "",
        row["question"],
        SHORT,
        row["answer"],
        "complex" if row.get("issimple") is False else "simple",
    )


CIRCULAR = {"score": score_mmbench, "submit": submit_mmbench, "metric": "circular accuracy %"}
BENCHMARKS = {
    "scienceqa": Benchmark(read_scienceqa, scienceqa_letter),
    "mmbench": Benchmark(partial(read_mmbench, MMBENCH, LETTER), mmbench_letter, **CIRCULAR),
    "mmbench-cn": Benchmark(
        partial(read_mmbench, MMBENCH_CN, "请直接回答选项字母。"), mmbench_letter, **CIRCULAR
    ),
    "seed-bench": Benchmark(
        partial(read_split, "SEED-Bench.json", "all image video", ask_seed, under="questions"), seed_letter
    ),
    "ai2d": Benchmark(read_ai2d, ai2d_letter),
    "tallyqa": Benchmark(partial(read_split, "{}.json", "test train", ask_tallyqa), count_in),
}

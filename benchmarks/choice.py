"""One letter of several options: ScienceQA, MMBench, SEED-Bench, AI2D; and TallyQA, which counts.

    (a picture of a brick)    Which is a solid?
                              A. water
                              B. brick
                              Answer with the option's letter from the given choices directly.
    label: B      a model: "B"

Every official script has its own idea of which texts are a letter; each reader below is one of them.
"""

import base64
import csv
import io
import re
from functools import partial

from benchmarks.common import (
    LETTER,
    LETTERS,
    SHORT,
    Benchmark,
    count_in,
    data_folder,
    find_file,
    find_split,
    lettered,
    load_records,
    main_file,
    paper,
    percent_right,
    question,
    read_each,
    split_files,
)
from support.cli import UserError, one_of
from support.io import reading

# ---- ScienceQA ----


def read_scienceqa(cfg):
    split = cfg.split or "test"
    path = find_file(cfg, "problems.json")
    problems = {id: (where, row) for where, id, row in load_records(path)}
    splits = {name: ids for _, name, ids in load_records(find_file(cfg, "pid_splits.json"))}
    one_of("--split", split, list(splits))
    for id in splits[split]:
        where, row = problems[str(id)]
        with reading(where):
            made = scienceqa_question(str(id), row, row.get("split", split), cfg.family)
        yield made


def scienceqa_question(id, row, split, family):
    hint, image, grade = row.get("hint"), row.get("image"), row.get("grade", "")
    context = ""
    if hint:
        context = f"{hint}\n" if family == "internvl" else f"Context: {hint}\n"

    # The official breakdown: a question counts under its subject, its context and its grade.
    lower_grades = [f"grade{k}" for k in range(1, 7)]
    category = [row.get("subject", ""), "grades 1-6" if grade in lower_grades else "grades 7-12"]
    category += ["text context"] * bool(hint) + ["image context"] * bool(image)
    if not hint and not image:
        category.append("no context")

    path = f"images/{split}/{id}/{image}" if image else None
    text = context + row["question"] + lettered(row["choices"])
    return question(
        id, path, text, LETTER, LETTERS[row["answer"]], category=category, n_choices=len(row["choices"])
    )


def scienceqa_letter(text, item):
    """LLaVA's: the letter alone, `B. ...`, or exactly one `The answer is B` with a character behind it."""
    if text in list("ABCDE"):
        return text
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


# ---- MMBench ----

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def read_mmbench(chinese, cfg):
    """Four rows to a question, its options rotated; the row numbers of one question differ by millions."""
    names = []
    for split in [cfg.split] if cfg.split else ["dev", "test"]:
        if chinese:
            names += [f"mmbench_{split}_cn_20231003.tsv", f"MMBench_{split.upper()}_CN.tsv"]
        else:
            names += [f"mmbench_{split}_20230712.tsv", f"mmbench_{split}_en_20231003.tsv"]
            names.append(f"MMBench_{split.upper()}_EN.tsv")
    path = main_file(cfg, *names)
    pictures = {row["index"]: row["image"] for _, _, row in load_records(path)}
    return read_each(path, lambda _, row: mmbench_question(row, pictures, chinese))


def mmbench_question(row, pictures, chinese):
    row = {name: "" if cell in ("nan", "NaN") else cell for name, cell in row.items()}
    choices = {}
    for letter in "ABCD":
        if not row.get(letter):
            break  # an empty cell ends the options
        choices[letter] = row[letter]

    # Later releases keep a picture once, in one row of its group, and elsewhere that row's number.
    image = row["image"]
    image = base64.b64decode(pictures.get(image, image), validate=True)

    index = int(float(row["index"]))
    hint = f"{row['hint']}\n" if row.get("hint") else ""
    suffix = "请直接回答选项字母。" if chinese else LETTER
    text = hint + row["question"] + lettered(choices.values())
    return question(
        index,
        image or None,
        text,
        suffix,
        row.get("answer") or None,
        unit=index % 1_000_000,
        category=row.get("category"),
        choices=choices,
        row=row,
    )


def mmbench_letter(text, item):
    """VLMEvalKit's exact matching -> a letter, Z (says that none fits), or None (there a judge would be
    asked).
    """
    options = item["choices"]
    if any(refusal in text for refusal in REFUSALS):
        return "Z"

    # A letter that stands alone, near the end.
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    there = [letter for letter in options if letter in words]
    if len(there) == 1 and words.index(there[0]) > len(words) - 5:
        return there[0]
    if not there and "Z" in words:
        return "Z"
    found = re.search(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", text, re.IGNORECASE)
    if found and found[1].upper() in options:
        return found[1].upper()

    # The text of one option, in an answer that is not much longer than all of them.
    text = text.lower()
    if len(text) <= 2 * sum(len(option) for option in options.values()):
        there = [letter for letter, option in options.items() if option.lower() in text]
        if len(there) == 1:
            return there[0]
    return None


def score_mmbench(units):
    """Circular: a question counts if all of its rows, the options rotated, are answered right."""
    return 100 * sum(all(record["score"] for record in unit) for unit in units) / len(units)


def mmbench_more(units):
    """The first rotation alone; it is 8 to 20 points higher, and no official figure."""
    first = [[min(unit, key=lambda record: record["id"])] for unit in units]
    return {"first pass only": percent_right(first)}


def submit_mmbench(items, records):
    """The server's table, without six of the columns and with `prediction` as the seventh.

    It wants .xlsx: pandas.read_csv("mmbench.tsv", sep="\\t").to_excel("mmbench.xlsx", index=False)
    """
    dropped = ("hint", "category", "source", "image", "comment", "l2-category")
    columns = [name for name in items[0]["row"] if name not in dropped]
    columns.insert(6, "prediction")
    sheet = io.StringIO()
    table = csv.DictWriter(sheet, columns, delimiter="\t", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for item, record in zip(items, records):
        table.writerow(item["row"] | {"prediction": record["answer"] or ""})
    return "mmbench.tsv", sheet.getvalue()


# ---- SEED-Bench ----


def read_seed(cfg):
    path = main_file(cfg, "SEED-Bench.json")
    kinds = {number: name for _, name, number in load_records(path, under="question_type")}

    def make(_, row):
        id, kind = str(row["question_id"]), row["question_type_id"]
        media = row.get("data_type") or ("video" if kind > 9 else "image")
        if media == "video":
            image = f"SEED-Bench-video-image/{kind}_{id}.png"  # its middle frame
        else:
            image = f"SEED-Bench-image/{row['data_id']}"
        text = row["question"] + lettered(row[f"choice_{letter}"] for letter in "abcd")
        return question(
            id,
            image,
            text,
            LETTER,
            row.get("answer"),
            category=[kinds.get(kind, str(kind)), media],
            family=cfg.family,
        )

    return read_each(path, make, under="questions")


def seed_letter(text, item):
    """LLaVA compares the whole text, InternVL its first character."""
    letter = text[:1] if item["family"] == "internvl" else text
    return letter if letter in list("ABCD") else None


# ---- AI2D ----


def read_ai2d(cfg):
    """Raw pictures: of `letters drawn` questions the letters are missing, which lowers the score."""
    folder = data_folder(cfg)
    root = folder if (folder / "questions").is_dir() else folder / "ai2d"
    if not (root / "questions").is_dir():
        raise UserError(
            f"{cfg.data}: no folder questions/ with <n>.png.json in it; unpack ai2d-all.zip there"
        )
    split = cfg.split or "test"
    one_of("--split", split, ["test", "val", "all"])
    test_ids = set()
    if split != "all":
        ids = find_file(cfg, "ai2d_test_ids.csv")
        with reading(ids):
            test_ids = set(ids.read_text(encoding="utf-8-sig").split())

    for path in sorted((root / "questions").glob("*.json"), key=lambda path: (len(path.name), path.name)):
        in_test = path.name.split(".")[0] in test_ids
        if split == "all" or in_test == (split == "test"):
            image = path.name.removesuffix(".json")
            yield from read_each(path, partial(ai2d_question, image), under="questions")


def ai2d_question(image, text, row):
    choices = row["answerTexts"]
    category = "letters drawn" if row.get("abcLabel") else "no letters drawn"
    return question(
        row["questionId"],
        f"images/{image}",
        text + lettered(choices),
        LETTER,
        LETTERS[row["correctAnswer"]],
        category=category,
        n_choices=len(choices),
        candidates=tuple("ABCD"),
    )


def option_letter(text, item):
    """The letter alone, or `B.`, `(B)`, `B. leaf`, `B) leaf`, `B: leaf` -> letter or None."""
    found = re.match(r"\(?([A-Z])(?:$|[.):](?:\s|$))", text.strip())
    return found[1] if found and found[1] in LETTERS[: item["n_choices"]] else None


# ---- TallyQA ----


def read_tallyqa(cfg):
    """By likelihood Prismatic asks for one of sixteen letters, A. 0 to P. 15; else a number is wanted."""
    letters = cfg.likelihood == "yes"

    def make(_, row):
        text = row["question"] + (lettered(range(16)) if letters else "")
        category = "complex" if row.get("issimple") is False else "simple"
        return question(
            row["question_id"],
            row["image"],
            text,
            LETTER if letters else SHORT,
            row["answer"],
            category=category,
            candidates=tuple(LETTERS[:16]),
        )

    _, path = find_split(cfg, split_files("{}.json", "test train"))
    return read_each(path, make)


def tallyqa_count(text, item):
    is_letter = re.fullmatch("[A-P]", text)
    return LETTERS.index(text) if is_letter else count_in(text)


MMBENCH = {
    "parse": mmbench_letter,
    "score": score_mmbench,
    "more": mmbench_more,
    "submit": submit_mmbench,
    "metric": "circular accuracy %",
}
BENCHMARKS = {
    "scienceqa": Benchmark(
        read_scienceqa,
        scienceqa_letter,
        paper=paper(llava13=74.39, **{"LLaVA-1.5-7B, IMG": 66.8, "LLaVA-1.5-13B, IMG": 71.6}),
    ),
    "mmbench": Benchmark(
        partial(read_mmbench, False), paper=paper(64.3, 67.7, **{"InternVL2.5-8B-MPO, v1.1": 82.4}), **MMBENCH
    ),
    "mmbench-cn": Benchmark(partial(read_mmbench, True), paper=paper(58.3, 63.6), **MMBENCH),
    "seed-bench": Benchmark(read_seed, seed_letter, paper=paper(58.6, 61.6)),
    "ai2d": Benchmark(
        read_ai2d, option_letter, paper=paper(54.10, 57.13, 55.65, 57.96, **{"InternVL2.5-8B-MPO": 84.5})
    ),
    "tallyqa": Benchmark(read_tallyqa, tallyqa_count, paper=paper(62.06, 64.83, 66.70, 70.41)),
}

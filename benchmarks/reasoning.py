"""Questions that want reasoning, asked directly and with a chain of thought: MathVista, M3CoT.

    (a bar chart)             Hint: Please answer the question requiring an integer answer and provide
                              the final value, e.g., 1, 2, 3, at the end.
                              Question: How many bars are above 5?
    answer: 3      a model: "Three bars are higher, so 3."      extracted: 3

Accuracy: the share of answers that, once extracted, are the label.
  MathVista  arXiv:2310.02255. Its authors let GPT-4 extract the answer. Here a rule does it, unless
             --predictions brings an `extraction`: their own short cuts, then the last option letter or
             number. Compare such a figure with its like only
  M3CoT      arXiv:2405.16473. A letter, for which is asked once more after the chain of thought
"""

import re
from pathlib import Path

from benchmarks.common import (
    COT,
    LETTER,
    LETTERS,
    SHORT,
    Benchmark,
    find_file,
    find_split,
    lettered,
    load_records,
    question,
    read_each,
    read_split,
    split_files,
)
from support.cli import one_of

IN_BRACKETS = "\n({}) {}"  # one option

# ---- MathVista ----

HINTS = {
    "choice": "and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    "float1": "requiring a floating-point number with one decimal place and provide the final value, "
    "e.g., 1.2, 1.3, 1.4, at the end.",
    "float2": "requiring a floating-point number with two decimal places and provide the final value, "
    "e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "requiring a Python list as an answer and provide the final list, "
    "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}


def read_mathvista(cfg):
    prompts = find_file(cfg, "query.json", optional=True)
    queries = {str(id): text for _, id, text in load_records(prompts)} if prompts else {}

    def ask(split, id, row):
        query = queries.get(str(id)) or row.get("query") or mathvista_query(row)
        # A chain of thought has a frame of its own in the place of the hint.
        bare = query.partition("\n")[2] if query.startswith("Hint: ") else query.removesuffix(f"\n{SHORT}")
        more = {
            "category": (row.get("metadata") or {}).get("task"),
            "asked": row["question"],
            "cot": COT + bare,
            "choices": row.get("choices") or None,
            "question_type": row["question_type"],
            "answer_type": row["answer_type"],
            "precision": row.get("precision"),
        }
        return question(str(id), row["image"] + "", query, "", row.get("answer") or None, **more)

    return read_split(cfg, split_files("{}.json", "testmini test"), ask)


def mathvista_query(row):
    hint = row["answer_type"]
    if row["question_type"] == "multi_choice":
        hint = "choice"
    elif hint == "float":
        hint = f"float{int(row.get('precision') or 1)}"
    query = f"Hint: Please answer the question {HINTS[hint]}\nQuestion: {row['question']}"
    if row.get("unit"):
        query += f" (Unit: {row['unit']})"
    if row.get("choices"):
        query += "\nChoices:" + lettered(row["choices"], IN_BRACKETS)
    return query


def mathvista_extract(item, text):
    """What the official pipeline asks GPT-4 for, by rule."""
    text = text.strip()
    choices, kind = item["choices"], item["answer_type"]
    is_choice = item["question_type"] == "multi_choice"
    is_number = kind in ("integer", "float") and mathvista_normal(text, item) is not None
    if not text or is_number or (is_choice and text in choices):
        return text
    if found := re.search(r'The answer is "(.*)"\.', text):
        return found[1]

    # So far the official short cuts. Now the last option letter, list or number.
    if is_choice:
        letters = LETTERS[: len(choices)]
        found = re.findall(rf"(?i:\(([{letters}])\))", text) or re.findall(rf"\b([{letters}])\b", text)
        return f"({found[-1]})" if found else text
    form = r"\[[^\[\]]*\]" if kind == "list" else r"-?\d+(?:\.\d+)?"
    if kind != "list":
        text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    return (re.findall(form, text) or [""])[-1]


def mathvista_normal(text, item):
    """The official normalisation: the option's text, or a number rounded as asked. None: it failed."""
    if item["question_type"] == "multi_choice":
        return nearest_choice(text.strip(), item["choices"])
    try:
        if item["answer_type"] == "integer":
            return str(int(float(text)))
        if item["answer_type"] == "float":
            return str(round(float(text), int(item["precision"])))
    except (ValueError, TypeError, OverflowError):
        return None
    return text


def nearest_choice(text, choices):
    """A letter becomes its option, other text the option that is the fewest edits away."""
    found = re.findall(r"\(([a-zA-Z])\)", text)
    if found:
        text = found[0].upper()
    if len(text) == 1 and text in LETTERS[: len(choices)]:
        return choices[LETTERS.index(text)]
    return min(choices, key=lambda choice: edit_distance(text, choice))


def edit_distance(a, b):
    """Levenshtein's: row[j] holds the edits between what is read of a and the first j letters of b."""
    row = range(len(b) + 1)
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (x != y)))
    return row[-1]


# ---- M3CoT ----


def read_m3cot(cfg):
    """Without test.jsonl the authors' result file will do, whose lines carry choices and answer too."""
    files = split_files("{}.jsonl", "test dev") | {"validation": ["dev.jsonl"]}
    one_of("--split", cfg.split, list(files))
    path = cfg.predictions
    if not path or Path(cfg.data).is_file() or find_file(cfg, "test.jsonl", "dev.jsonl", optional=True):
        _, path = find_split(cfg, files)
    seen = set()

    def ask(key, row):
        if row["id"] in seen:
            return None  # the first record of an id counts
        seen.add(row["id"])
        return ask_m3cot(row, cfg.family)

    return read_each(load_records(path), ask)


def ask_m3cot(row, family):
    id, choices, truth = row["id"], row["choices"], row.get("answer")
    image = row.get("image_path") or f"images/{row.get('image_id') or id}.png"
    text = row.get("question") or ""
    context = f"{row['context']}\n" if row.get("context") else ""
    more = {"category": [row["domain"], row["topic"]], "asked": text, "choices": choices, "family": family}
    if family == "internvl":
        return question(id, image, context + text + lettered(choices), LETTER, truth, **more)

    if context:
        context = f"[Context]\n{context}"
    text = f"{context}[Question]\n{text}\n[Choices]" + lettered(choices, IN_BRACKETS)
    letters = ",".join(f'"({letter})"' for letter in LETTERS[: len(choices)])
    more["cot"] = f"{text}\n\nLet's think step-by-step!"
    more["then"] = f"Please select the correct answer from the [{letters}] options."
    return question(id, image, text, "", truth, **more)


def m3cot_letter(text, item):
    return (internvl_letter if item["family"] == "internvl" else official_letter)(text, item["choices"])


def official_letter(text, choices):
    """The official judge of the last reply. Late matches win; even the article "a" may become option A."""
    if "[Answer]" in text:
        text = text.rsplit("[Answer]", 1)[1].split("[Rationale]")[0].split("[Context]")[0]
    letters = LETTERS[: len(choices)]
    words = re.sub(r"[\n.,!?]", " ", text).split(" ")
    tries = [
        re.findall(r"\(([A-Za-z])\)", text),
        [letter for letter, choice in zip(letters, choices) if choice.lower() in text.lower()],
        [letter for letter in letters if letter in words],
        [letter for letter in letters if letter.lower() in words],
    ]
    return next((found[-1].upper() for found in tries if found), None)


def internvl_letter(text, choices):
    """InternVL's: a lone character, a leading letter, an option's text, `A.`, `(A)`; the first of these."""
    text = text.strip()
    letters = LETTERS[: len(choices)]
    if len(text) == 1:
        return text if text in LETTERS else None
    if text and text[0] in letters:
        return text[0]
    for form in "{1}", "{0}.", "({0})":
        for letter, choice in zip(letters, choices):
            if form.format(letter, choice) in text:
                return letter
    return None


BENCHMARKS = {
    "mathvista": Benchmark(
        read_mathvista,
        mathvista_normal,
        extract=mathvista_extract,
        max_new_tokens=128,
        metric="accuracy %, extracted by rule where no extraction was given",
        paper="InternVL2.5-8B-MPO 68.9",
    ),
    "m3cot": Benchmark(read_m3cot, m3cot_letter, max_new_tokens=128, paper="InternVL2-8B-MPO 79.2"),
}

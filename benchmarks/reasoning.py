"""Questions that want reasoning, asked directly and with a chain of thought: MathVista, M3CoT.

    (a bar chart)             Hint: Please answer the question requiring an integer answer and provide
                              the final value, e.g., 1, 2, 3, at the end.
                              Question: How many bars are above 5?
    answer: 3      a model: "Three bars are higher, so 3."      extracted: 3

Accuracy: the share of answers that, once extracted, are the label.
  MathVista  arXiv:2310.02255. Its authors let GPT-4 extract the answer. Here a rule does it, unless
             --predictions brings an `extraction`: their own short cuts, then the last option letter or
             number. Compare such a figure with its like only
  M3CoT      arXiv:2405.16473. Asked as InternVL asks it; its authors ask for the letter in a second turn
"""

import re
from functools import partial
from pathlib import Path

from benchmarks.common import (
    COT,
    LETTER,
    LETTERS,
    Benchmark,
    lettered,
    question,
    read_split,
)

# ---- MathVista ----


def ask_mathvista(cfg, id, row):
    query = row["query"]
    return question(
        str(id),
        row["image"] + "",
        query,
        "",
        row["answer"] or None,
        row["metadata"]["task"],
        row["choices"],
        asked=row["question"],
        # A chain of thought has a frame of its own in the place of the hint.
        cot=COT + re.sub("^Hint: .*\n", "", query),
        **{name: row[name] for name in ("question_type", "answer_type", "precision")},
    )


def mathvista_answer(text, item):
    if not item.get("is_extracted"):
        text = mathvista_extract(item, text)
    return mathvista_normal(text, item)


def mathvista_extract(item, text):
    """What the official pipeline asks GPT-4 for, by rule."""
    text = text.strip()
    choices = item["choices"]
    kind = item["answer_type"]
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
    form = r"\[[^\[\]]*\]"  # a list
    if kind != "list":
        form = r"-?\d+(?:\.\d+)?"
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
    if text in list(LETTERS[: len(choices)]):
        return choices[LETTERS.index(text)]
    return min(choices, key=lambda choice: edit_distance(text, choice))


def edit_distance(a, b):
    """Levenshtein's: row[j] holds the edits between what is read of a and the first j letters of b."""
    row = range(len(b) + 1)
    for i, x in enumerate(a, 1):
        above = row
        row = [i]
        for j, y in enumerate(b):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (x != y)))
    return row[-1]


# ---- M3CoT ----


def read_m3cot(cfg):
    """Without test.jsonl the authors' result file will do, whose lines carry choices and answer too."""
    splits = f"test dev {Path(cfg.predictions).stem}"
    seen = set()

    def ask(cfg, key, row):
        id = row["id"]
        if id in seen:
            return None  # the first record of an id counts
        seen.add(id)
        choices = row["choices"]
        asked = row.get("question", "")
        context = f"{row['context']}\n" if row.get("context") else ""
        return question(
            id,
            f"images/{row.get('image_id') or id}.png",
            context + asked + lettered(choices),
            LETTER,
            row.get("answer"),
            [row["domain"], row["topic"]],
            choices,
            asked=asked,
        )

    return read_split("{}.jsonl", splits, ask, cfg)


def m3cot_letter(text, item):
    """The official judge of the last reply. Late matches win; even the article "a" may become option A."""
    choices = item["choices"]
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


BENCHMARKS = {
    "mathvista": Benchmark(
        partial(read_split, "{}.json", "testmini test", ask_mathvista),
        mathvista_answer,
        max_new_tokens=128,
        metric="accuracy %, extracted by rule where no extraction was given",
    ),
    "m3cot": Benchmark(read_m3cot, m3cot_letter, max_new_tokens=128),
}

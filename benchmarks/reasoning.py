"""Questions that want reasoning, asked directly and with a chain of thought: MathVista, M3CoT.

    (a bar chart)             Hint: Please answer the question requiring an integer answer and provide
                              the final value, e.g., 1, 2, 3, at the end.
                              Question: How many bars are above 5?
    answer: 3      a model: "Three bars are higher, so 3."      extracted: 3

MathVista's authors let GPT-4 extract the answer. Here a rule does it, unless --predictions brings an
`extraction`: their own short cuts, then the last option letter or the last number. Compare such a figure with
its like only.
"""

import re
from functools import partial

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
    main_file,
    question,
    read_each,
    split_files,
)

bracketed = partial(lettered, form="\n({}) {}")

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
    _, path = find_split(cfg, split_files("{}.json", "testmini test"))
    prompts = find_file(cfg, "query.json", optional=True)
    queries = {str(id): text for _, id, text in load_records(prompts)} if prompts else {}
    return read_each(path, lambda id, row: mathvista_question(str(id), row, queries))


def mathvista_question(id, row, queries):
    choices, kind, truth = row.get("choices"), row["question_type"], row.get("answer") or None
    choices = [choice + "" for choice in choices] if kind == "multi_choice" else choices
    query = queries.get(id) or row.get("query") or mathvista_query(row)

    # A chain of thought has a frame of its own in the place of the hint.
    bare = query.partition("\n")[2] if query.startswith("Hint: ") else query.removesuffix(f"\n{SHORT}")
    metadata = row.get("metadata") or {}
    return question(
        id,
        row["image"],
        query,
        "",
        truth,
        category=metadata.get("task"),
        cot=COT + bare,
        choices=choices,
        kind=kind,
        answer_type=row["answer_type"],
        precision=row.get("precision"),
    )


def mathvista_query(row):
    hint = row["answer_type"]
    if row["question_type"] == "multi_choice":
        hint = "choice"
    elif hint == "float":
        hint = f"float{int(row.get('precision') or 1)}"
    query = (
        f"Hint: Please answer the question {HINTS.get(hint, HINTS['integer'])}\nQuestion: {row['question']}"
    )
    if row.get("unit"):
        query += f" (Unit: {row['unit']})"
    if row.get("choices"):
        query += "\nChoices:" + bracketed(row["choices"])
    return query


def mathvista_extract(item, text):
    """What the official pipeline asks GPT-4 for, by rule."""
    text = text.strip()
    kind = item["answer_type"]
    if not text or is_number(text, kind) or (item["kind"] == "multi_choice" and text in item["choices"]):
        return text
    found = re.search(r'The answer is "(.*)"\.', text)
    if found:
        return found[1]

    # So far the official short cuts. Now the last option letter, list or number.
    if item["kind"] == "multi_choice":
        letters = LETTERS[: len(item["choices"])]
        found = re.findall(rf"\(([{letters}{letters.lower()}])\)", text) or re.findall(
            rf"\b([{letters}])\b", text
        )
        return f"({found[-1]})" if found else text
    if kind == "list":
        found = re.findall(r"\[[^\[\]]*\]", text)
    else:
        found = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return found[-1] if found else ""


def is_number(text, kind):
    if kind not in ("integer", "float"):
        return False
    try:
        int(text) if kind == "integer" else float(text)
    except ValueError:
        return False
    return True


def mathvista_normal(text, item):
    """The official normalisation: the option's text, or a number rounded as asked. None: it failed."""
    if item["kind"] == "multi_choice":
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
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            replaced = diagonal + (x != y)
            diagonal = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, replaced)
    return row[-1]


# ---- M3CoT ----


def read_m3cot(cfg):
    """test.jsonl; without it the authors' result file, whose lines carry choices and answer too."""
    seen = set()

    def make(_, row):
        if row["id"] in seen:
            return None  # the first record of an id counts
        seen.add(row["id"])
        return m3cot_question(row, cfg.family)

    split = {"validation": "dev"}.get(cfg.split, cfg.split) or "test"
    name = f"{split}.jsonl"
    if cfg.predictions and not find_file(cfg, name, optional=True):
        return read_each(cfg.predictions, make)
    return read_each(main_file(cfg, name), make)


def m3cot_question(row, family):
    choices = [choice + "" for choice in row["choices"]]
    image = row.get("image_path") or f"images/{row.get('image_id') or row['id']}.png"
    text, context = row.get("question") or "", row.get("context")
    more = {"category": [row["domain"], row["topic"]], "choices": choices, "family": family}
    if family == "internvl":
        text = (f"{context}\n" if context else "") + text + lettered(choices)
        return question(row["id"], image, text, LETTER, row.get("answer"), **more)

    text = (
        (f"[Context]\n{context}\n" if context else "") + f"[Question]\n{text}\n[Choices]" + bracketed(choices)
    )
    letters = ",".join(f'"({letter})"' for letter in LETTERS[: len(choices)])
    more["cot"] = f"{text}\n\nLet's think step-by-step!"
    more["then"] = f"Please select the correct answer from the [{letters}] options."
    return question(row["id"], image, text, "", row.get("answer"), **more)


def m3cot_letter(text, item):
    return (internvl_letter if item["family"] == "internvl" else official_letter)(text, item["choices"])


def official_letter(text, choices):
    """The official judge of the last reply. Late matches win; even the article "a" may become option A."""
    if "[Answer]" in text:
        text = text.rsplit("[Answer]", 1)[1].split("[Rationale]")[0].split("[Context]")[0]
    letters = LETTERS[: len(choices)]
    found = re.findall(r"\(([A-Za-z])\)", text)
    if found:
        return found[-1].upper()
    found = [letter for letter, choice in zip(letters, choices) if choice.lower() in text.lower()]
    if found:
        return found[-1]
    words = re.sub(r"[\n.,!?]", " ", text).split(" ")
    for case in letters, letters.lower():
        found = [letter for letter in case if letter in words]
        if found:
            return found[-1].upper()
    return None


def internvl_letter(text, choices):
    """InternVL's: a lone character, a leading letter, an option's text, `A.`, `(A)`; the first of these."""
    text = text.strip()
    letters = LETTERS[: len(choices)]
    if len(text) == 1:
        return text if text in LETTERS else None
    if text and text[0] in letters:
        return text[0]
    for form in "{choice}", "{letter}.", "({letter})":
        for letter, choice in zip(letters, choices):
            if form.format(letter=letter, choice=choice) in text:
                return letter
    return None


BENCHMARKS = {
    "mathvista": Benchmark(
        read_mathvista,
        mathvista_normal,
        extract=mathvista_extract,
        max_new_tokens=128,
        metric="accuracy %, extracted by rule where no extraction was given",
        paper={"InternVL2.5-8B-MPO": 68.9},
    ),
    "m3cot": Benchmark(read_m3cot, m3cot_letter, max_new_tokens=128, paper={"InternVL2-8B-MPO": 79.2}),
}

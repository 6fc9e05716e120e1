"""Somebody else's answers, for --predictions: JSON or JSON lines, rows of an id and a text.

    {"question_id": 42000, "prompt": "What color is it?", "text": "Red."}     LLaVA's form, and ours
    {"questionId": "201", "prediction": "red"}                                GQA's
    {"42000": "Red."}                                                         ids as keys do as well

A row answers the question that has its id; the name of a picture will do where its question stands beside it
(LLaVA's files of TextVQA and MME). Whenever a row has a question, it must be the one that was asked: two
versions of POPE have other questions under the same ids. POPE's own files have no ids, but a row for each
question, in order.
"""

import math
import re
from collections import defaultdict
from pathlib import Path

from benchmarks.common import load_records
from support.cli import UserError

ID_KEYS = "question_id questionId index pid id image".split()
SHOWN_KEYS = "prompt query question".split()  # what was asked; MathVista's own files have it in `query`
TEXT_KEYS = "text prediction response answer output".split()


def match_predictions(bench, items, path):
    """-> {question id: {"answer", ...}}"""
    known = defaultdict(list)  # {name: the questions that go by it}
    for item in items:
        if isinstance(item["image"], str):
            for name in {item["image"], Path(item["image"]).stem}:
                known[name].append(item)
    for k, item in enumerate(items):
        known |= {name: [item] for name in (str(item["id"]), item.get("also"), k)}

    answers = {}
    rows = load_records(path)
    for where, key, row in rows:
        row = row if isinstance(row, dict) else {"text": row}
        messages = row.get("messages")
        if isinstance(messages, list):  # M3CoT's: a conversation
            said = messages or [""]
            row = {"prompt": said[0]} | row | {"text": str(said[-1])}
        names = texts_of(row, ID_KEYS)
        shown = next(filter(None, texts_of(row, SHOWN_KEYS)), "")
        if isinstance(key, str):
            names = [key, *names]
        elif not names and shown and len(rows) == len(items):
            names = [key]  # its place
        item = pick_question(where, names, shown, known, answers)
        if item["id"] not in answers:
            answers[item["id"]] = read_prediction(where, row, bench)
        elif "messages" not in row:  # of M3CoT's own files the first record of an id counts
            raise UserError(f"{where}: a second answer to {item['id']!r}; each question is answered once")

    missing = [item["id"] for item in items if item["id"] not in answers]
    if not answers:
        raise UserError(f"{path}: holds no answers; expected rows of an id and a text")
    if missing and bench.all_needed:
        count = f"{len(missing)} of {len(items)} are missing"
        raise UserError(f"{path}: no answer to {missing[0]!r} ({count}); the official scorer refuses that")
    return answers


def drop_unanswered_splits(items, answers):
    """The questions without those of a split of which nothing is answered: that is not wrong."""
    answered = {item.get("part") for item in items if item["id"] in answers}
    left_out = {item["part"] for item in items if item.get("part") not in answered}
    if left_out:
        print(f"nothing of {', '.join(sorted(left_out))} is answered, so it is left out")
    return [item for item in items if item.get("part") in answered]


def pick_question(where, names, shown, known, answers):
    """The one question that a row answers. One that is asked twice takes its answers in turn."""
    if not names:
        raise UserError(
            f"{where}: no id in it; one of {', '.join(ID_KEYS)} is needed, or a row with its question "
            "for each question of --data and --split, in order"
        )
    found = next((known[name] for name in names if name in known), None)
    if found is None:
        raise UserError(f"{where}: answers {names[0]!r}, which is no question of --data and --split")
    # What was asked is part of the row's prompt, or the row's bare question part of what was asked.
    said = words(shown)
    fitting = [item for item in found if words(item["asked"]) in said or said in words(item["text"])]
    if not fitting:
        raise UserError(
            f"{where}: answers another question, {shown!r:.80}, than {str(found[0]['id'])!r} of --data, "
            f"{found[0]['asked']!r:.80}; are both of one version, and --split right?"
        )
    if len(fitting) > 1 and not shown:
        raise UserError(f"{where}: {names[0]!r} has {len(found)} questions; the prompt must stand beside it")
    return next((item for item in fitting if item["id"] not in answers), fitting[0])


def words(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def read_prediction(where, row, bench):
    if "extraction" in row:  # MathVista's
        return {"answer": str(row["extraction"]), "is_extracted": True}
    if bench.review in row:
        return {"answer": str(row[bench.review]), "is_review": True}
    if "choices" in row:  # it repeats its problem, whose truth it has in `answer`
        row = row | {"answer": None}
    found = texts_of(row, TEXT_KEYS)
    if found:
        return {"answer": found[0]}
    names = ", ".join(filter(None, [*TEXT_KEYS, bench.review]))
    raise UserError(f"{where}: no answer in it; one of {names} is needed, as text")


def texts_of(row, names):
    """What stands in these fields: text; numbers will do, but not true, false and NaN."""
    values = [row.get(name) for name in names]
    return [
        str(value)
        for value in values
        if isinstance(value, str) or (type(value) in (int, float) and math.isfinite(value))
    ]

"""Somebody else's answers, for --predictions: JSON or JSON lines, rows of an id and a text.

    {"question_id": 42000, "text": "Red."}              LLaVA's form, and ours: answers.jsonl
    {"questionId": "201", "prediction": "red"}          GQA's
    {"42000": "Red."}                                   ids as keys do as well

Rows are joined to questions by id and never by position. Where ids say too little (POPE numbers two versions
alike, LLaVA names TextVQA's and MME's pictures), the question stands in the row too, and both must fit.
"""

import re
from collections import defaultdict
from pathlib import Path

from benchmarks.common import load_records
from support.cli import UserError

ID_KEYS = ("question_id", "questionId", "index", "pid", "id", "image")
TEXT_KEYS = ("text", "prediction", "response", "answer", "output")


def match_predictions(bench, items, path):
    """-> {question id: {"text", ...}}"""
    known = defaultdict(list)
    for item in items:
        known[str(item["id"])].append(item)
        if "asked" in item:
            for name in (item["image"], Path(item["image"]).stem):
                known[name, plain_question(item["asked"])].append(item)

    answers = {}
    for where, key, row in load_records(path):
        row = row if isinstance(row, dict) else {"text": row}
        if isinstance(key, str):
            row = {"id": key} | row
        asked = find_questions(where, row, known)
        unanswered = [item for item in asked if item["id"] not in answers]
        if unanswered:  # the same question about one picture may be asked twice
            answers[unanswered[0]["id"]] = read_prediction(where, row, bench)
        elif "messages" not in row:  # of M3CoT's own files the first record of an id counts
            raise UserError(f"{where}: a second answer to {asked[0]['id']!r}; each question is answered once")

    missing = [item["id"] for item in items if item["id"] not in answers]
    if not answers:
        raise UserError(f"{path}: holds no answers; expected rows of an id and a text")
    if missing and bench.all_needed:
        count = f"{len(missing)} of {len(items)} are missing"
        raise UserError(f"{path}: no answer to {missing[0]!r} ({count}); the official scorer refuses that")
    return answers


def plain_question(text):
    """Without MME's last sentence, for which LLaVA has its own."""
    return re.sub(r"\s*please answer yes or no\.$", "", text.strip().lower())


def find_questions(where, row, known):
    """The questions a row may answer, by its id and, where it has one, its question."""
    ids = [str(row[name]) for name in ID_KEYS if isinstance(row.get(name), (str, int, float))]
    if not ids:
        raise UserError(f"{where}: no id in it; one of {', '.join(ID_KEYS)} is needed")
    lines = f"{row.get('question', '')}\n{row.get('prompt', '')}".split("\n")
    asked = {plain_question(line) for line in lines if line.strip()}
    keys = [(id, line) for id in ids for line in asked] + ids
    found = next((known[key] for key in keys if key in known), None)
    if found is None:
        raise UserError(f"{where}: answers {ids[0]!r}, which is no question of --data and --split")
    if asked and "asked" in found[0] and plain_question(found[0]["asked"]) not in asked:
        raise UserError(f"{where}: another question than {ids[0]!r} of --data; are both of the same version?")
    return found


def read_prediction(where, row, bench):
    if isinstance(row.get("messages"), list):  # a conversation: its last turn
        return {"text": str((row["messages"] or [""])[-1])}
    for name in ("content", "score") if bench.by_gpt else ():
        if name in row:
            return {"text": str(row[name]), "is_review": True}
    if bench.extract and "extraction" in row:
        return {"text": str(row["extraction"]), "is_extracted": True}
    for name in TEXT_KEYS:
        is_truth = name == "answer" and "choices" in row  # a row that repeats its problem
        if isinstance(row.get(name), (str, int, float)) and not is_truth:
            return {"text": str(row[name])}
    raise UserError(f"{where}: no answer in it; one of {', '.join(TEXT_KEYS)} is needed, as text")

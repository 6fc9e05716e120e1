"""From answers to a score: judge every answer, add them up, and say how far chance could move the sum.

record  {"id", "unit", "category", "answer", "parsed", "truth", "score"}    one judged answer
unit    [record, ...]                                                       what is counted together
figures {"n", "score", "ci95", "more"}                                      of all units, or of a category
"""

from collections import defaultdict

import numpy as np

from benchmarks.common import final_answer
from support.cli import UserError
from support.io import reading


def grade(bench, items, answers, cot=False):
    """{question id: answer} -> figures and records. A question without an answer counts as wrong."""
    records = []
    for item in items:
        with reading(f"question {item['id']!r}"):
            records.append(judge_one(bench, item, answers.get(item["id"], {}), cot))
    given = [record for record in records if not record["missing"]]
    unparsed = [record for record in given if record["parsed"] in (None, "")]
    result = {
        "n": len(records),
        "missing": len(records) - len(given),
        "unparsed": len(unparsed) / max(1, len(given)),
        "cut_off": sum(record.get("cut_off", False) for record in records),
        "score": None,
        "ci95": None,
        "more": {},
        "categories": {},
    }
    units = units_of(records)
    if units:
        result |= figures_of(bench, units)
    for category in dict.fromkeys(name for unit in units for name in categories_of(unit)):
        of_it = [unit for unit in units if category in categories_of(unit)]
        result["categories"][category] = figures_of(bench, of_it)
    return result | {"records": records}


def judge_one(bench, item, answer, cot):
    """-> record. Its score is None where the label is hidden, or GPT-4 has not reviewed the answer yet."""
    record = {"id": item["id"], "unit": item.get("unit", item["id"]), "category": item.get("category")}
    record |= {"truth": item["truth"], "answer": None, "parsed": None, "score": 0.0}
    record |= {name: answer[name] for name in ("cut_off", "p", "first") if name in answer}
    record["missing"] = "text" not in answer
    has_score = item["truth"] is not None and (not bench.by_gpt or "is_review" in answer)

    if "text" in answer:
        record["answer"] = record["parsed"] = text = answer["text"]
        if cot and "then" not in item:
            text = final_answer(text)
        if bench.extract and "is_extracted" not in answer:
            text = bench.extract(item, text)
        if has_score or not bench.by_gpt:
            record["parsed"] = answer = bench.parse(text, item)
            if has_score and answer is not None:
                record["score"] = bench.right(answer, item)
    return record if has_score else record | {"score": None}


def units_of(records):
    """Scored records, as they are counted: one question, MME's two, MMBench's four rotations."""
    units = defaultdict(list)
    for record in records:
        if record["score"] is not None:
            units[record["unit"]].append(record)
    return list(units.values())


def categories_of(unit):
    category = unit[0]["category"]
    if category is None:
        return []
    return category if isinstance(category, list) else [category]


def figures_of(bench, units):
    figures = {"n": sum(map(len, units)), "score": bench.score(units), "ci95": bootstrap(units, bench.score)}
    return figures | {"more": bench.more(units) if bench.more else {}}


def bootstrap(units, score):
    """95% interval of a score: draw as many units, with replacement, again and again; the same every time."""
    draw = np.random.default_rng(0)
    scores = []
    for _ in range(min(1000, 20_000_000 // len(units))):
        chosen = draw.integers(len(units), size=len(units))
        scores.append(score([units[i] for i in chosen]))
    return np.percentile(scores, [2.5, 97.5]).tolist()


def compare(bench, ours, theirs):
    """Paired bootstrap of two runs: the same units are drawn from both lists of records."""
    ours = {str(unit[0]["unit"]): unit for unit in units_of(ours)}
    theirs = {str(unit[0]["unit"]): unit for unit in units_of(theirs)}
    pairs = [(ours[name], theirs[name]) for name in ours if name in theirs]
    if not pairs:
        raise UserError("--compare: the two runs share no scored question; are both of one benchmark?")

    def difference(pairs):
        return bench.score([unit for unit, _ in pairs]) - bench.score([unit for _, unit in pairs])

    gains = [sum(r["score"] for r in a) - sum(r["score"] for r in b) for a, b in pairs]
    better = sum(gain > 0 for gain in gains)
    worse = sum(gain < 0 for gain in gains)
    figures = {"n": len(pairs), "difference": difference(pairs), "ci95": bootstrap(pairs, difference)}
    return figures | {"better": better, "worse": worse}

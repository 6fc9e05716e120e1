"""From answers to a score: judge every answer, add them up, and say how far chance could move the sum.

record  {"id", "unit", "category", "answer", "parsed", "truth", "score", ...}    one judged answer
unit    [record, ...]                                                       what is counted together
figures {"n", "score", "ci95", "more"}                                      of all units, or of a category
"""

from collections import defaultdict

import numpy as np

from benchmarks.common import by_category, final_answer
from support.cli import UserError
from support.io import reading


def grade(bench, questions, answers):
    """{question id: answer} -> figures and records. A question without an answer counts as wrong."""
    records = []
    for item in questions:
        with reading(f"question {item['id']!r}"):
            records.append(judge_one(bench, item, answers.get(item["id"], {})))
    given = [record for record in records if record["answer"] is not None]
    n_unparsed = sum(record["parsed"] in (None, "") for record in given)
    units = list(units_of(records).values())
    figures = {"n": len(records), "score": None, "ci95": None, "more": {}}
    if units:
        figures = figures_of(bench, units)
    return figures | {
        "missing": len(records) - len(given),
        "unparsed": n_unparsed / max(1, len(given)),
        "cut_off": sum(record.get("cut_off", False) for record in given),
        "categories": {name: figures_of(bench, some) for name, some in by_category(units).items()},
        "records": records,
    }


def judge_one(bench, item, answer):
    """-> record. Its score is None where the label is hidden, or GPT-4 has not reviewed the answer yet."""
    unreviewed = bench.review and "is_review" not in answer
    score = None if item["truth"] is None or unreviewed else 0.0
    parsed = text = answer.get("answer")
    if text is not None and not unreviewed:
        if item["worked"]:
            text = final_answer(text)
        parsed = bench.parse(text, item | answer)
        if parsed is not None and score is not None:
            score = bench.right(parsed, item)
    record = {name: item[name] for name in "id unit category image asked prompt truth".split()}
    return record | {"answer": None, "parsed": parsed, "score": score} | answer


def units_of(records):
    """{id: scored records that are counted together}: one question, MME's two, MMBench's four rotations."""
    units = defaultdict(list)
    for record in records:
        if record["score"] is not None:
            units[record["unit"]].append(record)
    return units


def figures_of(bench, units):
    return {
        "n": sum(map(len, units)),
        "score": bench.score(units),
        "ci95": bootstrap(units, bench.score),
        "more": bench.more(units),
    }


def bootstrap(units, score):
    """95% interval of a score: draw as many units, with replacement, again and again; the same every time."""
    n = len(units)
    draw = np.random.default_rng(0)
    n_draw = min(1000, 20_000_000 // n)
    scores = [score([units[i] for i in draw.integers(n, size=n)]) for _ in range(n_draw)]
    return np.percentile(scores, [2.5, 97.5]).tolist()


def compare(bench, ours, theirs):
    """Paired bootstrap of two runs: the same units are drawn from both lists of records."""
    theirs = units_of(theirs)
    pairs = [(unit, theirs[id]) for id, unit in units_of(ours).items() if id in theirs]
    if not pairs:
        raise UserError("the two runs share no scored question; are both of one benchmark?")

    gains = []
    for unit, other_unit in pairs:
        for one, other in zip(unit, other_unit):
            # The bare question: a chain of thought and another family have a prompt of their own.
            if one["asked"] != other["asked"]:
                raise UserError(
                    f"question {one['id']!r} is {other['asked']!r:.80} there, {one['asked']!r:.80} here; "
                    "compare two runs on the same questions"
                )
        gains.append(sum(one["score"] for one in unit) - sum(other["score"] for other in other_unit))
    if not np.isfinite(gains).all():
        raise ValueError("a score is no number")

    def difference(pairs):
        ours, theirs = zip(*pairs)
        return bench.score(ours) - bench.score(theirs)

    return {
        "n": len(pairs),
        "difference": difference(pairs),
        "ci95": bootstrap(pairs, difference),
        "better": sum(gain > 0 for gain in gains),
        "worse": sum(gain < 0 for gain in gains),
    }


def describe_comparison(found):
    low, high = found["ci95"]
    counts = f"{found['better']} better, {found['worse']} worse of {found['n']}"
    return f"{found['difference']:+.2f} ({low:+.2f} to {high:+.2f}), {counts}"

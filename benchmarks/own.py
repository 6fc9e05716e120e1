"""Right or wrong in questions of one's own, such as the toy world's.

    (a picture)    How many balls are there?
                   Answer the question using a single word or phrase.
    truth: 2      a model: "Two."      right
"""

import re
from collections import Counter

from benchmarks.common import DIGITS, by_category, evalai, iou, read_box


def is_right(said, truth):
    """The one judge of free answers, of eval.py and pairs.py alike.

    An option counts by its letter, a box by IoU >= 0.5, a number to 1 part in 1000, a worked answer by its
    end, and words as the VQA scorer normalises them; x-ray may be written x ray and xray.
    """
    if ("Final answer:" in said) != ("Final answer:" in truth):
        return False
    said = final_part(said)
    truth = final_part(truth)
    if said == truth:  # "+", of which normalising leaves nothing
        return bool(said)
    if re.fullmatch("[a-z]", truth):
        return chosen_letter(said) == truth
    if re.fullmatch(r"\[\d\.\d+(, \d\.\d+){3}\]", truth):
        box = read_box(said)
        return box is not None and iou(box, read_box(truth)) >= 0.5
    if (true_number := read_number(truth)) is not None:
        number = read_number(said)
        return number is not None and abs(number - true_number) <= 1e-3 * abs(true_number)
    return bool(spellings_of(said) & spellings_of(truth))


def spellings_of(text):
    return {evalai(text), evalai(text.replace("-", ""))} - {""}


def own_right(said, item):
    return float(is_right(said, item["truth"]))


def final_part(text):
    return text.rsplit("Final answer:", 1)[-1].strip().rstrip(".").lower()


def chosen_letter(text):
    """c of "C", "(c)", "C. cat", "(C) cat"; None of "A dog", "B and C", "(A) or (C)", "A. C."."""
    another = r"\s*(or\b|and\b|&|\(?(?!\1)[a-z]([.:,)]+\s|[.:,)]*$))"
    found = re.match(rf"\(?([a-z])(?:$|[.:)]+(?:$|\s(?!{another})))", text.lower().strip(" *"))
    return found and found[1]


def read_number(text):
    """12.5 of "12.5", "12.5%" and "12.5 degrees", 1000 of "1,000", 2 of "two"; None of what says more."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.lower())
    text = re.sub(r"\s*(degrees?|cm|%|°)$", "", text)
    text = DIGITS.get(text, text)
    return float(text) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text) else None


def most_frequent(items):
    """A baseline: to every question of a category its most frequent answer."""
    answers = {}
    for units in by_category([[item] for item in items]).values():
        truths = [item["truth"] for (item,) in units]
        count = Counter(map(final_part, truths))
        answer = max(truths, key=lambda truth: count[final_part(truth)])
        answers |= {item["id"]: {"answer": answer} for (item,) in units}
    return answers

"""What all benchmarks share: their form, reading official files, and what is read out of answers.

A benchmark is four functions. `read(cfg)` turns its official files into questions, dicts made by `question`
below. `parse(text, item)` finds the answer in what was said, `right(answer, item)` says how right it is, 0 to
1. `score(units)` turns judged records into the figure that its authors publish. A unit is what they count
together, a list of records: mostly one, but both questions about a picture of MME, or the rotations of a
question of MMBench.

Nothing here knows a model, and nothing imports torch.
"""

import csv
import io
import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable

from support.cli import UserError, one_of
from support.io import reading

# The three suffixes of LLaVA-1.5 (arXiv:2310.03744, table 7), and InternVL's frame around any question
# (arXiv:2411.10442), exactly the authors' (MMPR v1, v1.1 and their evaluation), in English and in Chinese
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."
COT = (
    "Your task is to answer the question below. Give step by step reasoning before you answer, and when "
    'you\'re ready to answer, please use the format "Final answer: .."\n\nQuestion:\n\n'
)
COT_CHINESE = (
    "你的任务是回答以下问题。在回答之前，请逐步推理说明您的思路。当你准备好给出答案时，请使用以下格式："
    '"答案: ..."\n\n问题:\n\n'
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def percent_right(units):
    """Mean score of all records, in percent."""
    scores = [record["score"] for unit in units for record in unit]
    return 100 * sum(scores) / len(scores)


def rounded_percent(units):
    """The same, rounded as the VQA scorers do."""
    return round(percent_right(units), 2)


def by_category(units):
    """{category: its units}"""
    groups = defaultdict(list)
    for unit in units:
        for category in unit[0]["category"]:
            groups[category].append(unit)
    return groups


def as_said(text, item):
    return text


def is_truth(answer, item):
    return float(answer == item["truth"])


@dataclass(frozen=True)
class Benchmark:
    read: Callable  # cfg -> questions; read_split, where all stand in one file
    parse: Callable  # (text, item) -> the answer in it; None: it cannot be read, which is wrong
    right: Callable = is_truth  # (answer, item) -> 0 to 1
    score: Callable = percent_right  # units -> the headline figure
    more: Callable = lambda units: {}  # units -> {figure: number}, what the authors publish beside it
    submit: Callable | None = None  # (items, records) -> file name, content: what is handed in
    review: str = ""  # GPT-4 judges, as `submit` requests; of --predictions the field with its reviews
    metric: str = "accuracy %"
    max_new_tokens: int = 16
    all_needed: bool = False  # the official scorer refuses a file in which an answer is missing


def question(id, image, text, suffix, truth, category=None, choices=None, **more):
    """One question. The prompt is the text, a newline, the suffix.

    image: its official path, the bytes of a picture, a list of names in one's own files, or None.
    truth: None where the labels are hidden. category: a name, a list of them, or None. choices: the options.
    more: `unit`, the id by default; `asked`, the bare question in a text that says more; `also`, another id
    that it goes by; `part`, its split, which --predictions may leave out as a whole; `cot`, the prompt of a
    chain of thought that has its own; and what the judge needs.
    """
    names = category if isinstance(category, list) else [category]
    item = {"id": id, "image": image, "text": text, "suffix": suffix, "truth": truth, "choices": choices}
    item |= {"unit": id, "asked": text, "category": [name for name in names if name]} | more
    texts = [text, item["asked"], *item["category"], *(choices or [])]
    if not isinstance(id, str | int) or not all(isinstance(x, str) for x in texts):
        raise ValueError("id, question, category and options must be text")
    if type(truth) not in (type(None), str, int, list):
        raise ValueError(f"the label is {truth!r}")
    if choices is not None and truth not in (None, *LETTERS[: len(choices)], *choices):
        raise ValueError(f"the label {truth!r} is none of {len(choices)} options")
    return item


# ---- official files ----


def data_folder(cfg):
    path = Path(cfg.data)
    return path.parent if path.is_file() else path


def find_file(cfg, *names):
    """The first of these official names in the folder --data or up to two folders below it."""
    found = find_all(cfg, names)
    if not found:
        names = " or ".join(names)
        raise UserError(f"{data_folder(cfg)}: no {names} in it; --data is the folder with the official files")
    return found[0]


def find_all(cfg, names):
    patterns = [depth + name for name in names for depth in ("", "*/", "*/*/")]
    return [path for pattern in patterns for path in visible(data_folder(cfg).glob(pattern))]


def visible(paths):
    """In order, without the twins `._NAME` that macOS puts beside every file it copies."""
    return sorted(path for path in paths if not re.search(r"/(\._|__MACOSX)", path.as_posix()))


def find_splits(cfg, forms, splits):
    """(split, path) of each of these splits that is there, or of --split alone.

    forms: under which names; {0} is the split, {1} the same in capitals. Where --data is a file, it is the
    split that has its name; else, under another name, the first.
    """
    names = {split: forms.format(split, split.upper()).split() for split in splits.split()}
    one_of("--split", cfg.split, list(names))
    wanted = [cfg.split] if cfg.split else list(names)
    path = Path(cfg.data)
    if path.is_file():
        named = [split for split in wanted if path.name in names[split]]
        return [((named or wanted)[0], path)]
    found = [(split, path) for split in wanted for path in find_all(cfg, names[split])[:1]]
    return found or [(wanted[0], find_file(cfg, *names[wanted[0]]))]  # which says that it is missing


def read_split(forms, splits, ask, cfg, under=None):
    """Questions of the official file of the first split that is there, or of --split.

    ask(cfg, key, record) -> question, or None; cfg.split is the split that is read.
    """
    split, path = find_splits(cfg, forms, splits)[0]
    return read_each(load_records(path, under), partial(ask, replace(cfg, split=split)))


def load_records(path, under=None):
    """JSON, JSON lines or TSV -> [(place, key or number, record)], all that lie `under` a name."""
    path = Path(path)
    with reading(path):
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise UserError("is empty; get the file again")

        # POPE's files are called .json and hold one record a line.
        has_records = re.match(r"\s*{", text)
        if has_records and (path.suffix == ".jsonl" or re.search(r"}\s*\n\s*{", text)):
            rows = []
            for number, line in enumerate(text.split("\n"), 1):
                where = f"{path}, line {number}"
                if line.strip():
                    with reading(where):
                        rows.append((where, len(rows), json.loads(line)))
            return rows

        if path.suffix == ".tsv":
            csv.field_size_limit(2**31 - 1)  # a cell may hold a whole picture in base64
            lines = io.StringIO(text, newline="")
            records = list(csv.DictReader(lines, delimiter="\t", restval=""))
        else:
            records = json.loads(text)
        if under:
            records = records[under]
        if isinstance(records, list):
            records = dict(enumerate(records))
        return [(f"{path}, record {key!r}", key, record) for key, record in records.items()]


def rows_by(cfg, field, name, under=None):
    """{what stands in this field: record} of another official file."""
    return {row[field]: row for _, _, row in load_records(find_file(cfg, name), under)}


def read_each(rows, make):
    """make(key, record) of every record of load_records. What goes wrong in one is an error that names it."""
    for where, key, record in rows:
        with reading(where):
            made = make(key, record)
        if made is not None:
            yield made


# ---- answers ----

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # in the official order; not ' : % $ # & * ~ ^ |
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
DIGITS = {word: str(n) for n, word in enumerate(NUMBER_WORDS[:11])} | {"none": "0"}

# The official table maps a word that lacks one of its apostrophes to the whole word, for these words ...
WHOLE_WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've
mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
you'll you're you've""".split()
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in WHOLE_WORDS
    for i, character in enumerate(word)
    if character == "'"
}
CONTRACTIONS |= {
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
}  # ... and three entries of another kind


def one_line(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text, contractions=CONTRACTIONS):
    """The VQA scorer's processPunctuation and processDigitArticle, oddities included."""
    out = text
    has_digit_comma = re.search(r"\d,\d", text)
    for mark in PUNCTUATION:  # always tested on the untouched text
        deleted = has_digit_comma or mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if deleted else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # 32: the value of re.UNICODE, which landed in `count`
    words = [DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in ("a", "an", "the"))


def evalai(text, item=None):
    """TextVQA's normaliser (EvalAI, M4C). LLaVA uploads VQAv2's and VizWiz's answers through it, too."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(one_line(text.strip()))


def final_answer(text):
    """InternVL's: what follows the first trigger on its line; without one the whole text."""
    found = re.search(r"(Final answer:|Answer:)\s*(.*)", text, re.IGNORECASE)
    return found[2].strip() if found else text


def lettered(choices):
    """The options of a question, a line each."""
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices))


def count_in(text, item=None):
    """The first integer or number word of an answer, None without one."""
    found = re.search(rf"\d+|\b(?:{'|'.join(NUMBER_WORDS)})\b", text, re.IGNORECASE)
    if found is None:
        return None
    word = found[0].lower()
    return int(word) if word.isdigit() else NUMBER_WORDS.index(word)


def read_box(text, item=None):
    """The first four numbers in brackets, [x1, y1, x2, y2]: fractions of the picture's sides, or thousandths
    (InternVL).
    """
    found = re.search(r"[\[(]\s*" + r"\s*,\s*".join([r"(-?\d*\.?\d+)"] * 4) + r"\s*[\])]", text)
    if found is None:
        return None
    box = [float(number) for number in found.groups()]
    return [x / 1000 for x in box] if sum(box) >= 4 else box


def draw_boxes(pen, text, left, top, side, color):
    """Draw the boxes that a text names on a picture that was padded to a square, as LLaVA counts them."""
    for brackets in re.findall(r"[\[(].*?[\])]", text):
        if box := read_box(brackets):
            x1, x2 = sorted(left + side * x for x in box[::2])
            y1, y2 = sorted(top + side * y for y in box[1::2])
            pen.rectangle((x1, y1, x2, y2), outline=color, width=2)


def iou(a, b):
    """Intersection over union of two boxes [x1, y1, x2, y2]; reversed corners enclose nothing."""

    def area(x1, y1, x2, y2):
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)

    start = map(max, a[:2], b[:2])
    end = map(min, a[2:], b[2:])
    common = area(*start, *end)
    return common / max(area(*a) + area(*b) - common, 1e-9)

"""Make preference pairs from a model's own answers, as MMPR was made (arXiv:2411.10442v2, "Data Engine").

    python pairs.py --method correctness --model DIR --data QUESTIONS.jsonl --image-root DIR --out PAIRS.jsonl
        Questions with one true answer. The model reasons step by step, --samples times a question; each
        answer is judged by its last line. Right answers are chosen; wrong ones, and those without the format
        ("Final answer: ..." after some lines of reasoning), are rejected. --prompt direct asks as the file
        does and judges the whole answer: for models that know no other.

    python pairs.py --method dropout-ntp --model DIR --data QUESTIONS.jsonl --image-root DIR --out PAIRS.jsonl
        Questions without one true answer (Dropout Next Token Prediction). Chosen is the model's answer, or
        the file's; rejected is its first half, by words, completed by the model without the picture: what
        then comes is made up.

QUESTIONS: JSON lines of {"image", "question", "answer"}, or LLaVA's JSON. PAIRS: JSON lines of {"image",
"question", "chosen", "rejected"}, which mpo.py trains on, and beside them PAIRS.jsonl.stats.json: what was
dropped, and why. A killed run goes on where it was: PAIRS.jsonl.part holds what is done. With the same seed
it ends as if nothing had happened.

Where this departs from the authors' code: an answer that ran out of tokens makes no pair (theirs takes it
for a wrong one, or for a whole one), nor does a completion that equals the answer, nor DropoutNTP of a
question without a picture; an answer is judged as benchmarks/own.py has it, for all kinds of questions alike,
and not by math-verify (formulas must be written alike).
"""

import random
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

from benchmarks.common import COT, COT_CHINESE, LETTER, SHORT
from benchmarks.own import is_right
from conversation import find_template, put_in_front
from sample import answer, encode_question, open_asked, read_answer
from support.asking import encode_questions, new_file, resume_flags
from support.cli import REQUIRED, Bar, UserError, arg, parse, run_program
from support.data_files import Records, picture_paths
from support.flags import AskConfig
from support.io import Progress, reading, write_json, write_json_lines

PROMPTS = {"en": COT, "zh": COT_CHINESE}  # what stands before a question
TRIGGERS = ("Final answer:", "Final Answer:", "答案:")
SHORT_ENDINGS = (  # what a question may end with; a step-by-step prompt asks for something else
    SHORT,
    LETTER,
    "Please answer Yes or No.",
    r"Please answer the question and put the final answer within \boxed{}.",
)


@dataclass
class PairsConfig(AskConfig):
    method: str = arg(REQUIRED, "how pairs are made", choices=("correctness", "dropout-ntp"))
    data: str = arg(REQUIRED, 'questions; dropout-ntp takes "chosen" for the answer where a record has it')
    out: str = arg(REQUIRED, "JSONL for the pairs")
    image_root: str = arg("", "folder that the pictures' names start from; empty: that of --data")
    limit: int = arg(0, "questions, evenly spread over the file; 0: all")
    batch_size: int = arg(64, "answers generated at once", at_least=1)

    # correctness
    samples: int = arg(32, "answers to each question", at_least=1)
    pairs_per_question: int = arg(15, "at most so many, drawn at random", at_least=1)
    min_newlines: int = arg(2, "an answer with fewer has not reasoned in lines")
    prompt: str = arg(
        "en", "the step-by-step prompt, by language; or direct", choices=(*PROMPTS, "direct")
    )

    # dropout-ntp
    ratio: float = arg(0.5, "share of an answer's words that is kept", below=1)
    load_image: bool = arg(False, "complete with the picture after all")


DEFAULTS = dict(temperature=1.0, top_k=50, max_new_tokens=1024, dtype="float32")


def main(argv=None):
    cfg = parse(PairsConfig, argv, __doc__, DEFAULTS)
    cfg.image_root = cfg.image_root or str(Path(cfg.data).parent)
    with new_file(cfg.out) as out:
        records = Records(cfg.data, cfg.image_root).split_questions()
        vlm, tok = open_asked(cfg)
        progress = ask_all(vlm, tok, records, cfg)
        pairs = report(progress.rows, out)
        if pairs:
            write_json_lines(out, pairs)
        progress.path.unlink()
    if not pairs:
        raise UserError("not one pair could be made; the counts are above")
    command = f"python mpo.py --model {cfg.model} --data {out} --image-root {cfg.image_root}"
    print(f"{len(pairs):,} pairs are in {out}; train on them: {command}")
    return 0


# ---- group by group, so that a killed run can go on ----


def ask_all(vlm, tok, records, cfg):
    """-> a Progress, of which each row is what ask_group gives."""
    size = cfg.batch_size
    if cfg.method == "correctness":
        size = max(1, cfg.batch_size // cfg.samples)
    n = min(cfg.limit or len(records), len(records))
    rows = [i * len(records) // n for i in range(n)]  # spread over the file

    progress = Progress(cfg.out + ".part", resume_flags(cfg, records.paths))
    n_done = len(progress.rows) * size
    print(f"{n:,} questions, {min(n, n_done):,} of them asked before")
    for first in Bar(range(n_done, n, size), cfg.method, unit="group"):
        seed = cfg.seed * 2**32 + first * 2**12  # of the group's place alone
        progress.add([ask_group(vlm, tok, records, rows[first : first + size], cfg, seed)])
    return progress


def ask_group(vlm, tok, records, rows, cfg, seed):
    """-> a line of the .part file"""
    group = {"pairs": [], "counts": Counter(questions=len(rows)), "skipped": [], "no_format": []}
    questions = []
    for i in rows:
        try:
            questions.append(read_question(vlm, tok, records[i], cfg))
        except UserError as error:
            group["skipped"].append(str(error))
    method = {"correctness": pairs_by_correctness, "dropout-ntp": pairs_by_dropout}[cfg.method]
    method(vlm, tok, questions, cfg, seed, group)
    return group


def draw_answers(vlm, tok, prompts, cfg, seed):
    choices = cfg.sampling | {"seed": seed}
    return answer(vlm, tok, prompts, cfg.max_new_tokens, cfg.batch_size, **choices)


# ---- questions ----


@dataclass
class Question:
    where: str          # file and line
    asked: dict         # what a pair says of it: "image" (a name, or several, or none) and "question"
    prompt: tuple       # what the model is given to answer
    truth: str
    chosen: str | None  # dropout-ntp: None until the model has answered, unless the record has it


def read_question(vlm, tok, record, cfg):
    with reading(record["where"]):
        by_correctness = cfg.method == "correctness"
        paths = picture_paths(record)
        (role, text), *answers = record["turns"]
        truth = answers[0][1].strip() if answers else ""
        if role != "human":
            raise UserError("no question")
        if by_correctness and not truth:
            raise UserError("no answer to judge by")
        if not by_correctness and not paths:
            raise UserError("no picture that could be left out")
        if by_correctness and cfg.prompt != "direct":
            text = ask_step_by_step(text, len(paths), cfg.prompt)
            truth = truth.rsplit("Final answer:", 1)[-1].strip()  # a worked one is judged by its end, too
        turns = put_in_front([("human", text)], len(paths))
        [prompt] = encode_questions(vlm, tok, [{"turns": turns, "pictures": paths}])
        n_token = len(prompt[0])
        longest = vlm.cfg.decoder.block_size
        if n_token >= longest * 3 // 4:
            raise UserError(f"its {n_token} tokens leave little room for an answer in {longest}")
    names = record["images"]
    image = names[0] if len(names) == 1 else names or None
    asked = {"image": image, "question": turns[0][1]}
    chosen = record.get("chosen")
    return Question(record["where"], asked, prompt, truth, chosen and chosen.strip())


def ask_step_by_step(text, n_image, language="en"):
    """The question in the step-by-step prompt, without its request for a short answer, the picture first."""
    if n_image <= 1:
        text = text.replace("<image>", "")
    text = text.strip().removeprefix(PROMPTS[language])
    for ending in SHORT_ENDINGS:
        text = text.removesuffix(ending).strip()
    front = "<image>\n" if n_image == 1 else ""
    return front + PROMPTS[language] + text


# ---- by correctness ----


def pairs_by_correctness(vlm, tok, questions, cfg, seed, group):
    """Every right answer with every wrong one and every one without format; some, if these are too many."""
    counts = group["counts"]
    prompts = [question.prompt for question in questions for _ in range(cfg.samples)]
    answers = iter(draw_answers(vlm, tok, prompts, cfg, seed))
    for question in questions:
        # {text of an answer: the part that is judged, "" where it kept no format}
        right = {}
        wrong = {}
        for said in islice(answers, cfg.samples):
            kind, text, final = judge_answer(said, question.truth, cfg)
            counts.update({"answers": 1, "tokens": len(said.ids), f"answers {kind}": 1})
            if kind == "right":
                right[text] = final
            elif kind in ("wrong", "no format"):
                wrong[text] = final
            if kind == "no format":
                group["no_format"] = [text]  # one is enough to show

        pairs = []
        for (chosen, good), (rejected, bad) in product(right.items(), wrong.items()):
            if good.lower() in bad.lower():  # "2" in "12 or 2": perhaps right after all
                counts["pairs in doubt"] += 1
                continue
            pair = question.asked | {"chosen": chosen, "rejected": rejected, "answer_gt": question.truth}
            pairs.append(pair | {"rule": "answer" if bad else "format"})
        n_kept = min(len(pairs), cfg.pairs_per_question)
        group["pairs"] += random.Random(f"{cfg.seed} {question.where}").sample(pairs, n_kept)
        counts["pairs beyond the cap"] += len(pairs) - n_kept
        if not right:
            counts["questions none right"] += 1
        elif not wrong:
            counts["questions all right"] += 1


def judge_answer(said, truth, cfg):
    """-> what kind of answer it is, its text as a pair has it, and the part of it that is judged, if any."""
    text = final = said.text
    if not said.whole or not text:
        return "empty or cut off", text, ""
    if cfg.prompt != "direct":
        parsed = parse_answer(text, cfg.min_newlines)
        if parsed is None:
            return "no format", text, ""
        reasoning, final = parsed
    if not is_right(final, truth):
        return "wrong", text, final
    if cfg.prompt != "direct":
        text = write_as_truth(reasoning, final, truth)
    return "right", text, final


def parse_answer(text, min_newlines=2):
    """A worked answer -> (reasoning with its trigger, final answer), or None where the format was not kept.

    The format: a trigger once or twice, of which the last counts; something before it; newlines, because
    reasoning has lines; one line after it.
    """
    trigger = next((t for t in TRIGGERS if t in text), None)
    if trigger is None or text.count(trigger) > 2 or text.count("\n") < min_newlines:
        return None
    reasoning, _, final = text.rpartition(trigger)
    final = final.strip()
    if not reasoning.strip() or not final or "\n" in final:
        return None
    return reasoning + trigger, final


def write_as_truth(reasoning, final, truth):
    """A right answer with its last line as the truth is written, without bold: a form to learn."""
    final = final.strip("*").strip()
    if truth.lower() in final.lower().replace(",", "").strip("."):
        final = truth
    before, newline, last = f"{reasoning} {final}".rpartition("\n")
    return before + newline + last.replace("**Final", "Final")


# ---- by dropout ----


def pairs_by_dropout(vlm, tok, questions, cfg, seed, group):
    """Each answer with its own first words, completed without the picture."""
    counts = group["counts"]

    # The chosen answers: those of the file, else the model's own, with the picture.
    unanswered = [question for question in questions if question.chosen is None]
    prompts = [question.prompt for question in unanswered]
    for question, said in zip(unanswered, draw_answers(vlm, tok, prompts, cfg, seed)):
        question.chosen = said.text if said.whole else ""
        counts["tokens"] += len(said.ids)
    answered = [question for question in questions if question.chosen]
    counts["answers empty or cut off"] = len(questions) - len(answered)

    # What the model makes of the first words of each.
    begins = []
    prompts = []
    for question in answered:
        begin = first_words(vlm, tok, question.chosen, cfg.ratio)
        ids, pictures = question.prompt
        if not cfg.load_image:
            text = question.asked["question"].replace("<image>", "").strip()
            ids, pictures = encode_question(vlm, tok, text)
        begins.append(begin)
        prompts.append((ids + begin, pictures))
    completions = draw_answers(vlm, tok, prompts, cfg, seed + 2**31)
    for question, begin, rest in zip(answered, begins, completions):
        counts.update(answers=1, tokens=len(rest.ids))
        completed = read_answer(tok, vlm.cfg.template, begin + rest.ids)
        if not completed.whole:
            counts["completions cut off"] += 1
        elif completed.text in ("", question.chosen):
            counts["completions empty or the same"] += 1
        else:
            pair = question.asked | {"chosen": question.chosen, "rejected": completed.text}
            group["pairs"].append(pair)


def first_words(vlm, tok, text, ratio):
    """Token ids of the first words of an answer, as the template opens one."""
    words = text.split(" ")
    begin = " ".join(words[: int(len(words) * ratio)]).strip()
    if not begin:
        return []
    # What opens an answer: a space, in LLaVA's templates
    opening = find_template(vlm.cfg.template).answer.split("{}")[0].replace("«", "")
    return tok.encode(opening + begin, dummy_prefix=False)


# ---- the report ----


def report(groups, out):
    """-> all pairs. Print what was dropped and why; the same as JSON beside the pairs."""
    of_all = lambda name: [one for group in groups for one in group[name]]
    pairs = of_all("pairs")
    skipped = of_all("skipped")
    no_format = of_all("no_format")
    for reason in skipped[:5]:
        print(f"skipped: {reason}")
    counts = Counter(pairs=len(pairs), skipped=len(skipped))
    for group in groups:
        counts.update(group["counts"])
    if pairs:
        counts["tokens generated per pair"] = round(counts["tokens"] / len(pairs), 1)
    counts = {name: n for name, n in sorted(counts.items()) if n}
    for name, n in counts.items():
        print(f"{name:30s}{n:10,}")
    write_json(out.with_name(out.name + ".stats.json"), {"counts": counts}, indent=1)
    if no_format:
        print("one answer without format, which wants lines of reasoning (--min-newlines) and then "
              f'"Final answer: ...", or --prompt direct: {no_format[0]!r:.300}')
    return pairs


if __name__ == "__main__":
    sys.exit(run_program(main))

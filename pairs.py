"""Make preference pairs from a model's own answers, as MMPR was made (arXiv:2411.10442v2, "Data Engine").

    python pairs.py --method correctness --model DIR --data QUESTIONS.jsonl --image-root DIR --out PAIRS.jsonl
        Questions with one true answer. The model reasons step by step, --samples times a question; each
        answer is judged by its last line. Right answers are chosen; wrong ones, and those without a format,
        are rejected.

    python pairs.py --method dropout-ntp --model DIR --data QUESTIONS.jsonl --image-root DIR --out PAIRS.jsonl
        Questions without one true answer (Dropout Next Token Prediction). Chosen is the model's answer, or
        the file's; rejected is its first half, by words, completed by the model without the picture: what
        then comes is made up.

QUESTIONS: JSON lines of {"image", "question", "answer"}, or LLaVA's JSON. PAIRS: JSON lines of {"image",
"question", "chosen", "rejected"}, which mpo.py trains on, and beside them PAIRS.jsonl.stats.json: what was
dropped, and why. A killed run goes on where it was: PAIRS.jsonl.part holds what is done. With the same seed
it ends as if nothing had happened.

Deviations from the authors' code, all of them: an answer that ran out of tokens makes no pair (theirs takes
it for a wrong one, or for a whole one), nor does a completion that equals the answer; an answer is judged by
normalised words, numbers, option letters and boxes, and not by math-verify (formulas must be written alike).
"""

import json
import math
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from tqdm import tqdm

from benchmarks.common import COT, LETTER, SHORT, is_right
from conversation import find_template
from data import Records, picture_paths
from sample import DTYPES, Answer, AskConfig, answer, encode_question, open_asked, open_picture, read_answer
from support.cli import REQUIRED, UserError, arg, parse, run
from support.io import write_json, write_whole

# What stands before a question, exactly the authors' (MMPR v1, v1.1 and their evaluation).
PROMPTS = {
    "en": COT,
    "zh": "你的任务是回答以下问题。在回答之前，请逐步推理说明您的思路。当你准备好给出答案时，请使用以下格式："
          '"答案: ..."\n\n问题:\n\n',
}
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
    limit: int = arg(0, "questions, evenly spread over the file; 0: all", at_least=0)
    batch_size: int = arg(64, "answers generated at once", at_least=1)

    # correctness
    samples: int = arg(32, "answers to each question", at_least=1)
    pairs_per_question: int = arg(15, "at most so many, drawn at random", at_least=1)
    min_newlines: int = arg(2, "an answer with fewer has not reasoned in lines", at_least=0)
    prompt: str = arg("en", "language of the step-by-step prompt", choices=tuple(PROMPTS))

    # dropout-ntp
    ratio: float = arg(0.5, "share of an answer's words that is kept", at_least=0, below=1)
    load_image: bool = arg(False, "complete with the picture after all")

    # As sample.py's, but these
    temperature: float = arg(
        1.0, "0 takes the likeliest word, more draws at random", at_least=0, below=math.inf
    )
    top_k: int = arg(50, "draw from so many likeliest words; 0: all", at_least=0)
    max_new_tokens: int = arg(1024, "longest answer in tokens; one that reaches it makes no pair", at_least=1)
    dtype: str = arg("float32", "of the weights", choices=DTYPES)


def main(argv=None):
    cfg = parse(PairsConfig, argv, description=__doc__)
    out = Path(cfg.out)
    if out.exists():
        raise UserError(f"--out {out} is there already; remove it, or give another")
    cfg.image_root = cfg.image_root or str(Path(cfg.data).parent)
    records = Records(cfg.data, cfg.image_root)
    vlm, tok = open_asked(cfg)

    questions, unreadable = read_questions(records, cfg)
    if cfg.limit:
        step = math.ceil(len(questions) / cfg.limit)
        questions = questions[::step][: cfg.limit]
    print_skipped(unreadable)
    if not questions:
        raise UserError(f"{cfg.data}: no question that could be used")

    groups = ask_all(vlm, tok, questions, cfg)
    print_skipped([reason for group in groups for reason in group["skipped"]])
    counts = sum_counts(groups)
    counts["unreadable"] = len(unreadable)
    pairs = [pair for group in groups for pair in group["pairs"]]
    report(pairs, counts, out)
    if not pairs:
        raise UserError("not one pair could be made; the counts are above")
    write_whole(out, lambda tmp: tmp.write_text(to_json_lines(pairs), encoding="utf-8"))
    part_file(cfg).unlink()
    command = f"python mpo.py --model {cfg.model} --data {out} --image-root {cfg.image_root}"
    print(f"{len(pairs):,} pairs are in {out}; train on them: {command}")
    return 0


# ---- questions ----


@dataclass
class Question:
    where: str                    # file and line, for messages
    image: object                 # as the record has it: a name, several or None
    paths: list
    text: str
    truth: str
    prompt: tuple = ()            # what the model is given to answer
    answer: Answer | None = None  # dropout-ntp: the chosen answer,
    completion: Answer | None = None  # and its first words completed


def read_questions(records, cfg):
    """Every question of every record -> [Question], and why others are none."""
    questions, unreadable = [], []
    for i in range(len(records)):
        try:
            record = records[i]
            paths = picture_paths(record)
        except UserError as error:
            unreadable.append(str(error))
            continue
        turns = record["turns"]
        if turns[0][0] != "human":
            turns = turns[1:]
        for k in range(0, len(turns), 2):
            where = record["where"]
            if len(turns) > 2:
                where += f", turn {k + 1}"
            text = turns[k][1]
            truth = turns[k + 1][1].strip() if k + 1 < len(turns) else ""
            if cfg.method == "correctness":
                text = ask_step_by_step(text, len(paths), cfg.prompt)
            question = Question(where, record.get("image"), paths, text, truth)
            if record.get("chosen") is not None:
                question.answer = Answer(record["chosen"].strip(), True, [])  # which cost no tokens
            if cfg.method == "correctness" and not truth:
                unreadable.append(f"{where}: no answer to judge by")
            elif not turns[k][1].replace("<image>", "").strip():
                unreadable.append(f"{where}: no question")
            else:
                questions.append(question)
    return questions, unreadable


def ask_step_by_step(text, n_image, language="en"):
    """The question in the step-by-step prompt, without its request for a short answer, the picture first."""
    if n_image <= 1:
        text = text.replace("<image>", "")
    text = text.strip()
    for ending in SHORT_ENDINGS:
        text = text.removesuffix(ending).strip()
    front = "<image>\n" if n_image == 1 else ""
    return front + PROMPTS[language] + text


# ---- by correctness ----


def pairs_by_correctness(vlm, tok, questions, cfg, seed):
    """-> (pairs, counts) of each question."""
    prompts = [question.prompt for question in questions for _ in range(cfg.samples)]
    answers = draw_answers(vlm, tok, prompts, cfg, seed)
    results = []
    for k, question in enumerate(questions):
        own = answers[k * cfg.samples : (k + 1) * cfg.samples]
        results.append(pair_answers(question, own, cfg))
    return results


def pair_answers(question, answers, cfg):
    """Every right answer with every wrong one and every one without format; some, if these are too many."""
    counts = Counter()
    right, wrong = {}, {}  # {text of an answer: its last line, or None where it kept no format}
    for said in answers:
        parsed = parse_answer(said.text, cfg.min_newlines)
        final = parsed[1] if parsed else None
        kind = sort_answer(said, final, question.truth)
        counts.update({"answers": 1, "tokens": len(said.ids), f"answers {kind}": 1})
        if kind == "right":
            right[write_as_truth(said.text, question.truth, cfg.min_newlines)] = final
        elif kind in ("wrong", "no format"):
            wrong[said.text] = final

    pairs = []
    for (chosen, good), (rejected, bad) in product(right.items(), wrong.items()):
        if bad is not None and good.lower() in bad.lower():  # "2" in "12 or 2": perhaps right after all
            counts["pairs in doubt"] += 1
            continue
        rule = "format" if bad is None else "answer"
        pair = {"image": question.image, "question": question.text, "chosen": chosen, "rejected": rejected}
        pairs.append(pair | {"answer_gt": question.truth, "rule": rule})

    n_kept = min(len(pairs), cfg.pairs_per_question)
    kept = random.Random(f"{cfg.seed} {question.where}").sample(pairs, n_kept)
    counts["pairs beyond the cap"] = len(pairs) - n_kept
    outcome = "all right" if not wrong else "none right" if not right else "right and wrong"
    counts[f"questions {outcome}"] = 1
    return kept, counts


def sort_answer(said, final, truth):
    if not said.whole:
        return "cut off"
    if not said.text:
        return "empty"
    if final is None:
        return "no format"
    return "right" if is_right(final, truth) else "wrong"


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


def write_as_truth(text, truth, min_newlines):
    """A right answer with its last line as the truth is written, without bold: a form to learn."""
    reasoning, final = parse_answer(text, min_newlines)
    final = final.strip("*").strip()
    if truth.lower() in final.lower().replace(",", "").strip("."):
        final = truth
    *lines, last = f"{reasoning} {final}".split("\n")
    return "\n".join([*lines, last.replace("**Final", "Final")])


# ---- by dropout ----


def pairs_by_dropout(vlm, tok, questions, cfg, seed):
    """-> (pairs, counts) of each question."""
    # The chosen answers: those of the file, else the model's own, with the picture.
    unanswered = [question for question in questions if question.answer is None]
    prompts = [question.prompt for question in unanswered]
    for question, said in zip(unanswered, draw_answers(vlm, tok, prompts, cfg, seed)):
        question.answer = said

    # The first words of each, completed without the picture.
    begun = [question for question in questions if question.answer.whole and question.answer.text]
    begins = [first_words(vlm, tok, question.answer.text, cfg.ratio) for question in begun]
    prompts = []
    for question, begin in zip(begun, begins):
        ids, pictures = question.prompt
        if not cfg.load_image:
            ids, pictures = encode_question(vlm, tok, question.text.replace("<image>", "").strip())
        prompts.append((ids + begin, pictures))
    completions = draw_answers(vlm, tok, prompts, cfg, seed + 2**31)
    for question, begin, rest in zip(begun, begins, completions):
        joined = read_answer(tok, vlm.cfg.template, begin + rest.ids)
        question.completion = joined._replace(ids=rest.ids)
    return [pair_completion(question) for question in questions]


def first_words(vlm, tok, text, ratio):
    """Token ids of the first words of an answer, as the template opens one."""
    words = text.split(" ")
    begin = " ".join(words[: int(len(words) * ratio)]).strip()
    if not begin:
        return []
    # What opens an answer: a space, in LLaVA's templates
    opening = find_template(vlm.cfg.template).answer.split("{}")[0].replace("«", "")
    return tok.encode(opening + begin, dummy_prefix=False)


def pair_completion(question):
    chosen, rejected = question.answer, question.completion
    counts = Counter(tokens=len(chosen.ids))
    if rejected is None:
        counts["answers empty" if chosen.whole else "answers cut off"] = 1
        return [], counts
    counts.update({"answers": 1, "tokens": len(rejected.ids)})
    problem = ""
    if not rejected.whole:
        problem = "cut off"
    elif not rejected.text:
        problem = "empty"
    elif rejected.text == chosen.text:
        problem = "the same"
    if problem:
        counts[f"completions {problem}"] = 1
        return [], counts
    text = question.text
    if len(question.paths) == 1 and "<image>" not in text:
        text = "<image>\n" + text
    pair = {"image": question.image, "question": text, "chosen": chosen.text, "rejected": rejected.text}
    return [pair], counts


# ---- group by group, so that a killed run can go on ----


def ask_all(vlm, tok, questions, cfg):
    """-> {"pairs", "counts", "skipped"} of each group of questions.

    Each is a line of the .part file, once it is done. Its draws depend on --seed and its place alone.
    """
    size = cfg.batch_size
    if cfg.method == "correctness":
        size = max(1, cfg.batch_size // cfg.samples)
    done = resume(cfg)
    n_done = min(len(done) * size, len(questions))
    print(f"{len(questions):,} questions, {n_done:,} of them answered before", flush=True)

    quiet = not sys.stderr.isatty()
    bar = tqdm(total=len(questions), initial=n_done, desc=cfg.method, unit="question", disable=quiet)
    with open(part_file(cfg), "a", encoding="utf-8") as file, bar:
        for first in range(n_done, len(questions), size):
            group = questions[first : first + size]
            done.append(ask_group(vlm, tok, group, cfg, seed=cfg.seed * 2**32 + first * 2**12))
            file.write(to_json_lines(done[-1:]))
            file.flush()
            bar.update(len(group))
            bar.set_postfix_str(f"{sum_counts(done)['pairs']:,} pairs")
    return done


def ask_group(vlm, tok, group, cfg, seed):
    usable, skipped = [], []
    for question in group:
        try:
            usable.append(replace(question, prompt=make_prompt(vlm, tok, question)))
        except UserError as error:
            skipped.append(f"{question.where}: {error}")

    method = {"correctness": pairs_by_correctness, "dropout-ntp": pairs_by_dropout}[cfg.method]
    made = method(vlm, tok, usable, cfg, seed)
    pairs = [pair for of_question, _ in made for pair in of_question]
    counts = Counter({"questions": len(group), "unusable": len(skipped), "pairs": len(pairs)})
    for _, of_question in made:
        counts.update(of_question)
    return {"pairs": pairs, "counts": counts, "skipped": skipped}


def make_prompt(vlm, tok, question):
    pictures = [open_picture(vlm, path) for path in question.paths]
    prompt = encode_question(vlm, tok, question.text, pictures)
    n_prompt, longest = len(prompt[0]), vlm.cfg.decoder.block_size
    if n_prompt >= longest * 3 // 4:
        raise UserError(f"a question of {n_prompt} tokens leaves little room for an answer in {longest}")
    return prompt


def draw_answers(vlm, tok, prompts, cfg, seed):
    choices = {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k}
    return answer(vlm, tok, prompts, cfg.max_new_tokens, cfg.batch_size, seed, **choices)


def resume(cfg):
    """The groups in the .part file of a killed run. Its first line are the flags."""
    part = part_file(cfg)
    head = asdict(cfg)
    del head["out"], head["device"]
    text = part.read_text(encoding="utf-8", errors="replace") if part.exists() else ""
    whole_lines = text.split("\n")[:-1]  # a kill may have left half a line behind them
    before = [json.loads(line) for line in whole_lines] or [head]
    if before[0] != head:
        raise UserError(f"{part} was begun with another model, data or flags; give the same, or remove it")
    write_whole(part, lambda tmp: tmp.write_text(to_json_lines(before), encoding="utf-8"))
    return before[1:]


def part_file(cfg):
    return Path(cfg.out + ".part")


def to_json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---- the report ----


def sum_counts(groups):
    total = Counter()
    for group in groups:
        total.update(group["counts"])
    return total


def print_skipped(reasons, n_shown=5):
    for reason in reasons[:n_shown]:
        print(f"skipped: {reason}")
    if len(reasons) > n_shown:
        print(f"skipped: {len(reasons) - n_shown:,} more")


def report(pairs, counts, out):
    """Print what was kept, what was dropped and why; the same as JSON beside the pairs."""
    counts = {name: n for name, n in sorted(counts.items()) if n}
    for name, n in counts.items():
        print(f"{name:26s}{n:10,}")
    summary = {"counts": counts}
    if pairs:
        summary["tokens_generated_per_pair"] = counts["tokens"] / len(pairs) if "tokens" in counts else 0
        print(f"{'tokens generated per pair':26s}{summary['tokens_generated_per_pair']:10.1f}")
    write_json(out.with_name(out.name + ".stats.json"), summary, indent=1)


if __name__ == "__main__":
    sys.exit(run(main))

"""Preference learning in miniature (arXiv:2411.10442v2): which of the paper's findings show in the toy.

    python -m lab.run mpo            # out/lab/mpo/table.md

Finetune, let the model make its own pairs, train each variant on them, evaluate all. The questions to make
pairs from are about training pictures, those of the evaluation about held-out ones.
"""

import random
import re
from collections import Counter

import mpo
import pairs
import toyworld
import train
from benchmarks.own import is_right
from conversation import Tokenizer
from lab.common import run_folder
from model import VLM
from pairs import ask_step_by_step, parse_answer
from sample import answer
from support.asking import encode_questions
from support.io import write_json_lines

SOURCES = {                          # of pairs -> the method of pairs.py, and its flags
    "correctness": ("correctness", ["--samples", 8, "--min-newlines", 1]),
    "dropout-0.25": ("dropout-ntp", ["--ratio", 0.25]),
    "dropout-0.5": ("dropout-ntp", ["--ratio", 0.5]),
    "dropout-0.75": ("dropout-ntp", ["--ratio", 0.75]),
}
BOTH = ("correctness", "dropout-0.5")
VARIANTS = {                         # row -> w_p, w_q, w_g; the pairs to train on
    "SFT on chosen": (0, 0, 1, BOTH),
    "DPO": (1, 0, 0, BOTH),
    "DPO+sft": (1, 0, 1, BOTH),
    "BCO+sft": (0, 1, 1, BOTH),
    "MPO": (0.8, 0.2, 1, BOTH),
    "MPO, DropoutNTP 0.25 alone": (0.8, 0.2, 1, ["dropout-0.25"]),
    "MPO, DropoutNTP 0.5 alone": (0.8, 0.2, 1, ["dropout-0.5"]),
    "MPO, DropoutNTP 0.75 alone": (0.8, 0.2, 1, ["dropout-0.75"]),
}
CLAIMS = {
    "MPO is better than SFT on the chosen answers, step by step (Table 3)":
        (("MPO", "step by step"), ("SFT on chosen", "step by step")),
    "DPO alone makes step by step worse than direct (Table 6)":
        (("DPO", "direct"), ("DPO", "step by step")),
    "with SFT beside it DPO is better step by step (Table 6)":
        (("DPO+sft", "step by step"), ("DPO", "step by step")),
    "DPO alone loses the format, SFT keeps it (section 10)":
        (("DPO", "no final answer"), ("DPO+sft", "no final answer")),
    "MPO is better than DPO+sft, step by step (Table 6)":
        (("MPO", "step by step"), ("DPO+sft", "step by step")),
    "DropoutNTP lessens hallucination (Table 4)":
        (("before", "made up"), ("MPO, DropoutNTP 0.5 alone", "made up")),
    "and at half of the answer more than at a quarter (Table 9)":
        (("MPO, DropoutNTP 0.25 alone", "made up"), ("MPO, DropoutNTP 0.5 alone", "made up")),
    "or at three quarters (Table 9)":
        (("MPO, DropoutNTP 0.75 alone", "made up"), ("MPO, DropoutNTP 0.5 alone", "made up")),
}
UNDISTURBED = ["--eval-every", 0, "--save-every", 0, "--no-final-eval"]
QUICK = ["--max-steps", 1, "--batch-size", 2, "--workers", 0]


def make_rows(folder, seed, quick):
    """Each variant: the finetuned model, its pairs, and 60 steps of 16 of them."""
    world = folder / "world"
    toyworld.write_world(world, *((16, 4) if quick else ()))
    write_questions(folder, 16 if quick else 300)
    start = folder / "before"
    undisturbed = UNDISTURBED + (QUICK if quick else [])
    before = (train, start, ["--data", world / "train.json", *undisturbed])
    common = ["--model", start, "--image-root", world, "--seed", seed]

    rows = {"before": [before]}
    for row, (w_p, w_q, w_g, sources) in VARIANTS.items():
        commands, files = [before], []
        for source in sources:
            method, flags = SOURCES[source]
            files.append(folder / f"{source}-{seed}.jsonl")
            flags = ["--method", method, *flags, "--data", folder / f"{method}.jsonl", *common]
            commands.append((pairs, files[-1], [*flags, "--max-new-tokens", 96]))
        flags = ["--w-p", w_p, "--w-q", w_q, "--w-g", w_g, "--data", ",".join(map(str, files)), *common]
        flags += ["--max-steps", 60, *undisturbed]
        rows[row] = [*commands, (mpo, run_folder(folder, row, seed), flags)]
    return rows


# ---- questions and their evaluation ----


def scene_of(split, i):
    """The scene of a picture, as toyworld.make_picture had it, and a generator for what is asked here."""
    rng = random.Random(f"0 {split} {i}")
    return toyworld.random_scene(rng, held_out=split == "val"), random.Random(f"lab {split} {i}")


def write_questions(out, n):
    """About the first n training pictures, for each method: questions of two steps, and for captions."""
    reasoning = []
    captions = []
    for i in range(n):
        question, truth, _ = toyworld.two_step_question(*scene_of("train", i))
        image = f"images/train_{i:05d}.png"
        reasoning.append({"image": image, "question": f"{question}\n{toyworld.SHORT}", "answer": str(truth)})
        captions.append({"image": image, "question": toyworld.CAPTION})
    write_json_lines(out / "correctness.jsonl", reasoning)
    write_json_lines(out / "dropout-ntp.jsonl", captions)


def score(model, quick):
    """Of held-out pictures each is asked about three times."""
    vlm = VLM.from_pretrained(model)
    tok = Tokenizer(model)
    n = 4 if quick else 200
    asked = [toyworld.two_step_question(*scene_of("val", i)) for i in range(n)]

    def answers_to(texts):
        questions = []
        for i, text in enumerate(texts):
            picture = model.parent / f"world/images/val_{i:05d}.png"
            questions.append({"turns": [("human", text)], "pictures": [picture]})
        prompts = encode_questions(vlm, tok, questions)
        return [found.text for found in answer(vlm, tok, prompts, max_new_tokens=96)]

    direct = answers_to([f"{question}\n{toyworld.SHORT}" for question, _, _ in asked])
    by_steps = answers_to([ask_step_by_step(question, 1) for question, _, _ in asked])
    captions = answers_to([toyworld.CAPTION] * n)

    truths = [str(truth) for _, truth, _ in asked]
    finals = [parse_answer(text, 1) for text in by_steps]
    found = [final is not None and is_right(final[1], truth) for final, truth in zip(finals, truths)]
    counts = [count_made_up(caption, scene_of("val", i)[0]) for i, caption in enumerate(captions)]
    made_up, named = zip(*counts)
    return {
        "direct": sum(map(is_right, direct, truths)) / n,
        "step by step": sum(found) / n,
        "no final answer": finals.count(None) / n,
        "made up": sum(made_up) / max(1, sum(named)),            # of all things that captions name
        "captions with one": sum(k > 0 for k in made_up) / n,
    }


def count_made_up(caption, scene):
    """How many things of a caption are not in the picture, how many it names (CHAIR, arXiv:1809.02156)."""
    colors = "|".join(toyworld.COLORS)
    kinds = "|".join(toyworld.KINDS)
    named = Counter(re.findall(rf"(?:{colors}) (?:{kinds})\b", caption))
    named.update(re.findall(r"says (\w+)", caption))                  # a sign counts by its word
    there = Counter(f"{thing.color} {thing.kind}" for thing in scene.things)
    there[scene.sign and scene.sign.word] += 1
    return (named - there).total(), named.total()

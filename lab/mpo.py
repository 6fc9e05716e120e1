"""Preference learning in miniature (arXiv:2411.10442v2): which of the paper's findings show in the toy.

    python -m lab.mpo                # out/lab-mpo/table.md

Finetune, let the model make its own pairs, train each variant on them, examine all. The questions to make
pairs from are about training pictures, those of the examination about held-out ones. What is there
already, pairs or a finished run, is not made again: remove the folder for that.
"""

import contextlib
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mpo
import pairs
import toyworld
import train
from benchmarks.common import is_right
from conversation import Tokenizer
from eval import answer_questions
from model import VLM
from pairs import ask_step_by_step, parse_answer
from support.cli import arg, parse, run
from support.io import write_json

RATIOS = (0.25, 0.5, 0.75)           # how much of an answer DropoutNTP keeps
UNDISTURBED = ["--eval-every", 0, "--save-every", 0, "--no-final-eval"]
MPO = (0.8, 0.2, 1)                  # w_p, w_q, w_g
VARIANTS = {                         # row -> weights; are there pairs by correctness; ratio of DropoutNTP's
    "SFT on chosen": ((0, 0, 1), True, 0.5),
    "DPO": ((1, 0, 0), True, 0.5),
    "DPO+sft": ((1, 0, 1), True, 0.5),
    "BCO+sft": ((0, 1, 1), True, 0.5),
    "MPO": (MPO, True, 0.5),
    "MPO, DropoutNTP 0.25 alone": (MPO, False, 0.25),
    "MPO, DropoutNTP 0.5 alone": (MPO, False, 0.5),
    "MPO, DropoutNTP 0.75 alone": (MPO, False, 0.75),
}
COLUMNS = {
    "direct": "direct",
    "cot": "step by step",
    "no_format": "no final answer",
    "hallucinated": "things that are not there",
    "captions": "captions with one",
}
CLAIMS = {                           # what the paper says -> two cells: the first is then above the second
    "MPO is better than SFT on the chosen answers, step by step (Table 3)":
        (("MPO", "cot"), ("SFT on chosen", "cot")),
    "DPO alone makes step by step worse than direct (Table 6)":
        (("DPO", "direct"), ("DPO", "cot")),
    "with SFT beside it DPO is better step by step (Table 6)":
        (("DPO+sft", "cot"), ("DPO", "cot")),
    "DPO alone loses the format, SFT keeps it (section 10)":
        (("DPO", "no_format"), ("DPO+sft", "no_format")),
    "MPO is better than DPO+sft, step by step (Table 6)":
        (("MPO", "cot"), ("DPO+sft", "cot")),
    "DropoutNTP lessens hallucination (Table 4)":
        (("before", "hallucinated"), ("MPO, DropoutNTP 0.5 alone", "hallucinated")),
    "and at half of the answer more than at a quarter (Table 9)":
        (("MPO, DropoutNTP 0.25 alone", "hallucinated"), ("MPO, DropoutNTP 0.5 alone", "hallucinated")),
    "or at three quarters (Table 9)":
        (("MPO, DropoutNTP 0.75 alone", "hallucinated"), ("MPO, DropoutNTP 0.5 alone", "hallucinated")),
}


@dataclass
class LabMPOConfig:
    model: str = arg("out/finetune", "the model before; trained first where it is not there")
    out: str = arg("out/lab-mpo", "folder to write to")
    seeds: int = arg(3, "runs of each variant", at_least=1)
    questions: int = arg(300, "training pictures to ask about, for each method", at_least=1)
    samples: int = arg(8, "answers to each question", at_least=2)
    steps: int = arg(60, "steps of 16 pairs", at_least=1)
    held_out: int = arg(200, "held-out pictures to ask about, in three ways", at_least=1, at_most=240)


def main(argv=None):
    cfg = parse(LabMPOConfig, argv, description=__doc__)
    out = Path(cfg.out)
    began = time.time()
    out.mkdir(parents=True, exist_ok=True)
    toyworld.write_world("toyworld")
    make_unless_there(cfg, Path(cfg.model), train, ["--stage", "finetune", "--seed", 0, *UNDISTURBED])
    write_questions(out, cfg.questions)
    exam = make_exam(cfg.held_out)
    results = {"before": [take_exam(cfg.model, exam)]}
    print(f"before: {result_line(results['before'])}", flush=True)

    for seed in range(cfg.seeds):
        folder = out / f"seed{seed}"
        make_pairs(cfg, folder, seed)
        for name, variant in VARIANTS.items():
            run_dir = folder / re.sub(r"\W+", "-", name.lower())
            train_variant(cfg, run_dir, variant, seed)
            results.setdefault(name, []).append(take_exam(run_dir, exam))
            print(f"seed {seed}, {name}: {result_line(results[name][-1:])}", flush=True)

    table = table_lines(results)
    (out / "table.md").write_text("\n".join(table) + "\n")
    write_json(out / "table.json", results, indent=1)
    print("\n".join(table))
    print(f"in {(time.time() - began) / 60:.1f} minutes; the runs, their logs and the table are in {out}")
    return 0


# ---- the runs ----


def make_unless_there(cfg, result, program, flags):
    """Run one of our programs unless its folder or file is there; what it prints goes to a file."""
    done = result if result.suffix == ".jsonl" else result / "config.json"
    if done.exists():
        return
    words = ["--out", result, *flags]
    with open(Path(cfg.out) / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        program.main([str(word) for word in words])


def make_pairs(cfg, folder, seed):
    common = ["--model", cfg.model, "--image-root", "toyworld", "--seed", seed, "--max-new-tokens", 96]
    make_unless_there(cfg, folder / "correctness.jsonl", pairs, [
        "--method", "correctness", "--data", f"{cfg.out}/reasoning.jsonl",
        "--samples", cfg.samples, "--min-newlines", 1, *common,
    ])
    for ratio in RATIOS:
        make_unless_there(cfg, folder / f"dropout{ratio}.jsonl", pairs, [
            "--method", "dropout-ntp", "--data", f"{cfg.out}/captions.jsonl", "--ratio", ratio, *common,
        ])


def train_variant(cfg, run_dir, variant, seed):
    (w_p, w_q, w_g), has_correctness, ratio = variant
    names = ["correctness"] if has_correctness else []
    names.append(f"dropout{ratio}")
    root = str(Path("toyworld").absolute())
    mixture = {}
    for name in names:
        file = run_dir.parent / f"{name}.jsonl"
        mixture[name] = {"root": root, "annotation": str(file.absolute())}
    data = run_dir.with_suffix(".json")
    write_json(data, mixture)
    make_unless_there(cfg, run_dir, mpo, [
        "--model", cfg.model, "--data", data, "--image-root", "toyworld", "--seed", seed,
        "--w-p", w_p, "--w-q", w_q, "--w-g", w_g, "--max-steps", cfg.steps, *UNDISTURBED,
    ])


# ---- questions and their examination ----


def scene_of(split, i):
    """The scene of a picture, as toyworld.make_picture had it, and a generator for what is asked here."""
    rng = random.Random(f"0 {split} {i}")
    return toyworld.random_scene(rng, held_out=split == "val"), random.Random(f"lab {split} {i}")


def write_questions(out, n):
    """reasoning.jsonl with answers, captions.jsonl without, both about the first n training pictures."""
    reasoning = []
    captions = []
    for i in range(n):
        scene, rng = scene_of("train", i)
        question, truth, _ = toyworld.two_step_question(scene, rng)
        image = f"images/train_{i:05d}.png"
        reasoning.append({"image": image, "question": f"{question}\n{toyworld.SHORT}", "answer": str(truth)})
        captions.append({"image": image, "question": toyworld.CAPTION})
    for name, rows in ("reasoning", reasoning), ("captions", captions):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_exam(n):
    """[(picture, question, answer, scene), ...] about held-out pictures."""
    exam = []
    for i in range(n):
        scene, rng = scene_of("val", i)
        question, truth, _ = toyworld.two_step_question(scene, rng)
        exam.append((Path(f"toyworld/images/val_{i:05d}.png"), question, str(truth), scene))
    return exam


def take_exam(model, exam):
    """-> {column: share}, the columns being those of COLUMNS."""
    vlm = VLM.from_pretrained(model)
    tok = Tokenizer(model)

    def answers_to(texts):
        asked = [{"paths": [picture], "text": text} for (picture, *_), text in zip(exam, texts)]
        return [answer.text for answer in answer_questions(vlm, tok, asked)]

    questions = [question for _, question, _, _ in exam]
    direct = answers_to([f"{question}\n{toyworld.SHORT}" for question in questions])
    by_steps = answers_to([ask_step_by_step(question, 1) for question in questions])
    captions = answers_to([toyworld.CAPTION] * len(exam))

    marks = Counter()
    for (_, _, truth, scene), short, long, caption in zip(exam, direct, by_steps, captions):
        marks["direct"] += is_right(short, truth)
        final = parse_answer(long, 1)
        marks["no_format"] += final is None
        marks["cot"] += final is not None and is_right(final[1], truth)
        n_made_up, n_named = count_made_up(caption, scene)
        marks["captions"] += n_made_up > 0
        marks["made up"] += n_made_up
        marks["named"] += n_named
    shares = {name: marks[name] / len(exam) for name in ("direct", "cot", "no_format", "captions")}
    return shares | {"hallucinated": marks["made up"] / max(1, marks["named"])}


def count_made_up(caption, scene):
    """How many things of a caption are not in the picture, how many it names (CHAIR, arXiv:1809.02156)."""
    colors = "|".join(toyworld.COLORS)
    kinds = "|".join(toyworld.KINDS)
    named = Counter(re.findall(rf"({colors}) ({kinds})\b", caption))
    named.update(re.findall(r"says (\w+)", caption))
    there = Counter((thing.color, thing.kind) for thing in scene.things)     # a sign counts by its word
    if scene.sign:
        there[scene.sign.word] += 1
    return (named - there).total(), named.total()


# ---- the table ----


def table_lines(results):
    """{row: what take_exam gave, for each seed} -> a table in Markdown, and a verdict on each claim."""
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for name, runs in results.items():
        lines.append(f"| {name} | {' | '.join(table_cells(runs).values())} |")

    n_seeds = max(map(len, results.values()))
    for claim, (more, less) in CLAIMS.items():
        (row, column), (other_row, other_column) = more, less
        higher = results[row] * n_seeds if row == "before" else results[row]
        gaps = [a[column] - b[other_column] for a, b in zip(higher, results[other_row])]
        if min(gaps) > 0:
            verdict = "shows"
        elif max(gaps) < 0:
            verdict = "the contrary shows"
        else:
            verdict = "not to be told at this size"
        points = ", ".join(f"{100 * gap:+.1f}" for gap in gaps)
        lines.append(f"- {claim}: {verdict} ({points} points by seed)")
    return lines


def table_cells(runs):
    """{column: mean of the seeds, and half the distance from the lowest to the highest}"""
    cells = {}
    for key, name in COLUMNS.items():
        values = [100 * shares[key] for shares in runs]
        cells[name] = f"{statistics.mean(values):.1f}%"
        if len(values) > 1:
            cells[name] += f" ± {(max(values) - min(values)) / 2:.1f}"
    return cells


def result_line(runs):
    return ", ".join(f"{cell} {name}" for name, cell in table_cells(runs).items())


if __name__ == "__main__":
    sys.exit(run(main))

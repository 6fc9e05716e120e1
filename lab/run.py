"""Run one experiment: rows that are trained alike but for a few flags, scored alike, with several seeds.

    python -m lab.run --list
    python -m lab.run formats            # results/formats.md and formats.png
    python -m lab.run formats --quick    # a step and a few questions, to see that it runs; in out/lab-quick

lab/experiments.py has the experiments. What has been trained lies in out/lab and is not trained again: a row
that two experiments share is one run. Remove out/lab to begin anew.
"""

import contextlib
import json
import os
import re
import statistics
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import mpo
import pairs
import toyworld
import train
from lab import losses
from lab.experiments import EXPERIMENTS, FILES, MEASURES, widen_pictures
from support.cli import UserError, arg, parse, run_program
from support.io import read_json, write_json, write_json_lines

PROGRAMS = {"train": train, "pairs": pairs, "mpo": mpo, "losses": losses}
UNDISTURBED = " --eval-every 0 --save-every 0"
QUICK = " --max-steps 1 --batch-size 2 --workers 0 --eval-limit 24"
QUICK_PAIRS = " --limit 12 --max-new-tokens 48"
LEGEND = (
    "The commands of the rows are in lab/experiments.py; a run is 80 steps of 16 records where nothing else "
    "is said above. Columns are shares of right answers to held-out questions, 72 of a category (one is 1.4 "
    "points), 198 where preferences are trained (0.5 points); `all` is the mean of twelve categories, `short "
    "answers` of existence, count, attribute, spatial, reading and reasoning; `cot` asks for the steps of "
    "`reasoning`, and `chat` has no format prompt. Of `made up` (things named that are not there), `no final "
    "answer` and `chat in one word` less is better. A difference shows where all seeds agree in it:"
)


@dataclass
class LabConfig:
    name: str = arg("", "of the experiment", choices=tuple(EXPERIMENTS), positional=True)
    list: bool = arg(False, "name every experiment, its paper, its claims and its minutes")
    seeds: int = arg(3, "runs of each row", at_least=1)
    out: str = arg("results", "folder for the page and its picture")
    quick: bool = arg(False, "a step and a few questions; its figures mean nothing")


def main(argv=None):
    cfg = parse(LabConfig, argv, description=__doc__)
    if cfg.list or not cfg.name:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:12}{experiment.paper}; {experiment.minutes} minutes a seed")
            print("\n".join(f"{'':12}- {claim}" for claim in experiment.claims))
        return 0

    experiment = EXPERIMENTS[cfg.name]
    lab = Path("out/lab-quick" if cfg.quick else "out/lab")
    results = {}                     # {row: [{column: share} of each seed]}
    seconds = {}                     # that each command took
    for seed in range(cfg.seeds):
        for row, commands in experiment.rows.items():
            run = make_row(lab, commands, seed, cfg.quick, seconds)
            records = read_json(run / "results.json")["records"]
            scores = {column: MEASURES[column](records) for column in experiment.columns}
            results.setdefault(row, []).append(scores)
            shares = ", ".join(f"{column} {share:.1%}" for column, share in scores.items())
            print(f"seed {seed}, {row}: {shares}", flush=True)

    page = (lab if cfg.quick else Path(cfg.out)) / f"{cfg.name}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    draw_results(page.with_suffix(".png"), results)
    page.write_text(write_page(cfg.name, experiment, results, sum(seconds.values())))
    print(f"{page.read_text()}\nin {page}")
    return 0


# ---- the runs of a row ----


def make_row(lab, commands, seed, quick, seconds):
    """Run the commands of a row, each once -> what the last one made. seconds takes in how long each took."""
    made = []
    for command in commands:
        program, flags = fill_in(command, seed)
        if quick:
            flags += QUICK_PAIRS if program == "pairs" else QUICK
        files = {name: make_file(lab, name, quick) for name in re.findall("{([a-z]+)", flags)}
        flags = flags.format(*made, **files)

        # Its file of seconds says that a command is done.
        out = lab / f"{program}-{zlib.crc32(flags.encode()):08x}"
        done = out.with_suffix(".json")
        if program == "pairs":
            out = out.with_suffix(".jsonl")
        if not done.exists():
            began = time.time()
            log = out.with_suffix(".txt")
            with open(log, "w") as file, contextlib.redirect_stdout(file):
                if PROGRAMS[program].main(["--out", str(out), *flags.split()]):
                    raise UserError(f"{out}: not finished; what was printed is in {log}")
            write_json(done, {"command": f"{program} {flags}", "seconds": round(time.time() - began)})
        seconds[out] = read_json(done)["seconds"]
        made.append(out)
    return out


def fill_in(command, seed):
    """-> the program, its flags with those that a command leaves out."""
    program, _, flags = command.partition(" ")
    if program == "train":
        flags += "" if "--data " in flags else " --data {base}"
        flags += "" if "--max-steps" in flags or "--epochs" in flags else " --epochs 1"
    return program, f"{flags} --seed {seed}" + ("" if program == "pairs" else UNDISTURBED)


def make_file(lab, name, quick):
    """The path of a file of FILES: that of a toy world, rewritten record by record, beside its pictures."""
    world, source, rewrite = FILES[name]
    folder = lab / "-".join(["world", *map(str, world)])
    path = folder / f"{name}{Path(source).suffix}"
    if path.exists():
        return path
    n_train, n_val = (16, 8) if quick else (world.n_train, world.n_val)
    toyworld.write_world(folder, n_train, n_val, world.size, 0, world.words)
    if world.wide:
        widen_pictures(folder)
    text = (folder / source).read_text()
    if path.suffix == ".json":
        write_json(path, [new for record in json.loads(text) for new in rewrite(record)])
    else:
        write_json_lines(path, [new for line in text.splitlines() for new in rewrite(json.loads(line))])
    return path


# ---- the page ----


def write_page(name, experiment, results, seconds):
    n_seed = len(next(iter(results.values())))
    machine = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    parts = [
        f"# {name}",
        f"{experiment.paper}: {experiment.says}",
        f"    python -m lab.run {name}",
        f"{experiment.setup} Mean and standard deviation of {n_seed} seeds; {seconds / 60:.0f} minutes "
        f"in all ({machine}).",
        "\n".join(table_lines(results)),
        f"![each seed a dot, their mean a stroke; each column has its own scale]({name}.png)",
        LEGEND,
        "\n".join(f"- {claim}: {judge(results, claim)}" for claim in experiment.claims),
    ]
    return "\n\n".join(filter(None, [*parts, experiment.note])) + "\n"


def table_lines(results):
    """In Markdown; a cell has mean and standard deviation over the seeds."""
    columns = list(next(iter(results.values()))[0])
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, runs in results.items():
        cells = []
        for column in columns:
            shares = [100 * scores[column] for scores in runs]
            spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
            cells.append(f"{statistics.mean(shares):.1f}%{spread}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def judge(results, claim):
    """What becomes of a claim. The same seeds are compared; a difference is what all seeds agree in."""
    first, sign, second = re.fullmatch("(.+) ([>=]) (.+)", claim).groups()
    (row, column), (other_row, other_column) = first.rsplit(", ", 1), second.rsplit(", ", 1)
    gaps = [a[column] - b[other_column] for a, b in zip(results[row], results[other_row])]
    differs = min(gaps) > 0 or max(gaps) < 0
    if len(gaps) == 1:
        said = "not to be told from one seed"
    elif sign == "=":
        higher = "first" if min(gaps) > 0 else "second"
        said = "no difference shows"
        if differs:
            said = f"does not show: the {higher} is higher"
    elif differs:
        said = "shows" if min(gaps) > 0 else "the contrary shows"
    else:
        said = "does not show"
    points = ", ".join(f"{100 * gap:+.1f}" for gap in gaps)
    return f"**{said}** ({points} points by seed)"


def draw_results(path, results):
    """A panel for each column, a line for each row: a dot for each seed, a stroke for their mean."""
    columns = list(next(iter(results.values()))[0])
    left, width, height = 180, 130, 26
    image = Image.new("RGB", (left + (width + 40) * len(columns), height * (len(results) + 2)), "white")
    pen = ImageDraw.Draw(image)
    for i, row in enumerate(results):
        pen.text((8, height * (i + 1.5)), row, "black", anchor="lm", font_size=13)
    for k, column in enumerate(columns):
        start = left + (width + 40) * k
        shares = [scores[column] for runs in results.values() for scores in runs]
        low, high = min(shares), max(shares)
        scale = width / (high - low or 1)
        pen.text((start, 4), column, "black", font_size=13)
        pen.text((start, image.height - 18), f"{low:.0%}", "gray", font_size=11)
        pen.text((start + width, image.height - 18), f"{high:.0%}", "gray", anchor="ra", font_size=11)
        for i, runs in enumerate(results.values()):
            y = height * (i + 1.5)
            places = [start + scale * (scores[column] - low) for scores in runs]
            mean = statistics.mean(places)
            pen.line([(start, y), (start + width, y)], "#e6e6e6")
            pen.line([(mean, y - 8), (mean, y + 8)], "#1f6fb5", 2)
            for x in places:
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), "#d6502b")
    image.save(path)


if __name__ == "__main__":
    sys.exit(run_program(main))

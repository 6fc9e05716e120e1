"""Run one experiment: rows that are trained alike but for a few flags, scored alike, with several seeds.

    python -m lab.run --list
    python -m lab.run formats            # results/formats.md and formats.png
    python -m lab.run formats --seeds 1
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
from lab.experiments import EXPERIMENTS, FILES
from support.cli import UserError, arg, parse, run_program
from support.io import read_json, write_json, write_json_lines

PROGRAMS = {"train": train, "pairs": pairs, "mpo": mpo}
UNDISTURBED = "--eval-every 0 --save-every 0"
QUICK = {
    "train": "--max-steps 1 --batch-size 2 --workers 0 --eval-limit 24",
    "pairs": "--limit 12 --max-new-tokens 48",
    "mpo": "--max-steps 1 --batch-size 2 --workers 0 --eval-limit 24",
}


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
            print(f"{name:12} {experiment.minutes:3} minutes a seed  {experiment.paper}")
            print("\n".join(f"             - {claim}" for claim in experiment.claims))
        return 0

    experiment = EXPERIMENTS[cfg.name]
    lab = Path("out/lab-quick" if cfg.quick else "out/lab")
    pages = lab if cfg.quick else Path(cfg.out)
    pages.mkdir(parents=True, exist_ok=True)
    results = {}                     # {row: [{column: share} of each seed]}
    seconds = 0
    for seed in range(cfg.seeds):
        for row, commands in experiment.rows.items():
            run, took = make_row(lab, commands, seed, cfg.quick)
            seconds += took
            records = read_json(run / "results.json")["records"]
            scores = {column: measure(records) for column, measure in experiment.columns.items()}
            results.setdefault(row, []).append(scores)
            shares = ", ".join(f"{column} {share:.1%}" for column, share in scores.items())
            print(f"seed {seed}, {row}: {shares}", flush=True)

    draw_results(pages / f"{cfg.name}.png", results)
    page = write_page(cfg.name, experiment, results, seconds)
    (pages / f"{cfg.name}.md").write_text(page)
    print(f"{page}\nin {pages / cfg.name}.md")
    return 0


# ---- the runs of a row ----


def make_row(lab, commands, seed, quick):
    """Run the commands of a row, each once -> what the last one made, and the seconds that all took."""
    made = []
    seconds = 0
    for command in commands:
        program, flags = command.partition(" ")[::2]
        if program == "train":
            flags += "" if "--data" in flags else " --data {base}"
            flags += "" if "--max-steps" in flags or "--epochs" in flags else " --epochs 1"
        files = {name: make_file(lab, name, quick) for name in re.findall("{([a-z]+)", flags)}
        flags = flags.format(*made, **files) + f" --seed {seed}"
        if program != "pairs":
            flags += " " + UNDISTURBED
        if quick:
            flags += " " + QUICK[program]

        # A file of the seconds that it took says that it is done.
        name = f"{program}-{zlib.crc32(flags.encode()):08x}"
        out = lab / (f"{name}.jsonl" if program == "pairs" else name)
        done = lab / f"{name}.json"
        if not done.exists():
            began = time.time()
            with open(lab / f"{name}.txt", "w") as log, contextlib.redirect_stdout(log):
                if PROGRAMS[program].main(["--out", str(out), *flags.split()]):
                    raise UserError(f"{out}: not finished; what was printed is in {lab / name}.txt")
            write_json(done, {"command": f"{program} {flags}", "seconds": round(time.time() - began)})
        seconds += read_json(done)["seconds"]
        made.append(out)
    return out, seconds


def make_file(lab, name, quick):
    """A file of a toy world, rewritten record by record -> its path."""
    world, source, rewrite = FILES[name]
    n_train, n_val, size, words = world
    folder = lab / "world-{}-{}-{}-{}".format(*world)
    path = folder / f"{name}{Path(source).suffix}"
    if path.exists():
        return path
    with contextlib.redirect_stdout(None):
        toyworld.write_world(folder, *((16, 8) if quick else (n_train, n_val)), size, 0, words)
    if path.suffix == ".json":
        records = [new for record in json.loads((folder / source).read_text()) for new in rewrite(record)]
        write_json(path, records)
    else:
        lines = (folder / source).read_text().splitlines()
        write_json_lines(path, [new for line in lines for new in rewrite(json.loads(line))])
    return path


# ---- the page ----


def write_page(name, experiment, results, seconds):
    n_seed = len(next(iter(results.values())))
    machine = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    lines = [f"# {name}", "", f"{experiment.paper}. {experiment.says}", ""]
    lines += [f"    python -m lab.run {name}", ""]
    lines += [f"{experiment.setup} Mean and standard deviation of {n_seed} seeds, {seconds / 60:.0f} minutes "
              f"in all ({machine}).", ""]
    lines += [*table_lines(results), "", f"![each seed a dot, the mean a line]({name}.png)", ""]
    lines += [f"- {claim}: {judge(results, *cells)}" for claim, cells in experiment.claims.items()]
    if experiment.note:
        lines += ["", experiment.note]
    return "\n".join(lines) + "\n"


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


def judge(results, high, sign, low):
    """What becomes of a claim: that a cell is above another (>), or that they are alike (=).

    The same seed of both is compared, and only what all seeds agree in is a difference.
    """
    (row, column), (other_row, other_column) = high, low
    gaps = [a[column] - b[other_column] for a, b in zip(results[row], results[other_row])]
    if len(gaps) == 1:
        said = "not to be told from one seed"
    elif min(gaps) > 0:
        said = "**shows**" if sign == ">" else "**does not show**"
    elif max(gaps) < 0:
        said = "**the contrary shows**" if sign == ">" else "**does not show**"
    else:
        said = "**does not show**" if sign == ">" else "**shows**, the seeds disagree"
    points = ", ".join(f"{100 * gap:+.1f}" for gap in gaps)
    return f"{said} ({points} points by seed)"


def draw_results(path, results):
    """A panel for each column, a line for each row: a dot for each seed, a stroke for their mean."""
    columns = list(next(iter(results.values()))[0])
    width, height, left = 190, 26, 250
    image = Image.new("RGB", (left + width * len(columns), height * (len(results) + 2)), "white")
    pen = ImageDraw.Draw(image)
    for i, row in enumerate(results):
        pen.text((8, height * (i + 1.5)), row, "black", anchor="lm", font_size=13)
    for k, column in enumerate(columns):
        shares = [scores[column] for runs in results.values() for scores in runs]
        low, high = min(shares), max(shares)
        scale = (width - 60) / (high - low or 1)
        start = left + width * k + 20
        pen.text((start, 4), column, "black", font_size=13)
        pen.text((start, image.height - 18), f"{low:.0%}", "gray", font_size=11)
        pen.text((start + width - 60, image.height - 18), f"{high:.0%}", "gray", anchor="ra", font_size=11)
        for i, runs in enumerate(results.values()):
            y = height * (i + 1.5)
            pen.line([(start, y), (start + width - 60, y)], "#e6e6e6")
            mean = start + scale * (statistics.mean(scores[column] for scores in runs) - low)
            pen.line([(mean, y - 8), (mean, y + 8)], "#1f6fb5", 2)
            for scores in runs:
                x = start + scale * (scores[column] - low)
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), "#d6502b")
    image.save(path)


if __name__ == "__main__":
    sys.exit(run_program(main))

"""Run one experiment: rows that are trained alike but for a few flags, scored alike, with several seeds.

    python -m lab.run --list
    python -m lab.run formats            # brings results/formats.md and formats.png up to date
    python -m lab.run formats --quick    # a step and a few questions, to see that it runs; in out/lab-quick

The page of an experiment says what the paper found and what is done here; the columns of its table are what
is scored, and a claim is "row, column > row, column" (the first is higher) or, with "=", that they are alike.
A run writes new figures into it: cells, verdicts, seeds and minutes. The commands of the rows stand in
lab/experiments.py. What has been trained lies in out/lab and is not trained again: a row that two experiments
share is one run. Remove out/lab to begin anew.
"""

import contextlib
import os
import re
import statistics
import sys
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import mpo
import pairs
import toyworld
import train
from benchmarks.common import load_records
from lab import losses
from lab.experiments import EXPERIMENTS, FILES, measure, widen_pictures
from support.cli import UserError, arg, parse, run_program
from support.io import read_json, reading, write_json, write_json_lines, write_text

PROGRAMS = {"train": train, "pairs": pairs, "mpo": mpo, "losses": losses}
UNDISTURBED = " --eval-every 0 --save-every 0"
QUICK = " --max-steps 1 --batch-size 2 --workers 0 --eval-limit 24"
QUICK_PAIRS = " --limit 12 --max-new-tokens 48"
PAGES = Path("results")
CLAIM = re.compile("^- (.+) ([>=]) ([^:\n]+).*", re.MULTILINE)          # with its verdict, if it has one


@dataclass
class LabConfig:
    name: str = arg("", "of the experiment", choices=tuple(EXPERIMENTS), positional=True)
    list: bool = arg(False, "name every experiment, its paper, its minutes and its claims")
    seeds: int = arg(3, "runs of each row", at_least=1)
    quick: bool = arg(False, "a step and a few questions; its figures mean nothing")


def main(argv=None):
    cfg = parse(LabConfig, argv, description=__doc__)
    if cfg.list or not cfg.name:
        for name in EXPERIMENTS:
            show_claims(name)
        return 0

    lab = Path("out/lab-quick" if cfg.quick else "out/lab")
    page = read_page(cfg.name)
    columns = re.search(r"^\| \| (.+) \|$", page, re.MULTILINE)[1].split(" | ")
    rows = EXPERIMENTS[cfg.name]
    results = defaultdict(list)      # {"row, column": [share of each seed]}
    made = set()
    for seed in range(cfg.seeds):
        for row, commands in rows.items():
            runs = make_row(lab, commands, seed, cfg.quick)
            made.update(runs)
            records = read_json(runs[-1] / "results.json")["records"]
            for column in columns:
                share = measure(column, records)
                results[f"{row}, {column}"].append(share)
                print(f"seed {seed}, {row}, {column}: {share:.1%}")

    # Of its page the words stay; rows, claims and what was needed for them become those of this run.
    seconds = sum(read_json(out.with_suffix(".json"))["seconds"] for out in made)
    machine = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    needed = f"{cfg.seeds} seeds; {seconds / 60:.0f} minutes in all ({machine})."
    page = re.sub(r"\d+ seeds; .*", needed, page)
    page = re.sub(r"(?m)^\| (\w[^|]*?) \|.*", lambda row: table_row(row[1], columns, results), page)
    page = CLAIM.sub(lambda claim: judge(results, claim), page)
    path = (lab if cfg.quick else PAGES) / f"{cfg.name}.md"
    write_text(path, page)
    draw_results(path.with_suffix(".png"), list(rows), columns, results)
    print(f"{page}\nin {path}")
    return 0


def read_page(name):
    path = PAGES / f"{name}.md"
    with reading(path):
        return path.read_text(encoding="utf-8")


def show_claims(name):
    page = read_page(name)
    paper = re.search("\n\n(.+?): ", page)[1]
    n_seed, minutes = re.search(r"(\d+) seeds; (\d+) minutes", page).groups()
    print(f"{name:12}{paper}; {int(minutes) / int(n_seed):.0f} minutes a seed")
    for claim in CLAIM.finditer(page):
        print(f"{'':12}{claim[0]}")


# ---- the runs of a row ----


def make_row(lab, commands, seed, quick):
    """Run the commands of a row, unless that was done before -> what each of them has made."""
    made = []
    for command in commands.split(" && "):
        program, _, flags = command.partition(" ")
        flags += f" --seed {seed}" + ("" if program == "pairs" else UNDISTURBED)
        if quick:
            flags += QUICK_PAIRS if program == "pairs" else QUICK
        files = {name: make_file(lab, name, quick) for name in re.findall("{([a-z]+)", flags)}
        flags = flags.format(*made, **files)

        # A file with its seconds, beside it, says that a command is done.
        out = lab / f"{program}-{zlib.crc32(flags.encode()):08x}"
        done = out.with_suffix(".json")
        if not done.exists():
            began = time.time()
            log = out.with_suffix(".txt")
            with open(log, "w") as file, contextlib.redirect_stdout(file):
                if PROGRAMS[program].main(["--out", str(out), *flags.split()]):
                    raise UserError(f"{out}: not finished; what was printed is in {log}")
            write_json(done, {"command": f"{program} {flags}", "seconds": round(time.time() - began)})
        made.append(out)
    return made


def make_file(lab, name, quick):
    """The path of a file of FILES: that of a toy world, rewritten record by record, beside its pictures."""
    world, rewrite = FILES[name]
    folder = lab / "-".join(["world", *map(str, world)])
    path = folder / f"{name}.jsonl"
    if path.exists():
        return path
    n_train, n_val = (16, 8) if quick else (world.n_train, world.n_val)
    toyworld.write_world(folder, n_train, n_val, world.size, 0, world.words)
    if world.wide:
        widen_pictures(folder)
    records = load_records(folder / ("val.jsonl" if name.endswith("val") else "train.json"))
    write_json_lines(path, [new for _, _, record in records for new in rewrite(record)])
    return path


# ---- the page ----


def table_row(row, columns, results):
    """In Markdown; a cell has mean and standard deviation over the seeds."""
    cells = [row]
    for column in columns:
        shares = [100 * share for share in results[f"{row}, {column}"]]
        spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
        cells.append(f"{statistics.mean(shares):.1f}%{spread}")
    return f"| {' | '.join(cells)} |"


VERDICTS = {                         # the first is higher with every seed, or the second, or neither
    ">": ("shows", "the contrary shows", "does not show"),
    "=": ("does not show: the first is higher", "does not show: the second is higher", "no difference shows"),
}


def judge(results, claim):
    """A match of CLAIM -> its line with a verdict. The same seeds are compared."""
    first, sign, second = claim.groups()
    gaps = [a - b for a, b in zip(results[first], results[second])]
    higher, lower, unclear = VERDICTS[sign]
    if len(gaps) == 1:
        verdict = "not to be told from one seed"
    elif min(gaps) > 0:
        verdict = higher
    elif max(gaps) < 0:
        verdict = lower
    else:
        verdict = unclear
    points = ", ".join(f"{100 * gap:+.1f}" for gap in gaps)
    return f"- {first} {sign} {second}: **{verdict}** ({points} points by seed)"


def draw_results(path, rows, columns, results):
    """A panel for each column, a line for each row: a dot for each seed, a stroke for their mean."""
    left, width, height = 180, 130, 26
    image = Image.new("RGB", (left + (width + 40) * len(columns), height * (len(rows) + 2)), "white")
    pen = ImageDraw.Draw(image)
    for i, row in enumerate(rows):
        pen.text((8, height * (i + 1.5)), row, "black", anchor="lm", font_size=13)
    for k, column in enumerate(columns):
        start = left + (width + 40) * k
        shares = np.array([results[f"{row}, {column}"] for row in rows])
        low, high = shares.min(), shares.max()
        pen.text((start, 4), column, "black", font_size=13)
        pen.text((start, image.height - 18), f"{low:.0%} to {high:.0%}", "gray", font_size=11)
        for i, xs in enumerate(start + width * (shares - low) / (high - low or 1)):
            y = height * (i + 1.5)
            pen.line([(start, y), (start + width, y)], "#e6e6e6")
            pen.line([(xs.mean(), y - 8), (xs.mean(), y + 8)], "#1f6fb5", 2)
            for x in xs:
                pen.circle((x, y), 3, "#d6502b")
    image.save(path)


if __name__ == "__main__":
    sys.exit(run_program(main))

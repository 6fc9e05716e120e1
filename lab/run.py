"""One experiment: rows that are trained alike but for a few flags, scored alike, with several seeds; a table.

    python -m lab.run hd             # out/lab/hd/table.md
    python -m lab.run mpo --seeds 1
    python -m lab.run mpo --quick    # a minute or two, to see that it runs; its figures mean nothing

What is there already, a file of pairs, a finished run or its scores, is not made again: remove it for that.

An experiment is a file of this folder:
    CLAIMS                  {what the paper says: two cells (row, column), the first of them above the second}
    make_rows(folder, seed, quick)   -> {row: [(program, out, flags), ...]}, of which the last makes the model
    score(model, quick)              -> {column: share}
"""

import contextlib
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import lab.hd
import lab.mpo
from support.cli import REQUIRED, UserError, arg, parse, run_program
from support.io import read_json, write_json

EXPERIMENTS = {"hd": lab.hd, "mpo": lab.mpo}


@dataclass
class LabConfig:
    name: str = arg(REQUIRED, "of the experiment", choices=tuple(EXPERIMENTS), positional=True)
    seeds: int = arg(3, "runs of each row", at_least=1)
    out: str = arg("out/lab", "folder to write to")
    quick: bool = arg(False, "a few records, steps and questions")


def main(argv=None):
    cfg = parse(LabConfig, argv, description=__doc__)
    experiment = EXPERIMENTS[cfg.name]
    folder = Path(cfg.out) / (f"{cfg.name}-quick" if cfg.quick else cfg.name)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()

    results = {}                     # {row: [{column: share} of each seed]}
    for seed in range(cfg.seeds):
        for row, commands in experiment.make_rows(folder, seed, cfg.quick).items():
            for program, out, flags in commands:
                make_once(program, out, flags, folder / "log.txt")
            scores = out / "scores.json"
            if not scores.exists():
                write_json(scores, experiment.score(out, cfg.quick))
            results.setdefault(row, []).append(read_json(scores))
            shares = ", ".join(f"{column} {share:.1%}" for column, share in results[row][-1].items())
            print(f"seed {seed}, {row}: {shares}", flush=True)

    table = table_lines(results) + [verdict(results, *claim) for claim in experiment.CLAIMS.items()]
    (folder / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    print(f"in {(time.time() - began) / 60:.1f} minutes; the runs, what they printed and the table: {folder}")
    return 0


def make_once(program, out, flags, log):
    """Run train.py, pairs.py or mpo.py, unless what it writes is there; what it prints goes to a file."""
    done = out if out.suffix else out / "config.json"
    if done.exists():
        return
    with open(log, "a") as file, contextlib.redirect_stdout(file):
        if program.main([str(word) for word in ("--out", out, *flags)]):
            raise UserError(f"{out}: not finished; what was printed is in {log}")


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


def verdict(results, claim, cells):
    """Shown, or the contrary, only where several seeds agree."""
    (row, column), (other_row, other_column) = cells
    gaps = [a[column] - b[other_column] for a, b in zip(results[row], results[other_row])]
    if len(gaps) == 1:
        said = "not to be told from one seed"
    elif min(gaps) > 0:
        said = "shows"
    elif max(gaps) < 0:
        said = "the contrary shows"
    else:
        said = "not to be told at this size"
    points = ", ".join(f"{100 * gap:+.1f}" for gap in gaps)
    return f"- {claim}: {said} ({points} points by seed)"


if __name__ == "__main__":
    sys.exit(run_program(main))

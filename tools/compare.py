"""Two runs of eval.py on the same questions: how far apart are they, and could it be chance?

    python -m tools.compare out/a/results.json out/b/results.json

The interval is a paired bootstrap: the same questions are drawn from both runs, a thousand times.
"""

import sys
from dataclasses import dataclass

from benchmarks.scoring import compare, describe_comparison
from eval import SUITE
from support.cli import REQUIRED, UserError, arg, parse, run_program
from support.io import read_json, reading


@dataclass
class CompareConfig:
    ours: str = arg(REQUIRED, "results.json of one run", positional=True)
    theirs: str = arg(REQUIRED, "results.json of the other", positional=True)


def main(argv=None):
    cfg = parse(CompareConfig, argv, __doc__)
    ours, theirs = read_json(cfg.ours), read_json(cfg.theirs)
    with reading(cfg.theirs, "give two results.json of eval.py"):
        if ours["benchmark"] != theirs["benchmark"]:
            raise UserError(f"{cfg.ours} is of {ours['benchmark']}, {cfg.theirs} of {theirs['benchmark']}")
        found = compare(SUITE[ours["benchmark"]], ours["records"], theirs["records"])
        scores = f"{ours['score']:.2f} and {theirs['score']:.2f}"
    print(f"{ours['benchmark']}: {scores}; {describe_comparison(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))

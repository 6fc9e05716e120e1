"""A file imports only from files to its left, and the programs that ask a model do not load the trainer."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [                            # files of one row may know each other
    {"support.io", "support.cli", "support.cache", "support.log_probs", "support.tiling",
     "support.templates", "support.picture_files",
     "support.processes"},
    {"vision"},
    {"model"},
    {"support.lora", "support.quantize"},
    {"support.configs"},
    {"support.weights", "support.export"},
    {"support.control_tokens"},
    {"conversation"},
    {"support.processor"},
    {"support.data_files", "support.flags"},
    {"data"},
    {"sample"},
    {"benchmarks"},
    {"support.asking", "support.attention", "support.trace", "support.chat"},
    {"eval"},
    {"support.plots", "support.distributed", "support.optim", "support.start"},
    {"support.heldout", "support.checkpoint", "support.plan", "support.threads"},
    {"train"},
    {"mpo"},
    {"pairs"},
    {"toyworld", "tools", "lab"},
]
LATE = {                             # three-line methods, and the toy's world where no --data is given
    ("model", "support.lora"),
    ("model", "support.weights"),
    ("model", "support.export"),
    ("train", "toyworld"),
    ("sample", "support.asking"),
    ("sample", "support.chat"),
}


def place(module):
    """Which row a module stands in; None of what is not ours."""
    for row, names in enumerate(ORDER):
        for name in names:
            if module == name or module.startswith(f"{name}."):
                return row
    return None


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path):
    """[(imported module, whether at the top of the file), ...]"""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(name, node in tree.body) for name in names]
    return found


FILES = sorted(path for path in ROOT.rglob("*.py") if place(module_of(path)) is not None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_its_left(path):
    module = module_of(path)
    for name, at_the_top in imports_of(path):
        row = place(name)
        if row is None or row <= place(module):
            continue
        assert (module, name) in LATE or (module, name.rpartition(".")[0]) in LATE, f"{module} imports {name}"
        assert not at_the_top, f"{module} imports {name} at its top"


@pytest.mark.parametrize("program", ["sample", "eval"])
def test_to_ask_a_model_nobody_needs_the_trainer(program):
    code = f"import sys, {program}; sys.exit('train' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


BENCHMARKS = [path for path in FILES if "benchmarks" in path.parts]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_benchmarks_need_no_torch(path):
    assert not [name for name, _ in imports_of(path) if name.split(".")[0] == "torch"]

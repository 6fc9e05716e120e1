"""Every command of the README runs, in the order of the README, in a fresh copy of the repository."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from common import ROOT, call, in_child, run_python

from tools import show

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [part for line in LINES for part in line.split(" && ") if part.startswith(("python ", "sh "))]
FEWER = {                            # what takes minutes takes a step or two here
    "train.py": "--max-steps 2 --batch-size 4 --eval-every 2 --eval-limit 6 --workers 0",
    "pairs.py": "--limit 12 --max-new-tokens 48",
    "mpo-toy.sh": "--max-steps 2 --batch-size 2 --workers 0 --eval-limit 6",
    "mpo.py": "--max-steps 2 --batch-size 2 --workers 0 --eval-limit 6",
    "-m lab.run": "--quick --seeds 1",
    "-m lab.ingredients": "--steps 1 --out made",
}
SMALLER = {                          # what the first command draws, and how much the lab looks at
    "toyworld.py": ("n_train=6000, n_val=240", "n_train=300, n_val=24"),
    "lab/clip.py": ("held_out_scenes(128)", "held_out_scenes(8)"),
    "lab/dino.py": ("range(400)", "range(40)"),
    "lab/vicuna.py": ("in range(64)", "in range(4)"),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository without its tests and runs, as somebody finds it who has just cloned it."""
    folder = tmp_path_factory.mktemp("clone") / "plainvlm"
    left_out = shutil.ignore_patterns("tests", "out", "toyworld", ".*", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=left_out)
    for file, (usual, small) in SMALLER.items():
        text = (folder / file).read_text()
        assert text.count(usual) == 1
        (folder / file).write_text(text.replace(usual, small))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(command, copy, capfd):
    if command.startswith(("python -m pytest", "python -m venv")):
        pytest.skip("the test command itself")
    words = shlex.split(command, comments=True)
    for program, flags in FEWER.items():
        if program in command:
            words += flags.split()
    program, *words = words
    if program == "python":
        code = in_child(lambda: run_python(words, copy))
    else:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "LIMIT": "24"}
        code = subprocess.call([program, *words], cwd=copy, env=environment, stdin=subprocess.DEVNULL)
    assert code == 0, f"{command}\n{capfd.readouterr()}"


def test_the_lines_of_python_run_after_the_commands(copy):
    [lines] = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run([sys.executable, "-c", lines], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_two_formats_are_those_that_are_read(tmp_path):
    record, question = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", README, re.S)]
    for line in record, question:
        (tmp_path / line["image"]).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "cat.jpg", tmp_path / line["image"])
        (tmp_path / "file.jsonl").write_text(json.dumps(line))
        assert call(show.main, "check", tmp_path / "file.jsonl") == 0


def test_the_table_of_files_has_every_variable_of_the_recipes():
    wanted = set()
    for recipe in (ROOT / "recipes").glob("*.sh"):
        wanted |= set(re.findall(r': "\${(\w+):\?', recipe.read_text()))
    told = set(re.findall(r"`([A-Z]+)`", README.split("| variable |")[1].split("\n\n")[0]))
    assert told >= wanted - {"PAIRS"}                    # those are made by pairs.py


def test_the_first_lines_install_train_and_ask():
    assert "pip install -r requirements.txt" in BLOCKS[0]
    assert COMMANDS[:2] == ["python train.py --stage finetune", "python sample.py --image cat.jpg"]


def test_every_file_the_readme_names_is_there_and_as_long_as_it_says():
    for name in re.findall(r"`([\w./-]+\.(?:py|txt|jpg|model))`", README):
        assert (ROOT / name).exists(), name
    for name, lines in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README):
        length = len((ROOT / name).read_text().splitlines())
        assert abs(length - int(lines)) <= 0.05 * length, f"{name} has {length} lines"


def test_each_exercise_has_a_test_that_fails_as_the_code_stands():
    exercises = re.findall(r"^def test_(\w+)", (ROOT / "tests/exercises.py").read_text(), re.M)
    table = README.split("## Ten exercises")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.M) == exercises
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/exercises.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert f"{len(exercises)} failed" in done.stdout

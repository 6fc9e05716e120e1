"""Every command of the README runs, in the order in which a reader meets it, in a fresh copy of the repository."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line.startswith("python ")]
SHORTER = {                                                                 # what takes minutes takes a step or two here
    "train.py": ["--max-steps", "2", "--batch-size", "4", "--eval-every", "2", "--eval-limit", "6", "--workers", "0"],
    "lab.py": ["--clip-steps", "1", "--vicuna-steps", "1", "--connector-steps", "1", "--out", "made"],
    "toyworld.py": ["--train", "32", "--val", "8", "--out", "small"],
}
PICTURES = "write_world(out=\"toyworld\", n_train=6000,"                     # and of the toy world that the first command draws a part does


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository without its tests and runs, as somebody finds it who has just cloned it; only its toy world is a tenth as large."""
    folder = tmp_path_factory.mktemp("clone") / "plainvlm"
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "cat.jpg"]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "assets", folder / "assets")
    text = (folder / "toyworld.py").read_text()
    assert text.count(PICTURES) == 1
    (folder / "toyworld.py").write_text(text.replace(PICTURES, PICTURES.replace("6000", "600")))
    if SHARED.exists():
        (folder.parent / "shared").symlink_to(SHARED)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(command, copy):
    if "../shared" in command and not SHARED.exists():
        pytest.skip("needs the photos in ../shared, which are not part of this repository")
    words = shlex.split(command, comments=True)[1:]
    if words[1:2] == ["-m"] or words[0] == "-m":
        pytest.skip("the test command itself")
    words += SHORTER.get(words[0], []) if "--hello" not in words else []
    done = subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_the_first_commands_are_install_train_and_ask():
    first = re.search(r"```sh\n(.*?)```", README, re.S)[1]
    assert "pip install -r requirements.txt" in first
    assert COMMANDS[:2] == ["python train.py --stage finetune", "python sample.py --image cat.jpg"]


def test_every_file_the_readme_names_is_there():
    for name in re.findall(r"`([\w./-]+\.(?:py|txt|jpg|model))`", README):
        assert (ROOT / name).exists() or name in ("loss.png",), name

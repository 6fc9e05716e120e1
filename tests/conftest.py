"""What several files of tests share."""

import itertools
import os
import signal
import threading
from types import SimpleNamespace

# Also of the programs that tests start: for models this small a second thread is only in the way.
os.environ["OMP_NUM_THREADS"] = "1"
# ATEN_CPU_CAPABILITY=avx2 or default tries how an older processor computes; oneDNN must believe it, too.
if older := {"avx2": "AVX2", "default": "SSE41"}.get(os.environ.get("ATEN_CPU_CAPABILITY")):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", older)

import pytest
import torch
import torch._dynamo  # noqa: F401 (optimizers import it: once here, not in each fork)
from common import QUICK, ROOT, call, save, tiny_config
from tqdm import tqdm

import support.plan
import toyworld
import train
from conversation import Tokenizer
from model import VLM
from support.start import wave_positions

# A killed process loses nothing of what it has written; fsync is against a loss of power, and waits 10 ms.
os.fsync = lambda file: None
# Its own lock is one for all forks: a child killed while it writes would keep it, and all would wait.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread beside the main one, which might hold that lock in the moment of a fork


@pytest.fixture(scope="session")
def tok():
    """The toy's tokenizer."""
    return Tokenizer(ROOT / "assets/toy-vicuna")


@pytest.fixture(scope="session")
def tiny(tok, tmp_path_factory):
    """The directory of a tiny model with random weights."""
    torch.manual_seed(0)
    vlm = VLM(tiny_config(tok))
    vlm.vision.pos.data.copy_(wave_positions(vlm.cfg.vision))
    return save(vlm, tok, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A toy world of pictures as large as the tiny model's tile."""
    out = tmp_path_factory.mktemp("data") / "world"
    toyworld.write_world(out, 24, 6, 32)
    return out


@pytest.fixture(scope="session")
def large_world(tmp_path_factory):
    """One of larger pictures, of which a mode with tiles makes several."""
    out = tmp_path_factory.mktemp("data") / "world"
    toyworld.write_world(out, 24, 6, 64)
    return out


@pytest.fixture(scope="session")
def eight_steps(tiny, world):
    """The flags of a run of the tiny model; no evaluation unless asked for."""
    return ["--model", tiny, "--data", world / "train.json", *QUICK, "--max-steps", 8]


@pytest.fixture(scope="session")
def whole(eight_steps, tmp_path_factory):
    """The folder of such a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert call(train.main, *eight_steps, "--out", out) == 0
    return out


@pytest.fixture
def go(eight_steps, tmp_path, monkeypatch):
    """go("--lr", 1, out="a") trains in tmp_path and returns the exit code."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags, out="run": call(train.main, *eight_steps, "--out", out, *flags)


@pytest.fixture
def steps_of_a_second(monkeypatch):
    """By the clock that --minutes measures with."""
    monkeypatch.setattr(support.plan, "time", SimpleNamespace(time=itertools.count().__next__))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # children of a fork must not wait for threads that they do not have


@pytest.fixture
def ctrl_c_arrives():
    """SIGINT does what it does in a terminal, also where pytest was started to ignore it, as by nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

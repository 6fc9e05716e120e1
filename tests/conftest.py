"""What several files of tests share."""

import os
import signal
import threading
from pathlib import Path

# Also of the programs that tests start: for models this small a second thread is only in the way.
os.environ["OMP_NUM_THREADS"] = "1"
# ATEN_CPU_CAPABILITY=avx2 or default tries how an older processor computes; oneDNN must believe it, too.
if older := {"avx2": "AVX2", "default": "SSE41"}.get(os.environ.get("ATEN_CPU_CAPABILITY")):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", older)

import pytest
import torch
from tqdm import tqdm

from conversation import Tokenizer

# Its own lock is one for all forks: a child killed while it writes would keep it, and all would wait.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread beside the main one, which might hold that lock in the moment of a fork


@pytest.fixture(scope="session")
def tok():
    """The toy's tokenizer."""
    return Tokenizer(Path(__file__).parents[1] / "assets/toy-vicuna")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # children of a fork must not wait for threads that they do not have


@pytest.fixture
def ctrl_c_arrives():
    """SIGINT does what it does in a terminal, also where pytest was started to ignore it, as by nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

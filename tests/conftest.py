"""What several files of tests share."""

from pathlib import Path

import pytest
import torch

from data import Tokenizer


@pytest.fixture(scope="session")
def tok():
    """The toy's tokenizer."""
    return Tokenizer(Path(__file__).parents[1] / "assets/toy-vicuna")


@pytest.fixture(scope="session")
def one_thread():
    torch.set_num_threads(1)                     # children of a fork must not wait for threads that they do not have

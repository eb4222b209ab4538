import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # tiny models; more threads wait for each other on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
multiprocessing.set_forkserver_preload(["trainer"])  # its processes start without the imports


@pytest.fixture
def full_precision(monkeypatch) -> None:
    """sample() in float32, also where the hardware has bfloat16, to compare it with one by hand."""
    monkeypatch.setattr("model.has_bf16", lambda device: False)


@pytest.fixture
def mnist_root() -> Path:
    """The folder that holds MNIST/raw; the test is skipped where there is none."""
    root = Path(__file__).resolve().parent.parent
    for folder in (root / "data", root.parent / "shared" / "data"):
        if (folder / "MNIST" / "raw").is_dir():
            return folder
    pytest.skip("MNIST is not in data/")


@pytest.fixture(autouse=True)
def numbers_of_every_size():
    """As a process begins: train() takes tiny numbers for zero, Hypothesis must not."""
    torch.set_flush_denormal(False)

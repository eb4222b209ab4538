import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import multiprocessing
from torch.utils.data import TensorDataset

from hvae import parallel
from hvae.checkpoint import read_tensors
from hvae.distributions import DiagonalGaussian
from model import HVAE
from trainer import Hyperparameters, batch_means, batches, flow_loss, objective, train

ROOT = Path(__file__).resolve().parent.parent
FREE = torch.tensor([0.5, 1e6, 2.0])  # the middle level is free


def three_levels():
    torch.manual_seed(0)
    images = dict(input_size=(8, 12), input_channels=1, likelihood="bernoulli", context=None)
    texts = dict(text_length=1, charset="ABCD")
    blocks = [[("res", 4)], [("dense", 5)]]
    return HVAE([("conv", 4, 2)], blocks, latent_channels=3, flow=2, **images, **texts)


def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 1, 8, 12, generator=generator)
    return x, torch.randint(4, (8, 1), generator=generator)


def gradients_of_shard(model):
    """(terms, gradients) of this process's shard of the images; without noise, to compare runs."""
    DiagonalGaussian.sample = lambda q, temperature=1.0, generator=None: q.mu
    mine = parallel.shard(list(range(8)))
    x, y = images()
    closed = Hyperparameters(batch_size=8, closed_levels=1).closed_at(0, 3)[mine]
    forward = parallel.data_parallel(model)  # alive until the gradients are there
    terms = forward(x[mine], y[mine], closed)
    loss = objective(terms, 0.7, FREE, closed) + flow_loss(model.levels[-1], terms.z_top.detach())
    loss.backward()
    return batch_means(terms, closed), {name: p.grad for name, p in model.named_parameters()}


def one_of_two(rank, port, out, work):
    ranks = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    parallel.init_processes("cpu")
    torch.save(work(), f"{out}/{rank}.pt")
    parallel.shutdown_processes()


def in_two_processes(work, out):
    """What `work` returns in each of two processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, str(out), work)
    multiprocessing.start_processes(one_of_two, arguments, nprocs=2, start_method="forkserver")
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


def two_gradients():
    return gradients_of_shard(three_levels())


def test_two_processes_have_the_gradients_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(DiagonalGaussian, "sample", DiagonalGaussian.sample)  # restored afterwards
    terms, gradients = gradients_of_shard(three_levels())
    assert all(gradient is not None for gradient in gradients.values())
    for their_terms, theirs in in_two_processes(two_gradients, tmp_path):
        assert their_terms == pytest.approx(terms, rel=1e-5)
        for name, gradient in gradients.items():
            message = lambda m, name=name: f"{name}: {m}"
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-5, msg=message)


def short_run(out, steps=10):
    """Trains, or goes on, to that step; (weights, the rows of the history)."""
    x, y = images()
    data = TensorDataset(x.repeat(5, 1, 1, 1), y.repeat(5, 1))
    settings = dict(batch_size=4, workers=0, device="cpu", eval_every=5, log_every=5, resume=True)
    settings["frozen_share"] = 0.2  # the last phase, too
    model, history = train(three_levels(), data, steps=steps, out=out, **settings)
    return model.state_dict(), history


def short_run_and_one_astray(out):
    """short_run(), and what is said if then one process goes on from another folder."""
    weights, history = short_run(out)
    with pytest.raises(ValueError) as error:
        short_run(out + "-other" * parallel.rank(), 15)
    return weights, history, str(error.value)


@pytest.mark.filterwarnings("ignore:.*resuming with")  # more steps
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    out = tmp_path / "run"
    two = in_two_processes(functools.partial(short_run_and_one_astray, str(out)), tmp_path)
    for rank, (_, _, message) in enumerate(two):
        folder = f"{out}{'-other' * rank}"
        assert message.startswith(f"{folder}: the processes found different states; do they share")
    (weights, history, _), (others, _, _) = two
    assert all(torch.equal(weights[name], others[name]) for name in weights)  # none drifts away
    files = ["hvae.pt", "loss.png", "metrics.csv", "samples.png", "state.pt"]
    assert sorted(p.name for p in out.iterdir()) == [".lock", *files]
    assert [row["images"] for row in history] == [20, 40]
    assert [row["images"] for row in short_run(out, 15)[1]] == [20, 40, 60]


def test_no_image_is_seen_twice(monkeypatch):
    """The processes' shards of an epoch are its images, each once."""
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        seen += sum(map(parallel.shard, batches(24, 6, 0, 0, 4)), [])
    assert sorted(seen) == list(range(24))


def test_batch_must_be_shared_evenly(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    message = "batch_size: 8 images cannot be shared evenly by 3 processes"
    settings = dict(steps=1, batch_size=8, device="cpu", workers=0, out=tmp_path)
    with pytest.raises(ValueError, match=message):
        train(three_levels(), TensorDataset(*images()), **settings)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_ends_when_one_of_its_processes_does(number, tmp_path):
    """SIGKILL: with an error within a minute. SIGTERM: with a state, and the run goes on."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    options = "--size 16 32 --images 64 --batch-size 4 --steps 100000 --eval-every 100000"
    options = [*options.split(), "--workers", "0", "--device", "cpu", "--out", tmp_path / "run"]
    log = tmp_path / "log"
    with open(log, "w") as file:
        run = subprocess.Popen(
            [*launcher, "trainer.py", *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_until(lambda: re.search(r"\b[1-9]\d*/100000", log.read_text()), run)
        os.kill(trainers(run.pid)[-1], number)
        assert run.wait(timeout=60) != 0
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    if number == signal.SIGTERM:
        assert read_tensors(tmp_path / "run" / "state.pt")[1]["step"] > 0
    else:
        assert "trainer.py FAILED" in log.read_text()


def wait_until(condition, run):
    deadline = time.monotonic() + 240
    while not condition():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


def trainers(parent):
    """The processes that torchrun has started, in the order of their ranks."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    command = lambda pid: Path(f"/proc/{pid}/cmdline").read_bytes()
    return [int(pid) for pid in children if b"trainer.py" in command(pid)]

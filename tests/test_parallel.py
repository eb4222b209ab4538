import os
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

import parallel
from model import HVAE, Normal
from runs import read_state
from trainer import batches, closings, loss_terms, train

ROOT = Path(__file__).resolve().parent.parent
FREE = torch.tensor([0.5, 1e6, 2.0])  # the middle level is free


def three_levels():
    torch.manual_seed(0)
    return HVAE([("conv", 4, 2)], [[("res", 4)], [("dense", 5)]], input_size=(8, 12), input_channels=1, latent_channels=3,
                likelihood="bernoulli", flow=2, text_length=1, charset="ABCD")


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(8, 1, 8, 12, generator=generator), torch.randint(4, (8, 1), generator=generator)


def gradients_of_share(model):
    """(terms, gradients) of this process's share of the eight images, without noise: with it, no two runs compare."""
    Normal.sample = lambda q, temperature=1.0, generator=None: q.mu
    mine = parallel.share(list(range(8)))
    x, y = images()
    closed = closings(model, 8, 1, 0.5, 0.5)
    wrapped = parallel.wrap(model)  # alive until the gradients are there
    loss, terms = loss_terms(wrapped, x[mine], y[mine], 0.7, FREE, closed[mine])
    loss.backward()
    return terms, {name: p.grad for name, p in model.named_parameters()}


def one_of_two(rank, port, out, work):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    parallel.join("cpu")
    torch.save(work(), f"{out}/{rank}.pt")
    parallel.leave()


def in_two_processes(work, out):
    """What `work` returns in each of two processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(one_of_two, (port, str(out), work), nprocs=2)
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


def two_gradients():
    return gradients_of_share(three_levels())


def test_two_processes_have_the_gradients_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Normal, "sample", Normal.sample)  # restored after the test
    terms, gradients = gradients_of_share(three_levels())
    assert all(gradient is not None for gradient in gradients.values())
    for their_terms, theirs in in_two_processes(two_gradients, tmp_path):
        assert their_terms == pytest.approx(terms, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


def short_run(steps=10):
    """Trains, or goes on, to that step; (weights, the rows of the history)."""
    x, y = images()
    data = TensorDataset(x.repeat(5, 1, 1, 1), y.repeat(5, 1))
    model, history = train(three_levels(), data, steps=steps, batch_size=4, workers=0, device="cpu", eval_every=5, log_every=5,
                           out=os.environ["OUT"], resume=True)
    return model.state_dict(), history


def short_run_and_one_astray():
    """short_run(), and what is said if then one of the processes goes on from another folder."""
    weights, history = short_run()
    os.environ["OUT"] += "-other" * parallel.rank()
    with pytest.raises(ValueError) as error:
        short_run(15)
    return weights, history, str(error.value)


@pytest.mark.filterwarnings("ignore:.*its run goes on with")  # more steps
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "run"))
    two = in_two_processes(short_run_and_one_astray, tmp_path)
    assert all("share that folder" in message for _, _, message in two)
    assert all(torch.equal(a, b) for a, b in zip(two[0][0].values(), two[1][0].values()))  # no process drifts away
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "hvae.pt", "loss.png", "metrics.csv", "samples.png",
                                                                    "state.previous.pt", "state.pt"]
    assert [row["images"] for row in two[0][1]] == [20, 40]
    assert [row["images"] for row in short_run(15)[1]] == [20, 40, 60]


def test_no_image_is_seen_twice(monkeypatch):
    """The processes' shares of an epoch are its images, each once."""
    monkeypatch.setattr(parallel, "size", lambda: 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        seen += sum(map(parallel.share, batches(24, 6, 0, 0, 4)), [])
    assert sorted(seen) == list(range(24))


def test_batch_must_be_shared_evenly(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "size", lambda: 3)
    with pytest.raises(ValueError, match="batch_size: 8 images cannot be shared evenly by 3 processes"):
        train(three_levels(), TensorDataset(*images()), steps=1, batch_size=8, device="cpu", workers=0, out=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_ends_when_one_of_its_processes_does(number, tmp_path):
    """SIGKILL: with an error within a minute. SIGTERM: with a state from which the run goes on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "trainer.py", "--size", "16",
               "32", "--images", "64", "--batch-size", "4", "--steps", "100000", "--eval-every", "100000", "--workers", "0",
               "--out", str(tmp_path / "run"), "--device", "cpu"]
    log = tmp_path / "log"
    with open(log, "w") as file:
        run = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file,
                               start_new_session=True)
    try:
        wait_until(lambda: "1/100000" in log.read_text() or "2/100000" in log.read_text(), run)
        os.kill(trainers(run.pid)[-1], number)
        assert run.wait(timeout=60) != 0
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    if number == signal.SIGTERM:
        assert read_state(tmp_path / "run" / "state.pt")["step"] > 0
    else:
        assert "trainer.py FAILED" in log.read_text()


def wait_until(condition, run):
    deadline = time.monotonic() + 240
    while not condition():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


def trainers(parent):
    """The processes that torchrun has started, in the order of their ranks."""
    children = [int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return [pid for pid in children if b"trainer.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]

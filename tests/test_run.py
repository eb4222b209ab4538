"""Runs survive: signals, dead data workers, damaged files, full disks, numbers that are none."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from test_trainer import (  # noqa: F401
    assert_same_run,
    bars,
    content,
    fit,
    last_line,
    read_csv,
    same,
    signal_in_step,
    tiny,
    train,
    undrawn,
)
from torch.utils.data import Dataset, get_worker_info

import trainer
from generate import sample_sheet
from hvae import parallel
from hvae.checkpoint import atomic_write, locked, read_tensors, write_tensors
from hvae.parallel import DeferredSignals
from hvae.run import Run, architecture
from model import HVAE

pytestmark = pytest.mark.filterwarnings("ignore:.*resuming with")  # other steps
FORKSERVER = multiprocessing.get_context("forkserver")


def train_apart(out, arguments, threads):
    """What a process of start() does: fit(), with what it prints in a file."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    trainer.plot_history = lambda history, path: path.touch()
    with open(f"{out}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            fit(out, eval_every=5, log_every=3, resume=True, **arguments)
        except KeyboardInterrupt:
            sys.exit(130)


def start(out, **arguments):
    """A training process, resumable, in a process group of its own."""
    threads = torch.get_num_threads()  # for sums in the same order
    process = FORKSERVER.Process(target=train_apart, args=(out, arguments, threads))
    process.start()
    return process


def end(process):
    """Waits for the process, which must end within a minute."""
    process.join(60)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the process does not end")


def saved_step(out):
    return read_tensors(out / "state.pt")[1]["step"]


def saved_model(out):
    tensors, _ = read_tensors(out / "state.pt")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}


def wait_for_step(out, process, step):
    """Until the run has saved a state of this step or a later one, or has ended."""
    while process.is_alive():
        try:
            if saved_step(out) >= step:
                return
        except (OSError, ValueError, RuntimeError):  # replaced while it is read
            pass
        time.sleep(0.005)


def stop_at(out, step, **arguments):
    """A run of 12 steps, or as the arguments say, that ends once it has saved this one."""
    save = Run.save

    def save_and_stop(run, path):
        save(run, path)
        if run.step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", save_and_stop)
        fit(out, **{"steps": 12, "resume": True, **arguments})


@pytest.fixture(scope="module")
def twelve_steps(tmp_path_factory):
    """The folder of a run of 12 steps in one piece."""
    out = tmp_path_factory.mktemp("twelve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "plot_history", lambda history, path: path.touch())
        fit(out, steps=12)
    return out


# ---------------------------------------------------------------------------- signals


def test_killed_at_random_and_resumed(tmp_path):
    """SIGKILL at random times; in the end bitwise the run that was never interrupted."""
    fit(tmp_path / "unbroken", steps=60, eval_every=5, log_every=3)
    stream = random.Random(0)
    for step, workers in ((5, 1), (30, 0)):
        process = start(tmp_path / "cut", steps=60, workers=workers)
        wait_for_step(tmp_path / "cut", process, step)
        time.sleep(stream.random() * 0.05)
        process.kill()
        end(process)
    process = start(tmp_path / "cut", steps=60)
    end(process)
    assert process.exitcode == 0
    assert_same_run(tmp_path / "unbroken", tmp_path / "cut")


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_the_state_first(number, status, group, tmp_path):
    """Sent only to the process, or to the whole group with its data worker."""
    out, again = tmp_path / "run", tmp_path / "again"
    process = start(out, steps=100_000, workers=1)
    wait_for_step(out, process, 5)
    (os.killpg if group else os.kill)(process.pid, number)
    end(process)
    assert process.exitcode == status
    stopped = saved_step(out)
    assert f"step {stopped} is saved" in (tmp_path / "run.log").read_text()
    stop_at(again, stopped, steps=100_000, eval_every=stopped, log_every=3)
    assert same(saved_model(out), saved_model(again))


def test_interrupted_and_resumed_in_one_process(twelve_steps, tmp_path, capsys):
    """As in a notebook, where nothing but train() itself lets go of the folder."""
    with signal_in_step(6, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        fit(tmp_path, steps=12)
    assert saved_step(tmp_path) == 6
    assert "step 6 is saved; resume=True (--resume) goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    fit(tmp_path, steps=12, resume=True)
    assert_same_run(twelve_steps, tmp_path)


def test_signal_that_comes_while_the_processes_agree_is_not_lost(tmp_path, monkeypatch):
    def agree(number, device):
        if running and not arrived:
            arrived.append(os.kill(os.getpid(), signal.SIGTERM))
        return number  # as it was before the signal came

    running, arrived, take_steps = [], [], trainer.take_steps
    monkeypatch.setattr(parallel, "all_reduce_max", agree)
    monkeypatch.setattr(trainer, "take_steps", lambda *args: running.append(1) or take_steps(*args))
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, steps=10)
    assert stop.value.code == 143
    assert saved_step(tmp_path) == 2


def test_second_signal_acts_at_once():
    with pytest.raises(KeyboardInterrupt), DeferredSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_command_line_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    options = ["--images", "40", "--out", str(tmp_path), "--device", "cpu"]
    assert "--resume" in last_line(options, capsys, status=130)


# ---------------------------------------------------------------------------- data workers


@contextmanager
def worker_killed_in_third_step(done, signal_too=None):
    """And in the same step a signal; a list receives the steps that are done."""
    training_step = trainer.training_step

    def kill_the_worker(run, x, y):
        if run.step == 2:
            if signal_too:
                os.kill(os.getpid(), signal_too)
            (worker,) = multiprocessing.active_children()
            worker.kill()
            time.sleep(0.3)  # SIGCHLD arrives
        terms = training_step(run, x, y)
        done.append(run.step)
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_step", kill_the_worker)
        yield
    multiprocessing.active_children()  # collects it, or torch would report it in a later test


def test_killed_worker_loses_no_step(twelve_steps, tmp_path, capsys):
    done = []
    with worker_killed_in_third_step(done), pytest.raises(RuntimeError, match="DataLoader worker"):
        fit(tmp_path, steps=12, workers=1)
    assert done[-1] >= 3 and saved_step(tmp_path) == done[-1]
    assert f"step {done[-1]} is saved" in capsys.readouterr().out
    fit(tmp_path, steps=12, resume=True)
    assert_same_run(twelve_steps, tmp_path)


def test_signal_that_ends_the_workers_loses_no_step(tmp_path):
    with worker_killed_in_third_step([], signal.SIGTERM), pytest.raises(SystemExit) as stop:
        fit(tmp_path, workers=1)
    assert stop.value.code == 143
    assert saved_step(tmp_path) == 3


def test_a_table_that_cannot_be_written_loses_no_step(twelve_steps, tmp_path):
    (tmp_path / "metrics.csv").mkdir(parents=True)  # as if another program held it
    with pytest.raises(OSError, match=r"metrics\.csv"):
        fit(tmp_path, steps=12)
    assert saved_step(tmp_path) == 4
    (tmp_path / "metrics.csv").rmdir()
    fit(tmp_path, steps=12, resume=True)
    assert_same_run(twelve_steps, tmp_path)


@pytest.mark.parametrize("interrupted_at", [5, 6])  # 6: the history has a row of this step
def test_a_run_that_is_resumed_to_end_here_is_measured(interrupted_at, tmp_path):
    with signal_in_step(interrupted_at, signal.SIGTERM), pytest.raises(SystemExit):
        fit(tmp_path, steps=12, eval_every=12)
    model, history = fit(tmp_path, steps=interrupted_at, eval_every=12, resume=True)
    assert model.provenance["steps"] == interrupted_at
    assert [row["step"] for row in history if "val_neg_elbo" in row] == [interrupted_at]


def test_a_script_without_a_main_guard_trains_where_processes_import_it(tmp_path):
    (tmp_path / "script.py").write_text(
        "import multiprocessing\n"
        "multiprocessing.set_start_method('spawn')\n"
        "from test_run import bars, tiny, train\n"
        "train(tiny(), bars(), steps=1, batch_size=8, device='cpu', out='run')\n"
    )
    tests = Path(__file__).resolve().parent
    paths = {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    settings = dict(capture_output=True, text=True, timeout=120, env={**os.environ, **paths})
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert saved_step(tmp_path / "run") == 1


class BrokenInWorker(Dataset):
    """Bars, of which a data worker can read only so many."""

    def __init__(self, reads):
        self.bars, self.reads = bars(), reads

    def __len__(self):
        return len(self.bars)

    def __getitem__(self, i):
        self.reads -= get_worker_info() is not None
        if self.reads < 0:
            raise OSError(f"image {i} is gone")
        return self.bars[i]


def test_run_ends_when_a_worker_raises(tmp_path):
    """With an interpreter of its own, which waits for the other worker on its way out."""
    arguments = "dataset=test_run.BrokenInWorker(24), val_dataset=test_run.bars(4), workers=2"
    code = f"import test_run; test_run.fit({str(tmp_path)!r}, {arguments})"
    tests = Path(__file__).resolve().parent
    paths = {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    settings = dict(capture_output=True, text=True, timeout=60, env={**os.environ, **paths})
    done = subprocess.run([sys.executable, "-c", code], **settings)
    assert done.returncode == 1 and "is gone" in done.stderr.strip().splitlines()[-1]
    assert saved_step(tmp_path) == 6


# ---------------------------------------------------------------------------- files


DAMAGE = [
    lambda b: b"",
    lambda b: b"text\n",
    lambda b: b[: len(b) // 2],
    lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:],
    lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 64]) + b[len(b) // 2 + 1 :],
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_named(damage, tmp_path):
    fit(tmp_path)
    state = tmp_path / "state.pt"
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(ValueError, match=r"state\.pt: "):
        fit(tmp_path, steps=9, resume=True)


@pytest.mark.parametrize("metadata", [{}, {"step": 4}, None])
def test_another_file_in_place_of_the_state_is_named(metadata, tmp_path):
    fit(tmp_path)
    if metadata is None:
        tiny().save(tmp_path / "state.pt")
    else:
        write_tensors(tmp_path / "state.pt", {}, metadata)
    with pytest.raises(ValueError, match=r"state\.pt: not a training state"):
        fit(tmp_path, steps=9, resume=True)


def test_two_processes_do_not_share_a_folder(tmp_path):
    process = start(tmp_path, steps=100_000)
    wait_for_step(tmp_path, process, 5)
    with pytest.raises(ValueError, match="in use by another training"):
        fit(tmp_path, resume=True, steps=100_000)
    process.kill()
    end(process)
    fit(tmp_path, resume=True, steps=saved_step(tmp_path) + 1)  # as soon as the other is gone


def test_two_trainings_of_one_process_do_not_share_a_folder(tmp_path):
    """And an attempt that failed does not undo the lock of the first one."""
    lock = "import fcntl; fcntl.lockf(open('.lock', 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other_process = [sys.executable, "-c", lock]
    with locked(tmp_path):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"{tmp_path} is in use by another training"):
                fit(tmp_path)
            done = subprocess.run(other_process, cwd=tmp_path, capture_output=True, text=True)
            assert "BlockingIOError" in done.stderr
    fit(tmp_path, steps=1)


@pytest.mark.parametrize("name", ["metrics.csv", "samples.png", "hvae.pt", "state.pt"])
def test_full_disk_keeps_the_last_state(name, twelve_steps, tmp_path, capsys, monkeypatch):
    """A limit on the size of files stands in for a full disk: writes fail half-way through.

    With capsys, because the file that pytest captures output in is limited too. No file that is
    written before the named one may be larger, so the sheet has one sample before hvae.pt.
    """
    if name == "hvae.pt":
        one_sample = lambda model, n, seed: sample_sheet(model, 1, seed=seed)
        monkeypatch.setattr(trainer, "sample_sheet", one_sample)
    stop_at(tmp_path, 4)
    before = content(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[name]) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"/{name}: could not be written \(File too large\)"):
            fit(tmp_path, steps=12, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    after = content(tmp_path)
    assert after.keys() == before.keys()  # nothing half-written
    assert all(after[kept] == before[kept] for kept in ("state.pt", name))
    fit(tmp_path, steps=12, resume=True)
    assert_same_run(twelve_steps, tmp_path)


def half_written(path):
    path.write_text("half")
    raise OSError("no space left")


def to_a_full_disk(path):
    with open("/dev/full", "w") as file:
        file.write("x")


def interrupted(path):
    path.write_text("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "write, error, message",
    [
        (half_written, OSError, r"file.png: could not be written \(no space left\)"),
        (to_a_full_disk, OSError, r"file.png: could not be written \(No space left on device\)"),
        (interrupted, KeyboardInterrupt, None),
    ],
)
def test_atomic_write_leaves_what_was_there(write, error, message, tmp_path):
    path = tmp_path / "file.png"
    path.write_text("old")
    with pytest.raises(error, match=message), atomic_write(path) as temporary:
        assert temporary.suffix == ".png" and temporary != path
        write(temporary)
    assert content(tmp_path) == {"file.png": b"old"}


def test_flipped_bits_of_a_model_are_noticed(tmp_path):
    model = tiny()
    model.provenance = {"steps": 3}
    model.save(tmp_path / "good.pt")
    good, stream, noticed = (tmp_path / "good.pt").read_bytes(), random.Random(0), 0
    for _ in range(150):
        flipped = bytearray(good)
        flipped[stream.randrange(len(good))] ^= 1 << stream.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:  # a flip in the padding of the header changes nothing
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = HVAE.load(tmp_path / "flipped.pt")
            assert same(loaded.state_dict(), model.state_dict()) and loaded.config == model.config
        except ValueError as error:
            assert "flipped.pt" in str(error)
            noticed += 1
    assert noticed > 30


# ---------------------------------------------------------------------------- numbers


class Poisoned(Dataset):
    """Bars, of which some reads come out as NaN."""

    def __init__(self, reads):
        self.bars, self.reads, self.count = bars(), reads, 0

    def __len__(self):
        return len(self.bars)

    def __getitem__(self, i):
        self.count += 1
        x, y = self.bars[i]
        return (x * float("nan") if self.count in self.reads else x), y


def test_nan_skips_the_step_and_is_counted(tmp_path):
    reads = 1 + 40  # to check the data and to set the output level
    poisoned = Poisoned({reads + 8 * 2 + 3, reads + 8 * 5 + 1})  # in steps three and six
    model, history = fit(tmp_path, dataset=poisoned, val_dataset=bars(4))
    assert history[-1]["skipped"] == 2
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(value == value for row in history for value in row.values())
    assert len(read_csv(tmp_path / "metrics.csv")) == 4


@pytest.mark.parametrize("level", [0, 1])
def test_a_run_of_nans_ends_by_name(level, tmp_path, monkeypatch):
    """From the sixth step on, one level's KL is infinite and the loss is no number."""
    objective, batch_means, calls = trainer.objective, trainer.batch_means, []

    def poisoned_objective(*args):
        calls.append(1)
        return objective(*args) * (float("nan") if len(calls) > 5 else 1)

    def poisoned_means(*args):
        poison = {f"kl_{level + 1}": float("inf")} if len(calls) > 5 else {}
        return {**batch_means(*args), **poison}

    monkeypatch.setattr(trainer, "objective", poisoned_objective)
    monkeypatch.setattr(trainer, "batch_means", poisoned_means)
    with pytest.raises(FloatingPointError, match=f"step 25: kl_{level + 1} is inf"):
        fit(tmp_path, steps=100, eval_every=4)
    assert all(weight.isfinite().all() for weight in saved_model(tmp_path).values())
    assert HVAE.load(tmp_path / "hvae.pt").sample(1).isfinite().all()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "logistic"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("inference", ["top-down", "bottom-up"])
def test_extreme_images_and_variances_stay_finite(likelihood, bf16, inference):
    model = tiny(likelihood=likelihood, inference=inference)
    noise = torch.rand(1, 1, 8, 12)
    x = torch.cat([torch.zeros_like(noise), torch.ones_like(noise), noise, (noise > 0.5).float()])
    for logvar in (-1e4, 1e4):  # far beyond the clamp
        for level in model.levels:
            torch.nn.init.constant_(level.q.out.bias, logvar)
            if level.p is not None:
                torch.nn.init.constant_(level.p.out.bias, -logvar)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            terms = model(x)
        assert all(term.isfinite().all() for term in terms[:5])
        (-terms.elbo.mean()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_run_may_be_resumed_with_more_texts_of_the_same_lengths():
    one, more, other = ({"lengths": counts} for counts in ([0, 3, 5], [0, 9, 6], [1, 3, 5]))
    assert architecture(one) == architecture(more) != architecture(other)

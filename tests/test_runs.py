"""Runs survive: kills, damaged files, full disks, numbers that are none."""

import hashlib
import io
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

import parallel
import trainer
from model import HVAE
from runs import MAGIC, Interruption, read_csv, read_state, replace
from test_trainer import assert_same_run, bars, fit, same, tiny, undrawn, without_seconds  # noqa: F401

SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_trainer, torch, trainer
torch.set_num_threads(2)  # as in these tests: sums in another order would not be the same to the bit
trainer.plot_history = lambda history, path: path.touch()
test_trainer.fit({out!r}, steps={steps}, eval_every=5, log_every=3, workers={workers}, resume=True)
"""


def start(out, steps=60, workers=0):
    """A training process of its own, resumable, and what it prints."""
    tests = Path(__file__).resolve().parent
    code = SCRIPT.format(tests=str(tests), root=str(tests.parent), out=str(out), steps=steps, workers=workers)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def wait_for_step(out, process, step):
    """Until the run has saved a state of this step or a later one, or has ended."""
    while process.poll() is None:
        try:
            if read_state(out / "state.pt")["step"] >= step:
                return
        except (FileNotFoundError, ValueError):
            pass
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------ signals


def test_killed_at_random_and_resumed(tmp_path):
    """SIGKILL whenever it pleases; in the end bitwise the run that was never interrupted."""
    fit(tmp_path / "whole", steps=60, eval_every=5, log_every=3)
    stream = random.Random(0)
    for step in (5, 20, 40):
        process = start(tmp_path / "cut", workers=step % 3)
        wait_for_step(tmp_path / "cut", process, step)
        time.sleep(stream.random() * 0.05)
        process.kill()
        process.communicate()
    output = start(tmp_path / "cut").communicate()[0]
    assert "Traceback" not in output
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_signal_saves_the_state_first(number, status, group, tmp_path):
    process = start(tmp_path, steps=100_000, workers=1)
    wait_for_step(tmp_path, process, 5)
    os.killpg(process.pid, number) if group else process.send_signal(number)  # the workers, too, or not
    process.communicate(timeout=60)
    assert process.returncode == status
    stopped = read_state(tmp_path / "state.pt")["step"]
    stop_at(tmp_path / "again", stopped, steps=100_000, eval_every=stopped, log_every=3)
    assert same(read_state(tmp_path / "state.pt")["model"], read_state(tmp_path / "again" / "state.pt")["model"])


def test_signal_that_comes_while_the_processes_agree_is_not_lost(tmp_path, monkeypatch):
    def agree(number, device):
        if not arrived:
            arrived.append(os.kill(os.getpid(), signal.SIGTERM))
        return number  # as it was before the signal came

    arrived = []
    monkeypatch.setattr(parallel, "any_signal", agree)
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, steps=10)
    assert stop.value.code == 143
    assert read_state(tmp_path / "state.pt")["step"] == 2


def test_second_signal_strikes_at_once():
    with pytest.raises(KeyboardInterrupt):
        with Interruption() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert stop.signal == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_command_line_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        trainer.main(["--images", "40", "--out", str(tmp_path), "--device", "cpu"])
    assert "--resume" in str(stop.value.code)


# ------------------------------------------------------------------------------------------------ files


DAMAGE = [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:],
          lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 64]) + b[len(b) // 2 + 1 :], lambda b: b"text\n", None]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_state_falls_back_to_the_previous_one(damage, tmp_path):
    fit(tmp_path / "whole", steps=12)
    for step in (4, 8):
        stop_at(tmp_path / "cut", step)
    state = tmp_path / "cut" / "state.pt"
    if damage is None:
        state.unlink()  # killed between the two renamings
    else:
        state.write_bytes(damage(state.read_bytes()))
    with pytest.warns(UserWarning, match="state.pt.*going on from state.previous.pt, step 4"):
        fit(tmp_path / "cut", steps=12, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("content", [[1], {"step": 4}, {"step": Path("x")}])
def test_other_content_with_a_right_checksum_falls_back(content, tmp_path):
    for step in (4, 8):
        stop_at(tmp_path, step)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    checksum = hashlib.sha256(buffer.getvalue()).hexdigest().encode()
    (tmp_path / "state.pt").write_bytes(MAGIC + b" " + checksum + b"\n" + buffer.getvalue())
    with pytest.warns(UserWarning, match="not a training state.*step 4"):
        fit(tmp_path, steps=12, resume=True)


@pytest.mark.filterwarnings("ignore:.*its run goes on with")  # fewer steps
def test_two_runs_do_not_share_a_folder(tmp_path):
    process = start(tmp_path, steps=100_000)
    wait_for_step(tmp_path, process, 5)
    with pytest.raises(ValueError, match="in use by another training"):
        fit(tmp_path, resume=True, steps=100_000)
    process.kill()
    process.communicate()
    step = read_state(tmp_path / "state.pt")["step"]
    fit(tmp_path, resume=True, steps=step + 1)  # as soon as the other one is gone


def test_saving_after_a_fallback_keeps_the_good_state(tmp_path):
    for step in (4, 8):
        stop_at(tmp_path, step)
    (tmp_path / "state.pt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="going on from state.previous.pt"):
        stop_at(tmp_path, 8)
    assert read_state(tmp_path / "state.previous.pt")["step"] == 4 and read_state(tmp_path / "state.pt")["step"] == 8


def stop_at(out, step, **arguments):
    """A run of 12 steps, or as the arguments say, stopped right after it has saved this one."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        save = trainer.save_state

        def save_and_stop(path, run):
            save(path, run)
            if run.step == step:
                raise KeyboardInterrupt

        patch.setattr(trainer, "save_state", save_and_stop)
        fit(out, **{"steps": 12, "resume": True, **arguments})


def test_both_states_damaged(tmp_path):
    fit(tmp_path)
    for name in ("state.pt", "state.previous.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="state.pt: not a training state"):
        fit(tmp_path, steps=9, resume=True)


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands in for a full disk: writes fail half-way through."""
    fit(tmp_path / "whole", steps=12)
    stop_at(tmp_path / "cut", 4)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["hvae.pt"]) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="hvae.pt: could not be written"):
            fit(tmp_path / "cut", steps=12, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    after = {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()}
    assert all(after[name] == before[name] for name in ("state.pt", "hvae.pt")) and set(after) == set(before)
    fit(tmp_path / "cut", steps=12, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_replace_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(new):
        new.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="file: could not be written .no space left"):
        replace(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_flipped_bits_of_a_model_are_noticed(tmp_path):
    model = tiny()
    model.provenance = {"steps": 3}
    model.save(tmp_path / "good.pt")
    content, stream, refused = (tmp_path / "good.pt").read_bytes(), random.Random(0), 0
    for _ in range(150):
        position = stream.randrange(len(content))
        flipped = content[:position] + bytes([content[position] ^ 1 << stream.randrange(8)]) + content[position + 1 :]
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:  # a flip in the padding between tensors changes nothing
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = HVAE.load(tmp_path / "flipped.pt")
            assert same(loaded.state_dict(), model.state_dict()) and loaded.config == model.config
        except ValueError:
            refused += 1
    assert refused > 30


# ------------------------------------------------------------------------------------------------ numbers


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
    poisoned = Poisoned({reads + 8 * 2 + 3, reads + 8 * 5 + 1})  # in the third step and the sixth
    model, history = fit(tmp_path, dataset=poisoned, val_dataset=bars(4))
    assert history[-1]["skipped"] == 2
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(value == value for row in history for value in row.values())
    assert len(without_seconds(read_csv(tmp_path / "metrics.csv"))) == 4


@pytest.mark.parametrize("level", [0, 1])
def test_a_run_of_nans_ends_by_name(level, tmp_path, monkeypatch):
    """From the sixth step on one level's prior has no number for its variance."""
    terms, calls = trainer.loss_terms, []

    def poisoned(model, *args):
        calls.append(1)
        loss, found = terms(model, *args)
        return (loss * float("nan"), {**found, f"kl_{level + 1}": float("inf")}) if len(calls) > 5 else (loss, found)

    monkeypatch.setattr(trainer, "loss_terms", poisoned)
    with pytest.raises(FloatingPointError, match=f"step 25: kl_{level + 1} is inf"):
        fit(tmp_path, steps=100, eval_every=4)
    state = read_state(tmp_path / "state.pt")
    assert all(weight.isfinite().all() for weight in state["model"].values())
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
            elbo = model(x)
        assert all(term.isfinite().all() for term in elbo)
        (-elbo.elbo.mean()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

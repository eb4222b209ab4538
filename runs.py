"""A training run as a thing that survives: its state, its files, and what happens when it is interrupted.

All that a run changes is in one file, state.pt: weights, their average, the optimiser, the step and every random state.
With the same arguments and data, the next step is the one that would have come. The file is written beside the old one
and then put in its place, and the old one is kept as state.previous.pt, so that there is a whole state at any instant. A
checksum tells a damaged file.
"""

import csv
import hashlib
import io
import math
import os
import signal
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

import parallel
from model import HVAE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAGIC = b"hvae-state-3"  # the first word of state.pt; then the checksum, a line's end, and what torch.save wrote
PARTS = {"config", "model", "average", "provenance", "began_with", "optimizer", "clip", "step", "seconds", "history",
         "terms", "settings", "rng", "rng_cuda"}
PATIENCE = 20  # steps in a row whose loss or gradient is not finite, before a run gives up


class Clipper:
    """Clips gradients to the running mean of their norm, and skips a step whose norm is not finite or 20 times that.

    A hierarchical VAE's loss has rare, huge gradients, of which one can end a run (Child 2021, section 3.2).
    """

    def __init__(self):
        self.mean, self.last, self.skipped, self.seen, self.in_a_row = 0.0, 0.0, 0, 0, 0

    def __call__(self, model: torch.nn.Module) -> bool:
        """True if the step should be taken."""
        limit = self.mean if self.seen else math.inf
        self.last = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
        finite = math.isfinite(self.last)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if not finite or (self.seen > 300 and self.last > 20 * self.mean):
            self.skipped += 1
            if finite:  # if norms stay that high, they will be taken
                self.mean *= 1.02
            return False
        self.mean = 0.98 * self.mean + 0.02 * min(self.last, 2 * self.mean) if self.seen else self.last
        self.seen += 1
        return True


@dataclass
class Run:
    """What a training run is made of, and what its state must hold."""

    model: HVAE
    average: HVAE  # with the moving average of the model's weights
    optimizer: torch.optim.Optimizer
    clip: Clipper = field(default_factory=Clipper)
    step: int = 0
    seconds: float = 0.0
    history: list[dict] = field(default_factory=list)
    terms: list[dict] = field(default_factory=list)  # of the steps since the last row of the history
    settings: dict = field(default_factory=dict)  # train()'s arguments, in plain values, on which the next step depends

    def record(self, terms: dict) -> None:
        """Keeps a step's terms for the next row of the history, or ends the run if too many steps went wrong.

        Raises:
            FloatingPointError: naming the term of the ELBO that is not finite.
        """
        if all(map(math.isfinite, terms.values())) and math.isfinite(self.clip.last):
            self.terms.append({**terms, "grad_norm": self.clip.last})
        elif self.clip.in_a_row >= PATIENCE:
            wrong = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
            raise FloatingPointError(f"step {self.step}: {wrong[-1] if wrong else 'the gradient is not finite'}, after "
                                     f"{PATIENCE} steps in a row without a finite gradient; the last checkpoint is good")

    def log(self, batch_size: int, beta: float) -> dict:
        """Adds a row to the history: means over the steps since the last one."""
        names = self.terms[0] if self.terms else {}
        means = {name: sum(terms[name] for terms in self.terms) / len(self.terms) for name in names}
        row = {"step": self.step, "images": self.step * batch_size, "seconds": round(self.seconds, 1),
               "beta": round(beta, 3), **means, "skipped": self.clip.skipped}
        self.history.append(row)
        self.terms = []
        return row


# ------------------------------------------------------------------------------------------------ state.pt


def save_state(path: Path, run: Run) -> None:
    """Writes everything that resuming needs; the file that was there becomes the previous one, if it is whole.

    Raises:
        OSError: the disk is full, say. The old file is still there.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    buffer = io.BytesIO()
    torch.save({"config": run.model.config, "model": run.model.state_dict(), "average": run.average.state_dict(),
                "provenance": run.average.provenance, "began_with": run.model.provenance,
                "optimizer": run.optimizer.state_dict(),
                "clip": dict(run.clip.__dict__), "step": run.step, "seconds": run.seconds, "history": run.history,
                "terms": run.terms, "settings": run.settings, "rng": torch.get_rng_state(), "rng_cuda": cuda}, buffer)
    content = buffer.getbuffer()
    checksum = hashlib.sha256(content).hexdigest().encode()

    def write(new: Path) -> None:
        with open(new, "wb") as file:
            file.write(MAGIC + b" " + checksum + b"\n")
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if is_whole(path):  # a damaged one must not take the place of the last good one
            os.replace(path, previous(path))

    replace(path, write)


def load_state(path: Path, run: Run) -> None:
    """Restores what save_state wrote, random states included; from the previous file, with a warning, if this is damaged.

    The settings are the new ones; a warning tells which are others than before.

    Raises:
        ValueError: neither file is readable, or their run trained another architecture.
    """
    try:
        state = read_state(path)
    except (ValueError, OSError) as error:
        try:
            state = read_state(previous(path))
        except (ValueError, OSError):
            raise error from None
        warnings.warn(f"{error}; going on from {previous(path).name}, step {state['step']}", stacklevel=2)
    config = run.model.config
    if state["config"] != config:
        different = [key for key, value in config.items() if state["config"].get(key) != value]
        raise ValueError(f"{path}: its run has another {', '.join(different)}")
    changed = [f"{name} = {run.settings.get(name)} instead of {value}" for name, value in state["settings"].items()
               if run.settings.get(name) != value]
    if changed:
        warnings.warn(f"{path}: its run goes on with {', '.join(changed)}", stacklevel=2)
    run.model.load_state_dict(state["model"])
    run.average.load_state_dict(state["average"])
    run.average.provenance = state["provenance"]
    run.model.provenance = state["began_with"]
    run.optimizer.load_state_dict(state["optimizer"])
    run.clip.__dict__.update(state["clip"])
    run.step, run.seconds, run.history, run.terms = (state[key] for key in ("step", "seconds", "history", "terms"))
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and state["rng_cuda"]:
        torch.cuda.set_rng_state_all(state["rng_cuda"][: torch.cuda.device_count()])


def read_state(path: Path) -> dict:
    """What a state file holds. Raises as read_content; ValueError also if it is something else with a right checksum."""
    content = read_content(path)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # what is in it may fail in many ways
        raise ValueError(f"{path}: not a training state ({type(error).__name__})") from None
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        raise ValueError(f"{path}: not a training state")
    return state


def read_content(path: Path) -> bytes:
    """A state file without its first line.

    Raises:
        OSError: it cannot be read; FileNotFoundError, there is none.
        ValueError: it is damaged, or something else.
    """
    first, _, content = path.read_bytes().partition(b"\n")
    magic, _, checksum = first.partition(b" ")
    if magic != MAGIC:
        raise ValueError(f"{path}: not a training state of this version")
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        raise ValueError(f"{path}: damaged, its checksum is wrong")
    return content


def is_whole(path: Path) -> bool:
    """Whether there is an undamaged state in this very file."""
    try:
        read_content(path)
    except (OSError, ValueError):
        return False
    return True


def has_state(path: Path) -> bool:
    """Whether there is a state to resume from, damaged or not."""
    return path.exists() or previous(path).exists()


def holds_run(out: Path) -> bool:
    """Whether training into this folder would overwrite a run, or a model without one."""
    return has_state(out / "state.pt") or (out / "hvae.pt").exists()


def holds_model_alone(out: Path) -> bool:
    """Whether the model in this folder is not a run's, which could be resumed; one killed early has metrics, if no state."""
    return (out / "hvae.pt").exists() and not has_state(out / "state.pt") and not (out / "metrics.csv").exists()


def lock(out: Path) -> IO:
    """Keeps other processes from training into the same folder, until the file that is returned is closed.

    The system closes it when the process ends, however it ends. (A lock of this kind is not passed on to data workers.)

    Raises:
        ValueError: another process has it.
        OSError: the folder cannot be written to.
    """
    file = open(out / ".lock", "w")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(f"{out} is in use by another training") from None
    except OSError:  # some network drives know no locks
        pass
    return file


def previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """write(new file) and then put it in the place of `path`, so that a half-written file never stands there.

    Raises:
        OSError: naming the file that could not be written; what was there is kept.
    """
    new = path.with_name(path.name + ".new")
    try:
        write(new)
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
        new.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error})") from None


def saved_on_failure(batches: Iterable, path: Path, run: Run) -> Iterator:
    """The batches; when they fail (a file is gone, a data worker killed), the leader saves the state before the error goes on."""
    try:
        yield from batches
    except Exception:
        if run.step and parallel.rank() == 0:
            save_state(path, run)
        raise


# ------------------------------------------------------------------------------------------------ metrics.csv


def write_csv(path: Path, history: Sequence[dict]) -> None:
    """A row per entry of the history, a column per name that any of them has."""
    names = list(dict.fromkeys(name for row in history for name in row))

    def write(new: Path) -> None:
        with open(new, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in history)

    replace(path, write)


def read_csv(path: str | Path) -> list[dict]:
    """A history that train() wrote: a list of rows, numbers where there are any."""
    with open(path, newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    return [{**row, **{k: int(row[k]) for k in ("step", "images", "skipped")}} for row in rows]


# ------------------------------------------------------------------------------------------------ interruptions


class Interruption:
    """Within `with Interruption() as stop:` the first SIGINT or SIGTERM only sets stop.signal; a second one kills.

    Thus a step is finished and its state saved before the process ends. Signals reach the main thread alone; in any
    other the block changes nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "Interruption":
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self.note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.signal = number
        self.__exit__()
        self.handlers = {}


def strike(number: int) -> None:
    """Ends the process as the signal would have: KeyboardInterrupt, or exit status 143 for SIGTERM."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def shield_worker(_: int) -> None:
    """In a data worker: a signal to the whole group, such as Ctrl-C, is for the main process to answer.

    A worker ends when the main process asks it to, or is gone.
    """
    for number in Interruption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)

"""Files: checkpoints of models, states of training runs, and atomic writes.

Both kinds are safetensors files: tensors by name, and JSON in the header. The header holds a
SHA-256 digest of everything else, because safetensors has no checksum.

    checkpoint    config (the arguments of HVAE), weights, provenance (data, steps, figures)
    run state     weights, their average, optimizer, random states, settings, history
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hvae.validate import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_locked: set[Path] = set()  # the folders that trainings in this process hold


# ---------------------------------------------------------------------------- writing


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to, which takes the place of `path` if all goes well.

    On an error the temporary file is removed, and what was there before stays.

    Raises:
        OSError: naming the file that could not be written.
    """
    path = Path(path)
    temporary = path.with_name(f".new-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping) -> None:
    """Writes tensors and JSON metadata into one file, atomically.

    Raises:
        ValueError: the metadata cannot be written as JSON.
        OSError: naming the file that could not be written.
    """
    try:
        text = json.dumps(metadata)
    except TypeError as error:
        names = ", ".join(metadata)
        raise InputError(f"{path}: {names} must be JSON: {error}") from error
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(tensors, {"hvae": text, "sha256": digest(tensors, text)})
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # before the renaming, so that a power cut loses nothing


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata as write_tensors() wrote them. Runs no code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file, which is damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable checkpoint ({error})") from error
    missing = {"hvae", "sha256"} - header.keys()
    if missing:
        raise InputError(f"{path}: not a file of this project; its header lacks {sorted(missing)}")
    if header["sha256"] != digest(tensors, header["hvae"]):
        raise InputError(f"{path}: damaged, its digest is wrong")
    return tensors, json.loads(header["hvae"])


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of the names, shapes, types and values of tensors, and of a text."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


# ---------------------------------------------------------------------------- checkpoints


def load_checkpoint(path: str | Path) -> tuple[dict, dict[str, Tensor], dict]:
    """Config, weights and provenance as HVAE.save() wrote them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file and what is wrong with it or what it lacks.
    """
    weights, metadata = read_tensors(path)
    if "step" in metadata:
        raise InputError(f"{path}: the state of a training run; its model is hvae.pt beside it")
    missing = [k for k in ("config", "provenance") if not isinstance(metadata.get(k), dict)]
    if missing:
        raise InputError(f"{path}: not a model checkpoint; it lacks {', '.join(missing)}")
    for name, weight in weights.items():
        if not weight.float().isfinite().all():
            raise InputError(f"{path}: not all numbers in {name} are finite")
    return metadata["config"], weights, metadata["provenance"]


# ---------------------------------------------------------------------------- run states


def has_state(folder: Path) -> bool:
    """Whether a run in this folder can be resumed."""
    return (folder / "state.pt").exists()


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list]:
    """An optimizer's state as tensors by name, and its parameter groups as plain values."""
    state, kind = optimizer.state_dict(), type(optimizer).__name__
    tensors = {
        f"{kind}.{i}.{name}": tensor
        for i, values in state["state"].items()
        for name, tensor in values.items()
    }
    return tensors, state["param_groups"]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list
) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{type(optimizer).__name__}."):
            _, i, name = key.split(".", 2)
            p = parameters[int(i)]
            # The file has lost channels_last, but fused AdamW takes a parameter and its moments
            # to lie in memory alike.
            same_layout = torch.empty_like(p).copy_(tensor) if tensor.shape == p.shape else tensor
            state.setdefault(int(i), {})[name] = same_layout
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other trainings, in this process or another, out of a folder.

    The system drops the lock when the process ends, however it ends. Windows, without fcntl, knows
    only those of this process.

    Raises:
        ValueError: another training has the folder.
        OSError: the folder cannot be written to.
    """
    folder = folder.resolve()
    in_use = InputError(f"{folder} is in use by another training")
    if folder in _locked:
        raise in_use
    with open(folder / ".lock", "w") as file:
        if fcntl:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise in_use from None
            except OSError:  # some network drives have no locks
                pass
        _locked.add(folder)
        try:
            yield
        finally:
            _locked.discard(folder)


# ---------------------------------------------------------------------------- tables


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """A table with a column for each name in any of its rows; real numbers to four decimals."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})

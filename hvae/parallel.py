"""Devices, signals, and several processes that train one model.

`torchrun --nproc_per_node=N trainer.py` starts the processes. Each takes its shard of every
batch, DistributedDataParallel averages their gradients, and rank 0 writes the files. Without
torchrun there is one process, and the collective operations do nothing.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hvae.validate import InputError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, from malloc.h


# ---------------------------------------------------------------------------- devices


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; None is CUDA if there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(name)!r} is not available: {reason}") from error
    if device.type == "meta":
        raise InputError("device 'meta' holds no numbers")
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32: on a GPU or a CPU with instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_instructions = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cpu" and has_instructions()


def keep_memory() -> None:
    """Lets this process keep up to 1 GiB of what it frees, where the C library is glibc.

    By default large tensors go back to the kernel at once, and the next step waits for new,
    zeroed pages: a third of a training step on the CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, 1 << 30)


# ---------------------------------------------------------------------------- processes


def can_fork() -> bool:
    """Whether processes start as forks here; others import the calling script anew."""
    start = multiprocessing.get_start_method(allow_none=True)
    return (start or multiprocessing.get_all_start_methods()[0]) == "fork"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def init_processes(device: str | torch.device | None) -> torch.device:
    """Joins the processes that torchrun started, if any; returns this one's device.

    Raises:
        ValueError: there is no such device here.
    """
    several = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and str(device or "cuda") == "cuda" and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    picked = pick_device(device)
    if several and not dist.is_initialized():
        if picked.type == "cuda":
            torch.cuda.set_device(picked)
        # long enough to wait for rank 0; when a process dies, torchrun ends the others
        backend = "nccl" if picked.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    return picked


def shutdown_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Lets rank 0 through the block before the others: it downloads, they find the files."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


def shard(batch: list[int] | Tensor) -> list[int] | Tensor:
    """This process's part of a batch, which is a list of indices or a tensor with a row each."""
    return batch[rank() :: world_size()]


def data_parallel(model: nn.Module) -> nn.Module:
    """The model with gradients that are means over the processes."""
    return DistributedDataParallel(model) if world_size() > 1 else model


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over the processes; no gradient flows through it."""
    values = values.detach()
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_reduce_max(number: int, device: torch.device) -> int:
    if world_size() == 1:
        return number
    numbers = torch.tensor(number, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def all_equal(number: int, device: torch.device) -> bool:
    """Whether all processes have the same number."""
    return all_reduce_max(number, device) == -all_reduce_max(-number, device)


# ---------------------------------------------------------------------------- signals


class DeferredSignals:
    """In `with DeferredSignals() as signals:` SIGINT and SIGTERM only set `signals.received`.

    So a step is finished and its state saved before the process ends. A second signal acts at
    once. A dead data worker (SIGCHLD) raises its error at the next batch, not in the middle of a
    step. Signals reach the main thread only; in another, the block changes nothing.
    """

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "DeferredSignals":
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self.handlers = {}

    def note(self, number: int, frame) -> None:
        self.received = number
        for deferred in (signal.SIGINT, signal.SIGTERM):
            signal.signal(deferred, self.handlers.pop(deferred) or signal.SIG_DFL)

    def ignore_dead_workers(self) -> None:
        """To be called once a DataLoader has started its workers and set its handler."""
        if self.handlers and hasattr(signal, "SIGCHLD"):
            self.handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def end_process(self) -> None:
        """Ends the process as the signal would have: KeyboardInterrupt, or status 143."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received:
            raise SystemExit(128 + self.received)


def ignore_interrupts(_: int) -> None:
    """In a data worker: Ctrl-C, which reaches the process group, is for the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

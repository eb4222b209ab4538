"""Several processes that train one model, as `torchrun --nproc_per_node=N trainer.py` starts them.

Each takes its share of every batch, DistributedDataParallel averages their gradients, and the first, the leader, alone
writes files. Without torchrun there is one process, and nothing here does anything.
"""

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import pick_device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device: str | None) -> torch.device:
    """Meets the other processes, if torchrun started any, and returns this one's device: of several GPUs, its own.

    Raises:
        ValueError: there is no such device here.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    picked = pick_device(device)
    if several and not dist.is_initialized():
        if picked.type == "cuda":
            torch.cuda.set_device(picked)
        # torchrun ends them all when one is gone; one that merely waits for the leader must have the patience
        dist.init_process_group("nccl" if picked.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return picked


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def leader_first() -> Iterator[None]:
    """Lets the leader through the block before the others: one process downloads, the rest find the files."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and size() > 1:
        dist.barrier()


def share(batch: list[int] | Tensor) -> list[int] | Tensor:
    """This process's part of a batch, which is a list of indices or a tensor with a row for each image."""
    return batch[rank() :: size()]


def wrap(model: nn.Module) -> nn.Module:
    """The model with gradients that are means over the processes."""
    return DistributedDataParallel(model) if size() > 1 else model


def total(values: Tensor) -> Tensor:
    """The sum over the processes; no gradient flows through it."""
    values = values.detach()
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def agree(number: int, device: torch.device) -> bool:
    """Whether all processes have the same number."""
    if size() == 1:
        return True
    extremes = torch.tensor([number, -number], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return bool(extremes.sum() == 0)


def any_signal(number: int | None, device: torch.device) -> int | None:
    """The signal that some process has received, so that all of them stop at the same step."""
    if size() == 1:
        return number
    numbers = torch.tensor(number or 0, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers) or None

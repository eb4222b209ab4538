"""Caches of rendered images, in shared memory or in a file."""

import math
import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor


class MemoryCache:
    """uint8 images (3, H, W) by index, in memory that all processes share.

    Row i holds the pixels of image i, and after them a byte that is 1 once they are complete.
    """

    def __init__(self, size: int, image_size: tuple[int, int]):
        self.shape = (3, *image_size)
        row_bytes = math.prod(self.shape) + 1
        if Path("/dev/shm").is_dir():  # where Linux keeps shared memory
            check_space("shared memory", "/dev/shm", size * row_bytes)
        self.rows = torch.zeros(size, row_bytes, dtype=torch.uint8).share_memory_()

    def get(self, i: int) -> Tensor | None:
        row = self.rows[i]
        return row[:-1].view(self.shape) if row[-1] else None

    def put(self, i: int, image: Tensor) -> None:
        row = self.rows[i]
        row[:-1] = image.flatten()
        row[-1] = 1  # last, so that an interrupted image never counts as complete


class FileCache:
    """The same rows in a file, which later runs read too.

    The file is sparse: it takes the disk space of the images that it holds. Every access opens it
    anew, so that processes can share it. When a write fails, say because the disk is full, one
    process warns and all stop writing; what the file holds is still read.
    """

    def __init__(self, size: int, image_size: tuple[int, int], path: Path):
        self.shape, self.path = (3, *image_size), path
        self.row_bytes = math.prod(self.shape) + 1
        self.failed = torch.zeros(1, dtype=torch.bool).share_memory_()
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = 512 * getattr(path.stat(), "st_blocks", 0) if path.exists() else 0
        check_space(path.parent, path.parent, size * self.row_bytes - taken)
        path.touch()  # keeps the content of an earlier run
        os.truncate(path, size * self.row_bytes)

    def get(self, i: int) -> Tensor | None:
        row = torch.zeros(self.row_bytes, dtype=torch.uint8)
        try:
            with open(self.path, "rb") as file:
                file.seek(i * self.row_bytes)
                file.readinto(row.numpy())
        except OSError:  # the image is rendered instead, and put() warns
            return None
        return row[:-1].view(self.shape) if row[-1] else None

    def put(self, i: int, image: Tensor) -> None:
        if self.failed:
            return
        try:
            with open(self.path, "r+b") as file:
                file.seek(i * self.row_bytes)
                file.write(image.numpy())
                file.flush()
                file.write(b"\1")  # last, so that an interrupted image never counts as complete
        except OSError as error:
            self.failed.fill_(True)
            reason = error.strerror or error
            warnings.warn(f"cache: {self.path} is no longer written: {reason}", stacklevel=2)


def check_space(name: str | Path, folder: str | Path, needed: int) -> None:
    """Raises OSError unless the file system of a folder has this many bytes left."""
    if needed > shutil.disk_usage(folder).free:
        raise OSError(f"cache: {name} lacks the space for {needed / 1e9:.1f} GB")

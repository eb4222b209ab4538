"""Draws maps whose positions see a window of earlier ones, many positions at once.

Pixels are drawn so (hvae/context.py), and the maps of z (hvae/prior.py). A position sees `columns`
positions to the left in its row, and in `rows` rows above `columns` to each side. So positions
(i, j) with the same j + (columns + 1) i do not see each other: they make a front, on a slant. There
are W + (columns + 1)(H - 1) fronts at most, instead of H W positions.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def fronts(h: int, w: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """(i, j, n) for each front: its first position, and their number, one a row from i on."""
    step = columns + 1
    for front in range(w + step * (h - 1)):
        first = max(0, -(-(front + 1 - w) // step))
        last = min(h - 1, front // step)
        if first <= last:
            yield first, front - step * first, last + 1 - first


def front_positions(
    i: int, j: int, n: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows and columns, (n,) each, of the n positions of a front, the first at (i, j)."""
    k = torch.arange(n, device=device)
    return i + k, j - (columns + 1) * k


class SlantedCanvas:
    """Maps that are being drawn, (fronts, C, rows, B), with margins before and above.

    The positions of a front lie side by side, so that their windows are slices.

    Args:
        like: maps (B, C, H, W), for the sizes and the device.
        window: (rows, columns).
        outside: the value of positions outside the map.
    """

    def __init__(self, like: Tensor, window: tuple[int, int], outside: float = 0):
        b, c, self.h, self.w = like.shape
        self.rows, self.columns = window
        self.step = self.columns + 1
        self.margin = self.step * self.rows + self.columns
        fronts = self.margin + self.w + self.step * (self.h - 1)
        self.values = like.new_full((fronts, c, self.rows + self.h, b), outside)

    def front(self, i, j):
        """The index of a position's front."""
        return self.margin + j + self.step * i

    def window(self, i: int, j: int, n: int) -> list[Tensor]:
        """The windows of n positions of a front from (i, j) on: for each row a (run, C, n, B)."""
        runs = []
        for above in range(self.rows, -1, -1):
            start = self.front(i - above, j - self.columns)
            length = self.columns + (self.columns + 1 if above else 0)
            row = self.rows + i - above
            runs.append(self.values[start : start + length, :, row : row + n])
        return runs

    def write(self, i: int, j: int, values: Tensor) -> None:
        """Sets the positions of a front from (i, j) on, values (C, n, B)."""
        row = self.rows + i
        self.values[self.front(i, j), :, row : row + values.shape[1]] = values

    def maps(self) -> Tensor:
        """(B, C, H, W)."""
        i = torch.arange(self.h, device=self.values.device)[:, None]
        j = torch.arange(self.w, device=self.values.device)
        return self.values[self.front(i, j), :, self.rows + i].permute(3, 2, 0, 1)

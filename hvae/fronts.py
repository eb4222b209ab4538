"""Draws maps whose positions see a window of earlier ones, many positions at once.

Pixels are drawn so (hvae/context.py), and the maps of z (hvae/prior.py). A position (i, j) sees the
`columns` positions to its left and, in each of the `rows` rows above, those from j - columns to
j + columns. Positions that do not see each other make a front: one in each row, columns + 1 further
left than the one above, just outside its window. With columns = 1 the fronts of a 3x5 map are

    0 1 2 3 4
    2 3 4 5 6
    4 5 6 7 8        front = j + (columns + 1) i

There are at most W + (columns + 1)(H - 1) of them, instead of H W positions.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def fronts(h: int, w: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """(i, j, n) for each front: the positions (i, j), (i + 1, j - columns - 1), ..., n in all."""
    step = columns + 1
    for front in range(w + step * (h - 1)):
        top = max(0, -(-(front + 1 - w) // step))  # rounded up: above it j >= w
        bottom = min(h - 1, front // step)
        if top <= bottom:
            yield top, front - step * top, bottom + 1 - top


class SlantedCanvas:
    """Maps (B, C, H, W) that are being drawn, as `values` (front, C, row, B).

    The next front is the next column of a row, so that a run of a window is a slice of fronts. The
    next row is the next position of a front, so that the windows of n positions are a slice of
    rows. Nothing need be gathered. It takes 1 + (columns + 1) H / W times the memory of the maps.

    Args:
        shape: (B, C, H, W).
        window: (rows, columns).
        like: a tensor of the dtype and on the device of the maps.
        outside: the value of positions outside the map: `margin` fronts before it, `rows` above.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        window: tuple[int, int],
        like: Tensor,
        outside: float = 0,
    ):
        b, c, self.h, self.w = shape
        self.rows, self.columns = window
        self.step = self.columns + 1
        self.margin = self.step * self.rows + self.columns
        length = self.margin + self.w + self.step * (self.h - 1)
        self.values = like.new_full((length, c, self.rows + self.h, b), outside)

    def index(self, i: int | Tensor, j: int | Tensor) -> int | Tensor:
        """Where the front of (i, j) is among the values."""
        return self.margin + j + self.step * i

    def positions(self, i: int, j: int, n: int) -> tuple[Tensor, Tensor]:
        """Rows and columns, (n,) each, of the n positions of a front from (i, j) on."""
        k = torch.arange(n, device=self.values.device)
        return i + k, j - self.step * k

    def window(self, i: int, j: int, n: int) -> list[Tensor]:
        """The windows of n positions of a front from (i, j) on, in reading order.

        They are (2 columns + 1, C, n, B) for each row above, then (columns, C, n, B).
        """
        runs = []
        for above in range(self.rows, -1, -1):
            start = self.index(i - above, j - self.columns)
            length = 2 * self.columns + 1 if above else self.columns
            row = self.rows + i - above
            runs.append(self.values[start : start + length, :, row : row + n])
        return runs

    def write(self, i: int, j: int, values: Tensor) -> None:
        """Sets the n positions of a front from (i, j) on, to values (C, n, B)."""
        row = self.rows + i
        self.values[self.index(i, j), :, row : row + values.shape[1]] = values

    def maps(self) -> Tensor:
        """(B, C, H, W)."""
        i = torch.arange(self.h, device=self.values.device)[:, None]
        j = torch.arange(self.w, device=self.values.device)
        return self.values[self.index(i, j), :, self.rows + i].permute(3, 2, 0, 1).contiguous()

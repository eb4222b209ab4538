"""Augmentation: images (B, C, H, W) in [0, 1], moved or bent at random."""

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted(x: Tensor, limit: int) -> Tensor:
    """Each image moved by up to so many pixels either way; new pixels repeat the border."""
    n, c, h, w = x.shape
    move = lambda: torch.randint(-limit, limit + 1, (n, 1), device=x.device)
    rows = (torch.arange(h, device=x.device) + move()).clamp(0, h - 1)
    columns = (torch.arange(w, device=x.device) + move()).clamp(0, w - 1)
    x = x.gather(2, rows[:, None, :, None].expand(n, c, h, w))
    x = x.gather(3, columns[:, None, None, :].expand(n, c, h, w))
    return x.contiguous(memory_format=torch.channels_last)


def warped(x: Tensor, limit: float) -> Tensor:
    """Each 8-bit image bent smoothly: its points move by up to so many pixels.

    Points half a height apart move at random, and those between them follow. New pixels repeat
    the border. (Elastic deformation, Simard et al. 2003.)
    """
    n, _, h, w = x.shape
    points = (3, max(3, 1 + round(2 * w / h)))
    move = limit * (2 * torch.rand(n, 2, *points, device=x.device) - 1)
    move = F.interpolate(move, (h, w), mode="bicubic", align_corners=True).clamp(-limit, limit)
    rows, columns = (torch.arange(end, device=x.device) for end in (h, w))
    place = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))  # (2, H, W): x, then y
    size = torch.tensor([w, h], device=x.device)
    grid = (2 * (place + move).permute(0, 2, 3, 1) + 1) / size - 1
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return ((255 * x).round() / 255).contiguous(memory_format=torch.channels_last)

"""The palette of an image: paper, ink, and the colour farthest from the paper, the deepest.

    log p(x|z) >= log p(c|z) + log p(x|z,c)      c = palette_of(x), (3, C) levels

Colours are global, and pixels that are drawn one after the other lose them: each would follow its
neighbours. So p(x|z) is a mixture over palettes c, and every pixel sees c. The right side is
log p(x, c|z) for the one c that the image has, and so a lower bound. Sampling draws c, then x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvae.distributions import LogisticMixture

LEVELS = 256
NEAR = 32  # levels to each side of a span's middle
INK, DEEPEST = 0.25, 0.9  # least distances from the paper, as shares of the farthest pixel's


def palette_of(x: Tensor) -> Tensor:
    """The palettes of images x (B, C, H, W) on the scale 0 ... 255: (B, 3, C) levels, of x's type.

    Paper is each channel's commonest level in the span that has the most pixels: where paper is
    uneven, an even ink can have the commonest level of all. The deepest colour is the commonest
    level of the pixels that are farthest from the paper. Ink is the commonest level of those that
    are clearly not paper, on the deepest colour's side of it: uneven paper has far pixels on the
    other side, too. As channels are counted one by one, a colour may be that of no pixel.
    """
    levels = x.flatten(2).nan_to_num().round().clamp(0, LEVELS - 1).long()
    paper = commonest(levels, is_near_most(levels))
    from_paper = distance(levels, paper)
    farthest = from_paper.amax(2, keepdim=True)
    deepest = commonest(levels, from_paper >= DEEPEST * farthest)
    is_its_side = distance(levels, deepest) <= farthest
    ink = commonest(levels, (from_paper >= INK * farthest) & is_its_side)
    return torch.stack([paper, ink, deepest], 1).to(x)


def distance(levels: Tensor, colour: Tensor) -> Tensor:
    """(B, 1, N): how far pixels (B, C, N) are from a colour (B, C), summed over the channels."""
    return (levels - colour[..., None]).abs().sum(1, keepdim=True)


def is_near_most(levels: Tensor) -> Tensor:
    """(B, C, N): whether a pixel's level lies in the span that has the most pixels."""
    counts = histogram(levels, torch.ones_like(levels))
    middle = F.avg_pool1d(counts, 2 * NEAR + 1, 1, NEAR).argmax(2, keepdim=True)
    return (levels - middle).abs() <= NEAR


def commonest(levels: Tensor, counted: Tensor) -> Tensor:
    """(B, C), of levels (B, C, N); counted (B, 1 or C, N) says of which pixels."""
    return histogram(levels, counted).argmax(2)


def histogram(levels: Tensor, counted: Tensor) -> Tensor:
    """(B, C, 256): how many of the counted pixels have each level."""
    counts = torch.zeros(*levels.shape[:2], LEVELS, device=levels.device)
    return counts.scatter_add_(2, levels, counted.to(counts).expand(levels.shape))


class PaletteNetwork(nn.Module):
    """p(c|z) for what z says, f (B, features, H, W): value after value, each given those before.

    A value is a mixture of discretised logistics.
    """

    width, mixtures = 64, 8

    def __init__(self, features: int, channels: int):
        super().__init__()
        self.shape = (3, channels)
        earlier = range(3 * channels)
        self.hidden = nn.ModuleList(nn.Linear(3 * features + k, self.width) for k in earlier)
        self.out = nn.ModuleList(nn.Linear(self.width, 3 * self.mixtures) for _ in earlier)
        for out in self.out:
            self.start_value(out, torch.linspace(0, 255, 64))

    def start_at(self, palettes: Tensor) -> None:
        """Starts every value at its quantiles in palettes (N, 3, C), unless it is trained.

        A value that all of them share starts anew even then, so that white paper is white at once:
        a checkpoint to begin with knows other papers, and they are forgotten slowly.
        """
        is_trained = self.out[0].bias[: self.mixtures].any()  # components weigh the same at first
        for out, levels in zip(self.out, palettes.flatten(1).T, strict=True):
            if not is_trained or levels.amin() == levels.amax():
                self.start_value(out, levels)

    @torch.no_grad()
    def start_value(self, out: nn.Linear, levels: Tensor) -> None:
        """Means at the quantiles of levels (N,), and scales for their gaps."""
        nn.init.normal_(out.weight, std=1e-4)
        _, mean, log_scale = nn.init.zeros_(out.bias).chunk(3)
        middles = (torch.arange(self.mixtures, device=levels.device) + 0.5) / self.mixtures
        mean.copy_(levels.float().quantile(middles) / 128 - 1)
        gap = (levels.amax() - levels.amin()) / self.mixtures
        log_scale.copy_((gap / 4).clamp(min=0.1).log())

    def log_prob(self, palette: Tensor, f: Tensor) -> Tensor:
        """(B,) nats, of palettes (B, 3, C)."""
        levels = palette.flatten(1)
        pooled = pool(f.to(palette))
        log_p = [self.mixture(levels[:, :k], pooled).log_prob(x) for k, x in enumerate(levels.T)]
        return torch.stack(log_p).sum(0)

    def sample(self, f: Tensor, noise: Tensor) -> Tensor:
        """A palette (B, 3, C) from uniform noise (3 C, 2, B)."""
        levels, pooled = noise.new_zeros(len(f), 0), pool(f.to(noise))
        for its_noise in noise:
            level = self.mixture(levels, pooled).draw(its_noise)
            levels = torch.cat([levels, level[:, None]], 1)
        return levels.unflatten(1, self.shape)

    def mixture(self, earlier: Tensor, pooled: Tensor) -> LogisticMixture:
        """Of the next level, (mixtures, B)."""
        k = earlier.shape[1]
        with torch.autocast(pooled.device.type, enabled=False):  # bfloat16 rounds to half a level
            h = F.silu(self.hidden[k](torch.cat([pooled, earlier / 64 - 2], 1)))
            logit, mean, log_scale = self.out[k](h).T.contiguous().chunk(3)
        return LogisticMixture(logit, 128 * (mean + 1), log_scale.clamp(-3.5, 5))


def pool(f: Tensor) -> Tensor:
    """Means, maxima and minima over the positions, (B, 3 features)."""
    return torch.cat([f.mean((2, 3)), f.amax((2, 3)), f.amin((2, 3))], 1)

"""p(x|z) with a local context: a pixel depends on z and on the pixels of a window before it.

    p(x|z) = prod_i prod_c p(x_ic | f_i(z), x_j for j in the window of i, x_ic' for c' < c)

An image has few colours, and a window inside a stroke may miss some. So for 8-bit images p(x|z) is
a mixture over palettes of three colours, which every pixel sees: see hvae/palette.py.

The window predicts fine detail, so z need only carry layout, glyphs and colours (PixelVAE,
Gulrajani et al. 2017; variational lossy autoencoder, Chen et al. 2017). Channels of 8 bits are
mixtures of discretised logistics (PixelCNN++, Salimans et al. 2017), each given the channels
before it; binary pixels are Bernoulli.

Linear layers see the windows of N pixels: together a masked convolution and 1x1 convolutions, of
these pixels only. To score an image, the windows of all its pixels are gathered, or in training of
a random part; to draw it, those of a front are sliced (hvae/fronts.py). Nothing can depend on a
later pixel, because none is ever looked up; the palette is drawn before them all.

Most tensors have the pixels last, (..., N): arithmetic on many short rows is slow.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvae.distributions import Bernoulli, Gaussian, LogisticMixture, draw_noise
from hvae.fronts import SlantedCanvas, fronts
from hvae.palette import PaletteNetwork, palette_of
from hvae.validate import InputError

BASES = 6  # that a mean starts from: left, above, a gradient, a blend, paper, ink
CHUNK = 1 << 16  # pixels scored at once: bounds the memory
KEEP_EDGE, KEEP_FLAT = 0.05, 0.01  # shares of the pixels of 60x160 that a training step scores
GUESS_SIGMA = 0.4  # for images in [-1, 1]
WINDOW_NOISE = 0.005  # share of the windows' values that are replaced at random in training


class ContextNetwork(nn.Module):
    """The network behind p(x|z): forward(f) makes the distribution of images, `Pixels`.

    f (B, `features`, H, W) is what z says; its first C channels are z's own guess of x: a mean in
    [-1, 1], or the logit of a binary pixel.

    Args:
        channels: C of the images.
        context: rows above and columns to each side that a pixel sees.
        mixtures: logistics of a channel; the k-th mean starts from base k modulo 6.
        likelihood: 'logistic' for 8-bit images, 'bernoulli' for binary ones.
    """

    features, width = 32, 64

    def __init__(self, channels: int, context: tuple[int, int], mixtures: int, likelihood: str):
        super().__init__()
        width = self.width
        self.rows, self.columns = context
        self.window_noise = WINDOW_NOISE  # a training run sets its own
        self.channels, self.mixtures = channels, mixtures
        self.binary = likelihood == "bernoulli"
        taps = self.rows * (2 * self.columns + 1) + self.columns  # the left pixel is the last
        taps += 0 if self.binary else 3  # the palette
        self.from_window = nn.Linear(channels * (taps + 1), width)
        self.from_z = nn.Linear(self.features, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        if self.binary:
            self.out = nn.Linear(width, channels)
            return
        self.out = nn.ModuleList(nn.Linear(width, 3 * mixtures) for _ in range(channels))
        later = range(1, channels)
        self.from_h = nn.ModuleList(nn.Linear(width, width) for _ in later)
        self.from_earlier = nn.ModuleList(nn.Linear((BASES + 1) * c, width) for c in later)
        self.slopes = nn.ModuleList(nn.Linear(width, c) for c in later)
        self.log_ridge = nn.Parameter(torch.tensor(2.5)) if channels > 1 else None
        self.coverage = nn.Linear(width, 1)
        self.palette = PaletteNetwork(self.features, channels)
        with torch.no_grad():
            for slopes in self.slopes:
                slopes.weight *= 0.1
                slopes.bias.fill_(1 / slopes.out_features)
            for out in self.out:
                out.weight *= 0.3
                out.bias.zero_()
                out.bias[2 * mixtures :] = torch.linspace(-1.5, 2.5, mixtures)

    def forward(self, f: Tensor) -> "Pixels":
        return Pixels(self, f)

    def start_at(self, bias: Tensor, x: Tensor) -> None:
        """Sets the bias of f so that z's guess starts at the level of images x."""
        guess = Bernoulli if self.binary else Gaussian
        guess.start_at(bias[: self.channels], x)

    def start_palette_at(self, x: Tensor) -> None:
        """Starts p(c|z) at the palettes of images x, see PaletteNetwork.start_at()."""
        if not self.binary:
            self.palette.start_at(palette_of(255 * x))

    def score_or_draw(
        self, window: Tensor, f: Tensor, x: Tensor | None, noise: Tensor | None = None
    ) -> Tensor:
        """log p (C, N) of the pixels x (C, N), or pixels drawn, (C, N), if x is None.

        Args:
            window: (taps, C, N), the palette, then pixels in reading order, see Pixels.window().
                It and x are levels: 0 ... 255, or 0 and 1.
            f: (N, features), what z says.
            noise: (C, 2, N), uniform in (0, 1).
        """
        left = window[-1:]
        if not self.binary:
            differences = window - left
            h = self.trunk(torch.cat([root(differences), left / 64 - 3]), f)
            return self.logistics(h, window, channel_products(differences), x, noise)
        # from_window has a place for the left pixel's level, which a binary window holds already
        h = self.trunk(torch.cat([window, torch.zeros_like(left)]), f)
        logit = (self.out(h).to(window) + f[:, : self.channels].to(window)).T
        if x is None:
            return (noise[:, 0] < logit.sigmoid()).to(window)
        return -F.binary_cross_entropy_with_logits(logit, x, reduction="none")

    def trunk(self, seen: Tensor, f: Tensor) -> Tensor:
        """What the window, `seen` (taps + 1, C, N), and z say, (N, width)."""
        h = F.silu(self.from_window(seen.flatten(0, 1).T) + self.from_z(f))
        for layer in self.hidden:
            h = h + F.silu(layer(h))
        return h

    def logistics(
        self,
        h: Tensor,
        window: Tensor,
        products: list[list[Tensor]],
        x: Tensor | None,
        noise: Tensor | None,
    ) -> Tensor:
        """Channel after channel: a mixture whose means follow the channels before.

        A mean moves with each earlier channel's residual by a slope. Slopes are ridge regressions
        over the window's pixels, by their `products`, shrunk towards a prediction from h.
        """
        bases = self.bases(window, self.coverage(h).to(window).T.sigmoid())  # (BASES, C, N)
        rows, residuals = [], []
        for c in range(self.channels):
            base, hidden = bases[:, c], h
            if c:
                expected = self.slopes[c - 1](h).to(window)
                slopes = ridge_slopes(products, c, expected, self.log_ridge.exp())
                for slope, residual in zip(slopes, residuals, strict=True):
                    base = base + slope * residual
                earlier = torch.cat([*map(root, residuals), torch.stack(slopes)]).T
                hidden = h + F.silu(self.from_h[c - 1](h) + self.from_earlier[c - 1](earlier))
            mixture = self.mixture(c, hidden, base)
            value = mixture.draw(noise[c]) if x is None else x[c]
            rows.append(value if x is None else mixture.log_prob(value))
            residuals.append(value - base)  # (BASES, N)
        return torch.stack(rows)

    def bases(self, window: Tensor, coverage: Tensor) -> Tensor:
        """The levels that means start from, (BASES, C, N).

        The blend is between paper and the deepest colour, by a coverage (1, N) from 0 to 1.
        """
        up = -2 * self.columns - 1
        left, above, corner = window[-1], window[up], window[up - 1]
        gradient = (left + above - corner).clamp(0, 255)
        paper, ink, deepest = window[:3]
        blend = paper + coverage * (deepest - paper)
        return torch.stack([left, above, gradient, blend, paper, ink])

    def mixture(self, c: int, hidden: Tensor, base: Tensor) -> LogisticMixture:
        logit, shift, log_scale = self.out[c](hidden).T.to(base).contiguous().chunk(3)
        times = math.ceil(self.mixtures / BASES)  # for one, expand() copies nothing
        base = base.expand(times, *base.shape).flatten(0, 1)[: self.mixtures]  # k modulo 6
        mean = base + shift * (1 + shift.abs())
        return LogisticMixture(logit, mean, log_scale.clamp(-3.5, 5))


class Pixels:
    """p(x|z) of images x (B, C, H, W) in [0, 1]: multiples of 1/255, or zeros and ones."""

    def __init__(self, network: ContextNetwork, f: Tensor):
        self.network, self.size = network, f.shape[2:]
        self.levels, self.outside = (1, 0) if network.binary else (255, 255)
        self.parameters = f
        self.f = f.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, features)
        self.pitch = self.size[1] + 2 * network.columns  # of a row on the canvas

    @property
    def guess(self) -> Bernoulli | Gaussian:
        """What z alone says of x, which teaches the latents: see trainer.py.

        A Bernoulli for binary pixels, otherwise a Gaussian of sigma 0.4.
        """
        parameters = self.parameters[:, : self.network.channels].float()
        if self.network.binary:
            return Bernoulli(parameters)
        return Gaussian(parameters, torch.full((), math.log(GUESS_SIGMA), device=self.f.device))

    @property
    def image(self) -> Tensor:
        """The guess's mean, (B, C, H, W) in [0, 1]; of binary pixels a draw, always the same."""
        if self.network.binary:
            return self.sample(torch.Generator().manual_seed(0))
        return self.guess.image

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) nats; of 8-bit images the bound of hvae/palette.py.

        Raises:
            ValueError: x is not a batch of such images.
        """
        shape = (len(self.parameters), self.network.channels, *self.size)
        if tuple(x.shape) != shape:
            raise InputError(f"expected images {shape}, got {tuple(x.shape)}")
        if self.network.binary and ((x > 0) & (x < 1)).any():
            raise InputError("expected pixels that are 0 or 1; see binarise")
        every = torch.arange(len(self.f), device=self.f.device)
        canvas, palette = self.canvas(x), self.palette(x)
        parts = [self.score(canvas, canvas, palette, i).sum(1) for i in every.split(CHUNK)]
        return torch.cat(parts).view(len(x), -1).sum(1) + self.log_prob_of_palette(palette)

    def estimate(self, x: Tensor) -> Tensor:
        """log_prob for training, (B,) nats: from a random part of the pixels, weighted by 1/share.

        Pixels equal to all their neighbours are rarely scored: they cost little and teach little.
        Of a smaller image a larger share is scored, and of a binary one every pixel. A few values
        in the windows are replaced at random, so that a sample recovers from an unlikely pixel.
        """
        if self.network.binary:
            return self.log_prob(x)
        keep = torch.where(is_flat(x), KEEP_FLAT, KEEP_EDGE) * (9600 / math.prod(self.size))
        keep = keep.clamp(max=1).flatten()
        i = (torch.rand_like(keep) < keep).nonzero()[:, 0]
        image = i // math.prod(self.size)
        other = x.flatten()[torch.randint(x.numel(), x.shape, device=x.device)]
        seen = torch.where(torch.rand_like(x) < self.network.window_noise, other, x)
        palette = self.palette(x)
        log_p = self.score(self.canvas(x), self.canvas(seen), palette, i).sum(1)
        log_p = x.new_zeros(len(x)).index_add(0, image, log_p / keep[i])
        return log_p + self.log_prob_of_palette(palette)

    def score(self, canvas: Tensor, seen: Tensor, palette: Tensor, i: Tensor) -> Tensor:
        """log p (N, C) of the pixels i, which count through (B, H, W), given windows of `seen`."""
        x = canvas.index_select(0, self.places(i))
        f = self.f.index_select(0, i).to(x)
        return self.network.score_or_draw(self.window(seen, palette, i), f, x.T).T

    def palette(self, x: Tensor) -> Tensor:
        """Of images x, (B, 3, C) levels; of binary ones no colours, (B, 0, C)."""
        return x.new_zeros(len(x), 0, x.shape[1]) if self.network.binary else palette_of(255 * x)

    def log_prob_of_palette(self, palette: Tensor) -> Tensor | int:
        """log p(c|z), (B,) nats."""
        return 0 if self.network.binary else self.network.palette.log_prob(palette, self.parameters)

    def canvas(self, x: Tensor) -> Tensor:
        """Levels of images, row by row with margins, (B * (rows + H) * pitch, C)."""
        sides, top = self.network.columns, self.network.rows
        x = F.pad((self.levels * x).round(), (sides, sides, top, 0), value=self.outside)
        return x.permute(0, 2, 3, 1).flatten(0, 2).contiguous()

    def places(self, i: Tensor) -> Tensor:
        """Where on the canvas the pixels i are."""
        h, w = self.size
        row, image = i // w, i // (h * w)
        return (row + (image + 1) * self.network.rows) * self.pitch + i % w + self.network.columns

    def window(self, canvas: Tensor, palette: Tensor, i: Tensor) -> Tensor:
        """The windows of the pixels i, (taps, C, N): the palette, then pixels in reading order.

        In every row above, and in its own, a window is a run of pixels; the last run is cut before
        the pixel itself.
        """
        net, places = self.network, self.places(i)
        rows, columns, c = net.rows, net.columns, net.channels
        runs = canvas.flatten().unfold(0, (2 * columns + 1) * c, c)  # a view: a run at each place
        above = torch.arange(-rows, 1, device=i.device) * self.pitch
        window = runs.index_select(0, (above[:, None] + places - columns).flatten())
        window = window.view(rows + 1, len(i), 2 * columns + 1, c).permute(0, 2, 3, 1).flatten(0, 1)
        window = window[: rows * (2 * columns + 1) + columns]
        colours = palette.index_select(0, i // math.prod(self.size)).permute(1, 2, 0)
        return torch.cat([colours.to(window), window])

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw, (B, C, H, W) in [0, 1]: the palette, then the pixels of a front at once."""
        (h, w), net, batch = self.size, self.network, len(self.parameters)
        c, like = net.channels, net.from_z.weight  # which has the dtype and device of the draws
        if not batch:
            return like.new_zeros(0, c, h, w)
        noise = lambda *s: draw_noise(torch.rand, s, like, generator).clamp(1e-6, 1 - 1e-6)
        palette = like.new_zeros(batch, 0, c)
        if not net.binary:
            palette = net.palette.sample(self.parameters, noise(3 * c, 2, batch))
        palette = palette.permute(1, 2, 0)[:, :, None]  # (colours, C, 1, B)
        of_pixels, first = noise(batch * h * w, c, 2), h * w * torch.arange(batch).to(like.device)
        canvas = SlantedCanvas((batch, c, h, w), (net.rows, net.columns), like, self.outside)
        for i, j, n in fronts(h, w, net.columns):
            rows, columns = canvas.positions(i, j, n)
            pixels = ((w * rows + columns)[:, None] + first).flatten()
            f = self.f.index_select(0, pixels).to(like)
            its_noise = of_pixels.index_select(0, pixels).permute(1, 2, 0)
            colours = palette.expand(-1, -1, n, -1)
            window = torch.cat([colours, *canvas.window(i, j, n)]).flatten(2)
            x = net.score_or_draw(window, f, None, its_noise)
            canvas.write(i, j, x.unflatten(1, (n, batch)))
        return canvas.maps() / self.levels


def root(t: Tensor) -> Tensor:
    """About a signed square root: of differences of levels, it tells 0 from 1 and 100 from 200."""
    return t * torch.rsqrt(1 + t.abs())


def channel_products(differences: Tensor) -> list[list[Tensor]]:
    """Sums over the window of products of channels, [C][C] (N,) of differences (taps, C, N)."""
    d, channels = differences, range(differences.shape[1])
    products = {(a, b): (d[:, a] * d[:, b]).sum(0) for a in channels for b in channels if b <= a}
    return [[products[max(a, b), min(a, b)] for b in channels] for a in channels]


def ridge_slopes(
    products: list[list[Tensor]], c: int, expected: Tensor, ridge: Tensor
) -> list[Tensor]:
    """How channel c follows each channel before it, (N,) each: ridge regressions, in turn.

    products[c][d] (N,) are of channels c and d, summed over the window. They are updated in place:
    row and column c then describe what is left of channel c. expected (N, c) are the slopes where
    the window has no colour.
    """
    slopes = []
    for d in range(c):
        slope = (products[c][d] + ridge * expected[:, d]) / (products[d][d] + ridge)
        slope = slope.clamp(-6, 6)
        square = products[c][c] - slope * (2 * products[c][d] - slope * products[d][d])
        for k in range(len(products)):
            products[c][k] = products[k][c] = products[c][k] - slope * products[d][k]
        products[c][c] = square.clamp(min=0)
        slopes.append(slope)
    return slopes


def is_flat(x: Tensor) -> Tensor:
    """(B, H, W): whether a pixel is the same as those above it and to the left."""
    padded = F.pad(x, (1, 1, 1, 0), value=-1.0)
    h, w = x.shape[2:]
    near = [padded[:, :, 1:, :w], *(padded[:, :, :h, j : j + w] for j in range(3))]
    return torch.stack([(x == other).all(1) for other in near]).all(0)

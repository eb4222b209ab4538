"""The distributions of an HVAE: latents, the top latent by a flow, and images.

    latents    DiagonalGaussian and kl_divergence; FlowPrior for a vector z_L
    images     Bernoulli, Gaussian, Logistic: p(x|z) from the decoder's output map
    levels     LogisticMixture: one of 0 ... 255

An image distribution has `image`, its mean in [0, 1], and `log_prob(x)`, in nats per image.
Images x are (B, C, H, W) in [0, 1] throughout.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SLOPE = 4.0  # of one channel's mean with another's value; PixelCNN++ has 1
EDGE = 1 / 64  # how near 0 and 1 `logits` tells values apart


# ---------------------------------------------------------------------------- latents


def draw_noise(
    draw: Callable, shape: Sequence[int], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """torch.rand or torch.randn, beside `like`; the generator may live on another device."""
    device = generator.device if generator else like.device
    return draw(shape, generator=generator, device=device).to(like)


class DiagonalGaussian(NamedTuple):
    """N(mu, exp(logvar)), any shape (B, ...)."""

    mu: Tensor
    logvar: Tensor

    @property
    def base(self) -> "DiagonalGaussian":
        """Itself; of a prior of another form, the Gaussian that it starts from."""
        return self

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """mu + temperature * sigma * eps."""
        eps = draw_noise(torch.randn, self.mu.shape, self.mu, generator)
        return self.mu + temperature * (0.5 * self.logvar).exp() * eps

    def entropy(self) -> Tensor:
        """(B,) nats."""
        return 0.5 * (self.logvar + math.log(2 * math.pi) + 1).flatten(1).sum(1)

    def log_prob(self, z: Tensor) -> Tensor:
        """(B,) nats."""
        squares = (z - self.mu).square() * (-self.logvar).exp()
        return -0.5 * (squares + self.logvar + math.log(2 * math.pi)).flatten(1).sum(1)


def kl_divergence(q: DiagonalGaussian, p: DiagonalGaussian) -> Tensor:
    """KL(q || p) in closed form, (B,) nats (Kingma & Welling 2014, appendix B)."""
    ratio = (q.logvar - p.logvar).exp() + (q.mu - p.mu).square() * (-p.logvar).exp()
    return 0.5 * (ratio - 1 + p.logvar - q.logvar).flatten(1).sum(1)


# ---------------------------------------------------------------------------- a flow for z_L


class Coupling(nn.Module):
    """Half of the numbers shift and scale the other half: invertible, whatever `net` computes.

    (Dinh et al. 2017, eq. 7 and 8.)
    """

    def __init__(self, c: int):
        super().__init__()
        self.sizes = (c // 2, c - c // 2)
        self.net = nn.Sequential(
            nn.Linear(c // 2, 2 * c),
            nn.SiLU(),
            nn.Linear(2 * c, 2 * c),
            nn.SiLU(),
            nn.Linear(2 * c, 2 * self.sizes[1]),
        )
        with torch.no_grad():
            self.net[-1].weight *= 0.1  # starts near the identity
            self.net[-1].bias.zero_()

    def shift_and_log_scale(self, a: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.net(a).chunk(2, dim=1)
        return shift, torch.tanh(log_scale)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, c) -> u (B, c) and log |det du/dz| (B,)."""
        a, b = z.split(self.sizes, dim=1)
        shift, log_scale = self.shift_and_log_scale(a)
        return torch.cat([a, (b - shift) * (-log_scale).exp()], dim=1), -log_scale.sum(1)

    def inverse(self, u: Tensor) -> Tensor:
        a, b = u.split(self.sizes, dim=1)
        shift, log_scale = self.shift_and_log_scale(a)
        return torch.cat([a, b * log_scale.exp() + shift], dim=1)


class Flow(nn.Module):
    """An invertible map z <-> u of c numbers: couplings, with a fixed shuffle before each."""

    def __init__(self, c: int, couplings: int):
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(c) for _ in range(couplings))
        order = torch.stack([torch.randperm(c) for _ in range(couplings)])
        self.register_buffer("order", order)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, c) -> u (B, c) and log |det du/dz| (B,)."""
        log_det = z.new_zeros(len(z))
        for order, coupling in zip(self.order, self.couplings, strict=True):
            z, change = coupling(z[:, order])
            log_det = log_det + change
        return z, log_det

    def inverse(self, u: Tensor) -> Tensor:
        """u (B, c) -> the z (B, c) that forward() maps to it."""
        for order, coupling in zip(self.order.flip(0), reversed(self.couplings), strict=True):
            u = coupling.inverse(u)[:, order.argsort()]
        return u


class FlowPrior(NamedTuple):
    """The density of z = flow.inverse(u), u ~ base, as the prior of a VAE (Chen et al. 2017).

    It is fitted to the aggregated posterior, so samples resemble encoded images.
    """

    base: DiagonalGaussian
    flow: Flow

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        u = self.base.sample(temperature, generator)
        with torch.autocast(u.device.type, enabled=False):
            return self.flow.inverse(u)

    def log_prob(self, z: Tensor) -> Tensor:
        """(B,) nats."""
        with torch.autocast(z.device.type, enabled=False):
            u, log_det = self.flow(z.float())
            return self.base.log_prob(u) + log_det


# ---------------------------------------------------------------------------- images


def logits(x: Tensor) -> Tensor:
    """Images in [0, 1] on a scale from -2.1 to 2.1 that spreads what is nearly black or white.

    A captcha's paper varies by only 0.02 on [0, 1]. (Dinh et al. 2017, section 4.1.)
    """
    return 0.5 * torch.logit(EDGE + (1 - 2 * EDGE) * x.clamp(0, 1))


def from_logits(m: Tensor) -> Tensor:
    """The inverse of `logits`; larger numbers reach a little beyond 0 and 1."""
    return (torch.sigmoid(2 * m) - EDGE) / (1 - 2 * EDGE)


def binarised(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Every pixel drawn as 0 or 1, with its value as the probability of 1; NaN stays."""
    drawn = torch.bernoulli(x.nan_to_num(0, 0, 0).clamp(0, 1), generator=generator)
    return torch.where(x.isfinite(), drawn, x)


class Bernoulli:
    """Independent Bernoulli pixels, for grey images (Kingma & Welling 2014, appendix C.1).

    `parameters` (B, C, H, W) are logits.
    """

    def __init__(self, parameters: Tensor):
        self.parameters = parameters

    @staticmethod
    def start_at(bias: Tensor, x: Tensor) -> None:
        """Sets the output map's bias so that the distribution starts at the data's level."""
        bias.copy_(channel_means(x).logit())

    @property
    def image(self) -> Tensor:
        return self.parameters.sigmoid()

    def log_prob(self, x: Tensor) -> Tensor:
        nats = F.binary_cross_entropy_with_logits(self.parameters, x, reduction="none")
        return -nats.flatten(1).sum(1)


class Gaussian:
    """N(parameters, sigma^2) over images scaled to [-1, 1] (Rybkin et al. 2021).

    A density, not a probability of 8-bit images.
    """

    def __init__(self, parameters: Tensor, log_sigma: Tensor):
        self.parameters, self.log_sigma = parameters, log_sigma

    @staticmethod
    def start_at(bias: Tensor, x: Tensor) -> None:
        bias.copy_(2 * channel_means(x) - 1)

    @property
    def image(self) -> Tensor:
        return ((self.parameters + 1) / 2).clamp(0, 1)

    def log_prob(self, x: Tensor) -> Tensor:
        error = (2 * x - 1 - self.parameters) * (-self.log_sigma).exp()
        nats = 0.5 * error.square() + self.log_sigma + 0.5 * math.log(2 * math.pi)
        return -nats.flatten(1).sum(1)


class Logistic:
    """A mixture of K discretised logistics on 8-bit values (Salimans et al. 2017, section 2.1-2.2).

    A true probability: it sums to one over the 256^(C H W) images. For each component the
    parameter map holds one weight, C means on the scale of `logits`, C log scales, and
    C (C - 1) / 2 coefficients: a channel's mean moves with the residuals of the channels before
    it (R -> G -> B).
    """

    def __init__(self, parameters: Tensor, c: int, mixtures: int):
        self.parameters = parameters
        b, _, h, w = parameters.shape
        parts = parameters.contiguous().view(b, mixtures, -1, h, w)  # channels-last is slower here
        pi, mean, log_scale, coeff = parts.split([1, c, c, c * (c - 1) // 2], dim=2)
        self.log_pi = pi[:, :, 0].log_softmax(1)  # (B, K, H, W)
        self.mean = 2 * from_logits(mean) - 1  # (B, K, C, H, W), images in [-1, 1]
        self.log_scale = log_scale.clamp(-7, 7)  # (B, K, C, H, W)
        self.coeff = MAX_SLOPE * (coeff / MAX_SLOPE).tanh()  # (B, K, C (C - 1) / 2, H, W)

    @staticmethod
    def channels(c: int, mixtures: int = 1) -> int:
        """Of the parameter map, for images of c channels."""
        return mixtures * (1 + 2 * c + c * (c - 1) // 2)

    @staticmethod
    def start_at(bias: Tensor, x: Tensor) -> None:
        """The means start at quantiles of the data, all scales at e^-1.5."""
        c = x.shape[1]
        mixtures = len(bias) // Logistic.channels(c)
        parts = bias.view(mixtures, -1)
        mean = channel_means(x) if mixtures == 1 else quantiles(x, mixtures)
        parts[:, 1 : 1 + c] = logits(mean)
        parts[:, 1 + c : 1 + 2 * c] = -1.5

    @property
    def image(self) -> Tensor:
        mean = (self.log_pi.exp()[:, :, None] * self.mean).sum(1)
        return ((mean + 1) / 2).clamp(0, 1)

    def residuals(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) in [-1, 1] less its mean given the channels before: (B, K, C, H, W)."""
        difference = x[:, None] - self.mean
        residuals, first = [], 0
        for channel in range(x.shape[1]):
            coeff = self.coeff[:, :, first : first + channel]
            explained = (coeff * difference[:, :, :channel]).sum(2)
            residuals.append(difference[:, :, channel] - explained)
            first += channel
        return torch.stack(residuals, dim=2)

    def log_prob(self, x: Tensor) -> Tensor:
        x = 2 * (255 * x).round() / 255 - 1
        levels, residual = 127.5 * (x[:, None] + 1), 127.5 * self.residuals(x)
        log_p = log_discretised_logistic(levels, residual, self.log_scale + math.log(127.5))
        return torch.logsumexp(self.log_pi + log_p.sum(2), dim=1).flatten(1).sum(1)


class LogisticMixture(NamedTuple):
    """N mixtures of K logistics, discretised to levels 0 ... 255: (K, N) each."""

    logit: Tensor  # of the components' weights
    mean: Tensor
    log_scale: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """(N,) nats, of levels (N,)."""
        log_p = log_discretised_logistic(value, value - self.mean, self.log_scale)
        return torch.logsumexp(self.logit + log_p, 0) - torch.logsumexp(self.logit, 0)

    def draw(self, noise: Tensor) -> Tensor:
        """Levels (N,) from uniform noise (2, N): one number picks the component."""
        cumulative = (self.logit - self.logit.amax(0)).exp().cumsum(0)
        k = (cumulative[:-1] < noise[0] * cumulative[-1]).sum(0, keepdim=True)
        mean, log_scale = self.mean.gather(0, k)[0], self.log_scale.gather(0, k)[0]
        value = mean + log_scale.exp() * torch.logit(noise[1])
        return value.round().clamp(0, 255)


def log_discretised_logistic(level: Tensor, residual: Tensor, log_scale: Tensor) -> Tensor:
    """Log of a logistic's mass in the bin of a level 0 ... 255; residual = level - mean.

    With u and l the bin's edges and s the sigmoid, log(s(u) - s(l)) is
    log(1 - e^(l-u)) + log s(u) + log s(-l), exact for any difference. The outermost bins reach to
    infinity.
    """
    inverse = (-log_scale).exp()
    upper, lower = inverse * (residual + 0.5), inverse * (residual - 0.5)
    inside = torch.log(-torch.expm1(-inverse)) + F.logsigmoid(upper) + F.logsigmoid(-lower)
    above_black = torch.where(level > 254.5, F.logsigmoid(-lower), inside)
    return torch.where(level < 0.5, F.logsigmoid(upper), above_black)


def channel_means(x: Tensor) -> Tensor:
    """(C,), kept away from 0 and 1."""
    return x.mean((0, 2, 3)).clamp(0.01, 0.99)


def quantiles(x: Tensor, n: int) -> Tensor:
    """(n, C): the middles of n equally frequent classes of each channel's values."""
    values = x.transpose(0, 1).flatten(1).sort(dim=1).values
    return values[:, [int((k + 0.5) / n * values.shape[1]) for k in range(n)]].T


LIKELIHOODS = {"bernoulli": Bernoulli, "gaussian": Gaussian, "logistic": Logistic}

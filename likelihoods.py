"""p(x|z): three ways to read the decoder's output map as a distribution over images.

Every class is built from the map `parameters` (B, channels(C), H, W) and has `image`, its mean in [0, 1] (of the logistic,
but for tails beyond 0 and 1), and `log_prob(x)`, in nats per image. Images x are (B, C, H, W) in [0, 1] throughout.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SLOPE = 4.0  # PixelCNN++ has 1; between two colours of a captcha, one channel can change by much more than another
EDGE = 1 / 64  # how near 0 and 1 `logits` tells values apart


def logits(x: Tensor) -> Tensor:
    """Images in [0, 1] on a scale that spreads what is almost black or white, from -2 to 2 (Dinh et al. 2017, section 4.1).

    On [0, 1] a captcha's paper is white give or take two hundredths.
    """
    return 0.5 * torch.logit(EDGE + (1 - 2 * EDGE) * x.clamp(0, 1))


def from_logits(m: Tensor) -> Tensor:
    """The inverse of `logits`; larger numbers reach a little beyond 0 and 1."""
    return (torch.sigmoid(2 * m) - EDGE) / (1 - 2 * EDGE)


class Bernoulli:
    """Independent Bernoulli pixels, the classic VAE (Kingma & Welling 2014, appendix C.1). For grey images."""

    def __init__(self, parameters: Tensor):
        self.parameters = parameters  # logits

    @staticmethod
    def channels(c: int) -> int:
        return c

    @property
    def image(self) -> Tensor:
        return self.parameters.sigmoid()

    def log_prob(self, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(self.parameters, x, reduction="none").flatten(1).sum(1)


class Gaussian:
    """N(parameters, sigma^2) over images scaled to [-1, 1]; sigma fixed or learned (Rybkin et al. 2021)."""

    def __init__(self, parameters: Tensor, log_sigma: Tensor):
        self.parameters, self.log_sigma = parameters, log_sigma

    @staticmethod
    def channels(c: int) -> int:
        return c

    @property
    def image(self) -> Tensor:
        return ((self.parameters + 1) / 2).clamp(0, 1)

    def log_prob(self, x: Tensor) -> Tensor:
        error = (2 * x - 1 - self.parameters) * (-self.log_sigma).exp()
        return -(0.5 * error.square() + self.log_sigma + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


class Logistic:
    """A mixture of K discretised logistics on 8-bit values (Salimans et al. 2017, PixelCNN++, section 2.1-2.2).

    A true probability: it sums to one over the 256^(C H W) images. Per mixture component the map holds one weight, C
    means on the scale of `logits`, C log scales, and C (C - 1) / 2 coefficients: a channel's mean moves with what the
    channels before it (R -> G -> B) turn out to be beyond their own means, by up to SLOPE times as much. With
    `neighbours` 4 C more coefficients a pixel let its means move, in the same way, with what is left to explain at the
    four pixels next to it that come earlier in reading order. `image` takes no notice of either: with one component what is
    left to explain is zero in the mean, with more nearly so.
    """

    def __init__(self, parameters: Tensor, c: int, mixtures: int, neighbours: bool = False):
        self.parameters = parameters
        b, _, h, w = parameters.shape
        parameters = parameters.contiguous()  # of channels-last maps all below is slower by half
        mixture, near = parameters.tensor_split([self.channels(c, mixtures)], dim=1)
        pi, mean, log_scale, coeff = mixture.view(b, mixtures, -1, h, w).split([1, c, c, c * (c - 1) // 2], dim=2)
        self.log_pi = pi[:, :, 0].log_softmax(1)  # (B, K, H, W)
        self.mean = 2 * from_logits(mean) - 1  # (B, K, C, H, W)
        self.log_scale = log_scale.clamp(-7, 7)
        self.coeff = SLOPE * (coeff / SLOPE).tanh()
        self.near = SLOPE * (near / SLOPE).tanh().view(b, 4, c, h, w) if neighbours else None

    @staticmethod
    def channels(c: int, mixtures: int, neighbours: bool = False) -> int:
        return mixtures * (1 + 2 * c + c * (c - 1) // 2) + 4 * c * neighbours

    def beyond_means(self, x: Tensor) -> Tensor:
        """What x (B, C, H, W), in [-1, 1], is beyond each component's mean given all that comes before, (B, K, C, H, W)."""
        beyond = x[:, None] - self.mean
        rest, first = [], 0
        for channel in range(x.shape[1]):
            coeff = self.coeff[:, :, first : first + channel]
            rest.append(beyond[:, :, channel] - (coeff * beyond[:, :, :channel]).sum(2))
            first += channel
        rest = torch.stack(rest, dim=2)
        if self.near is None:
            return rest
        return rest - (self.near * earlier(self.average(rest))).sum(1)[:, None]

    def average(self, values: Tensor) -> Tensor:
        """The mean of (B, K, C, H, W) over the mixture's components, (B, C, H, W)."""
        return (self.log_pi.exp()[:, :, None] * values).sum(1)

    @property
    def image(self) -> Tensor:
        return ((self.average(self.mean) + 1) / 2).clamp(0, 1)

    def log_prob(self, x: Tensor) -> Tensor:
        x = 2 * (255 * x).round() / 255 - 1
        centred = self.beyond_means(x)
        inverse = (-self.log_scale).exp()
        upper, lower = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255)  # edges of x's bin
        # log(s(u) - s(l)) = log(1 - e^(l-u)) + log s(u) + log s(-l), exact however small the difference; u - l is the
        # bin's width 2/255 over the scale
        inside = torch.log(-torch.expm1(-2 / 255 * inverse)) + F.logsigmoid(upper) + F.logsigmoid(-lower)
        edge = x[:, None].expand_as(centred)
        log_p = torch.where(edge < -0.999, F.logsigmoid(upper),  # the outermost bins reach to infinity
                            torch.where(edge > 0.999, F.logsigmoid(-lower), inside))
        return torch.logsumexp(self.log_pi + log_p.sum(2), dim=1).flatten(1).sum(1)


def earlier(t: Tensor) -> Tensor:
    """t (B, C, H, W) at the pixels above left, above, above right and left of each, (B, 4, C, H, W); 0 outside the image."""
    h, w = t.shape[2:]
    t = F.pad(t, (1, 1, 1, 0))
    return torch.stack([t[:, :, :h, :w], t[:, :, :h, 1:-1], t[:, :, :h, 2:], t[:, :, 1:, :w]], dim=1)

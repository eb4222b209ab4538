"""HVAE: a hierarchical variational autoencoder with L latent levels, z_1 nearest the image and z_L at the top.

    "top-down", a ladder       p(x, z) = p(x | z_{1..L}) prod_{l<L} p(z_l | z_{l+1..L}) p(z_L)
                               q(z|x)  = q(z_L|x) prod_{l<L} q(z_l | z_{l+1..L}, x)
    "bottom-up", a chain       p(x, z) = p(x | z_1) prod_{l<L} p(z_l | z_{l+1}) p(z_L)
                               q(z|x)  = q(z_1|x) prod_{l<L} q(z_{l+1} | z_l)

    -ELBO = reconstruction  -E log p(x|z)
          + prior matching   KL(q(z_L|.) || p(z_L))      p(z_L) = N(0, I), or a flow from it
          + consistency      sum_{l<L} KL(q(z_l|.) || p(z_l|.))              all in nats per image

In the code a level's index is l - 1: `levels[0]` holds z_1.
"""

import ctypes
import hashlib
import math
import sys
import zipfile
from numbers import Real
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import MOST_PIXELS, Block, Layer, Size, build, group_norm, mirror, pixels, plan, project, whole
from flow import Flow, Flowed
from likelihoods import Bernoulli, Gaussian, Logistic, logits

DIGITS = "0123456789"
UPPERCASE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# The shipped checkpoint: a vector for the whole, a 4x10 map for the layout, three 8x20 maps for the strokes.
OUTER_CONFIG = [("conv", 32, 2), ("conv", 64, 2), ("res", 64), ("conv", 128, 2), ("res", 128)]
INNER_CONFIG = [[("res", 128)], [("res", 128)], [("conv", 128, 2), ("res", 128)], [("dense", 128)]]
LATENT_CHANNELS = (4, 4, 4, 8, 64)

MOST_COUPLINGS = 1000  # more than anyone wants; each takes time to build
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, from malloc.h

# Arguments of HVAE by name.
BINARY_DIGITS = dict(input_size=(28, 28), input_channels=1, likelihood="bernoulli", text_length=None)
CONFIGS = {
    "captcha": {},
    # for bits/dim: a true probability of 8-bit images, most of it in the 15x40 map that tells where edges are
    "captcha-logistic": dict(outer_config=[("conv", 48, 2), ("conv", 64, 2), ("res", 64)],
                             inner_config=[[("conv", 128, 2), ("res", 128)], [("conv", 32), ("dense", 128)]],
                             latent_channels=(8, 8, 32), likelihood="logistic", mixtures=2, neighbours=True, flow=0),
    # the flat VAE of many a first course: three convolutions, a dense layer, a latent plane
    "mnist-vae": dict(outer_config=[("conv", 32), ("conv", 32), ("conv", 64, 2), ("dense", 128)], inner_config=[],
                      latent_channels=2, inference="bottom-up", **BINARY_DIGITS),
    "mnist-hvae": dict(outer_config=[("conv", 32, 2), ("res", 32)],
                       inner_config=[[("conv", 64, 2), ("res", 64)], [("res", 64)], [("res", 64)], [("dense", 128)]],
                       latent_channels=(2, 4, 4, 4, 32), flow=6, **BINARY_DIGITS),
}


class ELBO(NamedTuple):
    """The terms of the evidence lower bound, per image, in nats."""

    reconstruction: Tensor  # (B,)    -log p(x|z)
    kl: Tensor  # (B, L)  KL(q(z_l|.) || p(z_l|.)), column l-1 for z_l
    elbo: Tensor  # (B,)    -(reconstruction + sum of kl) <= log p(x)
    log_weight: Tensor  # (B,)    log p(x, z) - log q(z|x) of the z drawn; its mean is the ELBO too
    z_top: Tensor  # the draw of z_L


class Normal(NamedTuple):
    """A diagonal Gaussian N(mu, exp(logvar)), any shape (B, ...)."""

    mu: Tensor
    logvar: Tensor

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mu.shape, generator=generator, device=generator.device if generator else self.mu.device)
        return self.mu + temperature * (0.5 * self.logvar).exp() * noise.to(self.mu)

    def entropy(self) -> Tensor:
        """(B,) nats."""
        return 0.5 * (self.logvar + math.log(2 * math.pi) + 1).flatten(1).sum(1)

    def log_prob(self, z: Tensor) -> Tensor:
        """(B,) nats."""
        squares = (z - self.mu).square() * (-self.logvar).exp()
        return -0.5 * (squares + self.logvar + math.log(2 * math.pi)).flatten(1).sum(1)


def kl_divergence(q: Normal, p: Normal) -> Tensor:
    """KL(q || p) in closed form, (B,) nats (Kingma & Welling 2014, appendix B, for two Gaussians)."""
    ratio = (q.logvar - p.logvar).exp() + (q.mu - p.mu).square() * (-p.logvar).exp()
    return 0.5 * (ratio - 1 + p.logvar - q.logvar).flatten(1).sum(1)


class Head(nn.Module):
    """Features (B, c_in, *size) -> the mu and logvar of a latent, (B, c_z, *size) each, in float32.

    At the start mu is noise of size `scale` or so and logvar lies around the number given.
    """

    def __init__(self, c_in: int, c: int, c_z: int, size: Size, logvar: float, scale: float = 1.0):
        super().__init__()
        self.norm = group_norm(1, c_in, size)  # without it a latent's KL can run away in the first steps
        self.hidden = project(c_in, c, size)
        self.out = project(c, 2 * c_z, size)
        with torch.no_grad():
            self.out.weight *= scale
            self.out.bias.zero_()[c_z:] += logvar

    def forward(self, h: Tensor) -> Normal:
        mu, logvar = self.out(F.silu(self.hidden(self.norm(h)))).float().chunk(2, dim=1)
        return Normal(mu, logvar.clamp(-8, 4))


class Level(nn.Module):
    """The latent z_l: its prior p, its posterior q, and its way into the generation path.

    d are the inference features (B, c, *size), h the generation features (B, c_h, *size).
    """

    def __init__(self, c: int, c_h: int, c_out: int, c_z: int, size: Size, top: bool, top_down: bool, couplings: int):
        super().__init__()
        self.shape = (c_z, *size)
        self.top_down = top_down
        self.p = None if top else Head(c_h, c_h, c_z, size, logvar=0.0)
        self.flow = Flow(c_z, couplings) if couplings else None
        self.q = Head(c + c_h if top_down else c, c, c_z, size, logvar=-3.0, scale=3.0)  # z begins above its own noise
        self.from_z = project(c_z, c_out, size)
        if top_down:
            self.from_h = nn.Identity() if c_h == c_out else project(c_h, c_out, size)

    def prior(self, h: Tensor) -> Normal | Flowed:
        """p(z_l | z_{l+1..L}); p(z_L) is N(0, I), or a flow from it, and takes only the number of images from h."""
        if self.p is None:
            zeros = torch.zeros(len(h), *self.shape, device=h.device)
            return Normal(zeros, zeros) if self.flow is None else Flowed(Normal(zeros, zeros), self.flow)
        p = self.p(h)
        return Normal(p.mu, 2 * torch.tanh(p.logvar / 2))  # a variance from e^-2 to e^2; with less, KLs can explode

    def posterior(self, d: Tensor, h: Tensor, p: Normal | Flowed) -> Normal:
        """q(z_l|.): what d says about z_l, or (top-down) that combined with p, weighted by precision.

        The ladder's correction of the prior's mean and variance (Sonderby et al. 2016, eq. 17-18): the posterior is
        the normalised product of p and N(mu, exp(logvar)), as if the features were one noisy observation of z_l. The
        prior's mean thus has a direct gradient towards the data's, which a shift relative to it would not give. Of a
        flow, N(0, I) takes p's place.
        """
        if not self.top_down:
            return self.q(d)
        p = p.base if isinstance(p, Flowed) else p
        evidence = self.q(torch.cat([d, h], dim=1))
        trust = torch.sigmoid(p.logvar - evidence.logvar)  # the evidence's share of the precision
        return Normal(p.mu + trust * (evidence.mu - p.mu), evidence.logvar + F.logsigmoid(p.logvar - evidence.logvar))

    def merge(self, h: Tensor, z: Tensor) -> Tensor:
        """What the generation block below receives, (B, c_out, *size): z, and the features h if top-down."""
        z = F.silu(self.from_z(z))
        return z + self.from_h(h) if self.top_down else z


class TextInput(nn.Module):
    """The text y (B, T) as features for a map h (B, c, H, W): every position asks "which symbol is drawn here?".

    The answer is a softmax over the T symbols and "none". It starts as the symbols spread evenly over the width
    and learns from h where the captcha's layout really puts them. A vector h receives all symbols at once.
    """

    def __init__(self, c: int, size: Size, text_length: int, symbols: int):
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(symbols, c)
        if not size:
            self.flat = nn.Linear(text_length * c, c)
            return
        self.which = nn.Conv2d(c, text_length + 1, 1)
        column = (torch.arange(size[1]) + 0.5) / size[1] * text_length  # in symbols from the left
        distance = column - (torch.arange(text_length)[:, None] + 0.5)
        bias = torch.cat([-distance.square(), torch.full((1, size[1]), -2.0)])
        self.bias = nn.Parameter(bias[:, None].repeat(1, size[0], 1))  # (T+1, H, W)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        symbols = self.embedding(y)  # (B, T, c)
        if not self.size:
            return h + self.flat(symbols.flatten(1))
        share = (self.which(h) + self.bias).softmax(dim=1)[:, :-1]  # (B, T, H, W)
        return h + torch.einsum("bthw,btc->bchw", share, symbols.to(share.dtype))


class HVAE(nn.Module):
    """Hierarchical VAE. HVAE() is the architecture of checkpoints/hvae.pt.

    Args:
        outer_config: list of tuples that builds q(z_1|.); p(x|z) is its mirror.
        inner_config: list of such lists, one per level above the first; the number of levels is its length + 1.
        input_size, input_channels: of the images, (H, W) and C.
        latent_channels: channels of every latent, or one number per level from z_1 up.
        inference: 'top-down' (ladder) or 'bottom-up' (Markov chain).
        likelihood: 'gaussian', 'bernoulli' or 'logistic'.
        sigma: of the gaussian, for images in [-1, 1]; None learns it.
        mixtures: components of the logistic.
        neighbours: of the logistic, whether a pixel's distribution depends on the four before it too; see `Logistic`.
        flow: couplings of the flow that makes p(z_L) from N(0, I), for a z_L that is a vector; None is 24 for such a top
            of a ladder, and otherwise 0, which keeps N(0, I).
        text_length, charset: condition on texts of that length; text_length=None is the unconditional model.

    Raises:
        ValueError: naming the argument, or the block and layer of a config, that is at fault.
    """

    def __init__(
        self,
        outer_config: Sequence[tuple] = OUTER_CONFIG,
        inner_config: Sequence[Sequence[tuple]] = INNER_CONFIG,
        input_size: tuple[int, int] = (60, 160),
        input_channels: int = 3,
        latent_channels: int | Sequence[int] = LATENT_CHANNELS,
        inference: str = "top-down",
        likelihood: str = "gaussian",
        sigma: float | None = 0.4,
        mixtures: int = 1,
        neighbours: bool = False,
        flow: int | None = None,
        text_length: int | None = 4,
        charset: str = DIGITS + UPPERCASE,
    ):
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_arguments(**arguments)
        self.config = {name: plain(value) for name, value in arguments.items()}
        self.config.update(input_size=tuple(input_size), sigma=None if sigma is None else float(sigma))
        self.top_down = inference == "top-down"
        self.input_shape = (input_channels, *input_size)
        self.text_length, self.charset = text_length, self.config["charset"]
        self.likelihood, self.mixtures, self.neighbours = likelihood, mixtures, neighbours
        self.provenance: dict = {}  # where the weights come from; travels with save() and load()

        up, down = self.plan_blocks()
        widths = [block[-1].c_out for block in up]  # channels and size of the inference features d_1 ... d_L
        sizes = [block[-1].size_out for block in up]
        c_z = channels_per_level(latent_channels, len(up))
        L = len(up)
        couplings = check_flow(flow, c_z[-1], sizes[-1], by_default=self.top_down and L > 1)
        self.config["flow"] = couplings  # a file keeps its own, whatever the default becomes

        # inference[0] is the outer block, inference[l] leads from level l to level l+1, and generation[l] back
        self.inference = nn.ModuleList(Block(block) for block in up)
        self.generation = nn.ModuleList(Block(block) for block in down)
        self.levels = nn.ModuleList()
        for l in range(L):
            c_h = down[l + 1][-1].c_out if l + 1 < L else widths[l]
            c_out = down[l][0].c_in if down[l] else widths[l]
            self.levels.append(Level(widths[l], c_h, c_out, c_z[l], sizes[l], l + 1 == L, self.top_down,
                                     couplings if l + 1 == L else 0))
        if not self.top_down:  # the Markov chain reads z_l alone
            self.stems = nn.ModuleList(project(c_z[l], widths[l], sizes[l]) for l in range(L - 1))
        else:
            self.h_top = nn.Parameter(0.1 * torch.randn(1, widths[-1], *sizes[-1]))  # generation's first features
        if text_length is not None:
            text = lambda c, size: TextInput(c, size, text_length, len(charset))
            self.texts = nn.ModuleList(text(level.from_z.weight.shape[0], sizes[l]) for l, level in enumerate(self.levels))
            if self.top_down:
                self.text_top = text(widths[-1], sizes[-1])
        if likelihood == "gaussian":
            log_sigma = torch.tensor(math.log(0.5 if sigma is None else sigma))
            self.log_sigma = nn.Parameter(log_sigma, requires_grad=sigma is None)
        self.to(memory_format=torch.channels_last)  # convolutions are faster so, in sampling by a third

    def plan_blocks(self) -> tuple[list[list[Layer]], list[list[Layer]]]:
        """Plans of the inference blocks and of the generation blocks, level 1 first; also makes `to_image`."""
        config = self.config
        c, size = self.input_shape[0], self.input_shape[1:]
        up = [plan(config["outer_config"], c, size, "outer_config")]
        for i, block in enumerate(config["inner_config"]):
            up.append(plan(block, up[-1][-1].c_out, up[-1][-1].size_out, f"inner_config[{i}]"))

        outer = mirror(up[0])
        c_x = {"bernoulli": Bernoulli.channels, "gaussian": Gaussian.channels,
               "logistic": lambda c: Logistic.channels(c, self.mixtures, self.neighbours)}[self.likelihood](c)
        if outer[-1].kind == "convt":  # the mirror's last convolution yields p(x|z)'s parameters as they are
            last = outer.pop()
        else:
            last = Layer("convt", c, c, size, size)
        self.to_image = build(last._replace(c_out=c_x, bn=False))[0]
        # a block that keeps the size is its own mirror: both directions are built from the same list
        keeps_size = lambda block: block[0].size_in == block[-1].size_out != ()
        return up, [outer] + [block if keeps_size(block) else mirror(block) for block in up[1:]]

    # ---------------------------------------------------------------------------------------------- ELBO

    def forward(self, x: Tensor, y: Tensor | None = None, closed: Tensor | None = None, draws: int = 1) -> ELBO:
        """The ELBO's terms of images x (B, C, H, W) in [0, 1] with texts y (B, T), per draw of z: (B * draws, ...).

        The draws of an image are next to each other, and it is read only once for all of them. `closed` (B,) is for
        training: how many of an image's lowest levels do not see x but take their prior's mean.
        """
        p_x, levels = self.infer(x, y, closed, draws)
        with torch.autocast(x.device.type, enabled=False):
            log_p_x = p_x.log_prob(repeat(x.float(), draws))
            log_p = [p.log_prob(z) for _, p, z in levels]
            kl = torch.stack([self.kl(l, q, p, log_p[l]) for l, (q, p, _) in enumerate(levels)], dim=1)
            log_weight = log_p_x + sum(log_p) - sum(q.log_prob(z) for q, _, z in levels)
        return ELBO(-log_p_x, kl, log_p_x - kl.sum(1), log_weight, levels[-1][2])

    def kl(self, l: int, q: Normal, p: Normal | Flowed, log_p: Tensor) -> Tensor:
        """The KL term of levels[l], (B,) nats; log_p (B,) is log p at the z_l drawn.

        In the bottom-up chain p(z_l|z_{l+1}) depends on z_l itself, because z_{l+1} was drawn from it. The closed form
        would take the two for independent, so there log p is taken at the z_l drawn: unbiased, if noisier. A flow has
        no closed form either.
        """
        if isinstance(p, Normal) and (self.top_down or l + 1 == len(self.levels)):
            return kl_divergence(q, p)
        return -q.entropy() - log_p

    def infer(self, x: Tensor, y: Tensor | None = None, closed: Tensor | None = None, draws: int = 1,
              generator: torch.Generator | None = None):
        """q(z|x): returns p(x|z) and, per level from z_1 up, the triple (q, p, z) with z drawn from q."""
        self.check_images(x)
        y = None if y is None else repeat(y, draws)
        levels: list = [None] * len(self.levels)
        if not self.top_down:
            zs, qs = self.climb(x, draws, generator)
            p_x = self.generate(len(zs[0]), y, lambda l, p, h: self.record(levels, l, qs[l], p, zs[l]))
            return p_x, levels
        d, h = [], logits(x)  # the deterministic inference features d_1 ... d_L
        for block in self.inference:
            h = block(h)
            d.append(repeat(h, draws))

        def draw(l: int, p: Normal | Flowed, h: Tensor) -> Tensor:
            q = self.levels[l].posterior(d[l], h, p)
            z = q.sample(generator=generator)
            if closed is not None and isinstance(p, Normal):
                shut = (closed > l).view(-1, *[1] * (z.dim() - 1))
                q = Normal(torch.where(shut, p.mu, q.mu), torch.where(shut, p.logvar, q.logvar))
                z = torch.where(shut, p.mu, z)
            return self.record(levels, l, q, p, z)

        return self.generate(len(d[-1]), y, draw), levels

    def climb(self, x: Tensor, draws: int = 1,
              generator: torch.Generator | None = None) -> tuple[list[Tensor], list[Normal]]:
        """The bottom-up chain: z_1 ~ q(z_1|x), then z_{l+1} ~ q(z_{l+1}|z_l)."""
        zs, qs, h = [], [], repeat(self.inference[0](logits(x)), draws)
        for l, level in enumerate(self.levels):
            qs.append(level.q(h))
            zs.append(qs[-1].sample(generator=generator))
            if l < len(self.stems):
                h = self.inference[l + 1](self.stems[l](zs[-1]))
        return zs, qs

    @staticmethod
    def record(levels: list, l: int, q: Normal, p: Normal, z: Tensor) -> Tensor:
        levels[l] = (q, p, z)
        return z

    def generate(self, n: int, y: Tensor | None, choose: Callable[[int, Normal, Tensor], Tensor]):
        """The generation path from z_L down to p(x|z).

        `choose(l, p, h)` returns the z of levels[l], given its prior p and the generation features h: a draw from
        the posterior in training, from the prior in sampling.
        """
        self.check_text(n, y)
        top = self.levels[-1]
        if self.top_down:
            h = self.h_top.expand(n, *self.h_top.shape[1:])
            h = h if y is None else self.text_top(h, y)
        else:
            h = top.from_z.weight.new_zeros(n, 1)  # carries nothing but the batch size
        for l in reversed(range(len(self.levels))):
            level = self.levels[l]
            z = choose(l, level.prior(h), h)
            h = level.merge(h, z)
            h = h if y is None else self.texts[l](h, y)
            h = self.generation[l](h)
        with torch.autocast(h.device.type, enabled=False):  # the last convolution and the loss in full precision
            return self.make_likelihood(self.to_image(h.float()))

    def make_likelihood(self, parameters: Tensor) -> Bernoulli | Gaussian | Logistic:
        """p(x|z) from its parameter map."""
        if self.likelihood == "bernoulli":
            return Bernoulli(parameters)
        if self.likelihood == "gaussian":
            return Gaussian(parameters, self.log_sigma)
        return Logistic(parameters, self.input_shape[0], self.mixtures, self.neighbours)

    @torch.no_grad()
    def set_output_level(self, x: Tensor) -> None:
        """Starts p(x|z) at the mean of images x (B, C, H, W) instead of at grey: training begins sooner."""
        x = x[x.isfinite().flatten(1).all(1)]  # a broken image is for training to skip
        if len(x) == 0:
            return
        mean = x.mean((0, 2, 3)).clamp(0.01, 0.99)
        c = len(mean)
        if self.likelihood == "bernoulli":
            self.to_image.bias.copy_(mean.logit())
        elif self.likelihood == "gaussian":
            self.to_image.bias.copy_(2 * mean - 1)
        else:
            bias = self.to_image.bias[: Logistic.channels(c, self.mixtures)].view(self.mixtures, -1)
            bias[:, 1 : 1 + c] = logits(mean if self.mixtures == 1 else quantiles(x, self.mixtures))
            bias[:, 1 + c : 1 + 2 * c] = -1.5  # a scale that spans the differences between pixels
            bias[:, 1 + 2 * c :] = 0

    # ---------------------------------------------------------------------------------------------- use

    @torch.no_grad()
    def encode(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> list[Tensor]:
        """Latents [z_1 ... z_L] drawn from q(z|x): (B, c_z, H_l, W_l) each, or (B, c_z) after a 'dense'."""
        return [z for _, _, z in self.infer(x, y, generator=generator)[1]]

    def decode(self, latents: Sequence[Tensor], y: Tensor | None = None) -> Bernoulli | Gaussian | Logistic:
        """p(x|z) for latents [z_1 ... z_L]: `.parameters`, `.image` (B, C, H, W) in [0, 1], `.log_prob(x)`."""
        if len(latents) != len(self.levels):
            raise ValueError(f"expected {len(self.levels)} latents, got {len(latents)}")
        for l, (z, level) in enumerate(zip(latents, self.levels)):
            shape = (len(latents[0]), *level.shape)
            if tuple(z.shape) != shape:
                raise ValueError(f"z_{l + 1}: expected shape {shape}, got {tuple(z.shape)}")
        return self.generate(len(latents[0]), y, lambda l, p, h: latents[l])

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1] decoded from one draw of q(z|x)."""
        return self.infer(x, y, generator=generator)[0].image

    @torch.no_grad()
    def sample(self, n: int, text: str | Sequence[str] | None = None, temperature: float | Sequence[float] = 1.0,
               generator: torch.Generator | None = None) -> Tensor:
        """Draws n images (n, C, H, W) in [0, 1] from the prior; each is the mean of p(x|z).

        Computes in bfloat16 where the hardware has it.

        Args:
            text: one text for all images or a list of n; None draws one uniformly per image (if conditional).
            temperature: multiplies the noise of every prior (of a flow, the N(0, I) that it begins from), 0 leaves none;
                one number each, from z_1 up, treats the levels differently.
            generator: makes the draw repeatable.

        Raises:
            ValueError: n or a temperature is negative, there is another number of them, or the text does not fit the model.
        """
        y = self.draw_text(n, text, generator)
        T = per_level("temperature", temperature, len(self.levels))
        if n == 0:
            return self.to_image.weight.new_zeros(0, *self.input_shape)
        device = self.to_image.weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            return self.generate(n, y, lambda l, p, h: p.sample(T[l], generator)).image

    def draw_text(self, n: int, text: str | Sequence[str] | None = None,
                  generator: torch.Generator | None = None) -> Tensor | None:
        """Texts for n images as indices (n, T); None for an unconditional model."""
        if not whole(n, 0):
            raise ValueError(f"n must be a whole number >= 0, got {n!r}")
        if self.text_length is None:
            if text is not None:
                raise ValueError("this model is unconditional (text_length=None); it cannot draw a given text")
            return None
        device = self.to_image.weight.device
        if text is None:
            source = generator.device if generator else device
            return torch.randint(len(self.charset), (n, self.text_length), generator=generator, device=source).to(device)
        if not isinstance(text, (str, list, tuple)):
            raise ValueError(f"text: expected a string, or a list of one per image, got {type(text).__name__}")
        texts = [text] * n if isinstance(text, str) else list(text)
        if len(texts) != n:
            raise ValueError(f"got {len(texts)} texts for {n} images")
        for t in texts:
            if not isinstance(t, str) or len(t) != self.text_length or not set(t) <= set(self.charset):
                raise ValueError(f"text {t!r}: expected {self.text_length} symbols of {self.charset}")
        indices = [[self.charset.index(symbol) for symbol in t] for t in texts]
        return torch.tensor(indices, dtype=torch.long, device=device).view(n, self.text_length)

    # ---------------------------------------------------------------------------------------------- checks, files

    def check_images(self, x: Tensor) -> None:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(f"expected images (B, {', '.join(map(str, self.input_shape))}), got {tuple(x.shape)}")

    def check_text(self, n: int, y: Tensor | None) -> None:
        if self.text_length is None:
            if y is not None:
                raise ValueError("this model is unconditional (text_length=None): y must be None")
        elif y is None:
            raise ValueError(f"this model is conditional on a text: pass y, indices (B, {self.text_length}) into its charset")
        elif tuple(y.shape) != (n, self.text_length) or y.dtype != torch.long:
            raise ValueError(f"expected y as int64 ({n}, {self.text_length}), got {y.dtype} {tuple(y.shape)}")
        elif n and not (0 <= int(y.min()) and int(y.max()) < len(self.charset)):
            raise ValueError(f"y has indices outside the charset's 0..{len(self.charset) - 1}")

    def save(self, path: str | Path, half: bool = False) -> None:
        """Writes config, weights and provenance into one file; half rounds the matrices to float16, for half the size.

        Numbers and vectors stay as they are: they take no space, and sigma counts once for every pixel.

        Raises:
            ValueError: the provenance holds something that load() would not read.
        """
        if not is_plain(self.provenance):
            raise ValueError("provenance: only numbers, strings, lists and dicts of them can be kept in a file")
        weights = {k: v.detach().cpu() for k, v in self.state_dict().items()}
        if half:
            weights = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in weights.items()}
        content = {"config": self.config, "weights": weights, "provenance": self.provenance}
        torch.save({"format": "hvae-1", **content, "checksum": checksum(**content)}, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None) -> "HVAE":
        """Reads a file written by save(), in eval mode. Runs no code from the file (weights_only).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: naming the file and what is wrong with it.
        """
        config, weights, provenance = read_checkpoint(Path(path))
        try:
            model = cls.build({"flow": 0, **config}, weights)  # files from before there were flows lack it
        except (AttributeError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: its config and weights do not fit this version: {reason[:160]}") from None
        model.provenance = provenance
        return model.to(pick_device(device or "cpu")).eval()

    @classmethod
    def build(cls, config: dict, weights: dict[str, Tensor]) -> "HVAE":
        """A model with these weights. Takes memory for no more than those: shapes are compared before it is built.

        Raises:
            ValueError: config and weights do not fit each other.
        """
        outer, inner = config.get("outer_config", ()), config.get("inner_config", ())
        layers = sum(map(len, [outer, inner, *inner]))
        if layers > 10 * len(weights) or isinstance(config["flow"], int) and config["flow"] > len(weights):
            raise ValueError("the config has more layers than its weights are for")
        shapes = lambda state: {name: tuple(weight.shape) for name, weight in state.items()}
        with torch.device("meta"):
            ours, theirs = shapes(cls(**config).state_dict()), shapes(weights)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise ValueError(f"{name} is {theirs.get(name)} in the file, {ours.get(name)} in the model")
        model = cls(**config)
        model.load_state_dict(weights)
        flow = model.levels[-1].flow
        if flow is not None and not (flow.order.sort().values == torch.arange(flow.order.shape[1])).all():
            raise ValueError("the order of its flow is not a permutation")
        return model

    def summary(self) -> str:
        """The levels, their sizes and parameter counts, top first, and the outer block in both directions."""
        count = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())
        rows = [("", "latent", "values", "inference block", "generation block", "parameters")]
        for l in reversed(range(len(self.levels))):
            level = self.levels[l]
            shape = "x".join(map(str, level.shape))
            rows.append((f"z_{l + 1}", shape, str(pixels(level.shape)), brief(self.inference[l]), brief(self.generation[l]),
                         f"{count(self.inference[l], self.generation[l], level):,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        text = f"texts of {self.text_length} from {len(self.charset)} symbols" if self.text_length else "no text"
        c, h, w = self.input_shape
        couplings = len(self.levels[-1].flow.couplings) if self.levels[-1].flow else 0
        prior = f"p(z_{len(self.levels)}) a flow of {couplings} couplings, " if couplings else ""
        head = (f"HVAE, {len(self.levels)} levels, {self.config['inference']}, {self.likelihood}, images {c}x{h}x{w}, "
                f"{text}, {prior}{count(self):,} parameters")
        return "\n".join([head, *lines])


def repeat(x: Tensor, draws: int) -> Tensor:
    """(B, ...) -> (B * draws, ...): each row that many times, one after the other."""
    return x if draws == 1 else x.repeat_interleave(draws, 0)  # which copies, and forgets channels_last


def quantiles(x: Tensor, n: int) -> Tensor:
    """(n, C): values of each channel of images x that part its pixels into n classes of equal size, in their middles."""
    values = x.transpose(0, 1).flatten(1).sort(dim=1).values
    return values[:, [int((k + 0.5) / n * values.shape[1]) for k in range(n)]].T


def read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor], dict]:
    """Config, weights and provenance, as HVAE.save() wrote them; takes little more memory than the file's size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > size:
            raise ValueError("compressed")  # torch.save never does that, and who knows how much there is in it
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways, an unsafe one with UnpicklingError
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.get("format") != "hvae-1":
        raise ValueError(f"{path}: not an HVAE checkpoint (no format 'hvae-1' in it)")
    missing = {"config", "weights", "checksum"} - set(content)
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}")
    config, weights, provenance = content["config"], content["weights"], content.get("provenance", {})
    try:
        counts = [provenance.get(name, 0) for name in ("steps", "images_seen", "seconds")]
        sound = (is_plain((config, provenance)) and all(isinstance(count, Real) for count in counts)
                 and sum(weight.numel() * weight.element_size() for weight in weights.values()) <= size
                 and content["checksum"] == checksum(config, weights, provenance))
        broken = [name for name, weight in weights.items() if sound and not weight.float().isfinite().all()]
    except (AttributeError, TypeError, ValueError, RuntimeError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: damaged, its checksum is wrong")
    if broken:
        raise ValueError(f"{path}: not all numbers in {broken[0]} are finite")
    return config, weights, provenance


def checksum(config: dict, weights: dict[str, Tensor], provenance: dict) -> str:
    """Of everything in a checkpoint: torch.load does not notice a flipped bit."""
    digest = hashlib.sha256(repr((config, provenance)).encode())
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; None is CUDA if there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(name)!r} is not available: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError("device 'meta' holds no numbers")
    return device


def out_of_memory(error: Exception) -> bool:
    """Whether that is what an error says; torch has a type for it on GPUs alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "alloc" in str(error)


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here: on a GPU that has it, or a CPU with its instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def keep_memory() -> None:
    """Lets this process keep up to 1 GiB of what it frees, where the C library is glibc.

    By its defaults large tensors go back to the kernel as soon as they are freed, and the next step waits for new,
    zeroed pages: a third of a training step on the CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, 1 << 30)


def brief(block: Block) -> str:
    """A block in a few words: 'conv 32, pool 2' (channels after each layer, or its factor or index)."""
    number = lambda layer: layer.arg if layer.kind in ("pool", "upsample", "skip-up", "skip-down") else layer.c_out
    stride = lambda layer: f"/{layer.arg}" if layer.kind in ("conv", "convt") and layer.arg > 1 else ""
    return ", ".join(f"{layer.kind}{'-bn' * layer.bn} {number(layer)}{stride(layer)}" for layer in block.plan)


def plain(config):
    """A config as lists of tuples of plain values, whatever sequences and kinds of numbers and strings it came in."""
    if isinstance(config, (list, tuple)):
        values = map(plain, config)
        return tuple(values) if config and isinstance(config[0], str) else list(values)
    kind = next((kind for kind in (bool, str, int, float) if isinstance(config, kind)), None)
    return kind(config) if kind else config


def is_plain(value, most: int = 1_000_000) -> bool:
    """Whether a value is made of numbers, strings, lists, tuples and dicts alone, and of at most so many and characters."""
    found, rest = 0, [value]
    while rest and found <= most:
        part = rest.pop()
        found += 1 + (len(part) if type(part) is str else 0)
        if type(part) in (list, tuple):
            rest.extend(part)
        elif type(part) is dict:
            rest.extend([*part.keys(), *part.values()])
        elif type(part) not in (str, int, float, bool, type(None)):
            return False
    return found <= most


def channels_per_level(latent_channels: int | Sequence[int], levels: int) -> list[int]:
    channels = list(latent_channels) if isinstance(latent_channels, (list, tuple)) else [latent_channels] * levels
    if len(channels) != levels or not all(whole(c, 1) for c in channels):
        raise ValueError(f"latent_channels: expected a positive number, or {levels} (one per level), got {latent_channels!r}")
    return channels


def lower_half(levels: int) -> int:
    """How many levels, rounded up and without the top, training closes and sampling draws warm for texture."""
    return min((levels + 1) // 2, levels - 1)


def per_level(name: str, value: float | Sequence[float], levels: int) -> list[float]:
    """A number >= 0 for every level, from z_1 up, of one for all or of one each."""
    each = list(value) if isinstance(value, (list, tuple)) else [value]
    each = each * levels if len(each) == 1 else each
    if len(each) != levels or not all(isinstance(n, Real) and 0 <= n < math.inf for n in each):
        raise ValueError(f"{name}: expected a number >= 0, or {levels} (one per level), got {value!r}")
    return [float(n) for n in each]


def check_flow(flow: int | None, c_z: int, size: Size, by_default: bool) -> int:
    """The number of couplings of p(z_L)'s flow."""
    possible = not size and c_z > 1
    if flow is None:
        return 24 if possible and by_default else 0
    if not whole(flow, 0) or flow > MOST_COUPLINGS:
        raise ValueError(f"flow: expected a whole number from 0 to {MOST_COUPLINGS} or None, got {flow!r}")
    if flow and not possible:
        raise ValueError(f"flow={flow}: needs a z_L that is a vector of two numbers or more; end the last block with 'dense'")
    return flow


def check_arguments(outer_config, inner_config, input_size, input_channels, latent_channels, inference, likelihood,
                    sigma, mixtures, neighbours, flow, text_length, charset) -> None:
    """Raises ValueError naming the first argument that cannot be right; the configs are checked by plan()."""
    positive = lambda n: whole(n, 1)
    if not (isinstance(input_size, (tuple, list)) and len(input_size) == 2 and all(map(positive, input_size))):
        raise ValueError(f"input_size: expected (height, width), got {input_size!r}")
    if pixels(input_size) > MOST_PIXELS:
        raise ValueError(f"input_size: {input_size[0]}x{input_size[1]} has more than {MOST_PIXELS:,} pixels")
    if not isinstance(inner_config, (list, tuple)):
        raise ValueError(f"inner_config: expected a list of lists of tuples, got {inner_config!r}")
    for name, n in [("input_channels", input_channels), ("mixtures", mixtures)]:
        if not positive(n):
            raise ValueError(f"{name}: expected a positive whole number, got {n!r}")
    if inference not in ("top-down", "bottom-up"):
        raise ValueError(f"inference: expected 'top-down' or 'bottom-up', got {inference!r}")
    if likelihood not in ("gaussian", "bernoulli", "logistic"):
        raise ValueError(f"likelihood: expected 'gaussian', 'bernoulli' or 'logistic', got {likelihood!r}")
    if not isinstance(neighbours, bool) or neighbours and likelihood != "logistic":
        raise ValueError(f"neighbours: expected True or False, True with likelihood='logistic' alone, got {neighbours!r}")
    if sigma is not None and not (isinstance(sigma, (int, float)) and 0 < sigma < 1e30):
        raise ValueError(f"sigma: expected a positive number or None, got {sigma!r}")
    if text_length is not None and not positive(text_length):
        raise ValueError(f"text_length: expected a positive whole number or None, got {text_length!r}")
    if text_length is not None and (not isinstance(charset, str) or not charset or len(set(charset)) != len(charset)):
        raise ValueError(f"charset: expected a string of different symbols, got {charset!r}")

"""HVAE: a hierarchical variational autoencoder with L latent levels, z_1 nearest the image.

    "top-down", a ladder    p(x, z) = p(x | z_{1..L}) prod_{l<L} p(z_l | z_{l+1..L}) p(z_L)
                            q(z|x)  = q(z_L|x) prod_{l<L} q(z_l | z_{l+1..L}, x)
    "bottom-up", a chain    p(x, z) = p(x | z_1) prod_{l<L} p(z_l | z_{l+1}) p(z_L)
                            q(z|x)  = q(z_1|x) prod_{l<L} q(z_{l+1} | z_l)

    -ELBO = reconstruction  -E log p(x|z)
          + prior matching   KL(q(z_L|.) || p(z_L))      p(z_L): N(0, I), a flow, or a window
          + consistency      sum_{l<L} KL(q(z_l|.) || p(z_l|.))     all in nats per image

    With a context and 8-bit images, p(x|z) stands for p(x, c|z) <= p(x|z), see hvae/palette.py.

Names: x (B, C, H, W) images in [0, 1]; y (B, T) their texts as indices; d_l the features of a level
on the way up (inference), h_l on the way down (generation), (B, c, H_l, W_l) or (B, c); z_l its
latents. The index of a level is l - 1: `levels[0]` holds z_1.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvae.arguments import channels_per_level, flow_couplings, plain, validate_arguments
from hvae.blocks import (
    Block,
    ConvTranspose,
    Layer,
    Res,
    Size,
    group_norm,
    mirror,
    plan,
    project,
)
from hvae.checkpoint import load_checkpoint, write_tensors
from hvae.context import ContextNetwork, Pixels
from hvae.distributions import (
    LIKELIHOODS,
    Bernoulli,
    DiagonalGaussian,
    Flow,
    FlowPrior,
    Gaussian,
    Logistic,
    kl_divergence,
    logits,
)
from hvae.parallel import has_bf16, pick_device
from hvae.prior import WindowNetwork, WindowPrior
from hvae.text import DIGITS, UPPERCASE, encode_text, match_case, possible_lengths, span
from hvae.validate import InputError, validate_int, validate_number

# The shipped checkpoint: a vector for global properties, a 4x10 map for the layout, three
# 8x20 maps for the strokes. Its latents have 64, 8 and three times 4 channels: latent_width().
OUTER_CONFIG = [("conv", 32, 2), ("conv", 64, 2), ("res", 64), ("conv", 128, 2), ("res", 128)]
INNER_CONFIG = [[("res", 128)], [("res", 128)], [("conv", 128, 2), ("res", 128)], [("dense", 128)]]

# The windows of models that were saved before there were any, see load().
WITHOUT_WINDOWS = {"context": None, "prior_context": None}
BINARY_DIGITS = dict(
    WITHOUT_WINDOWS,
    input_size=(28, 28),
    input_channels=1,
    likelihood="bernoulli",
    text_length=None,
)
CONFIGS = {
    "captcha": {},
    # the flat VAE of many a first course: three convolutions, a dense layer, a latent plane
    "mnist-vae": dict(
        outer_config=[("conv", 32), ("conv", 32), ("conv", 64, 2), ("dense", 128)],
        inner_config=[],
        latent_channels=2,
        inference="bottom-up",
        **BINARY_DIGITS,
    ),
    "mnist-hvae": dict(
        BINARY_DIGITS,
        outer_config=[("conv", 24), ("res", 24), ("conv", 48, 2), ("res", 48)],
        inner_config=[
            [("conv", 64, 2), ("res", 64)],
            *[[("res", 64)]] * 4,
            [("conv", 64, 2), ("dense", 128)],
        ],
        latent_channels=(2, 4, 4, 4, 4, 4, 32),
        flow=6,
        context=(3, 3),
    ),
}

Prior = DiagonalGaussian | FlowPrior | WindowPrior
ImageDistribution = Bernoulli | Gaussian | Logistic | Pixels


class ELBOTerms(NamedTuple):
    """The terms of the evidence lower bound, in nats: a row for each image and draw of z."""

    reconstruction: Tensor  # (B,)    -log p(x|z)
    kl: Tensor  # (B, L)  KL(q(z_l|.) || p(z_l|.)), column l-1 for z_l
    elbo: Tensor  # (B,)    -(reconstruction + sum of kl); its mean <= log p(x)
    log_weight: Tensor  # (B,)    log p(x, z) - log q(z|x) of the z drawn; its mean is the ELBO too
    z_top: Tensor  # the draw of z_L
    guess: Tensor | None = None  # (B,) -log p(x) by z's guess alone, of training with a context


class LevelTerms(NamedTuple):
    """One level, inferred: posterior, prior, a draw z from q, log p(z) and KL(q || p), (B,)."""

    q: DiagonalGaussian
    p: Prior
    z: Tensor
    log_p: Tensor
    kl: Tensor


class Head(nn.Module):
    """Features (B, c_in, *size) -> the Gaussian of a latent (B, c_z, *size), in float32.

    At the start mu is random, of size about scale / 5, and logvar is near the number given.
    """

    def __init__(self, c_in: int, c: int, c_z: int, size: Size, logvar: float, scale: float = 1.0):
        super().__init__()
        self.norm = group_norm(1, c_in, size)  # without it the KL can explode in the first steps
        self.hidden = project(c_in, c, size)
        self.out = project(c, 2 * c_z, size)
        with torch.no_grad():
            self.out.weight *= scale
            self.out.bias.zero_()[c_z:] += logvar

    def forward(self, h: Tensor) -> DiagonalGaussian:
        mu, logvar = self.out(F.silu(self.hidden(self.norm(h)))).float().chunk(2, dim=1)
        return DiagonalGaussian(mu, logvar.clamp(-8, 4))


class TextInput(nn.Module):
    """Adds the text y (B, T) to a map h (B, c, H, W): each position asks which symbol is there.

    The answer is a softmax over the T symbols and "none". It starts as the symbols spread evenly
    over the width, and learns from h where the captcha has them. A vector h (B, c) receives all
    symbols at once. A blank, the index `symbols`, adds nothing.
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
        symbols = F.embedding(y, F.pad(self.embedding.weight, (0, 0, 0, 1)))  # (B, T, c)
        if not self.size:
            return h + self.flat(symbols.flatten(1))
        share = (self.which(h) + self.bias).softmax(dim=1)[:, :-1]  # (B, T, H, W)
        return h + torch.einsum("bthw,btc->bchw", share, symbols.to(share.dtype))


class PriorFeatures(nn.Module):
    """Prepares h (B, c, H, W) for the window of a map directly below a vector.

    Such an h comes from the vector by a linear layer: no convolution has mixed neighbours, and the
    text is spread over all positions. Here each position attends to the text once more, and a
    residual block mixes neighbours.
    """

    def __init__(self, c: int, size: Size, text_length: int | None, symbols: int):
        super().__init__()
        self.text = None if text_length is None else TextInput(c, size, text_length, symbols)
        self.res = Res(c, c, size)

    def forward(self, h: Tensor, y: Tensor | None) -> Tensor:
        return self.res(h if self.text is None else self.text(h, y))


class Level(nn.Module):
    """The latent z_l: its prior p, its posterior q, and its way into the generation path.

    d are the inference features (B, c, *size), h the generation features (B, c_h, *size), and
    merge() gives (B, c_out, *size). The prior may be a flow, at the top only, or have a window, if
    it is a map. The window of a map directly below a vector reads PriorFeatures instead of h.
    """

    def __init__(
        self,
        c: int,
        c_h: int,
        c_out: int,
        shape: tuple[int, ...],
        top: bool,
        top_down: bool,
        window: WindowNetwork | None = None,
        prior_features: PriorFeatures | None = None,
        flow: Flow | None = None,
    ):
        super().__init__()
        c_z, *size = self.shape = shape
        self.c_out, self.top_down = c_out, top_down
        self.p = None if top else Head(c_h, c_h, c_z, size, logvar=0.0)
        # at the start z must exceed its sampling noise, or the decoder learns to ignore it
        self.q = Head(c + c_h if top_down else c, c, c_z, size, logvar=-3.0, scale=3.0)
        self.from_z = project(c_z, c_out, size)
        if top_down:
            self.from_h = nn.Identity() if c_h == c_out else project(c_h, c_out, size)
        # keep these last: a run's state lists the optimizers' moments in the order of parameters
        self.window, self.prior_features, self.flow = window, prior_features, flow

    def prior(self, h: Tensor, y: Tensor | None = None) -> Prior:
        """p(z_l | z_{l+1..L}, y). At the top h gives only the batch size, if there is no window."""
        if self.p is None:
            zeros = torch.zeros(len(h), *self.shape, device=h.device)
            p = DiagonalGaussian(zeros, zeros)
        else:
            p = self.p(h)
            # a variance from e^-2 to e^2: with a smaller one, KLs can explode
            p = DiagonalGaussian(p.mu, 2 * torch.tanh(p.logvar / 2))
        if self.flow is not None:
            return FlowPrior(p, self.flow)
        if self.window is None:
            return p
        h = h if self.prior_features is None else self.prior_features(h, y)
        return WindowPrior(p, self.window, h)

    def posterior(self, d: Tensor, h: Tensor, p: Prior) -> DiagonalGaussian:
        """q(z_l | z_{l+1..L}, x): what d and h say about z_l, times the prior, normalised.

        The ladder's precision-weighted product of two Gaussians (Sonderby et al. 2016, eq. 17-18):
        the features act as a noisy observation of z_l, so the posterior has a direct gradient to
        the prior's mean. If the prior is a flow or has a window, this is its base Gaussian.
        """
        base, evidence = p.base, self.q(torch.cat([d, h], dim=1))
        gap = base.logvar - evidence.logvar
        weight = torch.sigmoid(gap)  # the evidence's share of the precision
        mu = base.mu + weight * (evidence.mu - base.mu)
        return DiagonalGaussian(mu, evidence.logvar + F.logsigmoid(gap))

    def merge(self, h: Tensor, z: Tensor) -> Tensor:
        """z as features, plus those from above if top-down: (B, c_out, *size)."""
        z = F.silu(self.from_z(z))
        return z + self.from_h(h) if self.top_down else z


class HVAE(nn.Module):
    """Hierarchical VAE. HVAE() is the architecture of checkpoints/hvae.pt.

    Args:
        outer_config: list of tuples that builds q(z_1|.); p(x|z) is its mirror.
        inner_config: list of such lists, one for each level above the first.
        input_size, input_channels: of the images, (H, W) and C.
        latent_channels: of all latents, or one number for each level, z_1 first; None is
            `latent_width` of each level.
        inference: 'top-down' (ladder) or 'bottom-up' (Markov chain).
        likelihood: 'logistic' for 8-bit images, 'bernoulli' for binary ones, or 'gaussian'.
        context: (rows, columns) of the window of earlier pixels that p(x_i | z, window) sees, see
            hvae/context.py; None: pixels are independent given z. A 'gaussian' needs None.
        prior_context: the same for the priors of latent maps, except a chain's z_L, see
            hvae/prior.py; None: positions are independent given the levels above.
        mixtures: components of the logistic.
        sigma: of the gaussian, for images in [-1, 1]; None learns it.
        flow: couplings of the flow that makes p(z_L) from N(0, I), for a z_L that is a vector; 0 is
            N(0, I) itself. None: 24 for such a top of a ladder of several levels, otherwise 0.
        text_length, charset: condition on texts of at most that length; None is the unconditional
            model.
        lengths: relative frequencies of texts of 1 ... text_length symbols; None: all are longest.

    Raises:
        ValueError: naming the argument, or the block and layer of a config, that is at fault.
    """

    def __init__(
        self,
        outer_config: Sequence[tuple] = OUTER_CONFIG,
        inner_config: Sequence[Sequence[tuple]] = INNER_CONFIG,
        input_size: tuple[int, int] = (60, 160),
        input_channels: int = 3,
        latent_channels: int | Sequence[int] | None = None,
        inference: str = "top-down",
        likelihood: str = "logistic",
        context: tuple[int, int] | None = (3, 3),
        prior_context: tuple[int, int] | None = (3, 3),
        mixtures: int = 6,
        sigma: float | None = 0.4,
        flow: int | None = None,
        text_length: int | None = 4,
        lengths: Sequence[float] | None = None,
        charset: str = DIGITS + UPPERCASE,
    ):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        validate_arguments(**arguments)
        super().__init__()
        self.config = {name: plain(value) for name, value in arguments.items()}
        self.top_down = inference == "top-down"
        self.input_shape = (input_channels, *input_size)
        self.text_length, self.charset = text_length, charset
        self.lengths = None if text_length is None else self.config["lengths"]
        self.provenance: dict = {}  # where the weights come from; save() and load() keep it

        up, down, to_image = self.plan_blocks()
        L = len(up)
        widths = [block[-1].c_out for block in up]  # of the inference features d_1 ... d_L
        sizes = [block[-1].size_out for block in up]
        c_z = self.config["latent_channels"] = channels_per_level(latent_channels, widths, sizes)
        # inference[0] is the outer block, inference[l] leads from level l to level l+1, and
        # generation[l] leads back
        self.inference = nn.ModuleList(Block(block) for block in up)
        self.generation = nn.ModuleList(Block(block) for block in down)
        self.to_image = ConvTranspose(to_image)
        nn.init.zeros_(self.to_image.bias)
        self.add_levels(widths, sizes, down)
        if self.top_down:  # generation's first features
            self.h_top = nn.Parameter(0.1 * torch.randn(1, widths[-1], *sizes[-1]))
        else:  # inference reads z_l, not features
            self.stems = nn.ModuleList(project(c_z[l], widths[l], sizes[l]) for l in range(L - 1))
        if text_length is not None:  # it enters after each z_l, and in a ladder's first features
            text = lambda c, size: TextInput(c, size, text_length, len(charset))
            self.texts = nn.ModuleList(map(text, [level.c_out for level in self.levels], sizes))
            if self.top_down:
                self.text_top = text(widths[-1], sizes[-1])
        self.context = None
        if context is not None:
            self.context = ContextNetwork(input_channels, context, mixtures, likelihood)
        if likelihood == "gaussian":
            log_sigma = torch.tensor(math.log(0.5 if sigma is None else sigma))
            self.log_sigma = nn.Parameter(log_sigma, requires_grad=sigma is None)
        self.to(memory_format=torch.channels_last)  # convolutions are faster, sampling by a third

    def add_levels(
        self, widths: Sequence[int], sizes: Sequence[Size], down: Sequence[Sequence[Layer]]
    ) -> None:
        """The latents z_1 ... z_L, with the windows, their features and the flow of the priors."""
        L, c_z = len(widths), self.config["latent_channels"]
        prior_context = self.config["prior_context"]
        couplings = flow_couplings(self.config["flow"], c_z[-1], sizes[-1], self.top_down and L > 1)
        self.config["flow"] = couplings
        self.levels = nn.ModuleList()
        for l in range(L):
            top = l + 1 == L
            c_h = widths[l] if top else down[l + 1][-1].c_out
            c_out = down[l][0].c_in if down[l] else widths[l]
            window = features = flow = None
            if top and couplings:
                flow = Flow(c_z[l], couplings)
            has_earlier = math.prod(sizes[l]) > 1  # positions of the map
            if prior_context and has_earlier and (self.top_down or not top):
                window = WindowNetwork(c_z[l], c_h, prior_context)
                if not top and not sizes[l + 1]:
                    features = PriorFeatures(c_h, sizes[l], self.text_length, len(self.charset))
            shape = (c_z[l], *sizes[l])
            level = Level(widths[l], c_h, c_out, shape, top, self.top_down, window, features, flow)
            self.levels.append(level)

    def plan_blocks(self) -> tuple[list[list[Layer]], list[list[Layer]], Layer]:
        """Plans of the inference and generation blocks, level 1 first, and of the output map."""
        config = self.config
        c, *size = self.input_shape
        up = [plan(config["outer_config"], c, tuple(size), "outer_config")]
        for i, block in enumerate(config["inner_config"]):
            up.append(plan(block, up[-1][-1].c_out, up[-1][-1].size_out, f"inner_config[{i}]"))

        outer = mirror(up[0])
        if outer[-1].kind == "convt":  # the mirror's last convolution gives p(x|z)'s parameters
            last = outer.pop()
        else:
            last = Layer("convt", c, c, tuple(size), tuple(size))
        if config["context"]:
            c_out = ContextNetwork.features
        elif config["likelihood"] == "logistic":
            c_out = Logistic.channels(c, config["mixtures"])
        else:
            c_out = c
        # a block that keeps the size is its own mirror: both directions are built from one list
        keeps_size = lambda block: block[0].size_in == block[-1].size_out != ()
        inner = [block if keeps_size(block) else mirror(block) for block in up[1:]]
        return up, [outer, *inner], last._replace(c_out=c_out, bn=False)

    @property
    def possible_lengths(self) -> list[int]:
        """The numbers of symbols that a text may have."""
        if self.lengths is None:
            return [self.text_length]
        return possible_lengths(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.to_image.weight.device

    @property
    def binarised(self) -> bool:
        """Whether the weights were trained on pixels drawn as 0 or 1."""
        return bool(self.provenance.get("binarised", False))

    # ------------------------------------------------------------------------ ELBO

    def forward(
        self, x: Tensor, y: Tensor | None = None, closed: Tensor | None = None, draws: int = 1
    ) -> ELBOTerms:
        """The ELBO's terms of images x (B, C, H, W) in [0, 1] with texts y (B, T).

        There is one row for each draw of z, B * draws in all; the draws of an image are next to
        each other. For `closed` see infer().
        """
        p_x, levels = self.infer(x, y, closed, draws)
        images, guess = repeat(x.float(), draws), None
        if self.training and self.context is not None:
            log_p_x = p_x.estimate(images)
            guess = -p_x.guess.log_prob(images)
        else:
            log_p_x = p_x.log_prob(images)
        with torch.autocast(x.device.type, enabled=False):
            log_p_z = sum(level.log_p for level in levels)
            log_q_z = sum(level.q.log_prob(level.z) for level in levels)
        kl = torch.stack([level.kl for level in levels], dim=1)
        log_weight = log_p_x + log_p_z - log_q_z
        return ELBOTerms(-log_p_x, kl, log_p_x - kl.sum(1), log_weight, levels[-1].z, guess)

    def infer(
        self,
        x: Tensor,
        y: Tensor | None = None,
        closed: Tensor | None = None,
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> tuple[ImageDistribution, list[LevelTerms]]:
        """Draws z ~ q(z|x); returns p(x|z) and the terms of each level, z_1 first.

        `closed` (B,) is for training: how many of an image's lowest levels do not see x, but take
        the mean of their prior's base Gaussian.
        """
        self.check_images(x)
        y = None if y is None else repeat(y, draws)
        if self.top_down:
            d = self.features(x, draws)
        else:
            drawn = self.chain(x, draws, generator)
        terms: list[LevelTerms] = []
        h = self.start(len(x) * draws, y)
        for l in reversed(range(len(self.levels))):
            level = self.levels[l]
            p = level.prior(h, y)
            if self.top_down:
                q = level.posterior(d[l], h, p)
                z = q.sample(generator=generator)
            else:
                q, z = drawn[l]
            if closed is not None:
                q, z = use_prior_mean(q, p.base, z, is_closed=closed > l)
            log_p = p.log_prob(z)
            terms.insert(0, LevelTerms(q, p, z, log_p, self.kl_term(l, q, p, log_p)))
            h = self.descend(l, h, z, y)
        return self.image_distribution(h), terms

    def features(self, x: Tensor, draws: int) -> list[Tensor]:
        """The ladder's deterministic way up: d_1 ... d_L."""
        d, h = [], logits(x)
        for block in self.inference:
            h = block(h)
            d.append(repeat(h, draws))
        return d

    def chain(
        self, x: Tensor, draws: int, generator: torch.Generator | None
    ) -> list[tuple[DiagonalGaussian, Tensor]]:
        """The Markov chain's way up: z_1 ~ q(z_1|x), then z_{l+1} ~ q(z_{l+1}|z_l)."""
        drawn, h = [], repeat(self.inference[0](logits(x)), draws)
        for l, level in enumerate(self.levels):
            if l > 0:
                h = self.inference[l](self.stems[l - 1](drawn[-1][1]))
            q = level.q(h)
            z = q.sample(generator=generator)
            drawn.append((q, z))
        return drawn

    def kl_term(self, l: int, q: DiagonalGaussian, p: Prior, log_p: Tensor) -> Tensor:
        """The KL term of a level, (B,) nats: in closed form, or as -H(q) - log p(z_l).

        In the chain z_{l+1} was drawn given z_l. The closed form, which averages over z_l for a
        fixed z_{l+1}, would be biased; log p at the z_l drawn is not, but noisier. A flow and a
        window have no closed form.
        """
        if isinstance(p, DiagonalGaussian) and (self.top_down or l + 1 == len(self.levels)):
            return kl_divergence(q, p)
        return -q.entropy() - log_p

    # ------------------------------------------------------------------------ generation

    def generate(
        self,
        n: int,
        y: Tensor | None = None,
        latents: Sequence[Tensor | None] | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> ImageDistribution:
        """p(x|z) for n images; z_l is latents[l - 1], or a draw from its prior if that is None."""
        h = self.start(n, y)
        for l in reversed(range(len(self.levels))):
            z = None if latents is None else latents[l]
            if z is None:
                z = self.levels[l].prior(h, y).sample(temperature, generator)
            h = self.descend(l, h, z, y)
        return self.image_distribution(h)

    def start(self, n: int, y: Tensor | None) -> Tensor:
        """Generation's first features, above z_L; in the chain they carry only the number n."""
        self.check_text(n, y)
        if not self.top_down:
            return torch.zeros(n, 1, device=self.device)
        h = self.h_top.expand(n, *self.h_top.shape[1:])
        return h if y is None else self.text_top(h, y)

    def descend(self, l: int, h: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        """Takes z_l and the text into the generation features, down to the next level."""
        h = self.levels[l].merge(h, z)
        h = h if y is None else self.texts[l](h, y)
        return self.generation[l](h)

    def picture(self, p_x: ImageDistribution, generator: torch.Generator | None = None) -> Tensor:
        """What is shown of p(x|z), (B, C, H, W) in [0, 1]: a draw, or without a context the mean.

        Draws of independent pixels would only be noisy.
        """
        return p_x.sample(generator) if self.context is not None else p_x.image

    def image_distribution(self, h: Tensor) -> ImageDistribution:
        """p(x|z) from the last features, without a context in full precision."""
        if self.context is not None:
            return self.context(self.to_image(h))
        with torch.autocast(h.device.type, enabled=False):
            parameters = self.to_image(h.float())
            if self.config["likelihood"] == "gaussian":
                return Gaussian(parameters, self.log_sigma)
            if self.config["likelihood"] == "logistic":
                return Logistic(parameters, self.input_shape[0], self.config["mixtures"])
            return Bernoulli(parameters)

    # ------------------------------------------------------------------------ use

    @torch.no_grad()
    def encode(
        self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Latents [z_1 ... z_L] ~ q(z|x): (B, c_z, H_l, W_l) each, or (B, c_z) after a 'dense'."""
        return [level.z for level in self.infer(x, y, generator=generator)[1]]

    def decode(self, latents: Sequence[Tensor], y: Tensor | None = None) -> ImageDistribution:
        """p(x|z) for latents [z_1 ... z_L]: `.image` (B, C, H, W) in [0, 1], `.log_prob(x)`."""
        if len(latents) != len(self.levels):
            raise InputError(f"expected {len(self.levels)} latents, got {len(latents)}")
        for l, (z, level) in enumerate(zip(latents, self.levels, strict=True)):
            shape = (len(latents[0]), *level.shape)
            if tuple(z.shape) != shape:
                raise InputError(f"z_{l + 1}: expected shape {shape}, got {tuple(z.shape)}")
        return self.generate(len(latents[0]), y, latents)

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images (B, C, H, W) in [0, 1] decoded from one draw of q(z|x)."""
        return self.picture(self.infer(x, y, generator=generator)[0], generator)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        text: str | Sequence[str] | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n images (n, C, H, W) in [0, 1]: z from the prior, then a draw of p(x|z).

        Without a context it is the mean of p(x|z), see picture(). Latents are computed in bfloat16
        where the hardware has it.

        Args:
            text: one for all images or a list of n; None draws one for each, uniformly. It is
                upper-cased if the charset has no lower-case letters.
            temperature: multiplies the noise of the priors; 1 draws from p(x).
            generator: makes the draw repeatable.

        Raises:
            ValueError: naming n, the temperature or the text, whichever does not fit the model.
        """
        validate_number("temperature", temperature, 0)
        y = self.draw_text(n, text, generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device)):
            p_x = self.generate(n, y, temperature=temperature, generator=generator)
        return self.picture(p_x, generator)

    def draw_text(
        self,
        n: int,
        text: str | Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | None:
        """Texts of n images as indices (n, T): those given, or uniform draws; None without text.

        Texts of several lengths are filled up with blanks, and lengths are drawn, too.
        """
        validate_int("n", n, 0)
        if self.text_length is None:
            if text is not None:
                raise InputError("this model is unconditional (text_length=None): it has no text")
            return None
        y = self.random_texts(n, generator) if text is None else self.encode_texts(n, text)
        return y.to(self.device)

    def random_texts(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Uniform draws of symbols; of lengths by their frequencies."""
        device = generator.device if generator else self.device
        shape = (n, self.text_length)
        y = torch.randint(len(self.charset), shape, generator=generator, device=device)
        if self.lengths and n:
            shares = torch.tensor(self.lengths, dtype=torch.float, device=device)
            last = shares.multinomial(n, True, generator=generator)[:, None]
            is_blank = torch.arange(self.text_length, device=device) > last
            y = y.masked_fill(is_blank, len(self.charset))
        return y

    def encode_texts(self, n: int, text: str | Sequence[str]) -> Tensor:
        """One text n times, or n texts."""
        texts = [text] * n if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or len(texts) != n:
            raise InputError(f"text: expected a string or a list of {n}, got {text!r}")
        y = torch.empty(n, self.text_length, dtype=torch.long)
        for row, t in zip(y, texts, strict=True):
            symbols = match_case(t, self.charset) if isinstance(t, str) else ""
            if len(symbols) not in self.possible_lengths or not set(symbols) <= set(self.charset):
                wanted = f"{span(self.possible_lengths)} symbols of {self.charset}"
                raise InputError(f"text {t!r}: expected {wanted}")
            row.copy_(encode_text(symbols, self.charset, self.text_length))
        return y

    # ------------------------------------------------------------------------ checks, files

    def check_images(self, x: Tensor) -> None:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise InputError(f"expected images (B, {expected}), got {tuple(x.shape)}")
        if not x.is_floating_point() or ((x < 0) | (x > 1)).any():
            found = f"{x.dtype} from {x.min().item():g} to {x.max().item():g}"
            raise InputError(f"expected floating-point images in [0, 1], got {found}")

    def check_text(self, n: int, y: Tensor | None) -> None:
        if self.text_length is None:
            if y is not None:
                raise InputError("this model is unconditional (text_length=None): y must be None")
            return
        shape = (n, self.text_length)
        if y is None:
            raise InputError(f"this model is conditional: pass texts y {shape}, as indices")
        if tuple(y.shape) != shape or y.dtype != torch.long:
            raise InputError(f"expected y as int64 {shape}, got {y.dtype} {tuple(y.shape)}")
        last = len(self.charset) if self.lengths else len(self.charset) - 1  # or a blank
        if n and not (int(y.min()) >= 0 and int(y.max()) <= last):
            raise InputError(f"y has indices outside the charset's 0..{last}")

    def freeze_latents(self, priors_too: bool = True) -> None:
        """Freezes all but p(x|z): the outer block's mirror, the output map and the context.

        If priors_too is False, the priors' windows and flow learn on; q does not depend on them.
        """
        self.requires_grad_(False)
        for part in self.children():  # not the model itself: in eval mode, forward() makes no guess
            part.eval()  # the statistics of batch normalisation stay as they are, too
        learning = [self.generation[0], self.to_image, self.context]
        if not priors_too:
            for level in self.levels:
                learning += [level.window, level.prior_features, level.flow]
        for part in learning:
            if part is not None:
                part.requires_grad_(True).train()
        if self.config["likelihood"] == "gaussian":
            self.log_sigma.requires_grad_(self.config["sigma"] is None)

    @torch.no_grad()
    def set_output_level(self, x: Tensor) -> None:
        """Sets the output bias and p(c|z), where they are untrained, from images x (B, C, H, W).

        Colours that all images share begin anew even in a trained p(c|z). Images with numbers that
        are not finite are left out.
        """
        x = x[x.isfinite().flatten(1).all(1)]
        if len(x) and not self.to_image.bias.any():  # the constructor's zeros
            distribution = self.context or LIKELIHOODS[self.config["likelihood"]]
            distribution.start_at(self.to_image.bias, x)
        if len(x) and self.context is not None:
            self.context.start_palette_at(x)

    def save(self, path: str | Path, half: bool = False) -> None:
        """Writes config, weights and provenance into one safetensors file.

        `half` rounds matrices to float16, for half the size. Numbers and vectors stay exact: they
        take no space, and sigma counts once for every pixel.

        Raises:
            ValueError: the provenance cannot be written as JSON.
            OSError: naming the file that could not be written.
        """
        weights = self.state_dict()
        if half:
            is_matrix = lambda w: w.is_floating_point() and w.ndim > 1
            weights = {k: w.half() if is_matrix(w) else w for k, w in weights.items()}
        write_tensors(path, weights, {"config": self.config, "provenance": self.provenance})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None) -> "HVAE":
        """Reads a file that save() wrote, in eval mode, onto the CPU or the device given.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: naming the file and what is wrong with it.
        """
        config, weights, provenance = load_checkpoint(path)
        try:
            model = cls(**{**WITHOUT_WINDOWS, **config})
            model.load_state_dict(weights)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = textwrap.shorten(str(error), 500)  # torch lists every weight
            by = provenance.get("version", "unknown")
            problem = f"its config and weights (version {by}) do not fit"
            raise InputError(f"{path}: {problem}: {reason}") from error
        model.provenance = provenance
        return model.to(pick_device(device or "cpu")).eval()

    def summary(self) -> str:
        """The levels, their sizes and parameter counts, top first."""
        rows = [("", "latent", "values", "inference block", "generation block", "parameters")]
        for l in reversed(range(len(self.levels))):
            level, up, down = self.levels[l], self.inference[l], self.generation[l]
            shape = "x".join(map(str, level.shape))
            parameters = sum(count_parameters(module) for module in (level, up, down))
            values = str(math.prod(level.shape))
            rows.append((f"z_{l + 1}", shape, values, str(up), str(down), f"{parameters:,}"))
        columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, columns)).rstrip() for row in rows]
        c, h, w = self.input_shape
        texts = "no text"
        if self.text_length:
            texts = f"texts of {span(self.possible_lengths)} from {len(self.charset)} symbols"
        head = [
            f"HVAE, {len(self.levels)} levels, {self.config['inference']}",
            f"{self.config['likelihood']}, images {c}x{h}x{w}",
            texts,
        ]
        if flow := self.config["flow"]:
            head.append(f"p(z_{len(self.levels)}) a flow of {flow} couplings")
        head.append(f"{count_parameters(self):,} parameters")
        return "\n".join([", ".join(head), *lines])


def use_prior_mean(
    q: DiagonalGaussian, p: DiagonalGaussian, z: Tensor, is_closed: Tensor
) -> tuple[DiagonalGaussian, Tensor]:
    """The posterior and the draw of a level that does not see x in the images `is_closed` (B,)."""
    is_closed = is_closed.view(-1, *[1] * (z.dim() - 1))
    mu, logvar = torch.where(is_closed, p.mu, q.mu), torch.where(is_closed, p.logvar, q.logvar)
    return DiagonalGaussian(mu, logvar), torch.where(is_closed, p.mu, z)


def repeat(x: Tensor, draws: int) -> Tensor:
    """(B, ...) -> (B * draws, ...): each row that many times, one after the other."""
    return x if draws == 1 else x.repeat_interleave(draws, 0)  # which loses channels_last


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

"""The settings of a training run, their defaults and their schedules; trainer.py says what for.

A hyperparameter is written down once, as a field of Hyperparameters: it is a keyword of train(), a
flag of the command line, and part of a run's state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from hvae.context import WINDOW_NOISE
from hvae.validate import per_level, validate_int, validate_number

SHORT_RUN = 2_000  # steps
FEW_IMAGES = 5_000  # fewer are augmented, have fewer free nats, and leave priors frozen at the end
CAPTCHA_VALUES = 3 * 60 * 160  # of the image for which the default of free_nats was found
FEW_FREE_NATS = 7.0  # at most, of few images: with 40 the held-out -ELBO was worse
FROZEN_PIXEL_WEIGHT = 0.3  # the least in the last phase, where latents have nothing to lose


def option(default, help: str, low: float = -math.inf, high: float = math.inf):
    """A hyperparameter with its default, its help, and its range low <= value <= high."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass
class Hyperparameters:
    """The settings of a run.

    Raises:
        ValueError: naming the one that is out of range.
    """

    steps: int = option(10_000, "training steps in all", 1)
    batch_size: int = option(32, "images per step", 1)
    lr: float = option(2e-3, "peak of the learning rate, which falls as a cosine to 2%%", 1e-12)
    warmup: int | None = option(
        None,
        "steps over which the learning rate rises in each phase; default: 200, at most half of all",
        0,
    )
    beta_start: float | None = option(
        None, "weight of the KL at the start; it goes to 1; default: 5, in a short run 1", 1e-12
    )
    beta_steps: int | None = option(
        None,
        "steps over which beta goes to 1; default and maximum: 0.6 of those before the last phase",
        1,
    )
    free_nats: Sequence[float] | float | None = option(
        None,
        "KL in nats that costs nothing (free bits): of every level, or one each, z_1 first; "
        "default: 40, and 80 for the top; fewer for small images; at most 7 and 14 for fewer than "
        "5,000 images; 0 in a short run",
    )
    free_share: float = option(
        1 / 3,
        "share of the steps before the last phase after which free nats become fewer",
        0,
        1,
    )
    free_until: float = option(0.6, "share of these steps after which no nats are free", 0, 1)
    closed_levels: int | None = option(
        None,
        "how many of the lowest levels are closed in a part of each batch, in the first third of "
        "the steps before the last phase; default: the lower half of a ladder",
    )
    closed_share: float | None = option(
        None, "share of each batch that has closed levels; default: 0.5; 0 in a short run", 0, 0.999
    )
    top_share: float = option(0.5, "share of those images in which only the top is open", 0, 1)
    ema: float = option(0.999, "decay of the averaged weights", 0, 0.999999)
    pixel_weight: float | None = option(
        None,
        "weight of log p(x|z) against z's own guess, with a context; default: 0.01, without a last "
        "phase 0.05, for binary pixels 0 at the start; in the last phase at least 0.3",
        0,
        1,
    )
    pixel_rise: float | None = option(
        None,
        "share of the run over which the pixel weight rises to 1; 0 keeps it constant; default: 0, "
        "for binary pixels 0.6",
        0,
        1,
    )
    frozen_share: float | None = option(
        None,
        "last share of the run, in which q is frozen; p(x|z) learns on, and the priors, if there "
        "are 5,000 images; default: 0.2 with a context, 0 for binary pixels and in a short run",
        0,
        1,
    )
    binarise: bool = option(False, "draw every pixel as 0 or 1, anew at every step")
    shift: int | None = option(
        None,
        "augmentation: images are moved by up to so many pixels; default: 0, of fewer than 5,000 "
        "images a twentieth of the shorter side",
        0,
    )
    warp: float | None = option(
        None,
        "augmentation until the last phase or quarter: images are bent, their points move by up to "
        "so many pixels (elastic deformation); default: 0, of fewer than 5,000 images 0.075 of the "
        "shorter side",
        0,
    )
    window_noise: float | None = option(
        None,
        "share of the values in the windows of p(x|z) that are replaced at random; default: 0.005, "
        "of fewer than 5,000 images 0.05 divided by their channels",
        0,
        1,
    )
    eval_every: int = option(250, "steps between evaluations, samples and checkpoints", 1)
    log_every: int = option(50, "steps per row of metrics.csv", 1)
    seed: int = option(0, "of the weights, the noise and the order of the data", 0, 2**32 - 1)

    def __post_init__(self):
        for f in fields(self):
            value, kind = getattr(self, f.name), f.type
            if value is None and f.default is None:  # filled below, or by fit_to()
                continue
            if kind in (int, int | None):
                validate_int(f.name, value, f.metadata["low"], f.metadata["high"])
            elif kind in (float, float | None):
                validate_number(f.name, value, f.metadata["low"], f.metadata["high"])
                setattr(self, f.name, float(value))  # numpy's numbers are not JSON
            elif kind is bool:
                setattr(self, f.name, bool(value))
        validate_number("free_share", self.free_share, 0, self.free_until)
        self.fill(
            warmup=min(200, self.steps // 2),
            beta_start=1.0 if self.is_short else 5.0,
            closed_share=0.0 if self.is_short else 0.5,
        )

    def fill(self, **defaults) -> None:
        """Sets those that are None."""
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def is_short(self) -> bool:
        """Too short to learn texts: no beta above 1, free nats, closed levels by default."""
        return self.steps < SHORT_RUN

    def fit_to(self, model: nn.Module, images: float = math.inf) -> None:
        """Sets what depends on the model, its levels and pixels, and on the number of images.

        Raises:
            ValueError: there are other numbers of free nats, or fewer levels to close.
        """
        levels, (channels, *size) = len(model.levels), model.input_shape
        binary = model.config["likelihood"] == "bernoulli"
        has_phase = model.context is not None and not binary and not self.is_short
        few = images < FEW_IMAGES and not binary
        nats_for_size = 40 * math.prod(model.input_shape) / CAPTCHA_VALUES
        limit = FEW_FREE_NATS if few else 40
        nats = 0 if self.is_short else min(limit, nats_for_size)
        below_top = levels - 1 if model.top_down else 0
        self.fill(
            frozen_share=0.2 if has_phase else 0.0,
            free_nats=[nats] * (levels - 1) + [2 * nats],
            closed_levels=min((levels + 1) // 2, below_top),
            pixel_rise=0.6 if binary else 0.0,
            shift=round(0.05 * min(size)) if few else 0,
            warp=0.075 * min(size) if few else 0.0,
            window_noise=0.05 / channels if few else WINDOW_NOISE,
        )
        self.fill(pixel_weight=0.0 if binary else 0.01 if self.frozen_share else 0.05)
        self.free_nats = per_level("free_nats", self.free_nats, levels)
        validate_int("closed_levels", self.closed_levels, 0, below_top)
        longest = max(1, round(0.6 * self.frozen_from))
        self.beta_steps = min(self.beta_steps or longest, longest)

    @property
    def warped_until(self) -> int:
        """The first step of which the images are not bent."""
        return min(self.frozen_from, round(0.75 * self.steps))

    @property
    def has_last_phase(self) -> bool:
        return self.frozen_from < self.steps

    @property
    def frozen_from(self) -> int:
        """The first step in which q is frozen."""
        return self.steps - round((self.frozen_share or 0) * self.steps)

    def lr_at(self, step: int) -> float:
        """In each phase a linear rise, then half a cosine from lr to 2% of it."""
        frozen_from = self.frozen_from
        first, end = (0, frozen_from) if step < frozen_from else (frozen_from, self.steps)
        step, steps = step - first, end - first
        warmup = min(self.warmup, steps // 2) if self.has_last_phase else self.warmup
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def beta_at(self, step: int) -> float:
        return self.beta_start ** max(0.0, 1 - step / self.beta_steps)

    def free_nats_at(self, step: int) -> Tensor:
        """(L,): those of each level."""
        left = self.free_until * self.frozen_from - step
        left /= max(1e-9, (self.free_until - self.free_share) * self.frozen_from)
        return min(1.0, max(0.0, left)) * torch.tensor(self.free_nats)

    def pixel_weight_at(self, step: int) -> float:
        weight = self.pixel_weight
        if self.pixel_rise:
            weight += (1 - weight) * min(1.0, step / (self.pixel_rise * self.steps))
        return max(weight, FROZEN_PIXEL_WEIGHT) if step >= self.frozen_from else weight

    def updates_at(self, step: int) -> int:
        """How many from each batch: four in the last phase and, if there is one, at the start."""
        is_early = self.has_last_phase and 16 * step < self.steps
        return 4 if is_early or step >= self.frozen_from else 1

    def closed_at(self, step: int, levels: int) -> Tensor:
        """(batch_size,): how many of the lowest levels are closed, for each image of a batch."""
        closed = torch.zeros(self.batch_size, dtype=torch.long)
        if self.closed_levels and 3 * step < self.frozen_from:
            closed[: int(self.closed_share * self.batch_size)] = self.closed_levels
            only_top = int(self.top_share * self.closed_share * self.batch_size)
            closed[:only_top] = levels - 1
        return closed


# The defaults of the command line for each of model.CONFIGS.
LIKELIHOOD_FIRST = dict(beta_start=0.1, beta_steps=2_000, free_nats=[0.0], closed_share=0.0)
TRAINING = {
    "captcha": {},
    "mnist-vae": {**LIKELIHOOD_FIRST, "batch_size": 100, "steps": 5_000},
    "mnist-hvae": {
        **LIKELIHOOD_FIRST,
        "free_nats": [0.0] + [3.0] * 6,  # z_1 first
        "free_share": 0.5,
        "free_until": 1.0,
        "batch_size": 50,
        "steps": 40_000,
        "binarise": True,
    },
}

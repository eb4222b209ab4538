"""A training run as an object: all that its steps change, and how it is saved and resumed."""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hvae.checkpoint import flatten_optimizer, read_tensors, restore_optimizer, write_tensors
from hvae.hyperparameters import FEW_IMAGES, Hyperparameters
from hvae.optimizer import make_optimizers
from hvae.parallel import data_parallel
from hvae.text import possible_lengths
from hvae.validate import InputError

PATIENCE = 20  # updates in a row without a finite gradient before a run gives up


class Run:
    """A training run: all that its steps change.

    Args:
        model: an HVAE.
        device, bf16: where, and whether with bfloat16 autocast.
        description: of the data, for the checkpoint.
        images: in the training set.
    """

    def __init__(
        self,
        model: nn.Module,
        hp: Hyperparameters,
        device: torch.device,
        bf16: bool,
        description,
        images: int,
    ):
        self.model, self.hp = model.to(device).train(), hp
        if model.context is not None:
            model.context.window_noise = hp.window_noise
        self.settings = {**asdict(hp), "images": images}
        self.has_few_images = images < FEW_IMAGES
        self.device, self.bf16, self.description = device, bf16, description
        self.forward = data_parallel(model)
        self.is_frozen = False
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.average = AveragedModel(model, multi_avg_fn=ema_with_warmup(hp.ema))
        self.average.eval().requires_grad_(False)
        self.optimizers = make_optimizers(model, hp.lr)
        self.clip = GradientClipper(math.prod(model.input_shape))
        self.began_with = model.provenance
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict] = []
        self.recent: list[dict] = []  # terms of the steps since the last row of the history

    def begin_last_phase(self) -> None:
        """Freezes q, as an average; p(x|z) learns on, and the priors if images are not few."""
        if self.average.n_averaged > 0:
            self.model.load_state_dict(self.average.module.state_dict())
        self.clip.mean, self.clip.seen = 0.0, 0  # gradients of other weights, another loss
        self.freeze()

    def freeze(self) -> None:
        self.model.freeze_latents(priors_too=self.has_few_images)
        for p in set(self.model.parameters()) - set(self.trainable):
            p.requires_grad_(False)
        self.forward = data_parallel(self.model)  # it reads requires_grad only when it is built
        self.is_frozen = True

    def unfreeze(self) -> None:
        """Leaves all of the model trainable that was, for another run."""
        for p in self.trainable:
            p.requires_grad_(True)
        self.model.train()

    def record(self, terms: dict) -> None:
        """Keeps a step's terms for the next row of the history.

        Raises:
            FloatingPointError: too many steps in a row had no finite gradient; naming the term.
        """
        if self.clip.last_is_finite and all(map(math.isfinite, terms.values())):
            self.recent.append({**terms, "grad_norm": self.clip.last})
        elif self.clip.skipped_in_a_row >= PATIENCE:
            wrong = [f"{name} is {n}" for name, n in terms.items() if not math.isfinite(n)]
            raise FloatingPointError(
                f"step {self.step}: {wrong[-1] if wrong else 'the gradient is not finite'}, after "
                f"{PATIENCE} updates in a row with no finite gradient; the last checkpoint is good"
            )

    def add_row(self) -> dict:
        """The row of this step in the history, now if it has none: means since the last row."""
        if self.history and self.history[-1]["step"] == self.step:
            return self.history[-1]
        names = dict.fromkeys(name for terms in self.recent for name in terms)
        having = {name: [terms[name] for terms in self.recent if name in terms] for name in names}
        means = {name: sum(values) / len(values) for name, values in having.items()}
        row = {
            "step": self.step,
            "images": self.step * self.hp.batch_size,
            "seconds": round(self.seconds, 1),
            "beta": round(self.hp.beta_at(self.step - 1), 3),
            **means,
            "skipped": self.clip.skipped,
        }
        self.history.append(row)
        self.recent = []
        return row

    def save(self, path: Path) -> None:
        """Writes the state: with it, the next step is the one that would have come."""
        tensors, groups = {}, []
        for optimizer in self.optimizers:
            state, its_groups = flatten_optimizer(optimizer)
            tensors.update(state)
            groups.append(its_groups)
        for name, module in (("model", self.model), ("average", self.average)):
            tensors.update({f"{name}.{key}": t for key, t in module.state_dict().items()})
        tensors["rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            for i, state in enumerate(torch.cuda.get_rng_state_all()):
                tensors[f"rng_cuda.{i}"] = state
        names = ("step", "seconds", "history", "recent", "is_frozen")
        metadata = {name: getattr(self, name) for name in names}
        metadata.update(
            config=self.model.config,
            settings=self.settings,
            data=self.description,
            optimizers=groups,
            clip=vars(self.clip),
            began_with=self.began_with,
        )
        write_tensors(path, tensors, metadata)

    def load(self, path: Path) -> None:
        """Restores what save() wrote. The settings are the new ones; a warning names differences.

        Raises:
            ValueError: there is no readable state, or its run has another architecture.
        """
        tensors, metadata = read_tensors(path)
        if missing := {"step", "config", "optimizers"} - metadata.keys():
            lacks = ", ".join(sorted(missing))
            raise InputError(f"{path}: not a training state; it lacks {lacks}")
        self.compare(path, metadata)
        for name, module in (("model", self.model), ("average", self.average)):
            prefix = f"{name}."
            weights = {
                k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)
            }
            if weights.keys() != module.state_dict().keys():
                raise InputError(
                    f"{path}: another version of this code trained it, with other layers"
                )
            module.load_state_dict(weights)
        for optimizer, groups in zip(self.optimizers, metadata["optimizers"], strict=True):
            restore_optimizer(optimizer, tensors, groups)
        vars(self.clip).update(metadata["clip"])
        for name in ("step", "seconds", "history", "recent", "began_with"):
            setattr(self, name, metadata[name])
        if metadata.get("is_frozen") and self.step >= self.hp.frozen_from:
            self.freeze()
        torch.set_rng_state(tensors["rng"])
        for i in range(torch.cuda.device_count()):
            if f"rng_cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng_cuda.{i}"], i)

    def compare(self, path: Path, metadata: dict) -> None:
        """Raises InputError if a state's architecture differs, warns of other settings or data."""
        config = architecture(json.loads(json.dumps(self.model.config)))
        old = architecture(metadata["config"])
        names = sorted(k for k in config.keys() | old.keys() if config.get(k) != old.get(k))
        if names:
            raise InputError(
                f"{path}: it was trained with other {', '.join(names)}; give the same options again"
            )
        changes = [
            f"{name} = {self.settings.get(name)} instead of {before}"
            for name, before in metadata["settings"].items()
            if self.settings.get(name) != before
        ]
        data = json.loads(json.dumps(self.description))
        if without_place(metadata.get("data", data)) != without_place(data):
            changes.append("other data")
        if changes:
            warnings.warn(f"{path}: resuming with {', '.join(changes)}", stacklevel=3)


def architecture(config: dict) -> dict:
    """A config in which texts' lengths are those that occur, however frequent they are."""
    lengths = config.get("lengths")
    return {**config, "lengths": lengths and possible_lengths(lengths)}


def without_place(description):
    """Of data, without where they lie: a folder may move."""
    if not isinstance(description, dict):
        return description
    return {k: v for k, v in description.items() if k not in ("folder", "path")}


class GradientClipper:
    """Clips gradients to the running mean of their norm; skips steps with enormous ones.

    A hierarchical VAE's loss has rare, huge gradients, one of which can end a run (Child 2021,
    section 3.2). A step is skipped if the norm is not finite or 20 times the mean.

    Norms above `ceiling` count as `ceiling`. A model that begins with unfamiliar images may have a
    KL of a million nats; AdamW divides by past gradients, and would stand still for long after.
    """

    def __init__(self, ceiling: float):
        self.ceiling = ceiling
        self.mean, self.last = 0.0, 0.0
        self.seen, self.skipped, self.skipped_in_a_row = 0, 0, 0

    @property
    def last_is_finite(self) -> bool:
        return math.isfinite(self.last)

    def __call__(self, model: nn.Module) -> bool:
        """Clips; True if the step should be taken."""
        limit = min(self.mean or self.ceiling, self.ceiling)
        self.last = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
        self.skipped_in_a_row = 0 if self.last_is_finite else self.skipped_in_a_row + 1
        if not self.last_is_finite or (self.seen > 300 and self.last > 20 * self.mean):
            self.skipped += 1
            if self.last_is_finite:  # norms that stay high are accepted in the end
                self.mean *= 1.02
            return False
        norm = min(self.last, self.ceiling)
        new = 0.98 * self.mean + 0.02 * min(norm, 2 * self.mean)
        self.mean = new if self.mean else norm
        self.seen += 1
        return True


def ema_with_warmup(decay: float) -> Callable:
    """For AveragedModel: an exponential moving average whose decay rises to `decay` at first."""

    @torch.no_grad()
    def update(averages: list[Tensor], parameters: list[Tensor], n: Tensor) -> None:
        now = min(decay, (int(n) + 1) / (int(n) + 11))
        torch._foreach_lerp_(averages, parameters, 1 - now)

    return update

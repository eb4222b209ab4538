"""train() fits an HVAE, with the settings of hvae/hyperparameters.py.

The loss of a batch, in nats per image (`objective`, and for a flow `flow_loss`):

    reconstruction + beta * sum_l max(KL_l, free_nats_l)  [ - log p(z_L) of the z_L drawn ]

Captchas need each of these for samples that follow their text; short runs and digits, fewer:

    beta starts above 1. While information is expensive, the model looks for the cheapest
        description of an image, and the text costs nothing.
    closed levels: in the first third of the steps before the last phase, the lowest levels do not
        see x in half of every batch; their z is the mean of the prior's Gaussian. The glyphs of
        these images can only come from the top latents and the text. Half of these images have
        only the top level open. Kept up longer, this fills the upper levels with detail that the
        priors of the lower ones draw better.
    free_nats: KL of a level that costs nothing, so that the upper levels are used. After a third of
        these steps free nats become fewer, and after 0.6 of them there are none; of digits, after
        half of them and at their end.
    pixel_weight: with a local context, 98% of the nats of a captcha are pixels, and latents that
        must serve them forget the glyphs. So z also guesses the image, without the context. The
        reconstruction is 0.99 of the guess's nats, which teach the latents, plus 0.01 of
        -log p(x|z), enough for the context to learn it. Of binary images the weight
        of -log p(x|z) rises from 0 to 1: early on, a context would explain what latents should.
    a last phase: q is frozen, and only p(x|z), the windows of the priors and the flow learn on. The
        weight of -log p(x|z) against the guess is 0.3 or more. If images are few, the priors are
        frozen, too, or they would learn them by heart.
    four updates from each batch, in the last phase and the first sixteenth of a run that has one.
        p(x|z) learns most from small batches. For z they are no better, and they take longer.
    a last fit: in the end the upper priors are fitted to q once more, see hvae/fit_prior.py.
    a flow as p(z_L): KL that costs nothing trains neither q(z_L) nor its prior, so -log p of the
        draws of z_L is a term of its own. It trains the flow alone.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from dataset import MNIST, CaptchaDataset, CaptchaFolder
from generate import held_out_images, sample_sheet, save_figures
from hvae import parallel
from hvae.adapt import adapted
from hvae.augment import shifted, warped
from hvae.checkpoint import has_state, locked, write_csv
from hvae.cli import given_options, make_parser, one_line_errors, path_argument, reject_unused
from hvae.distributions import binarised
from hvae.evaluation import evaluate
from hvae.fit_prior import fit_prior, flow_loss, upper_priors
from hvae.hyperparameters import TRAINING, Hyperparameters
from hvae.parallel import DeferredSignals, has_bf16, ignore_interrupts, keep_memory, pick_device
from hvae.pictures import plot_history, write_image
from hvae.run import Run
from hvae.text import DIGITS, UPPERCASE, possible_lengths, span
from hvae.validate import InputError, validate_int
from model import CONFIGS, HVAE, ELBOTerms

STEPS_PER_PRIOR_UPDATE = 3  # of those that fit the upper priors in the end
MOST_PIXELS = 500_000_000  # of the images for that: bounds the memory, to a gigabyte or so
VERSION = "2.2"  # of this code, written into every checkpoint


# ---------------------------------------------------------------------------- training


def train(
    model: HVAE | None = None,
    dataset: Dataset | None = None,
    *,
    val_dataset: Dataset | None = None,
    out: str | Path = "checkpoints/run",
    resume: bool = False,
    keep: bool = False,
    device: str | None = None,
    bf16: bool | None = None,
    workers: int | None = None,
    **hyperparameters,
) -> tuple[HVAE, list[dict]]:
    """Trains a model; returns the best one, with averaged weights, and its history.

    The folder `out` receives hvae.pt (the averaged model of the best held-out -ELBO), metrics.csv,
    loss.png, samples.png and state.pt: after Ctrl-C or SIGTERM, resume=True goes on where it ended.

    Args:
        model: None is HVAE() for the data's images and texts.
        dataset: of (image (C, H, W) in [0, 1], label (T,)); None renders captchas without end.
            Labels are used if it, or what it is a Subset of, has a `text_length` and a `charset`.
        val_dataset: held-out images; None renders the split 'val', or takes a tenth of the data.
        keep: keep the averaged model of every evaluation, as hvae-STEP.pt.
        device, bf16: None uses CUDA, and bfloat16 autocast, where available.
        workers: processes that load or render; None is one, or 0 where it would not be a fork.
        hyperparameters: see `Hyperparameters`, such as steps=2000, lr=1e-3.

    Raises:
        ValueError: naming the argument, the data, or what is wrong with the folder `out`.
        OSError: naming the file that cannot be written.
        FloatingPointError: naming the term of the ELBO that stayed NaN or infinite.
    """
    hp = Hyperparameters(**hyperparameters)
    workers = int(parallel.can_fork()) if workers is None else workers
    validate_int("workers", workers, 0)
    out = Path(out)
    validate_folder(out, resume, dataset)
    device = parallel.init_processes(device)
    torch.set_flush_denormal(True)  # tiny numbers are slow on a CPU and mean nothing here
    keep_memory()
    torch.manual_seed(hp.seed)
    dataset = CaptchaDataset(1_000_000) if dataset is None else dataset
    model = model_for(dataset) if model is None else model
    train_set, val_set = hold_out(dataset, hp.seed, val_dataset)
    hp.fit_to(model, len(train_set))
    validate_sets(model, hp, train_set, val_set)
    description = description_of(dataset)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) if parallel.rank() == 0 else nullcontext():
        bf16 = has_bf16(device) if bf16 is None else bf16
        run = Run(model, hp, device, bf16, description, images=len(train_set))
        begin_or_resume(run, train_set, out, resume)
        try:
            take_steps(run, train_set, val_set, out, workers, keep)
            fit_upper_priors(run, train_set, val_set, out, workers)
        finally:
            run.unfreeze()
    with parallel.rank_0_first():  # which has written it
        return HVAE.load(out / "hvae.pt", device), run.history


def begin_or_resume(run: Run, train_set: Dataset, out: Path, resume: bool) -> None:
    """Resumes from the state in `out`; if there is none, starts p(x|z) at the data's level."""
    if has_state(out):
        run.load(out / "state.pt")
    else:
        if resume and parallel.rank() == 0:
            tqdm.write(f"{out} holds no run; a new one begins")
        first = [train_set[i][0] for i in range(min(64, len(train_set)))]
        run.model.set_output_level(torch.stack(first).to(run.device))
    if run.step > run.hp.steps:
        raise InputError(f"{out} holds {run.step} steps, more than steps={run.hp.steps}")
    if not parallel.all_equal(run.step, run.device):
        raise InputError(f"{out}: the processes found different states; do they share its disk?")


def take_steps(
    run: Run, train_set: Dataset, val_set: Dataset, out: Path, workers: int, keep: bool
) -> None:
    """Steps until hp.steps are done, with rows of the history, checkpoints, and signals."""
    hp = run.hp
    indices = batches(len(train_set), hp.batch_size, hp.seed, run.step, hp.steps)
    loader = DataLoader(
        train_set,
        batch_sampler=map(parallel.shard, indices),
        num_workers=workers,
        pin_memory=run.device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=ignore_interrupts,
    )
    leads = parallel.rank() == 0
    if leads and (hp.shift or hp.warp):
        tqdm.write(
            f"{len(train_set):,} images, moved by up to {hp.shift} pixels (shift) and bent by "
            f"up to {hp.warp:g} (warp)"
        )
    start = time.time() - run.seconds
    with DeferredSignals() as signals:
        loaded = iter(loader)
        signals.ignore_dead_workers()
        look = dict(desc="train", unit="step", dynamic_ncols=True, mininterval=1)
        bar = tqdm(loaded, initial=run.step, total=hp.steps, disable=not leads, **look)
        for x, y in save_on_failure(bar, run, out / "state.pt", signals):
            run.record(training_step(run, x, y))
            run.seconds = time.time() - start
            is_checkpoint = run.step % hp.eval_every == 0 or run.step == hp.steps
            if run.step % hp.log_every == 0 or is_checkpoint:
                bar.set_postfix_str(describe(run.add_row(), len(run.model.levels)))
            if is_checkpoint and leads:
                write_checkpoint(run, val_set, out, keep)
            received = parallel.all_reduce_max(signals.received, run.device)
            if received:  # assigned only then: another signal may have come in between
                signals.received = received
                with parallel.rank_0_first():  # torchrun ends the others as soon as one is gone
                    if leads:
                        save_interrupted(run, out / "state.pt")
                signals.end_process()
        is_measured = "val_neg_elbo" in run.add_row()
        if leads and not is_measured:  # interrupted at this step, resumed with so many steps in all
            write_checkpoint(run, val_set, out, keep)
    signals.end_process()  # a signal in the last step


def fit_upper_priors(
    run: Run, train_set: Dataset, val_set: Dataset, out: Path, workers: int
) -> None:
    """After a last phase in which priors learned: fits those of the best model to its q."""
    hp, steps = run.hp, run.hp.steps // STEPS_PER_PRIOR_UPDATE
    priors_learned = hp.has_last_phase and not run.has_few_images
    if not (steps and priors_learned and len(upper_priors(run.model)) and parallel.rank() == 0):
        return
    model = HVAE.load(out / "hvae.pt", run.device)
    if "prior_fit" in model.provenance:
        return
    before = model.provenance["held_out"]["elbo"]
    n = min(10 * steps, MOST_PIXELS // math.prod(model.input_shape[1:]), len(train_set))
    shuffled = next(batches(len(train_set), n, hp.seed, 0, 1))  # a folder is sorted by text
    fit_prior(model, Subset(train_set, shuffled), steps=steps, workers=workers, seed=hp.seed)
    metrics = evaluate(model, val_set, batch_size=hp.batch_size, bf16=run.bf16)
    if metrics["elbo"] > before:
        model.provenance["held_out"] = metrics
        write_image(sample_sheet(model, 32, seed=hp.seed), out / "samples.png")
        model.save(out / "hvae.pt")
        tqdm.write(f"upper priors fitted: held out -elbo {-metrics['elbo']:,.1f} nats")


def training_step(run: Run, x: Tensor, y: Tensor) -> dict[str, float]:
    """Learns from a batch, in one update or several. Returns the ELBO's terms, their means."""
    model, hp, device = run.model, run.hp, run.device
    if run.step >= hp.frozen_from and not run.is_frozen:
        run.begin_last_phase()
    if parallel.world_size() > 1:  # noise that differs between processes, and not after a resume
        noise = (hp.seed * 1_000_003 + run.step) * parallel.world_size() + parallel.rank()
        torch.manual_seed(noise)
    x = x.to(device, non_blocking=True, memory_format=torch.channels_last)
    x = shifted(x, hp.shift) if hp.shift else x
    x = warped(x, hp.warp) if hp.warp and run.step < hp.warped_until else x
    x = binarised(x) if hp.binarise else x
    y = y.to(device, non_blocking=True) if model.text_length is not None else None
    closed = parallel.shard(hp.closed_at(run.step, len(model.levels))).to(device)

    # parts have two images or more, as batch normalisation needs, and alike shares of closed ones
    n = max(1, min(len(x) // 2, hp.updates_at(run.step)))
    parts = [(x[i::n], None if y is None else y[i::n], closed[i::n]) for i in range(n)]
    terms = joined([update(run, *part) for part in parts])
    run.step += 1
    return batch_means(terms, torch.cat([closed for *_, closed in parts]))


def update(run: Run, x: Tensor, y: Tensor | None, closed: Tensor) -> ELBOTerms:
    """One update of the weights: loss, backward, clip, step, average."""
    model, hp = run.model, run.hp
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
        terms = run.forward(x, y, closed)
    beta, pixel_weight = hp.beta_at(run.step), hp.pixel_weight_at(run.step)
    free_nats = hp.free_nats_at(run.step).to(run.device)
    loss = objective(terms, beta, free_nats, closed, pixel_weight)
    if model.levels[-1].flow is not None and not run.is_frozen:
        loss = loss + flow_loss(model.levels[-1], terms.z_top.detach())

    model.zero_grad(set_to_none=True)
    loss.backward()
    if run.clip(model):  # the gradient is usable
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = hp.lr_at(run.step)
            optimizer.step()
        run.average.update_parameters(model)
    else:  # a broken image must not stay in the statistics of batch normalisation either
        for mine, averaged in zip(model.buffers(), run.average.module.buffers(), strict=True):
            mine.copy_(averaged)
    return terms


@torch.no_grad()
def joined(parts: Sequence[ELBOTerms]) -> ELBOTerms:
    """The terms of a batch from those of its parts."""
    columns = zip(*parts, strict=True)
    return ELBOTerms(*(None if column[0] is None else torch.cat(column) for column in columns))


def objective(
    terms: ELBOTerms, beta: float, free_nats: Tensor, closed: Tensor, pixel_weight: float = 1.0
) -> Tensor:
    """reconstruction + beta * sum_l max(KL_l, free_nats_l), batch mean, in nats per image.

    With a context the reconstruction is pixel_weight * -log p(x|z) + (1 - pixel_weight) * guess.
    Free bits (Kingma et al. 2016, eq. 15) hold for a level's mean KL over the images in which it
    is open: `closed` (B,) is the number of an image's closed levels, whose KL does not count.
    """
    is_open = is_open_level(terms, closed)
    kl = (terms.kl * is_open).sum(0)  # (L,)
    free = parallel.all_reduce_sum(is_open.sum(0)) * free_nats
    # without free nats a KL counts as it is, even if a chain's estimate of it is negative
    is_free = (parallel.all_reduce_sum(kl) <= free) & (free > 0)
    kl = torch.where(is_free, free / parallel.world_size(), kl)
    reconstruction = terms.reconstruction.mean()
    if terms.guess is not None:
        reconstruction = torch.lerp(terms.guess.mean(), reconstruction, pixel_weight)
    return reconstruction + beta * kl.sum() / len(terms.kl)


def is_open_level(terms: ELBOTerms, closed: Tensor) -> Tensor:
    """(B, L): whether a level sees x."""
    return closed[:, None] <= torch.arange(terms.kl.shape[1], device=closed.device)


@torch.no_grad()
def batch_means(terms: ELBOTerms, closed: Tensor) -> dict[str, float]:
    """Means: reconstruction where no level is closed, each KL where its level is open."""
    is_open = is_open_level(terms, closed)
    sees_x = is_open[:, :1]  # at every level
    nats = terms.reconstruction[:, None]
    counted = torch.cat([sees_x, ~sees_x, is_open], 1)
    values = torch.where(counted, torch.cat([nats, nats, terms.kl], 1), 0)
    counts, sums = parallel.all_reduce_sum(torch.stack([counted.to(values), values]).sum(1))
    reconstruction, of_closed, *kl = (sums / counts.clamp(min=1)).tolist()
    row = {"neg_elbo": reconstruction + sum(kl), "reconstruction": reconstruction}
    if counts[1]:
        row["reconstruction_closed"] = of_closed
    return {**row, **{f"kl_{l + 1}": value for l, value in enumerate(kl)}}


def batches(n: int, batch_size: int, seed: int, start: int, steps: int) -> Iterator[list[int]]:
    """The indices of batches start .. steps-1: epochs, each shuffled by (seed, epoch)."""
    per_epoch = n // batch_size
    epoch, order = -1, None
    for step in range(start, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(n, generator=generator).tolist()
        first = (step % per_epoch) * batch_size
        yield order[first : first + batch_size]


# ---------------------------------------------------------------------------- files of a run


def write_checkpoint(run: Run, val_set: Dataset, out: Path, keep: bool) -> None:
    """Evaluates the averaged model, adds that to the history, and writes all files of a run.

    The state comes last, because with it the step counts as done. It is written, too, if a table
    or a picture cannot be.
    """
    model, hp = run.average.module, run.hp
    metrics = evaluate(
        model, val_set, batch_size=hp.batch_size, binarise=hp.binarise, bf16=run.bf16
    )
    if not math.isfinite(metrics["elbo"]):
        raise FloatingPointError(
            f"step {run.step}: the held-out ELBO is {metrics['elbo']}: training diverged, or a "
            "held-out image is broken; earlier checkpoints are kept"
        )
    run.history[-1].update(
        val_neg_elbo=-metrics["elbo"],
        val_reconstruction=metrics["reconstruction"],
        **{f"val_kl_{l + 1}": value for l, value in enumerate(metrics["kl"])},
    )
    model.provenance = provenance(run, metrics)
    try:
        write_csv(out / "metrics.csv", run.history)
        plot_history(run.history, out / "loss.png")
        write_image(sample_sheet(model, 32, seed=hp.seed), out / "samples.png")
    except Exception:  # such as a table that another program has open
        with suppress(OSError):  # a full disk
            write_model_and_state(run, out, keep)
        raise
    write_model_and_state(run, out, keep)
    tqdm.write(
        f"step {run.step}: held out -elbo {-metrics['elbo']:,.1f} nats = reconstruction "
        f"{metrics['reconstruction']:,.1f} + kl {sum(metrics['kl']):,.1f}"
    )


def write_model_and_state(run: Run, out: Path, keep: bool) -> None:
    """The averaged model, if it is the best or all are kept, and the run's state."""
    model = run.average.module
    nats = [row["val_neg_elbo"] for row in run.history if "val_neg_elbo" in row]
    if nats[-1] <= min(nats):
        model.save(out / "hvae.pt")
    if keep:
        model.save(out / f"hvae-{run.step:06d}.pt")
    run.save(out / "state.pt")


def provenance(run: Run, metrics: dict) -> dict:
    """What a checkpoint tells of its origin; the counts include the checkpoint it began with."""
    counts = {
        "steps": run.step,
        "images_seen": run.step * run.hp.batch_size,
        "seconds": round(run.seconds),
    }
    return {
        "version": VERSION,
        "torch": str(torch.__version__),
        "data": run.description,
        "binarised": run.hp.binarise,
        **{name: count + run.began_with.get(name, 0) for name, count in counts.items()},
        "device": str(run.device),
        "cpus": os.cpu_count(),
        "held_out": metrics,
        "began_with": run.began_with,
    }


def save_on_failure(
    loaded: Iterable, run: Run, path: Path, signals: DeferredSignals
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; if one fails (a file or a data worker is gone), the state is saved first."""
    try:
        yield from loaded
    except Exception:
        if run.step and parallel.rank() == 0:
            save_interrupted(run, path)
        signals.end_process()  # a signal to the whole group has ended the workers, too
        raise


def save_interrupted(run: Run, path: Path) -> None:
    run.save(path)
    tqdm.write(f"step {run.step} is saved; resume=True (--resume) goes on from there")


def describe(row: dict, levels: int) -> str:
    """A row for the progress bar: nats per image, levels from the top down."""
    if "neg_elbo" not in row:
        return f"{row['skipped']} steps skipped, none taken"
    kl = " ".join(f"{row[f'kl_{l}']:.0f}" for l in range(levels, 0, -1))
    skipped = f" | skipped {row['skipped']}" if row["skipped"] else ""
    elbo = f"-elbo {row['neg_elbo']:,.0f} nats = rec {row['reconstruction']:,.0f} + kl {kl}"
    return f"{elbo} | beta {row['beta']:.1f}{skipped}"


# ---------------------------------------------------------------------------- data and checks


def hold_out(
    dataset: Dataset, seed: int, val_set: Dataset | None = None, limit: int = 512
) -> tuple[Dataset, Dataset]:
    """(training set, validation set): the data's own splits, or a tenth set aside."""
    if hasattr(dataset, "other_split"):
        if val_set is None and dataset.split not in (None, "train"):
            raise InputError(f"the data are the split {dataset.split!r}: train on 'train'")
        train_set = dataset if dataset.split else dataset.other_split("train", len(dataset))
        return train_set, dataset.other_split("val", limit) if val_set is None else val_set
    if val_set is not None:
        return dataset, val_set
    n = min(limit, max(1, len(dataset) // 10))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(dataset, sorted(order[n:])), Subset(dataset, sorted(order[:n]))


def model_for(dataset: Dataset, **arguments) -> HVAE:
    """The default model for this data set's images and texts; arguments override."""
    return HVAE(**{**data_arguments(dataset), **arguments})


def begin_with(checkpoint: str | Path, dataset: Dataset, **arguments) -> HVAE:
    """A model for this data set's images and texts, with what fits of a checkpoint's weights.

    Arguments override: context, prior_context, mixtures.
    """
    model, new = adapted(HVAE.load(checkpoint), **{**data_arguments(dataset), **arguments})
    blocks = sorted({".".join(name.split(".")[:3]) for name in new})
    untrained = f", and {len(new)} new tensors in {', '.join(blocks)}" if new else ""
    if parallel.rank() == 0:
        print(f"begins with the weights of {checkpoint}{untrained}")
    return model


def data_arguments(dataset: Dataset) -> dict:
    """The arguments of HVAE that follow from the data's images and texts."""
    image, _ = first_item(dataset)
    source = source_of(dataset)
    arguments = dict(
        input_channels=image.shape[0],
        input_size=tuple(image.shape[1:]),
        text_length=getattr(source, "text_length", None),
    )
    if arguments["text_length"] is not None:
        arguments["charset"] = source.charset
        arguments["lengths"] = lengths = getattr(source, "lengths", None)
        if lengths and not lengths[-1]:
            raise InputError(
                f"text_length is {len(lengths)}, but the data's longest texts have "
                f"{max(possible_lengths(lengths))} symbols"
            )
    return arguments


def first_item(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The first image and its label; InputError if there is none, or it is no tensor."""
    if len(dataset) == 0:
        raise InputError("the data set has no images")
    image, label = dataset[0]
    if not isinstance(image, Tensor):
        raise InputError(f"the data's images are {type(image).__name__}, not tensors")
    return image, label


def source_of(dataset: Dataset | None) -> Dataset | None:
    """The data set that a Subset is of, else itself."""
    return source_of(dataset.dataset) if isinstance(dataset, Subset) else dataset


def validate_sets(model: HVAE, hp: Hyperparameters, train_set: Dataset, val_set: Dataset) -> None:
    """Raises InputError if a model cannot be trained on one of the sets and measured on both."""
    n, processes = hp.batch_size, parallel.world_size()
    if n % processes:
        raise InputError(f"batch_size: {n} images cannot be shared evenly by {processes} processes")
    if len(train_set) < n:
        raise InputError(
            f"the training set has {len(train_set)} images, fewer than a batch: batch_size={n} "
            "(--batch-size)"
        )
    for data in (train_set, val_set):
        validate_data(model, data)
    if model.context is not None and model.context.binary and not hp.binarise:
        if hp.warp:
            raise InputError("warp: bent images are not binary; pass binarise=True (--binarise)")
        image = train_set[0][0]
        if not ((image == 0) | (image == 1)).all():
            raise InputError(
                "a 'bernoulli' with a context is for pixels that are 0 or 1; pass binarise=True "
                "(--binarise), or context=None"
            )


def validate_data(model: HVAE, dataset: Dataset) -> None:
    """Raises InputError if a data set is empty, or its images or texts are not the model's."""
    image, label = first_item(dataset)
    if tuple(image.shape) != model.input_shape:
        raise InputError(
            f"the data's images are {tuple(image.shape)}, the model's {model.input_shape}"
        )
    model.check_images(image[None])
    if model.text_length is None:
        return
    if getattr(label, "ndim", None) != 1:  # of a tensor or an array
        raise InputError(
            f"the data's labels are no texts as indices ({model.text_length},), which the model "
            "needs; text_length=None is the unconditional model"
        )
    if len(label) != model.text_length:
        raise InputError(
            f"the data's texts have {len(label)} symbols, the model's {model.text_length}"
        )
    source = source_of(dataset)
    lengths = possible_lengths(getattr(source, "lengths", None) or [])
    if not set(lengths) <= set(model.possible_lengths):
        raise InputError(
            f"the data's texts have {span(lengths)} symbols, the model's "
            f"{span(model.possible_lengths)}"
        )
    charset = getattr(source, "charset", model.charset)
    if charset != model.charset:
        raise InputError(
            f"the data's texts are indices into {charset!r}, the model's into {model.charset!r}"
        )


def validate_folder(out: Path, resume: bool, dataset: Dataset | None) -> None:
    """Raises InputError if training into a folder would lose a run or a model, or spoil data."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder")
    source = source_of(dataset)
    if isinstance(source, CaptchaFolder):
        place, root = out.resolve(), source.root.resolve()
        if root in (place, *place.parents):
            raise InputError(f"{out} lies in {source.root}: the run's pictures would become data")
    has_model = (out / "hvae.pt").exists()
    if not resume and (has_state(out) or has_model):
        raise InputError(
            f"{out} holds a run: continue it (--resume, resume=True), or choose another"
        )
    # metrics.csv without a state: the run was killed during its first checkpoint
    begun = (out / "metrics.csv").exists()
    if resume and has_model and not has_state(out) and not begun:
        raise InputError(f"{out} holds a model, but no run that could be resumed; choose another")


def description_of(dataset: Dataset):
    """What a checkpoint tells of its data: their `description`, or the name of their class."""
    source = source_of(dataset)
    description = getattr(source, "description", type(source).__name__)
    if source is not dataset and isinstance(description, dict):
        description = {**description, "subset": len(dataset)}
    description = getattr(dataset, "description", description)  # a Subset's own, if it has one
    try:
        json.dumps(description)
    except TypeError as error:
        raise InputError(f"description: a checkpoint cannot hold it as JSON ({error})") from error
    return description


# ---------------------------------------------------------------------------- command line

ARCHITECTURE = ("inference", "likelihood", "sigma", "mixtures", "context", "prior_context", "flow")


def training_parser() -> argparse.ArgumentParser:
    parser = make_parser("Trains an HVAE on rendered captchas, on MNIST or on a folder of images.")
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=("captcha", "mnist"), help="rendered captchas, the default, or digits")
    add("--folder", type=path_argument, metavar="DIR", help="train on the images in this folder")
    add("--skip-bad", action="store_true", help="leave out damaged or misnamed files of the folder")
    add("--root", type=path_argument, default="data", metavar="DIR", help="of MNIST's files")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="image size; 60 160, or the folder's")
    grey = "of the folder's images: 1 is grey; default: 3, or 1 if all files are grey"
    add("--channels", type=int, choices=(1, 3), help=grey)
    add("--length", type=int, help="symbols in the longest text; default: 4 for renders, else none")
    add("--shortest", type=int, help="symbols in the shortest text; default: --length for renders")
    add("--charset", help="the symbols of the texts; digits and upper-case letters")
    add("--fonts", nargs="+", type=path_argument, metavar="FILE", help="font files, or names")
    add("--images", type=int, help="images to render (default: a million), or to evaluate on")
    add("--workers", type=int, default=1, help="processes that load or render")
    add = parser.add_argument_group("model").add_argument
    by_data = "architecture and training; default: captcha, or mnist-hvae with --data mnist"
    add("--config", choices=tuple(CONFIGS), help=by_data)
    add("--init", type=path_argument, metavar="FILE", help="begin with this checkpoint's weights")
    add("--inference", choices=("top-down", "bottom-up"), help="the form of q(z|x)")
    add("--likelihood", choices=("gaussian", "logistic", "bernoulli"), help="p(x|z)")
    add("--sigma", type=float, help="of the gaussian, for images in [-1, 1]")
    add("--mixtures", type=int, help="components of the logistic")
    window = dict(type=int, nargs=2, metavar=("ROWS", "COLUMNS"))
    add("--context", **window, help="earlier pixels that p(x|z) sees, too; 0 0 for none")
    add("--prior-context", **window, help="earlier positions that p(z_l|.) sees, too; 0 0 for none")
    add("--flow", type=int, help="couplings of p(z_L)'s flow, 0 for N(0, I)")
    add("--unconditional", action="store_true", help="leave the texts unused")
    group = parser.add_argument_group("training")
    for f in fields(Hyperparameters):
        add_hyperparameter(group, f)
    add = group.add_argument
    add("--device", help="cpu, cuda, ...; CUDA if there is one")
    add("--out", type=path_argument, default="checkpoints/run", help="folder of the run's files")
    add("--keep", action="store_true", help="keep the model of every evaluation, as hvae-STEP.pt")
    add("--resume", action="store_true", help="continue the run in that folder, same options")
    add = parser.add_argument_group("instead of training").add_argument
    add("--evaluate", type=path_argument, metavar="FILE", help="measure it on held-out images")
    add("--importance-samples", type=int, default=1, help="draws of z for the bound on log p(x)")
    return parser


def add_hyperparameter(group, f) -> None:
    """A field of Hyperparameters as a flag."""
    name, default, help = "--" + f.name.replace("_", "-"), f.default, f.metadata["help"]
    if f.type is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=help)
    elif f.name == "free_nats":
        group.add_argument(name, type=float, nargs="+", metavar="NATS", help=help)
    else:
        kind = float if f.type in (float, float | None) else int
        group.add_argument(name, type=kind, default=default, help=help)


def parse(
    arguments: Sequence[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace, set[str]]:
    """The arguments, with the defaults of the config that they name, and which were given."""
    parser = training_parser()
    args = parser.parse_args(arguments)
    given = given_options(parser, arguments, args)
    config = args.config or ("mnist-hvae" if args.data == "mnist" else "captcha")
    parser.set_defaults(config=config, **TRAINING[config])
    if config.startswith("mnist") and not args.folder:
        parser.set_defaults(data="mnist")
    return parser, parser.parse_args(arguments), given


def unused_options(args: argparse.Namespace) -> dict[str, set[str]]:
    """The options that have no effect, by the reason."""
    architecture = {*ARCHITECTURE, "config", "unconditional"}
    training = {f.name for f in fields(Hyperparameters)} | {"keep", "resume", "init"}
    images = set() if args.evaluate else {"images"}
    of_folder = {"skip_bad", "channels"}
    unused = {}
    if args.folder:
        unused["with --folder"] = {"fonts", "root", "data"} | images
        if args.length is None and not args.evaluate:
            unused["without --length"] = {"shortest", "charset"}
    elif args.data == "mnist":
        unused["with --data mnist"] = {"fonts", "size", "charset", "shortest", *of_folder} | images
    elif args.data == "captcha" or not args.evaluate:
        unused["with --data captcha"] = {"root", *of_folder}
    if args.evaluate:
        files = {"size", "channels", "length", "shortest", "charset", "workers", "out"}
        return {**unused, "with --evaluate": training | architecture | files}
    unused["without --evaluate"] = {"importance_samples"}
    if args.init:
        adds_context = args.context and any(args.context)
        kept = {"config", "context", "prior_context"} | ({"mixtures"} if adds_context else set())
        unused["with --init"] = architecture - kept
    return unused


def main(arguments: Sequence[str] | None = None) -> None:
    parser, args, given = parse(arguments)
    reject_unused(parser, given, unused_options(args))
    keep_memory()
    hint = "" if args.evaluate else "; go on with the same options and --resume"
    with one_line_errors(parser, after_interrupt=hint):
        if args.images is not None:
            validate_int("--images", args.images, 1, sys.maxsize)
        if args.evaluate:
            model = HVAE.load(args.evaluate, pick_device(args.device))
            images = (args.data, args.root, args.images, args.fonts, args.folder, args.skip_bad)
            print_evaluation(model, held_out_images(model, *images), args.importance_samples)
        else:
            train_and_draw(args)
        parallel.shutdown_processes()


def train_and_draw(args: argparse.Namespace) -> None:
    """Trains, in this process or together with the others, and draws what the model learned."""
    hyperparameters = {f.name: getattr(args, f.name) for f in fields(Hyperparameters)}
    Hyperparameters(**hyperparameters)  # errors come before the data are opened
    torch.manual_seed(args.seed)
    parallel.init_processes(args.device)
    leads = parallel.rank() == 0
    with parallel.rank_0_first():
        dataset = make_dataset(args)
    model = make_model(dataset, args)
    for name in ("pixel_weight", "pixel_rise", "window_noise"):
        if model.context is None and hyperparameters[name] is not None:
            raise InputError(f"--{name.replace('_', '-')} has no effect without a context")
    if leads:
        print(model.summary())
    names = ("out", "resume", "keep", "device", "workers")
    settings = {name: getattr(args, name) for name in names}
    model, _ = train(model, dataset, **settings, **hyperparameters)
    if leads:
        save_figures(model, Path(args.out), hold_out(dataset, args.seed)[1])
        print(f"model, metrics and pictures in {args.out}")


def make_dataset(args: argparse.Namespace) -> Dataset:
    """The training images that the command line asks for."""
    if args.folder:
        shortest = 1 if args.shortest is None else args.shortest
        texts = dict(text_length=args.length, shortest=shortest, charset=args.charset)
        images = dict(skip_bad=args.skip_bad, channels=args.channels)
        return CaptchaFolder(args.folder, args.size, **texts, **images)
    if args.data == "mnist":
        return MNIST("train", args.root, args.length)
    return CaptchaDataset(
        args.images or 1_000_000,
        image_size=args.size or (60, 160),
        text_length=4 if args.length is None else args.length,
        charset=DIGITS + UPPERCASE if args.charset is None else args.charset,
        fonts=args.fonts,
        shortest=args.shortest,
    )


def make_model(dataset: Dataset, args: argparse.Namespace) -> HVAE:
    """The checkpoint to begin with, or a config with its changes, for the data's images."""
    if args.init:
        changes = given_arguments(args, ("context", "prior_context", "mixtures"))
        return begin_with(args.init, dataset, **changes)
    if args.frozen_share == 1:
        raise InputError("--frozen-share 1: untrained latents; begin with a checkpoint (--init)")
    changes = given_arguments(args, ARCHITECTURE)
    if args.likelihood == "gaussian":
        changes.setdefault("context", None)
    if args.unconditional:
        changes["text_length"] = None
    of_the_data = ("input_size", "input_channels", "text_length")
    config = {k: v for k, v in CONFIGS[args.config].items() if k not in of_the_data}
    model = model_for(dataset, **{**config, **changes})
    likelihood = model.config["likelihood"]
    for name, of in (("mixtures", "logistic"), ("sigma", "gaussian")):
        if name in changes and likelihood != of:
            raise InputError(f"--{name} has no effect on the likelihood {likelihood!r}")
    return model


def given_arguments(args: argparse.Namespace, names: Sequence[str]) -> dict:
    """Arguments of HVAE that the command line gives; a window of 0 0 is none."""
    values = {name: getattr(args, name) for name in names}
    return {k: None if v == [0, 0] else v for k, v in values.items() if v is not None}


def print_evaluation(model: HVAE, test_set: Dataset, importance_samples: int) -> None:
    """A line for each term of the ELBO."""
    draws = max(64, 200_000 // math.prod(model.input_shape))  # together, as far as memory allows
    metrics = evaluate(model, test_set, importance_samples, batch_size=draws)
    kind = "binarised images" if model.binarised else "images"
    print(f"{metrics['images']} {kind}, nats per image")
    print(f"  -ELBO             {-metrics['elbo']:>10,.2f}")
    print(f"  reconstruction    {metrics['reconstruction']:>10,.2f}")
    for l in reversed(range(len(metrics["kl"]))):
        print(f"  KL z_{l + 1}            {metrics['kl'][l]:>10,.2f}")
    bounds = metrics["bounds"] if importance_samples > 1 else {}
    for k, bound in bounds.items():
        samples = "importance sample" if k == 1 else "importance samples"
        print(f"  -log p(x) <=      {-bound:>10,.2f}   {k} {samples}")
    if metrics["bits_per_dim"] is not None:
        print(f"  bits/dim          {metrics['bits_per_dim']:>10.3f}")


if __name__ == "__main__":
    main()

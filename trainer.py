"""train() fits an HVAE, evaluate() measures one, plot_history() draws how training went.

The loss of a batch, in nats per image (see `loss_terms`):

    reconstruction + beta * sum_l max(KL_l, free_nats_l)  [ - log p(z_L) of the z_L drawn, for a flow ]

Four things make samples follow their text and look like the data; each was needed in our experiments:

    beta starts high and falls to 1. While information is dear, the model looks for the cheapest description of an
        image, and the text is free.
    closed levels: for half of every batch the lowest levels take their prior's mean instead of seeing x. What is
        left to draw the glyphs from is the top latents and the text; in half of these, at first, the very top alone.
    free_nats: what a level may say for nothing, so that the upper ones are not abandoned.
    a flow as p(z_L): nats that are free do not draw q(z_L) to its prior, so the prior is drawn to it.
"""

import argparse
import copy
import math
import os
import sys
import time
from numbers import Real
from pathlib import Path
from typing import Iterator, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.utils import save_image
from tqdm import tqdm

import parallel
from blocks import whole
from dataset import MNIST, CaptchaDataset, CaptchaFolder, Help, one_line, refuse
from flow import fit
from generate import save_figures, test_images, usual_temperature
from model import (CONFIGS, ELBO, HVAE, Normal, has_bf16, is_plain, keep_memory, lower_half, out_of_memory, per_level,
                   pick_device)
from runs import (Interruption, Run, has_state, holds_model_alone, holds_run, load_state, lock, replace, save_state,
                  saved_on_failure, shield_worker, strike, write_csv)

VERSION = "1.0"  # of this code, written into every checkpoint

# What the command line does by default for each of model.CONFIGS. Where the likelihood is what counts: no closed levels or
# free nats, unless a config says so, and a beta that rises instead of falling.
LIKELIHOOD_FIRST = dict(beta_start=0.1, beta_steps=2_000, free_nats=[0.0], closed_share=0.0)
TRAINING = {
    "captcha": {},
    "captcha-logistic": {**LIKELIHOOD_FIRST, "beta_start": 0.03, "beta_steps": 3_000, "free_nats": [0.0, 300.0, 60.0],
                         "closed_levels": 1, "closed_share": 0.25, "batch_size": 8, "steps": 26_000},
    "mnist-vae": {**LIKELIHOOD_FIRST, "batch_size": 100, "steps": 5_000},
    "mnist-hvae": {**LIKELIHOOD_FIRST, "free_nats": [0.0, 4.0, 4.0, 4.0, 4.0], "batch_size": 50, "steps": 33_000,
                   "binarise": True},
}


def train(
    model: HVAE | None = None,
    dataset: Dataset | None = None,
    *,
    steps: int = 11_000,
    batch_size: int = 32,
    lr: float = 2e-3,
    warmup: int = 200,
    beta_start: float = 5.0,
    beta_steps: int = 7_700,
    free_nats: float | Sequence[float] | None = None,
    closed_levels: int | None = None,
    closed_share: float = 0.5,
    top_share: float = 0.5,
    ema: float = 0.999,
    binarise: bool = False,
    device: str | None = None,
    bf16: bool | None = None,
    workers: int = 1,
    seed: int = 0,
    out: str | Path = "checkpoints/run",
    resume: bool = False,
    keep: bool = False,
    val_dataset: Dataset | None = None,
    eval_every: int = 1000,
    log_every: int = 50,
) -> tuple[HVAE, list[dict]]:
    """Trains a model and returns it, with averaged weights and in eval mode, and its history.

    In the folder `out`: hvae.pt (the averaged model, for HVAE.load), metrics.csv (the history), loss.png, samples.png,
    and state.pt, from which `resume=True`, with the same arguments, goes on as if there had been no interruption. SIGTERM
    and Ctrl-C save the state before they end the run. Under torchrun, several processes share every batch; see parallel.py.

    Args:
        model: None is HVAE(), with the data's image size and text.
        dataset: of (image (C, H, W) in [0, 1], label (T,)); None renders captchas without end.
        steps, batch_size, lr, warmup: AdamW; the rate rises over `warmup` steps, then falls as a cosine to 2%.
        beta_start, beta_steps: beta goes exponentially from beta_start to 1 over this many steps. A run that is over
            before draws legible letters sooner: the fewer images, the less a latent should be allowed to hold.
        free_nats: per image, averaged over the batch; one number for every level, or one each from z_1 up. None is 40,
            and 80 for the top level: more than its KL at the start, so that nothing keeps z_L from finding its use.
        closed_levels, closed_share: how many of the lowest levels are closed, and for which share of each batch; None
            closes the lower half of a top-down model, rounded up. Bottom-up models have no closed levels.
        top_share: in the first third of the run, in this share of the images with closed levels, every level but the top
            is closed. What belongs to the image as a whole, its colours above all, thus finds its way into z_L.
        ema: decay of the weights' moving average.
        binarise: draw every pixel as 0 or 1 with its value as the probability, anew whenever an image is used.
        device: None takes CUDA if there is one.
        bf16: None uses bfloat16 autocast where the hardware has it.
        keep: keep the averaged model of every evaluation, as hvae-STEP.pt.
        val_dataset: held-out images; None renders the split 'val', or sets a tenth of other data aside.
        eval_every: steps between evaluations, samples and checkpoints.
        log_every: steps that a row of the history averages over.

    Raises:
        ValueError: an argument is out of range, data and model do not fit, `out` holds a run and resume is False, or a
            model and no run and resume is True, or both its states are damaged, or a batch cannot be shared evenly by the
            processes.
        OSError: a file cannot be written.
        FloatingPointError: naming the term of the ELBO that stayed NaN or infinite for many steps.
    """
    check_seed(seed)
    check_whole(1, steps=steps, batch_size=batch_size, beta_steps=beta_steps, eval_every=eval_every, log_every=log_every)
    check_whole(0, warmup=warmup, workers=workers)
    lr, beta_start, closed_share, top_share, ema = check_numbers(lr, beta_start, closed_share, top_share, ema)
    out = Path(out)
    if holds_run(out) and not resume:
        raise ValueError(f"{out} holds a run: continue it with resume=True, or choose another folder")
    if resume and holds_model_alone(out):
        raise ValueError(f"{out} holds a model, but no run that could be resumed; choose another folder")
    device = parallel.join(device)
    leads = parallel.rank() == 0
    bf16 = has_bf16(device) if bf16 is None else bf16
    torch.set_flush_denormal(True)  # tiny numbers are slow on a CPU and mean nothing here
    keep_memory()
    torch.manual_seed(seed)
    dataset = CaptchaDataset(1_000_000) if dataset is None else dataset
    train_set, val_set = (dataset, val_dataset) if val_dataset is not None else hold_out(dataset, seed)
    model = model_for(dataset) if model is None else model
    check_batch(train_set, batch_size)
    check_fit(model, train_set)
    check_fit(model, val_set)
    if not is_plain([model.provenance, getattr(dataset, "description", None)]):
        raise ValueError("the data set's description holds something other than numbers, strings, lists and dicts of them")
    closed_levels = check_closed(model, closed_levels)
    closed_first, closed_then = (parallel.share(closings(model, batch_size, closed_levels, closed_share, share)).to(device)
                                 for share in (top_share, 0.0))
    free_nats = check_free(model, free_nats)
    settings = dict(steps=steps, batch_size=batch_size, lr=lr, warmup=warmup, beta_start=beta_start, beta_steps=beta_steps,
                    free_nats=free_nats, closed_levels=closed_levels, closed_share=closed_share, top_share=top_share, ema=ema,
                    binarise=bool(binarise), seed=seed, images=len(train_set))
    free_nats = torch.tensor(free_nats, device=device)
    model.to(device).train()
    out.mkdir(parents=True, exist_ok=True)
    alone = lock(out) if leads else None  # noqa: F841, held to the end; also, can the folder be written to?

    forward = parallel.wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    run = Run(model, copy.deepcopy(model).eval().requires_grad_(False), optimizer, settings=settings)
    if has_state(out / "state.pt"):
        load_state(out / "state.pt", run)
    else:
        if not model.provenance:  # fresh weights
            model.set_output_level(torch.stack([train_set[i][0] for i in range(min(64, len(train_set)))]).to(device))
        run.average.load_state_dict(model.state_dict())
    if run.step > steps:
        raise ValueError(f"{out} holds {run.step} steps, more than steps={steps}")
    if not parallel.agree(run.step, device):
        raise ValueError(f"{out}: the processes find different states in it; do all of them share that folder?")

    indices = map(parallel.share, batches(len(train_set), batch_size, seed, run.step, steps))
    loader = DataLoader(train_set, batch_sampler=indices,
                        num_workers=workers, pin_memory=device.type == "cuda", generator=torch.Generator(),
                        worker_init_fn=shield_worker)
    start = time.time() - run.seconds
    bar = tqdm(loader, initial=run.step, total=steps, desc="train", unit="step", dynamic_ncols=True, mininterval=1,
               disable=not leads)
    with Interruption() as stop:
        for x, y in saved_on_failure(bar, out / "state.pt", run):
            if parallel.size() > 1:  # every process its own noise, and again the same after an interruption
                torch.manual_seed((seed * 1_000_003 + run.step) * parallel.size() + parallel.rank())
            x = x.to(device, non_blocking=True, memory_format=torch.channels_last)
            x = binarised(x) if binarise else x
            y = y.to(device, non_blocking=True) if model.text_length is not None else None
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate(run.step, steps, warmup)
            beta = beta_start ** max(0.0, 1 - run.step / beta_steps)
            closed = closed_first if 3 * run.step < steps else closed_then

            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, terms = loss_terms(forward, x, y, beta, free_nats, closed)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            run.step += 1
            if run.clip(model):
                optimizer.step()
                update_average(run.average, model, min(ema, run.step / (run.step + 10)))
            else:
                copy_buffers(run.average, model)  # batch norm has seen what was skipped
            run.record(terms)

            run.seconds = time.time() - start
            checkpoint = run.step % eval_every == 0 or run.step == steps
            if run.step % log_every == 0 or checkpoint:
                row = run.log(batch_size, beta)
                bar.set_postfix_str(describe(row, len(model.levels)))
            if checkpoint and leads:
                metrics = evaluate(run.average, val_set, batch_size=batch_size, binarise=binarise, bf16=bf16)
                if not math.isfinite(metrics["elbo"]):
                    raise FloatingPointError(f"step {run.step}: the held-out ELBO is {metrics['elbo']}: the weights are ruined, "
                                             "or a held-out image is broken; what was saved before is untouched")
                row.update(held_out_columns(metrics))
                run.average.provenance = provenance(dataset, run, batch_size, binarise, metrics, device)
                write_files(out, run, seed, keep)
                tqdm.write(f"step {run.step}: held out -elbo {-metrics['elbo']:,.1f} nats = reconstruction "
                           f"{metrics['reconstruction']:,.1f} + kl {sum(metrics['kl']):,.1f}")
            number = parallel.any_signal(stop.signal, device)  # one that arrives meanwhile is for the next step
            if number:
                with parallel.leader_first():  # torchrun ends the rest as soon as one is gone
                    if leads:
                        save_state(out / "state.pt", run)
                strike(number)
    if stop.signal:  # in the last step
        strike(stop.signal)
    return run.average, run.history


def binarised(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Every pixel drawn as 0 or 1 with its value as the probability; NaN stays, so that its step is skipped."""
    return torch.where(x.isfinite(), torch.bernoulli(x.nan_to_num(0, 0, 0).clamp(0, 1), generator=generator), x)


def closings(model: HVAE, batch_size: int, closed_levels: int, closed_share: float, top_share: float) -> Tensor:
    """(B,): how many of the lowest levels are closed, for each image of a batch."""
    closed = torch.zeros(batch_size, dtype=torch.long)
    if closed_levels:
        closed[: int(closed_share * batch_size)] = closed_levels
        closed[: int(top_share * closed_share * batch_size)] = len(model.levels) - 1
    return closed


def fit_prior(model: HVAE, dataset: Dataset, images: int = 150_000, steps: int = 10_000, batch_size: int = 256,
              lr: float = 1e-3, workers: int = 1, seed: int = 0, binarise: bool = False) -> HVAE:
    """Fits p(z_L), a flow, to q(z_L) over the first so many images of a data set; all else stays as it is.

    What training has left between the two is what keeps samples from looking like reconstructions, and this takes
    minutes (a second stage, as in Dai & Wipf 2019, section 4). Changes the model, and returns it in eval mode.

    Raises:
        ValueError: the model has no flow.
    """
    top = model.eval().levels[-1]
    if top.flow is None:
        raise ValueError("p(z_L) is N(0, I) in this model; there is no flow to fit (flow=24, or --flow 24, begins one)")
    device = model.to_image.weight.device
    torch.manual_seed(seed)
    first = Subset(dataset, range(min(images, len(dataset))))
    mu, logvar = encode_top(model, DataLoader(first, 100, num_workers=workers, worker_init_fn=shield_worker), binarise)

    def draw(n: int) -> Tensor:
        i = torch.randint(len(mu), (n,), device=device)
        return Normal(mu[i], logvar[i]).sample()

    p = top.prior(torch.empty(batch_size, 0, device=device))  # p(z_L) looks at nothing but the number
    fit(p, draw, steps, batch_size, lr)
    model.provenance = {**model.provenance, "prior_fit": {"images": len(first), "steps": steps, "batch_size": batch_size}}
    return model


@torch.no_grad()
def encode_top(model: HVAE, loader: DataLoader, binarise: bool) -> tuple[Tensor, Tensor]:
    """mu and logvar of q(z_L|.) of every image, (n, c) each."""
    device = model.to_image.weight.device
    posteriors = []
    for x, y in tqdm(loader, desc="encode", unit="batch", dynamic_ncols=True, mininterval=1):
        x = binarised(x) if binarise else x
        y = y.to(device) if model.text_length is not None else None
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            posteriors.append(model.infer(x.to(device), y)[1][-1][0])
            if not all(part.isfinite().all() for part in posteriors[-1]):
                raise FloatingPointError(f"an image among the first {100 * len(posteriors)} is encoded to NaN")
    return torch.cat([q.mu for q in posteriors]), torch.cat([q.logvar for q in posteriors])


def with_flow(model: HVAE, couplings: int) -> HVAE:
    """The same model with a fresh flow as p(z_L)."""
    changed = HVAE(**{**model.config, "flow": couplings})
    weights = {name: weight for name, weight in model.state_dict().items() if ".flow." not in name}
    changed.load_state_dict(weights, strict=False)
    changed.provenance = model.provenance
    return changed


def with_neighbours(model: HVAE) -> HVAE:
    """The same model of the same images, whose pixels' means can be taught to move with their neighbours'.

    Raises:
        ValueError: its likelihood is not the logistic.
    """
    changed = HVAE(**{**model.config, "neighbours": True})
    weights = model.state_dict()
    more = changed.to_image.out_channels - model.to_image.out_channels
    weights["to_image.weight"] = torch.nn.functional.pad(weights["to_image.weight"], (0, 0, 0, 0, 0, more))
    weights["to_image.bias"] = torch.nn.functional.pad(weights["to_image.bias"], (0, more))
    changed.load_state_dict(weights)
    changed.provenance = model.provenance
    return changed


def loss_terms(model: HVAE, x: Tensor, y: Tensor | None, beta: float, free_nats: float | Tensor, closed: Tensor):
    """The loss of a batch and, for the record, its terms as numbers.

    `free_nats` is one number or (L,). `closed` (B,) is the number of lowest levels that take their prior's mean, per
    image; those have no KL. Free bits (Kingma et al. 2016, eq. 15) hold for a level's mean over the images in which it
    is open.
    """
    elbo = model(x, y, closed)
    levels = getattr(model, "module", model).levels  # inside DistributedDataParallel
    is_open = closed[:, None] <= torch.arange(len(levels), device=x.device)  # (B, L)
    unclosed = elbo.reconstruction[closed == 0]
    sums = [is_open.sum(0), (elbo.kl * is_open).sum(0), unclosed.sum()[None], elbo.reconstruction.sum()[None]]
    n, kl, of_unclosed, of_all = parallel.total(torch.cat(sums)).split([len(levels), len(levels), 1, 1])
    images = parallel.size() * len(x)

    free = n * free_nats
    within = (kl <= free) & (free > 0)  # a chain's KL terms can be negative, and mean something then too
    cost = torch.where(within, free, parallel.size() * sums[1]) / images  # what is within has no gradient
    loss = elbo.reconstruction.mean() + beta * cost.sum()
    if levels[-1].flow is not None:  # fitted to every draw, though the KL that it is part of may be free
        z = elbo.z_top.detach()
        loss = loss - levels[-1].prior(z).log_prob(z).mean()

    kl, reconstruction = (kl / n).tolist(), (of_unclosed / n[0]).item()
    terms = {"neg_elbo": reconstruction + sum(kl), "reconstruction": reconstruction}
    if n[0] < images:
        terms["reconstruction_closed"] = ((of_all - of_unclosed) / (images - n[0])).item()
    return loss, {**terms, **{f"kl_{l + 1}": value for l, value in enumerate(kl)}}


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The factor on lr: a linear rise, then half a cosine from 1 to 0.02."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def update_average(average: HVAE, model: HVAE, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model; buffers (batch norm's statistics) are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    copy_buffers(model, average)


@torch.no_grad()
def copy_buffers(source: HVAE, target: HVAE) -> None:
    for theirs, mine in zip(source.buffers(), target.buffers()):
        mine.copy_(theirs)


# ------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate(model: HVAE, dataset: Dataset, importance_samples: int = 1, *, batch_size: int = 64,
             binarise: bool = False, bf16: bool = False, seed: int = 0) -> dict:
    """Means over a data set, in nats per image.

    Returns:
        elbo, reconstruction, kl (a list, z_1 first); log_likelihood, the importance-weighted lower bound on log p(x)
        with that many draws of z (Burda et al. 2016, eq. 8); bounds, the same for 1, 10, 100, ... of those draws;
        bits_per_dim of log_likelihood, or None unless the likelihood is a probability of 8-bit images ('logistic').
    """
    if not whole(importance_samples, 1):
        raise ValueError(f"importance_samples: expected a positive whole number, got {importance_samples!r}")
    if len(dataset) == 0:
        raise ValueError("evaluate: the data set is empty")
    device = model.to_image.weight.device
    was_training = model.training
    model.eval()
    draws = min(importance_samples, batch_size)  # of each image, at a time
    sums = None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        pixels = torch.Generator(device).manual_seed(seed)  # the same images, however many draws of z
        for x, y in tqdm(DataLoader(dataset, max(1, batch_size // draws)), desc="evaluate", delay=20, leave=False):
            x, y = x.to(device), y.to(device) if model.text_length is not None else None
            x = binarised(x, pixels) if binarise else x
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                elbos = [model(x, y, draws=min(draws, importance_samples - first))
                         for first in range(0, importance_samples, draws)]
            log_weights = torch.cat([elbo.log_weight.view(len(x), -1) for elbo in elbos], 1).double()  # (B, K)
            terms = torch.cat([terms_by_image(elbo, len(x)) for elbo in elbos], 1).double().mean(1)  # (B, 2 + L)
            bounds = importance_bounds(log_weights.T)
            columns = torch.cat([terms, *bounds.values()], 1).sum(0)
            sums = columns if sums is None else sums + columns
    model.train(was_training)
    elbo, reconstruction, *rest = (sums / len(dataset)).tolist()
    kl, bounds = rest[: len(model.levels)], dict(zip(bounds, rest[len(model.levels) :]))
    log_likelihood = bounds[importance_samples]
    c, h, w = model.input_shape
    bits = -log_likelihood / (c * h * w * math.log(2)) if model.likelihood == "logistic" else None
    return {"elbo": elbo, "reconstruction": reconstruction, "kl": kl, "log_likelihood": log_likelihood, "bounds": bounds,
            "importance_samples": importance_samples, "images": len(dataset), "bits_per_dim": bits}


def terms_by_image(elbo: ELBO, images: int) -> Tensor:
    """(images, draws, 2 + L): the ELBO, the reconstruction and the KL terms."""
    return torch.cat([elbo.elbo[:, None], elbo.reconstruction[:, None], elbo.kl], 1).unflatten(0, (images, -1))


def importance_bounds(log_weights: Tensor) -> dict[int, Tensor]:
    """Lower bounds on log p(x) from log weights (K, B): by number of draws k = 1, 10, ... K, each (B, 1).

    For a k below K the draws form K // k groups, whose bounds are averaged.
    """
    total = len(log_weights)
    numbers = sorted({10**i for i in range(len(str(total)))} | {total})
    groups = {k: log_weights[: total // k * k].unflatten(0, (-1, k)) for k in numbers}  # (K // k, k, B)
    return {k: (group.logsumexp(1) - math.log(k)).mean(0)[:, None] for k, group in groups.items()}


def save_samples(model: HVAE, path: Path, seed: int) -> None:
    """A sheet: the same 8 texts at the usual temperature, at 0.5 and at 0.8."""
    device = model.to_image.weight.device
    rows = [model.sample(8, temperature=T, generator=torch.Generator().manual_seed(seed))
            for T in (usual_temperature(model), 0.5, 0.8)]
    save_image(torch.cat(rows).to(device), path, nrow=8, pad_value=1)


def plot_history(history: Sequence[dict], path: str | Path | None = None):
    """Draws the loss and the KL of every level against images seen; writes a picture if given a path.

    Returns the matplotlib figure.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    seen = lambda rows: [row["images"] / 1000 for row in rows]
    for key, label in [("neg_elbo", "training"), ("reconstruction_closed", "reconstruction, lower levels closed")]:
        if history and key in history[0]:
            left.plot(seen(history), [row.get(key, math.nan) for row in history], label=label, linewidth=1)
    held_out = [row for row in history if row.get("val_neg_elbo") not in (None, "")]
    left.plot(seen(held_out), [row["val_neg_elbo"] for row in held_out], "k.-", label="held out")
    left.set(xlabel="thousand images seen", ylabel="-ELBO (nats per image)")
    left.legend()
    for key in [key for key in (history[0] if history else {}) if key.startswith("kl_")]:
        right.plot(seen(history), [row.get(key, math.nan) for row in history], label=f"z_{key[3:]}", linewidth=1)
    right.set(xlabel="thousand images seen", ylabel="KL (nats per image)", yscale="log")
    right.legend(ncols=2)
    if path is not None:
        figure.savefig(path, dpi=100)
    return figure


# ------------------------------------------------------------------------------------------------ data and devices


def batches(n: int, batch_size: int, seed: int, start: int, steps: int) -> Iterator[list[int]]:
    """The indices of batches start .. steps-1: epoch after epoch, each shuffled by (seed, epoch) alone."""
    per_epoch = n // batch_size
    epoch, order = -1, None
    for step in range(start, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        first = (step % per_epoch) * batch_size
        yield order[first : first + batch_size]


def hold_out(dataset: Dataset, seed: int, most: int = 512) -> tuple[Dataset, Dataset]:
    """(training set, validation set): another split where the data are rendered, else a tenth set aside."""
    if hasattr(dataset, "other_split"):
        return dataset, dataset.other_split("val", most)
    n = min(most, max(1, len(dataset) // 10))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(dataset, sorted(order[n:])), Subset(dataset, sorted(order[:n]))


def model_for(dataset: Dataset, **arguments) -> HVAE:
    """The default model for this data set's images and texts; arguments override."""
    if len(dataset) == 0:
        raise ValueError("the training set has no images")
    image, _ = dataset[0]
    data = dict(input_channels=image.shape[0], input_size=tuple(image.shape[1:]),
                text_length=getattr(dataset, "text_length", None))
    if data["text_length"] is not None:
        data["charset"] = dataset.charset
    return HVAE(**{**data, **arguments})


def check_seed(seed: int) -> None:
    """Raises ValueError unless every number that is derived from this seed is one that torch takes."""
    if not whole(seed, 0) or seed >= 2**32:
        raise ValueError(f"seed: expected a whole number from 0 to 2^32 - 1, got {seed!r}")


def check_whole(least: int, **values) -> None:
    """Raises ValueError naming the first value that is not a whole number from `least` up."""
    for name, value in values.items():
        if not whole(value, least):
            raise ValueError(f"{name}: expected a whole number from {least} up, got {value!r}")


def check_numbers(lr, beta_start, closed_share, top_share, ema) -> list[float]:
    """The same as plain numbers, which the state of a run can hold.

    Raises:
        ValueError: naming the first that is out of range.
    """
    ranges = {"lr": (lr, lambda n: 0 < n < math.inf), "beta_start": (beta_start, lambda n: 0 < n < math.inf),
              "closed_share": (closed_share, lambda n: 0 <= n < 1), "top_share": (top_share, lambda n: 0 <= n <= 1),
              "ema": (ema, lambda n: 0 <= n < 1)}
    for name, (value, fits) in ranges.items():
        if not (isinstance(value, Real) and fits(value)):
            raise ValueError(f"{name}: {value!r} is not a number in its range")
    return [float(value) for value, _ in ranges.values()]


def check_free(model: HVAE, free_nats: float | Sequence[float] | None) -> list[float]:
    """The free nats of every level, z_1 first; by default 40, and 80 for the top."""
    levels = len(model.levels)
    return per_level("free_nats", [40.0] * (levels - 1) + [80.0] if free_nats is None else free_nats, levels)


def check_closed(model: HVAE, closed_levels: int | None) -> int:
    """The number of levels to close: the lower half of a top-down model, rounded up, unless it is given."""
    levels = len(model.levels)
    most = levels - 1 if model.top_down else 0
    if closed_levels is None:
        return min(lower_half(levels), most)
    if not whole(closed_levels, 0) or closed_levels > most:
        raise ValueError(f"closed_levels: a {model.config['inference']} model of {levels} levels can close up to {most}, "
                         f"got {closed_levels}")
    return closed_levels


def check_batch(dataset: Dataset, batch_size: int) -> None:
    """Raises ValueError if the training set is too small for a batch, or that cannot be shared by the processes."""
    if batch_size % parallel.size():
        raise ValueError(f"batch_size: {batch_size} images cannot be shared evenly by {parallel.size()} processes")
    if len(dataset) < batch_size:
        raise ValueError(f"the training set has {len(dataset)} images, fewer than batch_size={batch_size}")


def check_fit(model: HVAE, dataset: Dataset) -> None:
    """Raises ValueError if a data set is empty, or its images or texts are not the model's."""
    if len(dataset) == 0:
        raise ValueError("the data set has no images")
    image, label = dataset[0]
    if tuple(image.shape) != model.input_shape:
        raise ValueError(f"the data's images are {tuple(image.shape)}, the model's {model.input_shape}")
    if model.text_length is not None and len(label) != model.text_length:
        raise ValueError(f"the data's texts have {len(label)} symbols, the model's {model.text_length}")
    source = dataset.dataset if isinstance(dataset, Subset) else dataset
    charset = getattr(source, "charset", model.charset)
    if model.text_length is not None and charset != model.charset:
        raise ValueError(f"the data's texts are indices into the charset {charset!r}, the model's into {model.charset!r}")


# ------------------------------------------------------------------------------------------------ files


def write_files(out: Path, run: Run, seed: int, keep: bool) -> None:
    """Everything a run leaves in its folder; the state last, because with it the step counts as done."""
    write_csv(out / "metrics.csv", run.history)
    plot_history(run.history, out / "loss.png")
    save_samples(run.average, out / "samples.png", seed)
    replace(out / "hvae.pt", run.average.save)
    if keep:
        replace(out / f"hvae-{run.step:06d}.pt", run.average.save)
    save_state(out / "state.pt", run)


def held_out_columns(metrics: dict) -> dict:
    """What evaluate() found, as columns of the history."""
    kl = {f"val_kl_{l + 1}": value for l, value in enumerate(metrics["kl"])}
    return {"val_neg_elbo": -metrics["elbo"], "val_reconstruction": metrics["reconstruction"], **kl}


def provenance(dataset: Dataset, run: Run, batch_size: int, binarise: bool, metrics: dict, device: torch.device) -> dict:
    """What a checkpoint says of its origin, in plain values; steps, images and seconds include those of the checkpoint
    that training began with."""
    began = run.model.provenance
    before = {name: began.get(name, 0) for name in ("steps", "images_seen", "seconds")}
    return {"version": VERSION, "torch": str(torch.__version__),
            "data": getattr(dataset, "description", type(dataset).__name__), "binarised": bool(binarise),
            "steps": before["steps"] + run.step, "images_seen": before["images_seen"] + run.step * batch_size,
            "seconds": before["seconds"] + round(run.seconds), "device": str(device), "cpus": os.cpu_count(),
            "held_out": metrics, "began_with": began}


def describe(row: dict, levels: int) -> str:
    """A row for the progress bar: nats per image, levels from the top down."""
    if "neg_elbo" not in row:
        return f"{row['skipped']} steps skipped, none taken"
    kl = " ".join(f"{row[f'kl_{l}']:.0f}" for l in range(levels, 0, -1))
    skipped = f" | skipped {row['skipped']}" if row["skipped"] else ""
    return (f"-elbo {row['neg_elbo']:,.0f} nats = rec {row['reconstruction']:,.0f} + kl {kl} | beta {row['beta']:.1f}"
            f"{skipped}")


# ------------------------------------------------------------------------------------------------ command line


def make_parser(config: str) -> argparse.ArgumentParser:
    """The command line, with the defaults of one of CONFIGS."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", formatter_class=Help,
                                     description="Trains an HVAE on rendered captchas, on MNIST or on a folder of images.")
    data = parser.add_argument_group("data").add_argument
    data("--data", choices=("captcha", "mnist"), default="captcha", help="rendered captchas, or handwritten digits")
    data("--folder", metavar="DIR", help="train on the images in this folder instead")
    data("--skip-bad", action="store_true", help="leave out the files of the folder that are damaged or misnamed")
    data("--root", default="data", metavar="DIR", help="where MNIST is, or is downloaded to")
    data("--size", type=int, nargs=2, metavar=("H", "W"), help="image size; the renderer's 60 160, or the folder's own")
    data("--length", type=int, help="symbols in a text; 4 when rendering, else none; 1 gives the model MNIST's digits")
    data("--charset", help="the symbols of the texts; digits and upper-case letters")
    data("--fonts", nargs="+", metavar="FILE", help="TrueType files to render with")
    data("--images", type=int, help="of the rendered training set, a million; with --evaluate, how many to measure on")
    data("--cache", help="'memory', or a folder: keep rendered images there")
    data("--workers", type=int, default=1, help="processes that load or render")
    made = parser.add_argument_group("model").add_argument
    made("--config", choices=tuple(CONFIGS), default=config, help="architecture, and defaults of what follows")
    made("--init", metavar="FILE", help="begin with the architecture and the weights of this checkpoint; "
         "of --config only the defaults of the training then count")
    made("--inference", choices=("top-down", "bottom-up"), help="the form of q(z|x); default: as in the config")
    made("--likelihood", choices=("gaussian", "logistic", "bernoulli"), help="p(x|z); default: as in the config")
    made("--sigma", type=float, help="of the gaussian, for images in [-1, 1]; default: as in the config")
    made("--mixtures", type=int, help="components of the logistic; default: as in the config")
    made("--neighbours", action=argparse.BooleanOptionalAction,
         help="of the logistic: a pixel's distribution depends on the four before it too; default: as in the config; "
         "can be added to --init")
    made("--flow", type=int, help="couplings of p(z_L)'s flow, 0 for N(0, I); default: as in the config, or 24 for a ladder "
         "with a vector on top; with --init or --fit-prior, a fresh one")
    made("--unconditional", action="store_true", help="leave the texts unused")
    option = parser.add_argument_group("training").add_argument
    option("--steps", type=int, default=11_000, help="training steps in all")
    option("--batch-size", type=int, default=32, help="images per step")
    option("--lr", type=float, default=2e-3, help="learning rate")
    option("--warmup", type=int, default=200, help="steps over which the learning rate rises")
    option("--beta-start", type=float, default=5.0, help="weight of the KL at the start; it goes to 1")
    option("--beta-steps", type=int, default=7_700, help="steps over which it does")
    option("--free-nats", type=float, nargs="+", metavar="NATS",
           help="KL that costs nothing: for every level, or one each from z_1 up; default: 40, and 80 for the top")
    option("--closed-levels", type=int, help="lowest levels closed for a part of each batch; default: the lower half")
    option("--closed-share", type=float, default=0.5, help="that part of each batch")
    option("--top-share", type=float, default=0.5, help="the part of those images in which only the top is open, at first")
    option("--ema", type=float, default=0.999, help="decay of the averaged weights")
    option("--binarise", action="store_true", help="draw every pixel as 0 or 1, anew at every step")
    option("--eval-every", type=int, default=1000, help="steps between evaluations, samples and checkpoints")
    option("--device", help="cpu, cuda, ...; CUDA if there is one")
    option("--seed", type=int, default=0, help="of the weights, the noise and the order of the data")
    option("--out", default="checkpoints/run", help="folder for the model, the metrics and the pictures")
    option("--keep", action="store_true", help="keep the model of every evaluation, as hvae-STEP.pt")
    option("--resume", action="store_true", help="continue the run in that folder, with the same options")
    option("--fit-prior", metavar="FILE", help="train nothing but this checkpoint's p(z_L), on 150,000 images: ten minutes, "
           "and samples come closer to reconstructions")
    measure = parser.add_argument_group("measuring").add_argument
    measure("--evaluate", metavar="FILE",
            help="train nothing: measure this checkpoint on the split 'test', or on all of a folder")
    measure("--importance-samples", type=int, default=1, help="draws of z per image for its bound on log p(x)")
    parser.set_defaults(**TRAINING[config])
    return parser


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The arguments, with the defaults of the config that they name."""
    parser = make_parser("captcha")
    first = parser.parse_args(arguments)
    if first.data == "mnist" and first.config == "captcha":
        parser = make_parser("mnist-hvae")
    elif first.config != "captcha":
        parser = make_parser(first.config)
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    parser, args = parse(arguments)
    go_on = "go on with the same options and --resume"
    keep_memory()
    try:
        check_seed(args.seed)
        if args.evaluate:
            model = HVAE.load(args.evaluate, pick_device(args.device))
            print_evaluation(model, test_set_for(model, args), args.importance_samples)
        elif args.fit_prior:
            save_fitted_prior(args)
        else:
            train_and_draw(args)
        parallel.leave()
    except (ValueError, OSError, FloatingPointError, OverflowError) as error:
        refuse(parser, one_line(error))
    except KeyboardInterrupt:
        sys.exit("interrupted" if args.evaluate or args.fit_prior else f"interrupted; {go_on}")
    except (RuntimeError, MemoryError) as error:
        first = (str(error) or "MemoryError").splitlines()[0]
        if out_of_memory(error):
            refuse(parser, f"not enough memory: {first}")
        if "DataLoader worker" in first:  # one that was killed, or ran out of memory
            sys.exit(f"{first}; {go_on}")
        if parallel.size() == 1:
            raise
        sys.exit(f"another process of this run is gone ({first}); {go_on}")


def train_and_draw(args: argparse.Namespace) -> None:
    """Trains, on this process or together with the others of torchrun, and draws what the model has learned."""
    torch.manual_seed(args.seed)
    parallel.join(args.device)
    leads = parallel.rank() == 0
    with parallel.leader_first():
        data_set = make_dataset(args)
    model = make_model(data_set, args)
    if leads:
        print(model.summary())
    model, _ = train(
        model, data_set, steps=args.steps, batch_size=args.batch_size, lr=args.lr, warmup=args.warmup,
        beta_start=args.beta_start, beta_steps=args.beta_steps, free_nats=args.free_nats,
        closed_levels=args.closed_levels, closed_share=args.closed_share, top_share=args.top_share, ema=args.ema,
        binarise=args.binarise, device=args.device, workers=args.workers, seed=args.seed, out=args.out, resume=args.resume,
        keep=args.keep, eval_every=args.eval_every)
    if leads:
        save_figures(model, Path(args.out), hold_out(data_set, args.seed)[1])
        print(f"model, metrics and pictures in {args.out}")


def save_fitted_prior(args: argparse.Namespace) -> None:
    """--fit-prior: writes OUT/hvae.pt."""
    if holds_run(Path(args.out)):
        raise ValueError(f"{args.out} holds a run, whose model would be lost; choose another folder with --out")
    torch.manual_seed(args.seed)
    data_set = make_dataset(args)
    model = load_changed(args.fit_prior, args).to(pick_device(args.device))
    check_fit(model, data_set)
    binarise = model.provenance.get("binarised", False)
    train_set, val_set = hold_out(data_set, args.seed)
    model = fit_prior(model, train_set, workers=args.workers, seed=args.seed, binarise=binarise)
    metrics = evaluate(model, val_set, binarise=binarise)
    model.provenance["held_out"] = metrics
    print(f"held out -elbo {-metrics['elbo']:,.1f} nats, kl of the top {metrics['kl'][-1]:,.1f}")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    replace(Path(args.out) / "hvae.pt", model.save)
    print(f"model with the fitted prior in {Path(args.out) / 'hvae.pt'}")


def make_dataset(args: argparse.Namespace) -> Dataset:
    """The training images that the command line asks for."""
    size = tuple(args.size) if args.size else None
    charset = {} if args.charset is None else {"charset": args.charset}
    if args.folder:
        return CaptchaFolder(args.folder, size, args.length, **charset, skip_bad=args.skip_bad)
    if args.data == "mnist":
        return MNIST("train", args.root, args.length)
    images = 1_000_000 if args.images is None else args.images
    length = 4 if args.length is None else args.length
    return CaptchaDataset(images, image_size=size or (60, 160), text_length=length, fonts=args.fonts, cache=args.cache,
                          **charset)


def make_model(dataset: Dataset, args: argparse.Namespace) -> HVAE:
    """The checkpoint to begin with, or the config that the command line names, with its changes, fitted to the data."""
    changes = {name: getattr(args, name) for name in ("inference", "likelihood", "sigma", "mixtures", "neighbours", "flow")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.unconditional:
        changes["text_length"] = None
    settled = [name for name, value in changes.items() if name not in ("neighbours", "flow") or value is False]
    if args.init and settled:
        raise ValueError(f"the checkpoint of --init settles the architecture, including its {', '.join(settled)}")
    if args.init:
        return load_changed(args.init, args)
    shape_free = {k: v for k, v in CONFIGS[args.config].items() if k not in ("input_size", "input_channels", "text_length")}
    return model_for(dataset, **{**shape_free, **changes})


def load_changed(path: str, args: argparse.Namespace) -> HVAE:
    """A checkpoint, with what the command line adds to it: a fresh flow, a likelihood that looks at neighbours."""
    model = HVAE.load(path)
    model = with_neighbours(model) if args.neighbours else model
    return model if args.flow is None else with_flow(model, args.flow)


def test_set_for(model: HVAE, args: argparse.Namespace) -> Dataset:
    """What --evaluate measures on: the images of the folder, or held-out ones of the data set, that the command line names."""
    if args.folder:
        images = CaptchaFolder(args.folder, model.input_shape[1:], model.text_length, model.charset, args.skip_bad)
        return images if args.images is None else Subset(images, range(min(args.images, len(images))))
    return test_images(model, args.data, args.root, args.images, args.fonts)


def print_evaluation(model: HVAE, test_set: Dataset, importance_samples: int) -> None:
    """A line per term of the ELBO."""
    binarise = model.provenance.get("binarised", False)
    draws = max(64, 200_000 // math.prod(model.input_shape))  # together, as far as memory allows
    metrics = evaluate(model, test_set, importance_samples, batch_size=draws, binarise=binarise)
    print(f"{metrics['images']} images{', binarised' * binarise}, nats per image\n"
          f"  -ELBO             {-metrics['elbo']:>10,.2f}\n"
          f"  reconstruction    {metrics['reconstruction']:>10,.2f}")
    for l in reversed(range(len(metrics["kl"]))):
        print(f"  KL z_{l + 1}            {metrics['kl'][l]:>10,.2f}")
    for k, bound in metrics["bounds"].items():
        print(f"  -log p(x) <=      {-bound:>10,.2f}   {k} importance sample{'s' * (k > 1)}")
    if metrics["bits_per_dim"] is not None:
        print(f"  bits/dim          {metrics['bits_per_dim']:>10.3f}")


if __name__ == "__main__":
    main()

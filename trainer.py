"""train() fits an HVAE, evaluate() measures one, plot_history() draws how training went.

The loss of a batch, in nats per image (see `loss_terms`):

    reconstruction + beta * sum_l max(KL_l, free_nats)

Three things make samples follow their text; each was needed in our experiments:

    beta starts high and falls to 1. While information is dear, the model looks for the cheapest description of an
        image, and the text is free.
    closed levels: for half of every batch the lowest levels take their prior's mean instead of seeing x. What is
        left to draw the glyphs from is the top latents and the text.
    free_nats: what a level may say for nothing, so that the upper ones are not abandoned.
"""

import argparse
import copy
import csv
import math
import os
import time
from pathlib import Path
from typing import Iterator, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.utils import save_image
from tqdm import tqdm

from dataset import CaptchaDataset, CaptchaFolder
from model import HVAE, pick_device

VERSION = "1.0"  # of this code, written into every checkpoint


def train(
    model: HVAE | None = None,
    dataset: Dataset | None = None,
    *,
    steps: int = 9_000,
    batch_size: int = 32,
    lr: float = 2e-3,
    warmup: int = 200,
    beta_start: float = 20.0,
    beta_share: float = 0.7,
    free_nats: float = 40.0,
    closed_levels: int | None = None,
    closed_share: float = 0.5,
    ema: float = 0.999,
    device: str | None = None,
    bf16: bool | None = None,
    workers: int = 1,
    seed: int = 0,
    out: str | Path = "checkpoints/run",
    resume: bool = False,
    val_dataset: Dataset | None = None,
    eval_every: int = 1000,
    log_every: int = 50,
) -> tuple[HVAE, list[dict]]:
    """Trains a model and returns it, with averaged weights and in eval mode, and its history.

    In the folder `out`: hvae.pt (the averaged model, for HVAE.load), metrics.csv (the history), loss.png, samples.png,
    and state.pt, from which `resume=True` goes on as if there had been no interruption.

    Args:
        model: None is HVAE(), with the data's image size and text.
        dataset: of (image (C, H, W) in [0, 1], label (T,)); None renders captchas without end.
        steps, batch_size, lr, warmup: AdamW; the rate rises over `warmup` steps, then falls as a cosine to 2%.
        beta_start, beta_share: beta falls exponentially from beta_start to 1 over this share of the steps.
        free_nats: per level and image, averaged over the batch.
        closed_levels, closed_share: how many of the lowest levels are closed, and for which share of each batch; None
            closes the lower half of a top-down model, rounded up. Bottom-up models have no closed levels.
        ema: decay of the weights' moving average.
        device: None takes CUDA if there is one.
        bf16: None uses bfloat16 autocast where the hardware has it.
        val_dataset: held-out images; None renders the split 'val', or sets a tenth of other data aside.
        eval_every: steps between evaluations, samples and checkpoints.
        log_every: steps that a row of the history averages over.

    Raises:
        ValueError: an argument is out of range, data and model do not fit, or `out` holds a run and resume is False.
    """
    for name, value in dict(steps=steps, batch_size=batch_size, eval_every=eval_every, log_every=log_every).items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive whole number, got {value!r}")
    if not (lr > 0 and beta_start > 0 and free_nats >= 0 and 0 < beta_share <= 1 and 0 <= closed_share < 1 and 0 <= ema < 1):
        raise ValueError(f"out of range: lr={lr}, beta_start={beta_start}, beta_share={beta_share}, "
                         f"free_nats={free_nats}, closed_share={closed_share}, ema={ema}")
    out = Path(out)
    if (out / "state.pt").exists() and not resume:
        raise ValueError(f"{out} holds a run: continue it with resume=True, or choose another folder")
    out.mkdir(parents=True, exist_ok=True)

    device = pick_device(device)
    bf16 = has_bf16(device) if bf16 is None else bf16
    torch.set_flush_denormal(True)  # tiny numbers are slow on a CPU and mean nothing here
    torch.manual_seed(seed)
    dataset = CaptchaDataset(1_000_000) if dataset is None else dataset
    train_set, val_set = (dataset, val_dataset) if val_dataset is not None else hold_out(dataset, seed)
    model = model_for(dataset) if model is None else model
    check_fit(model, train_set, batch_size)
    model.to(device, memory_format=torch.channels_last).train()
    levels = len(model.levels)
    if closed_levels is None:
        closed_levels = (levels + 1) // 2 if model.top_down and levels > 1 else 0
    if not 0 <= closed_levels < max(levels, 2) or (closed_levels and not model.top_down):
        raise ValueError(f"closed_levels: a {model.config['inference']} model of {levels} levels cannot close {closed_levels}")

    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    clip = Clipper()
    history: list[dict] = []
    step, seconds = 0, 0.0
    if resume and (out / "state.pt").exists():
        step, seconds = load_state(out / "state.pt", model, average, optimizer, clip, device)
        history = [row for row in read_csv(out / "metrics.csv") if row["step"] <= step]
    else:
        model.set_output_level(torch.stack([train_set[i][0] for i in range(min(64, len(train_set)))]).to(device))
        average.load_state_dict(model.state_dict())

    loader = DataLoader(train_set, batch_sampler=batches(len(train_set), batch_size, seed, step, steps),
                        num_workers=workers, pin_memory=device.type == "cuda")
    totals: dict[str, float] = {}
    start = time.time() - seconds
    bar = tqdm(loader, initial=step, total=steps, desc="train", unit="step", dynamic_ncols=True, mininterval=1)
    for x, y in bar:
        x = x.to(device, non_blocking=True, memory_format=torch.channels_last)
        y = y.to(device, non_blocking=True) if model.text_length is not None else None
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate(step, steps, warmup)
        beta = beta_start ** max(0.0, 1 - step / (beta_share * steps))
        closed = torch.zeros(len(x), dtype=torch.long, device=device)
        closed[: int(closed_share * len(x))] = closed_levels

        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, terms = loss_terms(model, x, y, beta, free_nats, closed)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip(model):
            optimizer.step()
        step += 1
        update_average(average, model, min(ema, step / (step + 10)))

        for name, value in {**terms, "grad_norm": clip.last}.items():
            totals[name] = totals.get(name, 0.0) + value
        if step % log_every == 0 or step == steps:
            seconds = time.time() - start
            count = (step - 1) % log_every + 1
            row = {"step": step, "images": step * batch_size, "seconds": round(seconds, 1), "beta": round(beta, 3),
                   **{name: value / count for name, value in totals.items()}, "skipped": clip.skipped}
            history.append(row)
            totals = {}
            bar.set_postfix_str(describe(row, levels))
        if step % eval_every == 0 or step == steps:
            metrics = evaluate(average, val_set, batch_size=batch_size, bf16=bf16)
            if history:
                history[-1].update({"val_neg_elbo": -metrics["elbo"], "val_reconstruction": metrics["reconstruction"],
                                    **{f"val_kl_{l + 1}": kl for l, kl in enumerate(metrics["kl"])}})
            write_csv(out / "metrics.csv", history)
            plot_history(history, out / "loss.png")
            save_samples(average, out / "samples.png", seed)
            average.provenance = provenance(dataset, step, batch_size, time.time() - start, metrics, device)
            average.save(out / "hvae.pt.new")
            os.replace(out / "hvae.pt.new", out / "hvae.pt")
            save_state(out / "state.pt", model, average, optimizer, clip, step, time.time() - start)
            tqdm.write(f"step {step}: held out -elbo {-metrics['elbo']:,.0f} nats = reconstruction "
                       f"{metrics['reconstruction']:,.0f} + kl {sum(metrics['kl']):,.0f}")
    return average.to(memory_format=torch.contiguous_format), history


def loss_terms(model: HVAE, x: Tensor, y: Tensor | None, beta: float, free_nats: float, closed: Tensor):
    """The loss of a batch and, for the record, its terms as numbers.

    `closed` (B,) is the number of lowest levels that take their prior's mean, per image; those have no KL. Free bits
    (Kingma et al. 2016, eq. 15) hold for a level's mean over the images in which it is open.
    """
    elbo = model(x, y, closed)
    is_open = closed[:, None] <= torch.arange(len(model.levels), device=x.device)  # (B, L)
    kl = (elbo.kl * is_open).sum(0) / is_open.sum(0)
    weight = beta * is_open.float().mean(0)
    loss = elbo.reconstruction.mean() + (weight * kl.clamp(min=free_nats)).sum()
    whole = closed == 0
    reconstruction = elbo.reconstruction[whole].mean()
    terms = {"neg_elbo": (reconstruction + kl.sum()).item(), "reconstruction": reconstruction.item()}
    if not whole.all():
        terms["reconstruction_closed"] = elbo.reconstruction[~whole].mean().item()
    return loss, {**terms, **{f"kl_{l + 1}": value for l, value in enumerate(kl.tolist())}}


class Clipper:
    """Clips gradients to the running mean of their norm, and skips a step whose norm is not finite or 20 times that.

    A hierarchical VAE's loss has rare, huge gradients, of which one can end a run (Child 2021, section 3.2).
    """

    def __init__(self):
        self.mean, self.last, self.skipped, self.seen = 0.0, 0.0, 0, 0

    def __call__(self, model: torch.nn.Module) -> bool:
        """True if the step should be taken."""
        limit = self.mean if self.seen else math.inf
        self.last = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
        if not math.isfinite(self.last) or (self.seen > 300 and self.last > 20 * self.mean):
            self.skipped += 1
            return False
        self.mean = 0.98 * self.mean + 0.02 * min(self.last, 2 * self.mean) if self.seen else self.last
        self.seen += 1
        return True


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
    for mine, theirs in zip(average.buffers(), model.buffers()):
        mine.copy_(theirs)


# ------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate(model: HVAE, dataset: Dataset, importance_samples: int = 1, *, batch_size: int = 64,
             bf16: bool = False, seed: int = 0) -> dict:
    """Means over a data set, in nats per image.

    Returns:
        elbo, reconstruction, kl (a list, z_1 first); log_likelihood, the importance-weighted lower bound on log p(x)
        with that many draws of z (Burda et al. 2016, eq. 8); bits_per_dim of that bound, or None unless the
        likelihood is a probability of 8-bit images ('logistic').
    """
    if not isinstance(importance_samples, int) or importance_samples < 1:
        raise ValueError(f"importance_samples: expected a positive whole number, got {importance_samples!r}")
    if len(dataset) == 0:
        raise ValueError("evaluate: the data set is empty")
    device = model.to_image.weight.device
    was_training = model.training
    model.eval()
    sums = None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for x, y in DataLoader(dataset, batch_size):
            x, y = x.to(device), y.to(device) if model.text_length is not None else None
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                draws = [model(x, y) for _ in range(importance_samples)]
            weights = torch.stack([draw.log_weight for draw in draws]).double()
            bound = torch.logsumexp(weights, 0) - math.log(importance_samples)
            rows = [torch.cat([d.elbo[:, None], d.reconstruction[:, None], d.kl], 1).double() for d in draws]
            columns = torch.cat([torch.stack(rows).mean(0), bound[:, None]], 1).sum(0)  # (3 + L,)
            sums = columns if sums is None else sums + columns
    model.train(was_training)
    elbo, reconstruction, *kl, log_likelihood = (sums / len(dataset)).tolist()
    c, h, w = model.input_shape
    bits = -log_likelihood / (c * h * w * math.log(2)) if model.likelihood == "logistic" else None
    return {"elbo": elbo, "reconstruction": reconstruction, "kl": kl, "log_likelihood": log_likelihood,
            "importance_samples": importance_samples, "images": len(dataset), "bits_per_dim": bits}


def save_samples(model: HVAE, path: Path, seed: int) -> None:
    """A sheet: the same 8 texts at temperatures 0.6, 0.8 and 1."""
    device = model.to_image.weight.device
    rows = [model.sample(8, temperature=t, generator=torch.Generator().manual_seed(seed)) for t in (0.6, 0.8, 1.0)]
    save_image(torch.cat(rows).to(device), path, nrow=8, pad_value=1)


def plot_history(history: Sequence[dict], path: str | Path | None = None):
    """Draws the loss and the KL of every level against images seen; writes a picture if given a path.

    Returns the matplotlib figure.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    images = [row["images"] for row in history]
    for key, label in [("neg_elbo", "training"), ("reconstruction_closed", "reconstruction, lower levels closed")]:
        if history and key in history[0]:
            left.plot(images, [row[key] for row in history], label=label, linewidth=1)
    held_out = [row for row in history if row.get("val_neg_elbo") not in (None, "")]
    left.plot([row["images"] for row in held_out], [row["val_neg_elbo"] for row in held_out], "k.-", label="held out")
    left.set(xlabel="images seen", ylabel="-ELBO (nats per image)")
    left.legend()
    for key in [key for key in (history[0] if history else {}) if key.startswith("kl_")]:
        right.plot(images, [row[key] for row in history], label=f"z_{key[3:]}", linewidth=1)
    right.set(xlabel="images seen", ylabel="KL (nats per image)", yscale="log")
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
    if isinstance(dataset, CaptchaDataset):
        return dataset, dataset.other_split("val", most)
    n = min(most, max(1, len(dataset) // 10))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(dataset, sorted(order[n:])), Subset(dataset, sorted(order[:n]))


def model_for(dataset: Dataset, **arguments) -> HVAE:
    """The default model for this data set's images and texts; arguments override."""
    image, _ = dataset[0]
    data = dict(input_channels=image.shape[0], input_size=tuple(image.shape[1:]),
                text_length=getattr(dataset, "text_length", None))
    if data["text_length"] is not None:
        data["charset"] = dataset.charset
    return HVAE(**{**data, **arguments})


def check_fit(model: HVAE, dataset: Dataset, batch_size: int) -> None:
    """Raises ValueError if the data set is too small for a batch, or its images or texts are not the model's."""
    if len(dataset) < batch_size:
        raise ValueError(f"the training set has {len(dataset)} images, fewer than batch_size={batch_size}")
    image, label = dataset[0]
    if tuple(image.shape) != model.input_shape:
        raise ValueError(f"the data's images are {tuple(image.shape)}, the model's {model.input_shape}")
    if model.text_length is not None and len(label) != model.text_length:
        raise ValueError(f"the data's texts have {len(label)} symbols, the model's {model.text_length}")


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here: on a GPU that has it, or a CPU with its instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


# ------------------------------------------------------------------------------------------------ files


def save_state(path: Path, model: HVAE, average: HVAE, optimizer, clip: Clipper, step: int, seconds: float) -> None:
    """Everything that resuming needs, written beside the old file and then put in its place."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    torch.save({"config": model.config, "model": model.state_dict(), "average": average.state_dict(),
                "optimizer": optimizer.state_dict(), "clip": dict(clip.__dict__), "step": step, "seconds": seconds,
                "rng": torch.get_rng_state(), "rng_cuda": cuda}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def load_state(path: Path, model: HVAE, average: HVAE, optimizer, clip: Clipper, device) -> tuple[int, float]:
    """Restores what save_state wrote; returns (step, seconds of training).

    Raises:
        ValueError: the file is not readable, or its run trained another architecture.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable training state ({type(error).__name__})") from None
    if state["config"] != model.config:
        different = [key for key, value in model.config.items() if state["config"].get(key) != value]
        raise ValueError(f"{path}: its run has another {', '.join(different)}")
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    clip.__dict__.update(state["clip"])
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and state["rng_cuda"]:
        torch.cuda.set_rng_state_all(state["rng_cuda"])
    return state["step"], state["seconds"]


def provenance(dataset: Dataset, step: int, batch_size: int, seconds: float, metrics: dict, device) -> dict:
    """What a checkpoint says of its origin; plain values only."""
    return {"version": VERSION, "torch": str(torch.__version__), "data": getattr(dataset, "description", type(dataset).__name__),
            "steps": step, "images_seen": step * batch_size, "seconds": round(seconds), "device": str(device),
            "cpus": os.cpu_count(), "held_out": metrics}


def write_csv(path: Path, history: Sequence[dict]) -> None:
    names = list(dict.fromkeys(name for row in history for name in row))
    with open(path.with_suffix(".new"), "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in history)
    os.replace(path.with_suffix(".new"), path)


def read_csv(path: str | Path) -> list[dict]:
    """A history that train() wrote: a list of rows, numbers where there are any."""
    with open(path, newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    return [{**row, **{k: int(row[k]) for k in ("step", "images", "skipped")}} for row in rows]


def describe(row: dict, levels: int) -> str:
    """A row for the progress bar: nats per image, levels from the top down."""
    kl = " ".join(f"{row[f'kl_{l}']:.0f}" for l in range(levels, 0, -1))
    return f"-elbo {row['neg_elbo']:,.0f} nats = rec {row['reconstruction']:,.0f} + kl {kl} | beta {row['beta']:.1f}"


# ------------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains an HVAE on rendered captchas, or on a folder of images.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option = parser.add_argument
    data = parser.add_argument_group("data")
    data.add_argument("--folder", metavar="DIR", help="train on the images in this folder instead of rendered captchas")
    data.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="image size; the renderer's 60 160, or the folder's own")
    data.add_argument("--length", type=int, help="symbols in a text; 4 when rendering, none for a folder")
    data.add_argument("--charset", help="the symbols of the texts; digits and upper-case letters")
    data.add_argument("--fonts", nargs="+", metavar="FILE", help="TrueType files to render with")
    data.add_argument("--images", type=int, default=1_000_000, help="size of the rendered training set")
    data.add_argument("--cache", help="'memory', or a folder: keep rendered images there")
    data.add_argument("--workers", type=int, default=1, help="processes that load or render")
    made = parser.add_argument_group("model")
    made.add_argument("--inference", choices=("top-down", "bottom-up"), default="top-down", help="the form of q(z|x)")
    made.add_argument("--likelihood", choices=("gaussian", "logistic", "bernoulli"), default="gaussian", help="p(x|z_1)")
    made.add_argument("--sigma", type=float, default=0.2, help="of the gaussian, for images in [-1, 1]")
    made.add_argument("--mixtures", type=int, default=1, help="components of the logistic")
    made.add_argument("--unconditional", action="store_true", help="leave the texts unused")
    option("--steps", type=int, default=9_000, help="training steps in all")
    option("--batch-size", type=int, default=32, help="images per step")
    option("--lr", type=float, default=2e-3, help="learning rate")
    option("--warmup", type=int, default=200, help="steps over which the learning rate rises")
    option("--beta-start", type=float, default=20.0, help="weight of the KL at the start; it falls to 1")
    option("--beta-share", type=float, default=0.7, help="share of the steps over which it falls")
    option("--free-nats", type=float, default=40.0, help="KL per level and image that costs nothing")
    option("--closed-levels", type=int, help="lowest levels closed for a part of each batch; default: the lower half")
    option("--closed-share", type=float, default=0.5, help="that part of each batch")
    option("--ema", type=float, default=0.999, help="decay of the averaged weights")
    option("--eval-every", type=int, default=1000, help="steps between evaluations, samples and checkpoints")
    option("--device", help="cpu, cuda, ...; CUDA if there is one")
    option("--seed", type=int, default=0, help="of the weights, the noise and the order of the data")
    option("--out", default="checkpoints/run", help="folder for the model, the metrics and the pictures")
    option("--resume", action="store_true", help="continue the run in that folder")
    option("--evaluate", metavar="FILE", help="train nothing: measure this checkpoint on captchas of the split 'test'")
    option("--importance-samples", type=int, default=1, help="draws of z per image for the bound that --evaluate prints")
    args = parser.parse_args(arguments)
    try:
        if args.evaluate:
            print_evaluation(HVAE.load(args.evaluate, pick_device(args.device)), args)
            return
        data_set = make_dataset(args)
        kind = dict(inference=args.inference, likelihood=args.likelihood, sigma=args.sigma, mixtures=args.mixtures)
        if args.unconditional:
            kind["text_length"] = None
        model = model_for(data_set, **kind)
        print(model.summary())
        train(model, data_set, steps=args.steps, batch_size=args.batch_size, lr=args.lr, warmup=args.warmup,
              beta_start=args.beta_start, beta_share=args.beta_share, free_nats=args.free_nats,
              closed_levels=args.closed_levels, closed_share=args.closed_share, ema=args.ema, device=args.device,
              workers=args.workers, seed=args.seed, out=args.out, resume=args.resume, eval_every=args.eval_every)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"model, metrics and pictures in {args.out}")


def print_evaluation(model: HVAE, args: argparse.Namespace, images: int = 512) -> None:
    """A line per term of the ELBO, on the given folder or on held-out captchas of the model's kind."""
    if args.folder:
        test_set = CaptchaFolder(args.folder, model.input_shape[1:], model.text_length, model.charset)
    else:
        test_set = CaptchaDataset(images, "test", model.input_shape[1:], model.text_length or 4, model.charset)
    metrics = evaluate(model, test_set, args.importance_samples)
    print(f"{metrics['images']} held-out images, nats per image\n"
          f"  -ELBO           {-metrics['elbo']:>10,.1f}\n"
          f"  reconstruction  {metrics['reconstruction']:>10,.1f}")
    for l in reversed(range(len(metrics["kl"]))):
        print(f"  KL z_{l + 1}          {metrics['kl'][l]:>10,.1f}")
    print(f"  -log p(x) bound {-metrics['log_likelihood']:>10,.1f}   ({args.importance_samples} importance samples)")
    if metrics["bits_per_dim"] is not None:
        print(f"  bits/dim        {metrics['bits_per_dim']:>10.3f}")


def make_dataset(args: argparse.Namespace) -> Dataset:
    """The data set that the command line asks for."""
    size = tuple(args.size) if args.size else None
    charset = {} if args.charset is None else {"charset": args.charset}
    if args.folder:
        return CaptchaFolder(args.folder, size, args.length, **charset)
    return CaptchaDataset(args.images, image_size=size or (60, 160), text_length=args.length or 4, fonts=args.fonts,
                          cache=args.cache, **charset)


if __name__ == "__main__":
    main()

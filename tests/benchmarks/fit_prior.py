"""Fits p(z_L), a flow, to q(z_L) of a trained model, and changes nothing else.

    python tests/benchmarks/fit_prior.py run/hvae.pt --images 30000 --out fitted.pt

On images of the kind that the model was trained on: renders, or a folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm, trange

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from generate import held_out_images
from hvae.cli import make_parser, one_line_errors, path_argument
from hvae.distributions import DiagonalGaussian, binarised
from hvae.evaluation import evaluate
from hvae.parallel import has_bf16, ignore_interrupts, keep_memory, pick_device
from hvae.validate import InputError
from model import HVAE
from trainer import flow_loss


def fit_prior(
    model: HVAE,
    dataset: Dataset,
    *,
    steps: int = 10_000,
    batch_size: int = 256,
    lr: float = 1e-3,
    workers: int = 1,
    seed: int = 0,
) -> HVAE:
    """Fits p(z_L), a flow, to q(z_L) over a data set, and nothing else.

    Where q(z_L) and its prior differ, samples do not look like reconstructions; this takes
    minutes (a second stage, as in Dai & Wipf 2019, section 4). Changes the model and returns it
    in eval mode.

    Raises:
        ValueError: the model has no flow.
    """
    top = model.eval().levels[-1]
    if top.flow is None:
        raise InputError("p(z_L) of this model is no flow: there is nothing to fit")
    torch.manual_seed(seed)
    loader = DataLoader(dataset, 100, num_workers=workers, worker_init_fn=ignore_interrupts)
    mu, logvar = encode_top(model, loader)

    optimizer = torch.optim.AdamW(top.flow.parameters(), lr)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    average = AveragedModel(top.flow, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    bar = trange(steps, desc="p(z_L)", unit="step", dynamic_ncols=True, mininterval=1)
    for _ in bar:
        i = torch.randint(len(mu), (batch_size,), device=mu.device)
        loss = flow_loss(top, DiagonalGaussian(mu[i], logvar[i]).sample())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(top.flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(top.flow)
        bar.set_postfix_str(f"-log p(z_L) {loss.item():.2f} nats", refresh=False)
    top.flow.load_state_dict(average.module.state_dict())
    fit = {"images": len(dataset), "steps": steps, "batch_size": batch_size}
    model.provenance = {**model.provenance, "prior_fit": fit}
    return model


@torch.no_grad()
def encode_top(model: HVAE, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """mu and logvar of q(z_L|.) of every image, (n, c) each."""
    device = model.device
    posteriors = []
    for x, y in tqdm(loader, desc="encode", unit="batch", dynamic_ncols=True, mininterval=1):
        x = binarised(x) if model.binarised else x
        y = y.to(device) if model.text_length is not None else None
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            _, levels = model.infer(x.to(device), y)
        posteriors.append(levels[-1].q)
        if not all(part.isfinite().all() for part in posteriors[-1]):
            n = loader.batch_size * len(posteriors)
            raise FloatingPointError(f"q(z_L|x) is not finite for one of the first {n} images")
    return torch.cat([q.mu for q in posteriors]), torch.cat([q.logvar for q in posteriors])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", type=path_argument)
    add("--images", type=int, default=150_000, help="captchas to fit to")
    add("--steps", type=int, default=10_000)
    add("--out", type=path_argument, default="fitted.pt", metavar="FILE")
    args = parser.parse_args(arguments)
    keep_memory()
    with one_line_errors(parser):
        if Path(args.out).exists():
            raise InputError(f"{args.out} is there already; choose another")
        model = HVAE.load(args.checkpoint, pick_device())
        data = held_out_images(model)
        fit_prior(model, data.other_split("train", args.images), steps=args.steps)
        metrics = evaluate(model, data.other_split("val", 512))
        model.provenance["held_out"] = metrics
        model.save(args.out)
        print(f"-ELBO {-metrics['elbo']:,.1f} nats, KL of z_L {metrics['kl'][-1]:,.1f}: {args.out}")


if __name__ == "__main__":
    main()

"""What each part of the digits' model is worth: one budget, one change at a time.

    python tests/benchmarks/digits.py                    all rows
    python tests/benchmarks/digits.py "no context"       some of the rows

Every model takes 1,000 steps of 50 on binarised MNIST, with the settings of `trainer.py --data
mnist`, and is measured on every tenth test image. The rows are Markdown.
"""

import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import MNIST
from generate import held_out_images
from hvae.cli import make_parser
from hvae.context import ContextNetwork
from hvae.distributions import binarised
from hvae.hyperparameters import TRAINING
from model import CONFIGS, HVAE, count_parameters
from trainer import batches, evaluate, train

ALL = CONFIGS["mnist-hvae"]


def ladder_of(levels: int) -> dict:
    """The model with more or fewer levels of 4x7x7; seven is all of it."""
    bottom, *_, top = ALL["inner_config"]
    inner_config = [bottom, *[[("res", 64)]] * (levels - 3), top]
    return dict(inner_config=inner_config, latent_channels=(2, *[4] * (levels - 2), 32))


CHANGES = {  # arguments of HVAE, hyperparameters
    "all of it": ({}, {}),
    "no context": (dict(context=None), {}),
    "context from the start": ({}, dict(pixel_weight=1.0)),
    "windows for the priors": (dict(prior_context=(3, 3)), {}),
    "3 levels": (ladder_of(3), {}),
    "5 levels": (ladder_of(5), {}),
    "10 levels": (ladder_of(10), {}),
    "bottom-up": (dict(inference="bottom-up"), {}),
}
WITHOUT_LATENTS = "context without latents"


class WindowAlone(nn.Module):
    """p(x) of a context without latents: features that are the same for all images."""

    def __init__(self):
        super().__init__()
        self.context = ContextNetwork(1, ALL["context"], 1, "bernoulli")
        self.features = nn.Parameter(torch.zeros(1, self.context.features, 28, 28))

    def forward(self, x: Tensor) -> Tensor:
        """-log p(x), mean in nats per image."""
        f = self.features.expand(len(x), -1, -1, -1)
        return -self.context(f).log_prob(x).mean()


def train_window(steps: int, batch_size: int, data: MNIST) -> WindowAlone:
    torch.manual_seed(0)
    model = WindowAlone()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, _ in DataLoader(data, batch_sampler=batches(len(data), batch_size, 0, 0, steps)):
        loss = model(binarised(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help=f"of {', '.join([*CHANGES, WITHOUT_LATENTS])}")
    add("--steps", type=int, default=1000)
    add("--root", default="data", help="of MNIST's files")
    args = parser.parse_args()
    data = MNIST("train", args.root)
    test_set = held_out_images(HVAE(**ALL), "mnist", args.root, limit=1000)
    print("| model | parameters | -ELBO | k = 10 | reconstruction | KL of z_L ... z_1 | minutes |")
    print("|---|---|---|---|---|---|---|")
    for name, (change, more) in CHANGES.items():
        if args.rows and name not in args.rows:
            continue
        torch.manual_seed(0)
        model, start = HVAE(**{**ALL, **change}), time.time()
        settings = {**TRAINING["mnist-hvae"], **more, "steps": args.steps, "eval_every": args.steps}
        lowest, others, *_ = settings["free_nats"]
        settings["free_nats"] = [lowest] + [others] * (len(model.levels) - 1)
        with tempfile.TemporaryDirectory() as out, redirect_stdout(sys.stderr):
            model, _ = train(model, data, out=out, **settings)
        minutes = (time.time() - start) / 60
        m = evaluate(model, test_set, 10, batch_size=200)
        kl = ", ".join(f"{nats:.1f}" for nats in reversed(m["kl"]))
        nats = f"{-m['elbo']:.2f} | {-m['log_likelihood']:.2f} | {m['reconstruction']:.2f}"
        row = f"| {name} | {count_parameters(model):,} | {nats} | {kl} | {minutes:.1f} |"
        print(row, flush=True)
    if not args.rows or WITHOUT_LATENTS in args.rows:
        model = train_window(args.steps, TRAINING["mnist-hvae"]["batch_size"], data)
        x = torch.stack([image for image, _ in test_set])
        with torch.no_grad():
            nats = model(binarised(x, torch.Generator().manual_seed(0))).item()
        print(f"| {WITHOUT_LATENTS} | {count_parameters(model):,} | {nats:.2f} | | | | |")


if __name__ == "__main__":
    main()

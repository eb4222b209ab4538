"""Fits the upper priors to q of a trained model, and changes nothing else: see hvae/fit_prior.py.

    python tests/benchmarks/fit_prior.py run/hvae.pt --images 100000 --out fitted.pt

The images are of the kind that the model was trained on: renders, or a folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from generate import held_out_images
from hvae.cli import make_parser, one_line_errors, path_argument
from hvae.evaluation import evaluate
from hvae.fit_prior import fit_prior
from hvae.parallel import keep_memory, pick_device
from hvae.validate import InputError
from model import HVAE
from trainer import VERSION


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", type=path_argument)
    add("--images", type=int, default=100_000, help="images to fit to; 30 kB of memory each")
    add("--steps", type=int, default=4000)
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
        model.provenance.update(held_out=metrics, version=VERSION)
        model.save(args.out)
        kl = ", ".join(f"{nats:.1f}" for nats in reversed(metrics["kl"]))
        print(f"-ELBO {-metrics['elbo']:,.1f} nats, KL of z_L to z_1 {kl}: {args.out}")


if __name__ == "__main__":
    main()

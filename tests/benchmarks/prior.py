"""Where should z_L be drawn from? The share of symbols that the reader finds in samples, by the source of their z_L.

    python tests/benchmarks/prior.py               the shipped checkpoint; all levels below the top at T = 0.3
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from generate import CHECKPOINTS, first_images, test_images  # noqa: E402
from model import HVAE  # noqa: E402
from reader import load_reader  # noqa: E402

BATCH = 100


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=str(CHECKPOINTS["captcha"]))
    parser.add_argument("--n", type=int, default=2000, help="held-out captchas, and samples of each kind")
    parser.add_argument("--reader", default="checkpoints/run/reader.pt", help="where the reader is, or is written to")
    args = parser.parse_args()
    reader = load_reader(Path(args.reader), 5.0, "cpu")
    model = HVAE.load(args.checkpoint)
    top, generator = len(model.levels) - 1, torch.Generator().manual_seed(0)

    x, y, _ = first_images(model, test_images(model, most=args.n), args.n)
    encoded = torch.cat([model.encode(*batch, generator)[top] for batch in zip(x.split(BATCH), y.split(BATCH))])
    noise = torch.randn(encoded.shape, generator=generator)
    gaussian = encoded.mean(0) + noise @ torch.linalg.cholesky(encoded.T.cov()).T
    sources = {"N(0, I)": noise, "a Gaussian fitted to encoded captchas": gaussian,
               "the prior, a flow": model.levels[top].flow.inverse(noise),
               "encoded captchas of other texts": encoded.roll(1, 0)}

    def read(images: torch.Tensor, labels: torch.Tensor) -> int:
        return (reader(images).argmax(2) == labels).sum().item()

    renders = sum(map(read, x.split(BATCH), y.split(BATCH)))
    print(f"{'renders':40s}{renders / y.numel():6.3f}")
    for name, z_top in sources.items():
        right = 0
        for z, labels in zip(z_top.split(BATCH), y.split(BATCH)):
            draw = lambda l, p, h: z if l == top else p.sample(0.3, generator)
            right += read(model.generate(len(z), labels, draw).image, labels)
        print(f"{name:40s}{right / y.numel():6.3f}")


if __name__ == "__main__":
    main()

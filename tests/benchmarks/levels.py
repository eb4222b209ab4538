"""Which level's prior costs legibility? The share of symbols that a reader finds in samples.

    python tests/benchmarks/levels.py           the shipped checkpoint at T = 1

In each row the upper levels are those of encoded captchas, and the lower ones are drawn from their
priors: the first row of samples is reconstructions, the last is plain samples. First the means or
guesses of p(x|z) are read, then what is drawn.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from reader import RULER, load_reader

from generate import CHECKPOINTS, first_images, held_out_images
from hvae.cli import make_parser
from model import HVAE

BATCH = 50


@torch.no_grad()
def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", default=str(CHECKPOINTS["captcha"]))
    add("--n", type=int, default=600, help="held-out captchas")
    add("--temperature", type=float, default=1.0, help="times the priors' noise")
    add("--reader", default=str(RULER), help="read, or trained and written")
    args = parser.parse_args()
    model, generator = HVAE.load(args.checkpoint), torch.Generator().manual_seed(0)
    reader = load_reader(Path(args.reader), model).cpu()
    x, y, _ = first_images(model, held_out_images(model, limit=args.n), args.n)

    def report(name: str, *kinds: torch.Tensor) -> None:
        print(f"{name:32s}", end="")
        for images in kinds:
            right = reader(images).argmax(2) == y
            symbols, texts = right.float().mean(), right.all(1).float().mean()
            print(f"   symbols {symbols:.3f} texts {texts:.3f}", end="", flush=True)
        print()

    report("renders", x)
    L = len(model.levels)
    for drawn in range(L + 1):
        guesses, pictures = [], []
        for x_part, y_part in zip(x.split(BATCH), y.split(BATCH), strict=True):
            z = model.encode(x_part, y_part, generator)
            latents = [None] * drawn + z[drawn:]
            p_x = model.generate(len(x_part), y_part, latents, args.temperature, generator)
            guesses.append(p_x.image)
            pictures.append(model.picture(p_x, generator))
        name = " ".join(f"z_{l}" for l in range(L, drawn, -1)) or "none"
        report(f"encoded: {name}", torch.cat(guesses), torch.cat(pictures))


if __name__ == "__main__":
    main()

"""Does a reader gain from samples? The proof, for a folder of labelled captchas.

    python tests/benchmarks/style.py captchas
    python tests/benchmarks/usefulness.py captchas --length 6 \\
        --charset 23456789abcdefghkmnpqrstuvwxyz

For every number of training pictures, a model begins with checkpoints/fonts.pt, is trained on these
pictures, and draws samples. A reader is trained on the pictures alone and on both, half of every
batch each; both readers see augmented images and are tested on the folder's split 'test'.
"""

import hashlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality import accuracy, labels, samples_of
from reader import balanced, fit_reader, kind_of, shuffled

from dataset import CaptchaFolder
from generate import FOLDER, draw_texts, sample_sheet
from hvae.cli import make_parser, one_line_errors, path_argument
from hvae.parallel import keep_memory
from hvae.pictures import write_image
from model import HVAE
from trainer import begin_with, train


def as_tensors(data: Dataset) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, C, H, W) and labels (n, T)."""
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack([(255 * image).round().byte() for image in images]), torch.stack(labels)


def augmented(batches, seed: int = 0):
    """Batches whose images are turned, moved, scaled, brightened and darkened a little."""
    generator = torch.Generator().manual_seed(seed)
    for x, y in batches:
        between = lambda n, most: most * (2 * torch.rand(n, generator=generator) - 1)
        n = len(x)
        angle, scale = between(n, 0.1), 1 + between(n, 0.1)
        turn = (
            torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1) * scale[:, None]
        )
        aspect = x.shape[3] / x.shape[2]  # of the plane in which affine_grid's square lies
        turn = turn * torch.tensor([1, 1 / aspect, aspect, 1])
        move = torch.stack([between(n, 0.06), between(n, 0.08)], 1)
        theta = torch.cat([turn.view(n, 2, 2), move[:, :, None]], 2)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        contrast, brightness = 1 + between(n, 0.2), between(n, 0.1)
        x = (x - 0.5) * contrast.view(-1, 1, 1, 1) + 0.5 + brightness.view(-1, 1, 1, 1)
        yield x.clamp(0, 1), y


def fit_model(pictures: CaptchaFolder, args, out: Path) -> HVAE:
    """A model of these pictures; a tenth of them chooses the best."""
    model = begin_with(args.init, pictures)
    data = Subset(pictures, range(len(pictures)))
    data.description = pictures.description
    every = max(1, args.steps // 8)
    return train(model, data, out=out, resume=True, eval_every=every, steps=args.steps)[0]


def compare(pictures: CaptchaFolder, test: tuple[Tensor, Tensor], args) -> list[float]:
    """Shares of symbols and texts that the readers read: of pictures alone, of both."""
    data = "\n".join([pictures.description["content"], pictures.charset, *pictures.texts])
    origin = Path(args.init).read_bytes() + data.encode()
    digest = hashlib.blake2b(origin, digest_size=4).hexdigest()  # of another origin, another run
    out = Path(args.out) / f"{pictures.root.name}-{len(pictures)}-{digest}"
    model = fit_model(pictures, args, out)
    write_image(sample_sheet(model, 40, captions=True), out / "sheet.png")
    texts = draw_texts(model, args.samples, None, seed=0)
    drawn = samples_of(model, 1.0)(texts, "useful"), labels(texts, model)
    real = as_tensors(pictures)
    kind = kind_of(model)
    figures = []
    for name, batches in {"alone": shuffled(*real), "both": balanced([real, drawn])}.items():
        reader = fit_reader(augmented(batches), args.reader_steps, name, kind)
        figures += accuracy(reader, *test)
    return figures


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=path_argument)
    add("--length", type=int, required=True, help="symbols in the longest text")
    add("--charset", help="the symbols of the texts; digits and upper-case letters")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="to resize the pictures to")
    add("--skip-bad", action="store_true", help="leave out damaged or misnamed files")
    add("--sizes", type=int, nargs="+", default=[250, 500, 1000, 2000], help="training pictures")
    add("--init", type=path_argument, default=FOLDER / "fonts.pt", help="what a model begins with")
    add("--steps", type=int, default=3000, help="of a model's training")
    add("--samples", type=int, default=20_000, help="that a reader is given")
    add(
        "--reader-steps", type=int, default=6000, help="of a reader's training, with 64 images each"
    )
    add("--out", type=path_argument, default="checkpoints/run-useful", help="models and sheets")
    args = parser.parse_args()
    keep_memory()
    with one_line_errors(parser):
        texts = (args.length, args.charset)
        folder = CaptchaFolder(args.folder, args.size, *texts, args.skip_bad, split="train")
        test = as_tensors(folder.other_split("test", len(folder)))
        print(f"{len(folder)} training pictures, {len(test[0])} to test", flush=True)
        print("pictures   alone: symbols  texts   with samples: symbols  texts", flush=True)
        for n in sorted({min(n, len(folder)) for n in args.sizes}):
            figures = compare(folder.other_split("train", n), test, args)
            alone, both = figures[:2], figures[2:]
            row = f"{n:8d} {alone[0]:16.3f} {alone[1]:6.3f} {both[0]:23.3f} {both[1]:6.3f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()

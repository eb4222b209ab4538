"""Samples a saved HVAE, and the pictures that show what it has learned.

    python generate.py                                  a sheet of samples from checkpoints/hvae.pt
    python generate.py --text 7KQ2 --n 8                the same text eight times
    python generate.py --individual out/ --n 100        one file per image, named by its text

The functions return matplotlib figures, for notebooks; `path` also writes them to a file.
"""

import argparse
from itertools import islice
from pathlib import Path
from typing import Iterator, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from blocks import whole
from dataset import MNIST, UNSAFE, CaptchaDataset, Help, decode_text, one_line, refuse
from model import HVAE, Normal, keep_memory, lower_half, out_of_memory, per_level, pick_device

CHECKPOINTS = {"captcha": Path(__file__).resolve().parent / "checkpoints" / "hvae.pt",
               "mnist": Path(__file__).resolve().parent / "checkpoints" / "mnist.pt"}
BATCH = 64  # images drawn at once: bounds the memory
SHEET = 1024  # most images on one sheet, which is in memory as a whole; a multiple of BATCH
Temperature = float | Sequence[float] | None  # for every level, or one each from z_1 up; None is `usual_temperature`
TEXTURE, GLYPHS, TOP = 0.9, 0.3, 0.8  # usual temperatures of the lower half of the levels, the middle ones and z_L


# ------------------------------------------------------------------------------------------------ samples


def usual_temperature(model: HVAE) -> list[float]:
    """Cold in the middle for clear glyphs, warm below for texture and above for variety."""
    below = len(model.levels) - 1
    texture = lower_half(below + 1)
    return [TEXTURE] * texture + [GLYPHS] * (below - texture) + [TOP]


def temperatures(model: HVAE, temperature: Temperature) -> list[float]:
    """One for every level, from z_1 up."""
    return per_level("temperature", usual_temperature(model) if temperature is None else temperature, len(model.levels))


def sample_batches(model: HVAE, n: int, text: str | None = None, temperature: Temperature = None,
                   seed: int = 0) -> Iterator[tuple[Tensor, list[str]]]:
    """Yields (images (<= 64, C, H, W) in [0, 1], their texts) until n are drawn; '' is the text of no text."""
    generator = torch.Generator().manual_seed(seed)
    T = temperatures(model, temperature)
    for first in range(0, n, BATCH):
        count = min(BATCH, n - first)
        y = model.draw_text(count, text, generator)
        texts = [""] * count if y is None else [decode_text(row, model.charset) for row in y]
        yield model.sample(count, None if y is None else texts, T, generator).cpu(), texts


def sample_sheet(model: HVAE, n: int = 32, text: str | None = None, temperature: Temperature = None, seed: int = 0,
                 columns: int | None = None) -> Tensor:
    """n samples side by side: one image (3, H', W') in [0, 1]; by default about 640 pixels wide.

    Raises:
        ValueError: n < 1 or above SHEET, a bad temperature, or a text the model cannot draw.
    """
    check_n(n)
    if n > SHEET:
        raise ValueError(f"a sheet holds at most {SHEET} images, got {n}; save_sheets and save_individual write any number")
    images = torch.cat([images for images, _ in sample_batches(model, n, text, temperature, seed)])
    return framed(images, columns or columns_for(model))


def save_sheets(model: HVAE, path: str | Path, n: int, text: str | None = None, temperature: Temperature = None,
                seed: int = 0) -> list[Path]:
    """Writes n samples as sheets of at most SHEET: `path`, or NAME-001.png, NAME-002.png ... if it takes several.

    Holds one sheet at a time in memory. Returns the paths.

    Raises:
        ValueError: n < 1, a bad temperature, or a text the model cannot draw.
    """
    check_n(n)
    path, paths = Path(path), []
    batches = sample_batches(model, n, text, temperature, seed)
    with tqdm(total=n, unit="image", disable=n <= SHEET) as bar:
        for _ in range(0, n, SHEET):
            images = torch.cat([images for images, _ in islice(batches, SHEET // BATCH)])
            paths.append(path if n <= SHEET else path.with_stem(f"{path.stem}-{len(paths) + 1:03d}"))
            save_image(framed(images, columns_for(model)), paths[-1])
            bar.update(len(images))
    return paths


def framed(images: Tensor, columns: int) -> Tensor:
    """Images (n, C, H, W) in rows with white between them, (3, H', W')."""
    return make_grid(images, nrow=columns, padding=2, pad_value=1)


def check_n(n: int) -> None:
    if not whole(n, 1):
        raise ValueError(f"n must be at least 1, a whole number; got {n!r}")


def columns_for(model: HVAE) -> int:
    """How many images make a row of about 640 pixels, at most 16."""
    return max(1, min(16, 640 // model.input_shape[2]))


def save_individual(model: HVAE, folder: str | Path, n: int, text: str | None = None,
                    temperature: Temperature = None, seed: int = 0) -> None:
    """Writes n samples as TEXT_INDEX.png, which dataset.CaptchaFolder reads back; INDEX.png if without text.

    Raises:
        ValueError: n < 1, a bad temperature, a text the model cannot draw, or a charset with symbols that a file's
            name cannot hold.
    """
    check_n(n)
    if model.text_length is not None and set(UNSAFE) & set(model.charset):
        raise ValueError("the charset has symbols that a file's name cannot hold")
    temperatures(model, temperature)  # refused before a folder is made
    model.draw_text(1, text, torch.Generator())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = 0
    with tqdm(total=n, desc=str(folder), unit="image") as bar:
        for images, texts in sample_batches(model, n, text, temperature, seed):
            for image, drawn in zip(images, texts):
                save_image(image, folder / f"{drawn}{'_' * bool(drawn)}{index:06d}.png")
                index += 1
            bar.update(len(texts))


# ------------------------------------------------------------------------------------------------ figures


def show_rows(rows: Sequence[Tensor], titles: Sequence[str], path: str | Path | None, labels: Sequence[str] = ()) -> Figure:
    """A figure of image rows, (n, C, H, W) each, with a title beside every row and a label over every column."""
    n, (_, h, w) = len(rows[0]), rows[0].shape[1:]
    figure = Figure(figsize=(1.0 + 1.45 * n, (0.2 + len(rows)) * 1.45 * h / w + 0.2), layout="constrained")
    axes = figure.subplots(len(rows), n, squeeze=False)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            axis = axes[row, column]
            axis.imshow(image.permute(1, 2, 0).squeeze(-1).float().cpu().clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if row == 0 and labels:
                axis.set_title(labels[column], fontsize=9)
        axes[row, 0].set_ylabel(titles[row], rotation=0, ha="right", va="center", fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=100)
    return figure


def plot_samples(model: HVAE, n: int = 6, text: str | None = None, temperatures: Sequence[Temperature] = (None, 0.3, 0.6, 1.0),
                 seed: int = 0, path: str | Path | None = None) -> Figure:
    """Samples of the same texts, a row per temperature."""
    temperatures = [usual_temperature(model) if T is None else T for T in temperatures]
    y = model.draw_text(n, text, torch.Generator().manual_seed(seed))
    texts = None if y is None else [decode_text(row, model.charset) for row in y]
    rows = [model.sample(n, texts, t, torch.Generator().manual_seed(seed)) for t in temperatures]
    name = lambda T: " ".join(f"{t:g}" for t in T) if isinstance(T, (list, tuple)) else f"{T:g}"
    return show_rows(rows, [f"T = {name(T)}" for T in temperatures], path, texts or ())


def plot_reconstructions(model: HVAE, dataset: Dataset, n: int = 6, seed: int = 0,
                         path: str | Path | None = None) -> Figure:
    """The first n images of a data set above their reconstructions."""
    x, y, texts = first_images(model, dataset, n)
    generator = torch.Generator().manual_seed(seed)
    return show_rows([x, model.reconstruct(x, y, generator)], ["x", "reconstruction"], path, texts)


@torch.no_grad()
def plot_levels(model: HVAE, dataset: Dataset, n: int = 6, seed: int = 0, path: str | Path | None = None) -> Figure:
    """What each level holds: an image of the data set, then rows in which one level alone is drawn anew.

    In the row of z_l the other levels keep the posterior's draw for the image and z_l comes from its prior, n times.
    A bottom-up model draws its image from z_1 alone, so that only the last row changes.
    """
    x, y, _ = first_images(model, dataset, 1)
    y = None if y is None else y.expand(n, -1)
    generator = torch.Generator().manual_seed(seed)
    kept = [z.expand(n, *z.shape[1:]) for z in model.encode(x, y if y is None else y[:1], generator)]
    rows, titles = [x.expand(n, -1, -1, -1)], ["x"]
    for level in reversed(range(len(kept))):
        draw = lambda l, p, h: p.sample(1.0, generator) if l == level else kept[l]
        rows.append(model.generate(n, y, draw).image)
        titles.append(f"z_{level + 1} anew")
    return show_rows(rows, titles, path)


@torch.no_grad()
def plot_interpolation(model: HVAE, dataset: Dataset, pair: tuple[int, int] = (0, 1), n: int = 8, seed: int = 0,
                       path: str | Path | None = None) -> Figure:
    """From one image of the data set to another: every latent moves on a great circle.

    The text cannot be half one and half another: in the first row it is that of the first image throughout, in the
    second row that of the second. An unconditional model has one row.

    Raises:
        ValueError: the data set has no such pair.
    """
    if not all(0 <= i < len(dataset) for i in pair):
        raise ValueError(f"pair: the data set has images 0 to {len(dataset) - 1}, got {pair}")
    x, y, texts = first_images(model, torch.utils.data.Subset(dataset, pair), 2)
    shares = torch.linspace(0, 1, n, device=x.device)
    ends = model.encode(x, y, torch.Generator().manual_seed(seed))
    latents = [torch.cat([slerp(z[:1], z[1:], share) for share in shares]) for z in ends]
    if y is None:
        return show_rows([model.decode(latents).image], [""], path)
    rows = [model.decode(latents, y[i : i + 1].expand(n, -1)).image for i in (0, 1)]
    return show_rows(rows, [f"text {text}" for text in texts], path)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation (White 2016): between Gaussian draws a straight line would pass too near the mean."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1)
    angle = cosine.acos().view(-1, *[1] * (a.dim() - 1))
    straight = a + share * (b - a)  # for ends on one line, where the arc's formula divides by zero
    arc = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin().clamp(min=1e-6)
    return torch.where(angle.sin() < 1e-3, straight, arc)


@torch.no_grad()
def plot_prior_vs_aggregate(model: HVAE, dataset: Dataset, n: int = 6, temperature: Temperature = None, seed: int = 0,
                            path: str | Path | None = None) -> Figure:
    """Samples with z_L from its prior above samples with z_L from a Gaussian fitted to the aggregated posterior.

    The texts are the same. With N(0, I) as the prior, rows that look different show that it covers regions that no image
    is encoded to; a flow knows more than the fitted Gaussian.
    """
    aggregate = fit_aggregate(model, dataset, seed=seed)
    T = temperatures(model, temperature)
    top = len(model.levels) - 1
    y = model.draw_text(n, None, torch.Generator().manual_seed(seed))
    texts = () if y is None else [decode_text(row, model.charset) for row in y]
    rows = []
    for source in (None, aggregate):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda l, p, h: (source.expand(n) if source and l == top else p).sample(T[l], generator)
        rows.append(model.generate(n, y, draw).image)
    return show_rows(rows, ["z_L ~ p(z_L)", "z_L ~ aggregate"], path, texts)


@torch.no_grad()
def plot_plane(model: HVAE, dataset: Dataset, path: str | Path | None = None) -> Figure:
    """The means of q(z_1|x) of a data set on the plane of a two-dimensional z_1, coloured by the labels' first symbol.

    Raises:
        ValueError: the model has more than one level, or its latent is not a vector of two numbers.
    """
    check_plane(model)
    means, labels = [], []
    for first in range(0, len(dataset), 500):
        items = [dataset[i] for i in range(first, min(first + 500, len(dataset)))]
        x = torch.stack([image for image, _ in items]).to(model.to_image.weight.device)
        means.append(model.infer(x)[1][0][0].mu.cpu())
        labels += [int(label[0]) if len(label) else 0 for _, label in items]
    z = torch.cat(means)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axis = figure.subplots()
    points = axis.scatter(z[:, 0], z[:, 1], c=labels, s=3, cmap="tab10")
    axis.set(xlabel="z[0]", ylabel="z[1]", aspect="equal")
    figure.colorbar(points, ticks=sorted(set(labels)))
    if path is not None:
        figure.savefig(path, dpi=100)
    return figure


@torch.no_grad()
def plot_manifold(model: HVAE, n: int = 20, path: str | Path | None = None) -> Figure:
    """What the plane of a two-dimensional z_1 decodes to: an n x n grid over the quantiles of N(0, 1).

    Every picture thus stands for the same share of the prior (Kingma & Welling 2014, figure 4). z[0] grows to the right,
    z[1] upwards.

    Raises:
        ValueError: as plot_plane.
    """
    check_plane(model)
    shares = (torch.arange(n) + 0.5) / n
    z = torch.distributions.Normal(0, 1).icdf(shares)
    grid = torch.cartesian_prod(-z, z).flip(1)  # rows from the top, (n * n, 2)
    images = model.decode([grid.to(model.to_image.weight.device)]).image
    sheet = make_grid(images, nrow=n, padding=0)
    figure = Figure(figsize=(7, 7 * sheet.shape[1] / sheet.shape[2]), layout="constrained")
    axis = figure.subplots()
    axis.imshow(sheet.permute(1, 2, 0).cpu().numpy(), extent=(0, n, 0, n))
    values = [f"{value:.1f}" for value in z.tolist()]
    axis.set(xticks=[i + 0.5 for i in range(n)], yticks=[i + 0.5 for i in range(n)], xlabel="z[0]", ylabel="z[1]")
    axis.set_xticklabels(values, fontsize=6, rotation=90)
    axis.set_yticklabels(values, fontsize=6)
    if path is not None:
        figure.savefig(path, dpi=100)
    return figure


def has_plane(model: HVAE) -> bool:
    """Whether the model is a flat VAE of two latent numbers without text."""
    return [level.shape for level in model.levels] == [(2,)] and model.text_length is None


def check_plane(model: HVAE) -> None:
    if not has_plane(model):
        shapes = ", ".join("x".join(map(str, level.shape)) for level in model.levels)
        raise ValueError(f"expected one level of two numbers and no text, got latents {shapes}")


class Aggregate(Normal):
    """A Gaussian fit to q(z_L|x) over a data set: one mean and variance per value of z_L, (1, ...)."""

    def expand(self, n: int) -> Normal:
        return Normal(self.mu.expand(n, *self.mu.shape[1:]), self.logvar.expand(n, *self.logvar.shape[1:]))


@torch.no_grad()
def fit_aggregate(model: HVAE, dataset: Dataset, most: int = 512, seed: int = 0) -> Aggregate:
    """Mean and variance of z_L ~ q(z_L|x) over the first images of a data set (Tomczak & Welling 2018, section 2)."""
    if len(dataset) == 0:
        raise ValueError("the data set is empty")
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for first in range(0, min(most, len(dataset)), BATCH):
        indices = range(first, min(first + BATCH, most, len(dataset)))
        x, y, _ = first_images(model, torch.utils.data.Subset(dataset, indices), BATCH)
        draws.append(model.encode(x, y, generator)[-1])
    z = torch.cat(draws)
    return Aggregate(z.mean(0, keepdim=True), z.var(0, unbiased=False, keepdim=True).clamp(min=1e-6).log())


def first_images(model: HVAE, dataset: Dataset, n: int) -> tuple[Tensor, Tensor | None, list[str]]:
    """The first n images (n, C, H, W) of a data set, their texts as the model's y and as strings."""
    items = [dataset[i] for i in range(min(n, len(dataset)))]
    if not items:
        raise ValueError("the data set is empty")
    device = model.to_image.weight.device
    x = torch.stack([image for image, _ in items]).to(device)
    if model.text_length is None:
        return x, None, []
    y = torch.stack([label for _, label in items])
    return x, y.to(device), [decode_text(row, model.charset) for row in y]


# ------------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", formatter_class=Help,
                                     description="Draws captchas with a trained HVAE.")
    option = parser.add_argument
    option("--data", choices=tuple(CHECKPOINTS), default="captcha", help="which shipped checkpoint and test images")
    option("--root", default="data", metavar="DIR", help="where MNIST is, or is downloaded to; for --figures")
    option("--checkpoint", metavar="FILE", help="a file that HVAE.save wrote; default: the shipped one of --data")
    option("--out", default="samples.png", metavar="FILE", help="the sheet of samples; of several, their names begin so")
    option("--n", type=int, default=32, help=f"number of images; more than {SHEET} are written as several sheets")
    option("--text", help="what to draw; by default a different text on every image")
    option("--temperature", type=float, nargs="+", metavar="T",
           help="times the priors' noise, 0 leaves none; one number, or one each from z_1 up; default: "
           f"{TOP} for the top level, {GLYPHS} for the middle and {TEXTURE} for the lowest ones")
    option("--seed", type=int, default=0, help="another seed gives other samples")
    option("--individual", metavar="DIR", help="write one file per image into this folder instead of a sheet")
    option("--figures", metavar="DIR", help="write the README's pictures into this folder instead of a sheet")
    option("--device", help="cpu, cuda, ...; CUDA if there is one")
    args = parser.parse_args(arguments)
    if args.n < 1:
        parser.error(f"argument --n: expected at least 1, got {args.n}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: expected a number from 0 to 2^63 - 1, got {args.seed}")
    keep_memory()
    try:
        model = HVAE.load(args.checkpoint or CHECKPOINTS[args.data], pick_device(args.device))
        if args.figures:
            save_figures(model, Path(args.figures), test_images(model, args.data, args.root))
            print(f"pictures in {args.figures}")
        elif args.individual:
            save_individual(model, args.individual, args.n, args.text, args.temperature, args.seed)
            print(f"{args.n} images in {args.individual}")
        else:
            paths = save_sheets(model, args.out, args.n, args.text, args.temperature, args.seed)
            print(f"{args.n} samples on {' to '.join(map(str, paths[:1] + paths[1:][-1:]))}")
    except (ValueError, OSError) as error:
        refuse(parser, one_line(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        refuse(parser, "not enough memory")


def test_images(model: HVAE, data: str = "captcha", root: str | Path = "data", most: int | None = None,
                fonts: Sequence[str] | None = None) -> Dataset:
    """Held-out images for a model: 512 captchas of the kind it draws, or MNIST's test set; or so many of them.

    Of MNIST evenly spaced ones: the first half of its test set is easier than the second.
    """
    if data == "mnist":
        test_set = MNIST("test", root, model.text_length)
        n = len(test_set) if most is None else min(most, len(test_set))
        return torch.utils.data.Subset(test_set, [i * len(test_set) // n for i in range(n)])
    size = 512 if most is None else most
    return CaptchaDataset(size, "test", model.input_shape[1:], model.text_length or 4, model.charset, fonts=fonts)


def save_figures(model: HVAE, folder: Path, test_set: Dataset) -> None:
    """Pictures of what a model draws and holds, with held-out images as the originals."""
    folder.mkdir(parents=True, exist_ok=True)
    save_image(sample_sheet(model, 32), folder / "samples.png")
    originals, _, _ = first_images(model, test_set, 32)
    save_image(framed(originals, columns_for(model)), folder / "originals.png")
    plot_samples(model, path=folder / "temperatures.png")
    plot_reconstructions(model, test_set, path=folder / "reconstructions.png")
    plot_levels(model, test_set, path=folder / "levels.png")
    plot_interpolation(model, test_set, (0, min(1, len(test_set) - 1)), path=folder / "interpolation.png")
    plot_prior_vs_aggregate(model, test_set, path=folder / "prior_vs_aggregate.png")
    if has_plane(model):
        plot_plane(model, test_set, path=folder / "plane.png")
        plot_manifold(model, path=folder / "manifold.png")


if __name__ == "__main__":
    main()

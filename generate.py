"""Samples a saved HVAE, and the pictures that show what it has learned.

    python generate.py                                  a sheet of samples from checkpoints/hvae.pt
    python generate.py --text 7KQ2 --n 8                the same text eight times
    python generate.py --individual out/ --n 100        one file per image, named by its text

The sampling itself is HVAE.sample in model.py; hvae/context.py draws the pixels. The plot
functions return matplotlib figures, for notebooks; `path` also writes them to a file.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from dataset import MNIST, UNSAFE, CaptchaDataset, CaptchaFolder, read_labels
from hvae.checkpoint import write_csv
from hvae.cli import given_options, make_parser, one_line_errors, path_argument, reject_unused
from hvae.distributions import DiagonalGaussian, binarised
from hvae.parallel import keep_memory, pick_device
from hvae.pictures import check_picture, shown, write_figure, write_image
from hvae.text import decode_text
from hvae.validate import InputError, validate_int, validate_number
from model import HVAE

FOLDER = Path(__file__).resolve().parent / "checkpoints"
CHECKPOINTS = {"captcha": FOLDER / "hvae.pt", "mnist": FOLDER / "mnist.pt"}
BATCH = 64  # images that a process draws at once
MAX_PROCESSES = 8  # that draw a set; both numbers bound the memory
CAPTION = 12  # pixels of the text below a sample
SHEET = 1024  # images on a sheet, which is in memory all at once


# ---------------------------------------------------------------------------- samples


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(eq=False)
class SampleBatches(Dataset):
    """n samples in batches: item k is (images (<= 64, C, H, W) in [0, 1], their texts or "").

    Each batch has noise of its own, so that any process may draw it. `text` is one for all, a list
    with one for each, or None for random ones.

    Raises:
        ValueError: there are not n texts; in a draw, a text or a temperature that does not fit.
    """

    model: HVAE
    n: int
    text: str | Sequence[str] | None = None
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not (self.text is None or isinstance(self.text, str) or len(self.text) == self.n):
            raise InputError(f"text: expected {self.n} texts, got {len(self.text)}")

    def __len__(self) -> int:
        return -(-self.n // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, k: int) -> tuple[Tensor, list[str]]:
        texts, generator = self.begin(k)
        given = texts if self.model.text_length else None
        images = self.model.sample(len(texts), given, self.temperature, generator)
        return images.cpu(), texts

    def begin(self, k: int) -> tuple[list[str], torch.Generator]:
        """The texts of batch k, and the generator for its noise."""
        generator = seeded(self.seed + k * 1_000_003)
        part = slice(k * BATCH, min((k + 1) * BATCH, self.n))
        text = self.text if isinstance(self.text, str) or self.text is None else self.text[part]
        n = part.stop - part.start
        y = self.model.draw_text(n, text, generator)
        texts = [""] * n if y is None else [decode_text(row, self.model.charset) for row in y]
        return texts, generator

    def by_all_cores(self, order: Sequence[int] | None = None) -> DataLoader:
        """The batches, all or those of an order, with images as uint8.

        A draw is many small operations, which cores cannot share. So on Linux each core has a
        process that draws; elsewhere, and on a GPU, this process does.
        """
        order = range(len(self)) if order is None else order
        on_cpu = self.model.device.type == "cpu"
        can_fork = sys.platform == "linux"  # other ways to start a process run the script again
        cores = min(torch.get_num_threads(), MAX_PROCESSES) if on_cpu and can_fork else 1
        settings = dict(batch_size=None, sampler=order, collate_fn=to_bytes)
        settings["generator"] = torch.Generator()  # or it would draw from the global one
        if min(cores, len(order)) > 1:
            settings.update(num_workers=min(cores, len(order)), prefetch_factor=1)
            settings["multiprocessing_context"] = "fork"
        return DataLoader(self, **settings)


def to_bytes(batch: tuple[Tensor, list[str]]) -> tuple[Tensor, list[str]]:
    """A batch with its images as uint8."""
    images, texts = batch
    return (255 * images).round().clamp(0, 255).byte(), texts


def sample_sheet(
    model: HVAE,
    n: int = 32,
    text: str | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    columns: int | None = None,
    captions: bool = False,
) -> Tensor:
    """n samples side by side: one image (3, H', W') in [0, 1]; by default 640 pixels wide or so.

    `captions` puts the text that was asked for below each sample.

    Raises:
        ValueError: n < 1 or above SHEET, a bad temperature, or a text the model cannot draw.
    """
    validate_int("n", n, 1)
    if captions and model.text_length is None:
        raise InputError("captions: this model is unconditional, its samples have no texts")
    if n > SHEET:
        raise InputError(f"n: a sheet holds at most {SHEET} images, got {n}; see --individual")
    batches = SampleBatches(model, n, text, temperature, seed)
    images = [captioned(*batch) if captions else batch[0] for batch in batches]
    return make_grid(shown(torch.cat(images)), columns or columns_for(model), pad_value=1)


def captioned(images: Tensor, texts: Sequence[str]) -> Tensor:
    """Images (n, C, H, W) above their texts, (n, C, H + 12, W)."""
    c, _, w = images.shape[1:]
    strips = []
    for text in texts:
        strip = Image.new("L", (w, CAPTION), "white")
        ImageDraw.Draw(strip).text((2, 0), text, "black")
        strips.append(pil_to_tensor(strip).expand(c, -1, -1).float() / 255)
    return torch.cat([images, torch.stack(strips)], 2)


def save_individual(
    model: HVAE,
    folder: str | Path,
    n: int,
    text: str | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Writes a labels.csv and n samples as TEXT_INDEX.png, for dataset.CaptchaFolder.

    A text that cannot begin a file's name is only in labels.csv, and the name is INDEX.png. Without
    texts there is no labels.csv. `resume` keeps batches whose files are all there: they must come
    from the same call.

    Raises:
        ValueError: n < 1, a bad temperature, a text the model cannot draw, or a folder with other
            files.
    """
    validate_int("n", n, 1)
    validate_number("temperature", temperature, 0)
    batches = SampleBatches(model, n, text, temperature, seed)
    texts = [drawn for k in range(len(batches)) for drawn in batches.begin(k)[0]]
    is_name = lambda drawn: drawn and not set(drawn) & set(UNSAFE)
    starts = [f"{drawn}_" if is_name(drawn) else "" for drawn in texts]
    names = [f"{start}{i:06d}.png" for i, start in enumerate(starts)]
    folder = Path(folder)  # errors come before it is made
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found and not resume:
        raise InputError(
            f"{folder} has files: if they are of the same call, go on with --resume (resume=True), "
            "otherwise choose another folder"
        )
    if not read_labels(folder / "labels.csv").keys() <= set(names):
        raise InputError(f"{folder}/labels.csv names other files; choose another folder")
    if others := sorted(name for name in found - {*names, "labels.csv"} if name[0] != "."):
        raise InputError(f"{folder} has other files, such as {others[0]}; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if model.text_length is not None:  # first, because a name alone may be taken for a text
        rows = [{"name": name, "text": text} for name, text in zip(names, texts, strict=True)]
        write_csv(folder / "labels.csv", rows)
    names_of = [names[first : first + BATCH] for first in range(0, n, BATCH)]  # each batch
    is_there = lambda k: resume and all((folder / name).is_file() for name in names_of[k])
    missing = [k for k in range(len(batches)) if not is_there(k)]
    done = n - sum(len(names_of[k]) for k in missing)
    with tqdm(total=n, initial=done, desc=str(folder), unit="image") as bar:
        for k, (images, _) in zip(missing, batches.by_all_cores(missing), strict=True):
            for image, name in zip(images, names_of[k], strict=True):
                write_image(image.float() / 255, folder / name)
            bar.update(len(images))


def columns_for(model: HVAE) -> int:
    """How many images make a row of about 640 pixels, at most 16."""
    return max(1, min(16, 640 // model.input_shape[2]))


# ---------------------------------------------------------------------------- figures


def plot_rows(
    rows: Sequence[Tensor],
    titles: Sequence[str],
    path: str | Path | None,
    labels: Sequence[str] = (),
) -> Figure:
    """Rows of images, (n, C, H, W) each, a title beside each row and a label over each column."""
    n, (_, h, w) = len(rows[0]), rows[0].shape[1:]
    size = (1.0 + 1.45 * n, (0.2 + len(rows)) * 1.45 * h / w + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), n, squeeze=False)
    for row, images in enumerate(rows):
        images = shown(images).permute(0, 2, 3, 1).squeeze(-1).float().cpu().clamp(0, 1).numpy()
        for axis, image in zip(axes[row], images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        label = dict(rotation=0, ha="right", va="center", fontsize=9, parse_math=False)
        axes[row, 0].set_ylabel(titles[row], **label)
    for axis, label in zip(axes[0], labels, strict=False):
        axis.set_title(label, fontsize=9, parse_math=False)
    return write_figure(figure, path)


def plot_samples(
    model: HVAE,
    n: int = 6,
    text: str | None = None,
    temperatures: Sequence[float] = (1.0, 0.8, 0.6, 0.3),
    seed: int = 0,
    path: str | Path | None = None,
) -> Figure:
    """Samples of the same texts, a row for each temperature."""
    texts = draw_texts(model, n, text, seed)
    rows = [model.sample(n, texts or None, T, seeded(seed)) for T in temperatures]
    return plot_rows(rows, [f"T = {T:g}" for T in temperatures], path, texts)


def plot_reconstructions(
    model: HVAE, dataset: Dataset, n: int = 6, seed: int = 0, path: str | Path | None = None
) -> Figure:
    """The first n images of a data set above their reconstructions."""
    x, y, texts = first_images(model, dataset, n)
    reconstructed = model.reconstruct(x, y, seeded(seed))
    return plot_rows([x, reconstructed], ["x", "reconstruction"], path, texts)


@torch.no_grad()
def plot_levels(
    model: HVAE, dataset: Dataset, n: int = 6, seed: int = 0, path: str | Path | None = None
) -> Figure:
    """What each level holds: an image, then rows in which only one level is drawn anew.

    In the row of z_l the other levels keep the posterior's draw for the image, and z_l comes from
    its prior, n times. A bottom-up model draws its image from z_1, so only its last row changes.
    """
    x, y, _ = first_images(model, dataset, 1)
    generator = seeded(seed)
    kept = [z.expand(n, *z.shape[1:]) for z in model.encode(x, y, generator)]
    y = None if y is None else y.expand(n, -1)
    rows, titles = [x.expand(n, -1, -1, -1)], ["x"]
    for l in reversed(range(len(kept))):
        latents = [None if i == l else z for i, z in enumerate(kept)]
        p_x = model.generate(n, y, latents, generator=generator)
        rows.append(model.picture(p_x, generator))
        titles.append(f"z_{l + 1} anew")
    return plot_rows(rows, titles, path)


@torch.no_grad()
def plot_interpolation(
    model: HVAE,
    dataset: Dataset,
    pair: tuple[int, int] = (0, 1),
    n: int = 8,
    seed: int = 0,
    path: str | Path | None = None,
) -> Figure:
    """From one image of the data set to another: every latent moves on a great circle.

    The first row has the text of the first image throughout, the second row that of the second.
    An unconditional model has one row.

    Raises:
        ValueError: the data set has no such pair.
    """
    if not all(0 <= i < len(dataset) for i in pair):
        raise InputError(f"pair: the data set has images 0 to {len(dataset) - 1}, got {pair}")
    x, y, texts = first_images(model, Subset(dataset, pair), 2)
    shares = torch.linspace(0, 1, n, device=x.device)
    ends = model.encode(x, y, seeded(seed))
    latents = [torch.cat([slerp(z[:1], z[1:], share) for share in shares]) for z in ends]
    texts_of = [None] if y is None else [y[i : i + 1].expand(n, -1) for i in (0, 1)]
    rows = [model.picture(model.decode(latents, text), seeded(seed)) for text in texts_of]
    return plot_rows(rows, [f"text {text}" for text in texts] or [""], path)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation (White 2016): a straight line would pass too near the mean."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1)
    angle = cosine.acos().view(-1, *[1] * (a.dim() - 1))
    straight = a + share * (b - a)  # for ends on one line, where the arc divides by zero
    arc = ((1 - share) * angle).sin() * a + (share * angle).sin() * b
    return torch.where(angle.sin() < 1e-3, straight, arc / angle.sin().clamp(min=1e-6))


@torch.no_grad()
def plot_prior_vs_aggregate(
    model: HVAE,
    dataset: Dataset,
    n: int = 6,
    temperature: float = 1.0,
    seed: int = 0,
    path: str | Path | None = None,
) -> Figure:
    """Samples with z_L from its prior above samples with z_L from the aggregated posterior.

    The texts are the same. Where N(0, I) is the prior, rows that look different show that it
    covers regions that no image is encoded to.
    """
    texts = draw_texts(model, n, None, seed)
    y = model.draw_text(n, texts or None)
    aggregate = fit_aggregate(model, dataset, n, seed=seed)
    rows = []
    for from_prior in (True, False):
        generator = seeded(seed)  # the noise of both rows is the same
        z_top = None if from_prior else aggregate.sample(temperature, generator)
        latents = [*[None] * (len(model.levels) - 1), z_top]
        rows.append(model.picture(model.generate(n, y, latents, temperature, generator), generator))
    return plot_rows(rows, ["z_L ~ p(z_L)", "z_L ~ aggregate"], path, texts)


@torch.no_grad()
def fit_aggregate(
    model: HVAE, dataset: Dataset, n: int, limit: int = 512, seed: int = 0
) -> DiagonalGaussian:
    """A Gaussian fitted to z_L ~ q(z_L|x) of the first `limit` images, repeated for n samples.

    (Tomczak & Welling 2018, section 2.)
    """
    generator = seeded(seed)
    x, y, _ = first_images(model, dataset, limit)
    texts = [None] * len(x) if y is None else y.split(BATCH)
    parts = zip(x.split(BATCH), texts, strict=False)
    z = torch.cat([model.encode(part, text, generator)[-1] for part, text in parts])
    mu, logvar = z.mean(0), z.var(0, unbiased=False).clamp(min=1e-6).log()
    return DiagonalGaussian(mu.expand(n, *mu.shape), logvar.expand(n, *mu.shape))


@torch.no_grad()
def plot_plane(model: HVAE, dataset: Dataset, path: str | Path | None = None) -> Figure:
    """The means of q(z_1|x) on the plane of a two-dimensional z_1, coloured by the first symbol.

    Raises:
        ValueError: the model has more than one level, or its latent is not two numbers.
    """
    check_plane(model)
    items = [dataset[i] for i in range(len(dataset))]
    x, _, _ = first_images(model, items, len(items))
    z = torch.cat([model.infer(part)[1][0].q.mu.cpu() for part in x.split(500)])
    labels = [int(label[0]) if len(label) else 0 for _, label in items]
    figure = Figure(figsize=(6, 5), layout="constrained")
    axis = figure.subplots()
    points = axis.scatter(z[:, 0], z[:, 1], c=labels, s=3, cmap="tab10")
    axis.set(xlabel="z[0]", ylabel="z[1]", aspect="equal")
    figure.colorbar(points, ticks=sorted(set(labels)))
    return write_figure(figure, path)


@torch.no_grad()
def plot_manifold(model: HVAE, n: int = 20, path: str | Path | None = None) -> Figure:
    """What the plane of a two-dimensional z_1 decodes to: n x n quantiles of N(0, 1).

    So every picture stands for the same share of the prior (Kingma & Welling 2014, figure 4).
    z[0] grows to the right, z[1] upwards.

    Raises:
        ValueError: as plot_plane.
    """
    check_plane(model)
    z = torch.distributions.Normal(0, 1).icdf((torch.arange(n) + 0.5) / n)
    points = torch.cartesian_prod(-z, z).flip(1)  # rows from the top, (n * n, 2)
    sheet = make_grid(model.decode([points.to(model.device)]).image, nrow=n, padding=0)
    figure = Figure(figsize=(7, 7 * sheet.shape[1] / sheet.shape[2]), layout="constrained")
    axis = figure.subplots()
    axis.imshow(sheet.permute(1, 2, 0).cpu().numpy(), extent=(0, n, 0, n))
    ticks = [i + 0.5 for i in range(n)]
    values = [f"{value:.1f}" for value in z.tolist()]
    axis.set_xticks(ticks, values, fontsize=6, rotation=90)
    axis.set_yticks(ticks, values, fontsize=6)
    axis.set(xlabel="z[0]", ylabel="z[1]")
    return write_figure(figure, path)


def has_plane(model: HVAE) -> bool:
    """Whether the model is a flat VAE of two latent numbers without text."""
    return [level.shape for level in model.levels] == [(2,)] and model.text_length is None


def check_plane(model: HVAE) -> None:
    if not has_plane(model):
        shapes = ", ".join("x".join(map(str, level.shape)) for level in model.levels)
        raise InputError(f"expected one level of two numbers and no text, got latents {shapes}")


def draw_texts(model: HVAE, n: int, text: str | None, seed: int) -> list[str]:
    """The texts of n images; an empty list for an unconditional model."""
    y = model.draw_text(n, text, seeded(seed))
    return [] if y is None else [decode_text(row, model.charset) for row in y]


def first_images(model: HVAE, dataset: Dataset, n: int) -> tuple[Tensor, Tensor | None, list[str]]:
    """The first n images (n, C, H, W) of a data set; y or None; the texts as strings."""
    items = [dataset[i] for i in range(min(n, len(dataset)))]
    if not items:
        raise InputError("the data set is empty")
    x = torch.stack([image for image, _ in items])
    x = (binarised(x, seeded(0)) if model.binarised else x).to(model.device)
    if model.text_length is None:
        return x, None, []
    y = torch.stack([label for _, label in items])
    return x, y.to(model.device), [decode_text(row, model.charset) for row in y]


def held_out_images(
    model: HVAE,
    data: str | None = None,
    root: str | Path = "data",
    limit: int | None = None,
    fonts: Sequence[str] | None = None,
    folder: str | Path | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Held-out images for a model: of the data that it was trained on, unless others are named.

    Args:
        data: 'captcha' for renders of the model's size and texts, or 'mnist'.
        root: of MNIST's files.
        limit: how many; None is 512 renders, or all of the others. Of MNIST they are evenly spaced,
            because the first half of its test set is easier than the second.
        fonts: to render with.
        folder: use this folder: all of it, or its split 'test' if the model was trained on it.
        skip_bad: leave out damaged or misnamed files of the folder.

    Raises:
        ValueError: the images that the model was trained on are unknown, gone, or have no fonts.
    """
    origin = origin_of(model)
    if folder is None and data is None and "path" in origin:
        folder = origin["path"]
        if not Path(folder).is_dir():
            raise InputError(f"the model was trained on {folder}, which is gone; name a --folder")
    if folder is not None:
        if fonts:
            raise InputError("fonts: they have no effect on the images of a folder")
        return folder_images(model, folder, origin, limit, skip_bad)
    if data == "mnist" or (data is None and origin.get("data") == "MNIST"):
        if fonts:
            raise InputError("fonts: they have no effect on MNIST")
        test_set = MNIST("test", root, model.text_length)
        n = len(test_set) if limit is None else min(limit, len(test_set))
        return Subset(test_set, [i * len(test_set) // n for i in range(n)])
    if data is None and origin.get("renderer") != "captcha":
        raise InputError("the model was not trained on plain renders; name a --folder or --data")
    known = origin if data is None else {}
    look = dict(fonts=fonts or known.get("fonts"), font_sizes=known.get("font_sizes"))
    if model.text_length:
        shortest = model.possible_lengths[0] if model.lengths else None
        texts = dict(text_length=model.text_length, shortest=shortest, charset=model.charset)
    else:  # those of its training
        names = ("text_length", "shortest", "charset")
        texts = {name: known[name] for name in names if name in known}
    size = 512 if limit is None else limit
    return CaptchaDataset(size, "test", model.input_shape[1:], **texts, **look)


def origin_of(model: HVAE) -> dict:
    """What is known of the data that a model was trained on; by default they are renders."""
    origin = model.provenance.get("data", {"renderer": "captcha"})
    return origin if isinstance(origin, dict) else {}


def folder_images(
    model: HVAE, folder: str | Path, origin: dict, limit: int | None, skip_bad: bool
) -> CaptchaFolder:
    """The images of a folder at the model's size; the test split, if the model has seen others.

    A copy of the folder that the model was trained on is known by its content.
    """
    is_path = str(Path(folder).resolve()) == origin.get("path")
    images = CaptchaFolder(
        folder,
        model.input_shape[1:],
        model.text_length,
        model.charset,
        skip_bad=skip_bad or (is_path and origin.get("skip_bad", False)),
        channels=model.input_shape[0],
        shortest=model.possible_lengths[0] if model.text_length else 1,
    )
    limit = len(images) if limit is None else limit
    is_known = is_path or images.description["content"] == origin.get("content")
    if is_known and "subset" in origin:
        warnings.warn(f"{folder}: the model may have seen these images in a Subset", stacklevel=3)
    return images.other_split("test" if is_known else None, limit)


def save_figures(model: HVAE, folder: Path, test_set: Dataset) -> None:
    """Pictures of what a model draws and holds, with held-out images as the originals."""
    folder.mkdir(parents=True, exist_ok=True)
    write_image(sample_sheet(model, 32), folder / "samples.png")
    originals, _, _ = first_images(model, test_set, 32)
    sheet = make_grid(shown(originals), columns_for(model), pad_value=1)
    write_image(sheet, folder / "originals.png")
    plot_samples(model, path=folder / "temperatures.png")
    plot_reconstructions(model, test_set, path=folder / "reconstructions.png")
    plot_levels(model, test_set, path=folder / "levels.png")
    pair = (0, min(1, len(test_set) - 1))
    plot_interpolation(model, test_set, pair, path=folder / "interpolation.png")
    plot_prior_vs_aggregate(model, test_set, path=folder / "prior_vs_aggregate.png")
    if has_plane(model):
        plot_plane(model, test_set, path=folder / "plane.png")
        plot_manifold(model, path=folder / "manifold.png")


# ---------------------------------------------------------------------------- command line


def sampling_parser() -> argparse.ArgumentParser:
    parser = make_parser("Draws captchas with a trained HVAE.")
    add = parser.add_argument
    add("--data", choices=tuple(CHECKPOINTS), help="whose shipped checkpoint; default: captcha")
    add("--folder", type=path_argument, metavar="DIR", help="originals of the figures")
    add("--root", type=path_argument, default="data", metavar="DIR", help="of MNIST's files")
    add("--checkpoint", type=path_argument, metavar="FILE", help="a file that HVAE.save wrote")
    add("--out", type=path_argument, default="samples.png", metavar="FILE", help="the sheet")
    add("--n", type=int, default=32, help=f"images; on a sheet at most {SHEET}")
    add("--text", help="what to draw; by default another text on every image")
    add("--temperature", type=float, default=1.0, metavar="T", help="below 1, samples are plainer")
    add("--captions", action="store_true", help="the texts asked for, below the samples")
    add("--seed", type=int, default=0, help="another seed gives other samples")
    add("--individual", type=path_argument, metavar="DIR", help="one file per image, no sheet")
    add("--resume", action="store_true", help="go on with the files of --individual, same options")
    add("--figures", type=path_argument, metavar="DIR", help="the README's pictures, no sheet")
    add("--device", help="cpu, cuda, ...; CUDA if there is one")
    return parser


def unused_options(args: argparse.Namespace) -> dict[str, set[str]]:
    """The options that have no effect, by the reason."""
    if args.figures:
        sheet = {"individual", "out", "n", "text", "temperature", "seed", "captions"}
        return {"with --figures": sheet | {"resume"}}
    unused = {"without --figures": {"root", "folder"}}
    if args.individual:
        unused["with --individual"] = {"out", "captions"}
    else:
        unused["without --individual"] = {"resume"}
    if args.checkpoint:
        unused["with --checkpoint"] = {"data"}
    return unused


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sampling_parser()
    args = parser.parse_args(arguments)
    reject_unused(parser, given_options(parser, arguments, args), unused_options(args))
    keep_memory()
    with one_line_errors(parser):
        validate_int("--n", args.n, 1)
        validate_int("--seed", args.seed, 0, 2**63 - 1)
        checkpoint = args.checkpoint or CHECKPOINTS[args.data or "captcha"]
        model = HVAE.load(checkpoint, pick_device(args.device))
        request = (args.n, args.text, args.temperature, args.seed)
        if args.figures:
            originals = held_out_images(model, args.data, args.root, folder=args.folder)
            save_figures(model, Path(args.figures), originals)
            print(f"pictures in {args.figures}")
        elif args.individual:
            save_individual(model, args.individual, *request, args.resume)
            print(f"{args.n} images in {args.individual}")
        else:
            check_picture(args.out)  # errors come before the drawing
            write_image(sample_sheet(model, *request, captions=args.captions), args.out)
            print(f"{args.n} samples on {args.out}")


if __name__ == "__main__":
    main()

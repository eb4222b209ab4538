"""How good are the samples? Their figures beside those of real renders, in one command.

    python tests/benchmarks/quality.py                            the shipped checkpoint
    python tests/benchmarks/quality.py run/hvae.pt --temperature 0.8
    python tests/benchmarks/quality.py run/hvae-*.pt --curve quality.png     a run, as a picture

Use: what do the samples teach?
    CAS          a reader trained on samples reads renders, beside one trained on as many renders
                 (Classification Accuracy Score, Ravuri & Vinyals 2019)
    few          readers trained on 500 or 2,000 renders, without and with samples of the model
Truth: are they the renderer's distribution?
    C2ST         the accuracy of a classifier that tells samples from renders; 0.5 is the best
                 (classifier two-sample test, Lopez-Paz & Oquab 2017), with its 95% interval
    symbols, texts   the share that a reader trained on renders reads as asked for
    Frechet      distance of Gaussians fitted to its features of samples and of renders (Heusel et
                 al. 2017, with this reader in place of Inception)
    diversity    of images of one text: mean distance of two of them, in features and in pixels
    colours      standard deviation over images: of the ink (a channel's third percentile) and of
                 the paper (its median); and within an image: the root mean square distance, in
                 levels, of its pixels from the best line through its paper
    -ELBO        on 512 captchas of the split 'test', and bits/dim where there are any
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from reader import (
    RULER,
    Kind,
    Reader,
    balanced,
    fit_reader,
    kind_of,
    load_reader,
    renders_like,
    shuffled,
)
from tqdm import tqdm

from dataset import random_stream, render
from generate import CHECKPOINTS, SampleBatches, draw_texts, held_out_images
from hvae.cli import make_parser
from hvae.parallel import keep_memory, pick_device
from model import HVAE
from trainer import evaluate

Draw = Callable[[Sequence[str], str], Tensor]  # texts, name of the stream -> uint8 (n, 3, H, W)
FEW = (500, 2000)  # real captchas


# ---------------------------------------------------------------------------- images


def renders_for(model: HVAE) -> Draw:
    """Renders of a model's size and fonts; each name is another stream of randomness."""
    renderer = renders_like(model, 0).renderer

    def draw(texts: Sequence[str], stream: str) -> Tensor:
        bar = tqdm(texts, f"render {stream}", leave=False, mininterval=1)
        return torch.stack(
            [render(renderer, text, random_stream(2, stream, i)) for i, text in enumerate(bar)]
        )

    return draw


def samples_of(model: HVAE, temperature: float) -> Draw:
    def draw(texts: Sequence[str], stream: str) -> Tensor:
        seed = random_stream(3, stream, 0).getrandbits(62)
        batches = SampleBatches(model, len(texts), list(texts), temperature, seed).by_all_cores()
        bar = tqdm(batches, f"sample {stream}", leave=False, mininterval=1)
        return torch.cat([images for images, _ in bar])

    return draw


def labels(texts: Sequence[str], model: HVAE) -> Tensor:
    return model.draw_text(len(texts), texts).cpu()


# ---------------------------------------------------------------------------- measures


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A function of floats in [0, 1], of all images uint8 (n, 3, H, W)."""
    device = pick_device()
    parts = [function(part.to(device).float() / 255).cpu() for part in images.split(100)]
    return torch.cat(parts)


def accuracy(reader: Reader, images: Tensor, y: Tensor) -> tuple[float, float]:
    """(share of symbols, share of texts) read as asked for."""
    right = in_batches(reader, images).argmax(2) == y
    return right.float().mean().item(), right.all(1).float().mean().item()


def frechet(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (n, d), in float64."""
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def diversity(images: Tensor, per_text: int) -> float:
    """Mean distance of two images (or features) of one text; per_text in a row share one."""
    groups = images.flatten(1).unflatten(0, (-1, per_text))
    distances = [torch.pdist(group).mean() / group.shape[1] ** 0.5 for group in groups]
    return torch.stack(distances).mean().item()


def colours(images: Tensor, quantile: float) -> float:
    """Standard deviation, over images, of a quantile of each channel's pixels, in [0, 1]."""
    values = in_batches(lambda x: x.flatten(2).quantile(quantile, 2), images)
    return values.std(0).mean().item()


def off_the_line(x: Tensor) -> Tensor:
    """(n,): how far pixels (n, 3, H, W) in [0, 1] are from a line of colours, in levels."""
    x = 255 * x.flatten(2)
    squares = torch.linalg.svdvals(x - x.mode(2, keepdim=True).values).square()
    return (squares[:, 1:].sum(1) / x.shape[2]).sqrt()


def two_sample_test(a: Tensor, b: Tensor, steps: int) -> tuple[float, float]:
    """Accuracy of a classifier that tells a from b, and half of its 95% interval.

    Trained on the first three quarters of each, tested on the rest.
    """
    train, test = zip(*(x.tensor_split([3 * len(x) // 4]) for x in (a, b)), strict=True)
    parts = [(x, torch.full((len(x), 1), i)) for i, x in enumerate(train)]
    kind = Kind(tuple(a.shape[1:]), rows=1, outputs=2)
    classifier = fit_reader(balanced(parts), steps, "classifier", kind)
    right = [in_batches(classifier, x).argmax(2) == i for i, x in enumerate(test)]
    p, n = torch.cat(right).float().mean().item(), sum(map(len, test))
    return p, 1.96 * math.sqrt(max(p * (1 - p), 1 / n) / n)


def truth(draw: Draw, reader: Reader, model: HVAE, n: int, reference: Tensor) -> dict[str, float]:
    """The figures that need no training; `reference` are features of renders of other texts."""
    texts = draw_texts(model, n, None, seed=0)
    images = draw(texts, "measure")
    symbols, whole_texts = accuracy(reader, images, labels(texts, model))
    same = draw([text for text in texts[:40] for _ in range(16)], "one text")
    return {
        "symbols read": symbols,
        "texts read": whole_texts,
        "Frechet distance": frechet(in_batches(reader.features, images), reference),
        "diversity, features": diversity(in_batches(reader.features, same), 16),
        "diversity, pixels": diversity(same.float() / 255, 16),
        "colours of the ink": colours(images, 0.03),
        "colours of the paper": colours(images, 0.5),
        "colours off a line": in_batches(off_the_line, images).mean().item(),
    }


def use(
    images: Tensor,
    real: Tensor,
    y: Tensor,
    test: tuple[Tensor, Tensor],
    kind: Kind,
    steps: int,
) -> dict[str, float]:
    """What images of texts y teach a reader: alone, and beside the first few of `real`, renders.

    If the images are `real` themselves, the few are alone.
    """
    read = lambda batches, name: accuracy(fit_reader(batches, steps, name, kind), *test)
    figures = {}
    figures["CAS symbols"], figures["CAS texts"] = read(shuffled(images, y), "CAS")
    for n in FEW:
        few, name = (real[:n], y[:n]), f"{n} renders"
        if images is not real:
            name += " and samples"
        batches = shuffled(*few) if images is real else balanced([few, (images, y)])
        _, figures[f"texts, {name}"] = read(batches, name)
    return figures


# ---------------------------------------------------------------------------- table and curve


def print_table(columns: dict[str, dict[str, float]]) -> None:
    real = columns["renders"]
    for name, figures in columns.items():
        print(f"\n{name}")
        for key, value in figures.items():
            ratio = f"   {value / real[key]:6.2f} x renders" if real.get(key) else ""
            print(f"  {key:34s}{value:9.3f}{ratio}")


def plot_curve(images_seen: Sequence[int], rows: Sequence[dict], real: dict, path: str) -> None:
    """Figures against images seen, with the renders' own as a dashed line."""
    names = ["symbols read", "Frechet distance", "diversity, features"]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, 3), names, strict=True):
        seen = [images / 1000 for images in images_seen]
        axis.plot(seen, [row[name] for row in rows], "o-", label="samples")
        axis.axhline(real[name], color="black", linestyle="--", label="renders")
        scale = "log" if "distance" in name else "linear"
        axis.set(xlabel="thousand images seen", title=name, yscale=scale)
        axis.legend()
    figure.savefig(path, dpi=100)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoints", nargs="*", default=[str(CHECKPOINTS["captcha"])])
    add("--temperature", type=float, default=1.0, help="times the priors' noise")
    add("--n", type=int, default=2000, help="images of each source, measured")
    add("--n-train", type=int, default=20_000, help="images that a reader is trained on")
    add("--n-two", type=int, default=6000, help="images of each kind in the two-sample test")
    add("--steps", type=int, default=800, help="of a reader's training, with 64 images each")
    add("--reader", default=str(RULER), help="the ruler; trained if there is no such file")
    add("--curve", metavar="FILE", help="no training: draw the other figures against images seen")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    keep_memory()
    device = pick_device()
    models = {path: HVAE.load(path, device) for path in args.checkpoints}
    model = next(iter(models.values()))
    reader, draw_renders = load_reader(Path(args.reader), model), renders_for(model)
    others = draw_renders(draw_texts(model, args.n, None, seed=1), "reference")
    reference = in_batches(reader.features, others)
    columns = {"renders": truth(draw_renders, reader, model, args.n, reference)}
    if not args.curve:
        real_texts = draw_texts(model, args.n_train, None, seed=2)
        real, y = draw_renders(real_texts, "train"), labels(real_texts, model)
        test_texts = draw_texts(model, 2 * args.n, None, seed=3)
        test = draw_renders(test_texts, "test"), labels(test_texts, model)
        kind = kind_of(model)
        columns["renders"].update(use(real, real, y, test, kind, args.steps))
    for path, model in models.items():
        draw = samples_of(model, args.temperature)
        columns[path] = truth(draw, reader, model, args.n, reference)
        metrics = evaluate(model, held_out_images(model))
        columns[path]["-ELBO, nats"] = -metrics["elbo"]
        if metrics["bits_per_dim"] is not None:
            columns[path]["bits/dim"] = metrics["bits_per_dim"]
        if not args.curve:
            samples = draw(real_texts, "train")
            columns[path].update(use(samples, real, y, test, kind, args.steps))
            two = samples[: args.n_two], real[-args.n_two :]
            p, half = two_sample_test(*two, args.steps // 2)
            columns[path].update({"C2ST": p, "C2ST +-": half})
    print(f"T = {args.temperature:g}")
    print_table(columns)
    if args.curve:
        seen = [model.provenance.get("images_seen", 0) for model in models.values()]
        plot_curve(seen, [columns[path] for path in models], columns["renders"], args.curve)


if __name__ == "__main__":
    main()

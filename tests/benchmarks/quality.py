"""How good are the samples? One table per checkpoint, beside the same figures for real renders.

    python tests/benchmarks/quality.py                                     the shipped checkpoint
    python tests/benchmarks/quality.py run/hvae-*.pt --curve quality.png   a training run, as a picture

A reader trained on renders (reader.py; the first call trains it, five minutes on two cores) looks at samples of given
texts and at renders of the same texts:

    symbols, texts   the share that it reads as asked for
    Frechet          the distance between Gaussians fitted to its features of samples and of renders (Heusel et al. 2017,
                     with this reader in place of Inception), beside that between two sets of renders
    diversity        of images of one text: the mean distance of two of them, in its features and in pixels
    colours          their standard deviation over images: of the ink (a channel's third percentile) and of the paper
                     (its median)
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Callable, Sequence

import captcha.image
import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from dataset import encode_text, random_stream, render  # noqa: E402
from generate import CHECKPOINTS, test_images, usual_temperature  # noqa: E402
from model import HVAE, pick_device  # noqa: E402
from reader import Reader, load_reader  # noqa: E402
from trainer import evaluate  # noqa: E402

Draw = Callable[[Sequence[str]], Tensor]  # texts -> images (n, 3, H, W) in [0, 1]


def renders(split: str) -> Draw:
    """Draws of the real renderer; every split has a stream of its own."""
    renderer = captcha.image.ImageCaptcha(160, 60)

    def draw(texts: Sequence[str]) -> Tensor:
        images = [render(renderer, text, random_stream(2, split, i)) for i, text in enumerate(texts)]
        return torch.stack(images).float() / 255

    return draw


def samples(model: HVAE, temperature: Sequence[float], seed: int = 0) -> Draw:
    generator = torch.Generator().manual_seed(seed)

    def draw(texts: Sequence[str]) -> Tensor:
        parts = [list(texts[i : i + 50]) for i in range(0, len(texts), 50)]
        images = torch.cat([model.sample(len(part), part, temperature, generator).cpu() for part in parts])
        return (255 * images).round() / 255  # as a file would hold them

    return draw


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, device: torch.device) -> Tensor:
    return torch.cat([function(part.to(device)).cpu() for part in x.split(100)])


def accuracy(reader: Reader, images: Tensor, texts: Sequence[str], charset: str, device: torch.device) -> tuple[float, float]:
    """(share of symbols, share of whole texts) read as asked for."""
    y = torch.stack([encode_text(text, charset) for text in texts])
    right = in_batches(reader, images, device).argmax(2) == y
    return right.float().mean().item(), right.all(1).float().mean().item()


def frechet(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (n, d), in float64."""
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()  # of the same eigenvalues as A B
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def diversity(images: Tensor, per_text: int) -> float:
    """Mean root-mean-square distance between two images (or features) of one text; per_text in a row share one."""
    groups = images.flatten(1).unflatten(0, (-1, per_text))
    distances = [torch.pdist(group).mean() / group.shape[1] ** 0.5 for group in groups]
    return torch.stack(distances).mean().item()


def colours(images: Tensor, quantile: float) -> float:
    """Standard deviation, over images, of a quantile of each channel's pixels."""
    values = torch.cat([part.flatten(2).quantile(quantile, 2) for part in images.split(100)])
    return values.std(0).mean().item()


def measure(draw: Draw, reader: Reader, texts: Sequence[str], reference: Tensor, charset: str, device: torch.device) -> dict:
    """The figures of one source of images; `reference` are the features of renders of other texts."""
    images = draw(texts)
    symbols, whole = accuracy(reader, images, texts, charset, device)
    same = draw([text for text in texts[:40] for _ in range(16)])
    return {"symbols read": symbols, "texts read": whole,
            "Frechet distance to renders": frechet(in_batches(reader.features, images, device), reference),
            "diversity of one text, features": diversity(in_batches(reader.features, same, device), 16),
            "diversity of one text, pixels": diversity(same, 16),
            "colours of the ink": colours(images, 0.03), "colours of the paper": colours(images, 0.5)}


def random_texts(n: int, length: int, charset: str, seed: int) -> list[str]:
    stream = random.Random(seed)
    return ["".join(stream.choice(charset) for _ in range(length)) for _ in range(n)]


def plot_curve(images_seen: Sequence[int], table: Sequence[dict], real: dict, path: str) -> None:
    """Each figure against images seen, with the renders' own as a dashed line."""
    names = ["symbols read", "Frechet distance to renders", "diversity of one text, features"]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, 3), names):
        axis.plot([images / 1000 for images in images_seen], [row[name] for row in table], "o-", label="samples")
        axis.axhline(real[name], color="black", linestyle="--", label="renders")
        axis.set(xlabel="thousand images seen", title=name, yscale="log" if "distance" in name else "linear")
        axis.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=[str(CHECKPOINTS["captcha"])])
    parser.add_argument("--temperature", type=float, nargs="+", action="append", metavar="T",
                        help="one number, or one each from z_1 up; default: as in generate.py; may be given several times")
    parser.add_argument("--n", type=int, default=2000, help="images of each source")
    parser.add_argument("--reader", default="checkpoints/run/reader.pt", help="where the reader is, or is written to")
    parser.add_argument("--minutes", type=float, default=5.0, help="for training the reader, if it is not there")
    parser.add_argument("--curve", metavar="FILE", help="draw the figures against images seen")
    parser.add_argument("--device", help="cpu, cuda, ...; CUDA if there is one")
    args = parser.parse_args()
    if args.curve and len(args.temperature or []) > 1:
        parser.error("--curve draws one temperature")
    device = pick_device(args.device)
    reader = load_reader(Path(args.reader), args.minutes, device.type)
    charset, length = HVAE.load(args.checkpoints[0]).charset, reader.shape[0]
    texts = random_texts(args.n, length, charset, seed=0)
    reference = in_batches(reader.features, renders("train")(random_texts(args.n, length, charset, seed=1)), device)
    columns = {"renders": measure(renders("test"), reader, texts, reference, charset, device)}
    seen = []
    for path in args.checkpoints:
        model = HVAE.load(path, device)
        seen.append(model.provenance.get("images_seen", 0))
        for temperature in args.temperature or [usual_temperature(model)]:
            name = f"{path}, T = {' '.join(map(str, temperature))}"
            columns[name] = measure(samples(model, temperature), reader, texts, reference, charset, device)
    for name, figures in columns.items():
        print(f"\n{name}")
        for key, value in figures.items():
            print(f"  {key:34s}{value:8.3f}   {value / columns['renders'][key]:6.2f} x renders")
    if len(args.checkpoints) == 1:
        metrics = evaluate(model, test_images(model))
        kl = " ".join(f"{value:.1f}" for value in reversed(metrics["kl"]))
        print(f"\n-ELBO {-metrics['elbo']:,.1f} nats per image: reconstruction {metrics['reconstruction']:,.1f}, KL from the top {kl}")
        if metrics["bits_per_dim"] is not None:
            print(f"{metrics['bits_per_dim']:.3f} bits/dim")
    if args.curve:
        plot_curve(seen, [row for name, row in columns.items() if name != "renders"], columns["renders"], args.curve)


if __name__ == "__main__":
    main()

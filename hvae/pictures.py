"""Pictures as files: encoded in memory first, because Pillow hides write errors of JPEG files."""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from hvae.checkpoint import atomic_write
from hvae.validate import InputError


def write_image(image: Tensor, path: str | Path) -> None:
    """Writes an image (C, H, W) in [0, 1].

    Raises:
        ValueError: the file's extension is not that of a picture, or cannot hold the image.
        OSError: naming the file that could not be written.
    """
    content, kind = BytesIO(), picture_format(path)
    try:
        levels = (255 * image.float()).round().clamp(0, 255).byte()
        to_pil_image(levels.cpu()).save(content, kind)
    except (ValueError, OverflowError) as error:  # such as a GIF of more than 65,535 rows
        raise InputError(f"{path}: {error}") from error
    write_bytes(path, content)


def write_figure(figure: Figure, path: str | Path | None) -> Figure:
    """Writes a figure if there is a path; returns it."""
    if path is not None:
        content = BytesIO()
        figure.savefig(content, format=Path(path).suffix[1:], dpi=100)
        write_bytes(path, content)
    return figure


def plot_history(history: Sequence[dict], path: str | Path | None = None) -> Figure:
    """Draws the loss and the KL of every level against images seen, into a file if given."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    columns = dict.fromkeys(name for row in history for name in row)

    def curve(axis, rows: Sequence[dict], key: str, *style, **more) -> None:
        seen = [row["images"] / 1000 for row in rows]
        axis.plot(seen, [row.get(key, math.nan) for row in rows], *style, **more)

    closed = "reconstruction, lower levels closed"
    for key, label in [("neg_elbo", "training"), ("reconstruction_closed", closed)]:
        if key in columns:
            curve(left, history, key, label=label, linewidth=1)
    held_out = [row for row in history if "val_neg_elbo" in row]
    curve(left, held_out, "val_neg_elbo", "k.-", label="held out")
    left.set(xlabel="thousand images seen", ylabel="-ELBO (nats per image)")
    left.legend()
    for key in columns:
        if key.startswith("kl_"):
            curve(right, history, key, label=f"z_{key[3:]}", linewidth=1)
    right.set(xlabel="thousand images seen", ylabel="KL (nats per image)", yscale="log")
    right.legend(ncols=2)
    return write_figure(figure, path)


def shown(images: Tensor) -> Tensor:
    """Of images (n, C, H, W) the channels that a picture can have: three, or the first."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1]


def check_picture(path: str | Path) -> None:
    """Raises the error that write_image() would raise if it could not write to this path."""
    picture_format(path)
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path}: could not be written (No such file or directory)")


def picture_format(path: str | Path) -> str:
    """The format that a file's extension names."""
    suffix = Path(path).suffix
    name = Image.registered_extensions().get(suffix.lower())
    if name not in Image.SAVE:
        raise InputError(f"{path}: {suffix!r} is not the extension of a picture, such as .png")
    return name


def write_bytes(path: str | Path, content: BytesIO) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getvalue())

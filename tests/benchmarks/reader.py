"""The measuring instruments: a captcha reader, and a classifier of two samples.

Both are trained for a fixed number of steps, so that a slower machine gives the same figures.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import CaptchaDataset, make_loader
from generate import held_out_images, origin_of
from hvae.checkpoint import read_tensors, write_tensors
from hvae.parallel import has_bf16, pick_device
from hvae.validate import InputError
from model import HVAE

BATCH = 64
RULER = Path(__file__).with_name("reader.pt")  # for four digits and upper-case letters, 60x160


class Kind(NamedTuple):
    """What a reader sees and says."""

    image: tuple[int, int, int]
    rows: int  # symbols of a text
    outputs: int  # of the charset, and a blank if there are shorter texts


class Reader(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> logits (B, rows, outputs)."""

    def __init__(self, kind: Kind):
        super().__init__()
        (c, h, w), self.shape = kind.image, (kind.rows, kind.outputs)
        widths = [(c, 32, 2), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        layers = []
        for c_in, c_out, stride in widths:
            conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
        self.maps = nn.Sequential(*layers)
        self.columns = nn.Conv2d(128, 64, (-(-h // 8), 1))  # (B, 64, 1, W / 8)
        self.hidden = nn.Linear(64 * -(-w // 8), 128)
        self.heads = nn.Linear(128, kind.rows * kind.outputs)

    def features(self, x: Tensor) -> Tensor:
        """(B, 128): what the reader knows of an image before it names the symbols."""
        return F.relu(self.hidden(F.relu(self.columns(self.maps(2 * x - 1))).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.features(x)).unflatten(1, self.shape)


def fit_reader(
    batches: Iterable[tuple[Tensor, Tensor]], steps: int, name: str, kind: Kind
) -> Reader:
    """Trains a reader on batches (images (B, C, H, W), labels (B, rows)) for so many steps."""
    torch.manual_seed(1)
    device = pick_device()
    reader = Reader(kind).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3, weight_decay=0.01)
    schedule = OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    bar = tqdm(islice(batches, steps), name, steps, dynamic_ncols=True, mininterval=1, leave=False)
    for x, y in bar:
        x, y = x.to(device, memory_format=torch.channels_last), y.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            logits = reader(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader.eval()


def shuffled(images: Tensor, labels: Tensor, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of images uint8 (n, C, H, W), as floats in [0, 1], and their labels."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for i in order[: max(BATCH, len(order) // BATCH * BATCH)].split(BATCH):
            yield images[i].float() / 255, labels[i]


def balanced(parts: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, an equal share of each from every part (images, labels)."""
    streams = [shuffled(*part, seed=i) for i, part in enumerate(parts)]
    share = BATCH // len(parts)
    while True:
        drawn = [next(stream) for stream in streams]
        yield tuple(torch.cat([items[k][:share] for items in drawn]) for k in (0, 1))


def kind_of(model: HVAE) -> Kind:
    """The reader for the images and texts of a model."""
    outputs = len(model.charset) + (model.lengths is not None)
    return Kind(model.input_shape, model.text_length, outputs)


def renders_like(model: HVAE, n: int) -> CaptchaDataset:
    """Renders for a model, with the fonts that it was trained on."""
    origin = origin_of(model)
    if origin.get("renderer") != "captcha":
        raise InputError("the measures are for models of rendered captchas, not of other images")
    if model.input_shape[0] != 3 or model.text_length is None:
        raise InputError("the measures are for models of rendered captchas, in colour, with texts")
    return held_out_images(model, limit=n)


def load_reader(path: Path, model: HVAE, steps: int = 2500) -> Reader:
    """The reader of a file; trained on new renders and written there, if there is none."""
    kind = kind_of(model)
    renders = renders_like(model, steps * BATCH)
    ruler = [list(kind.image), *kind[1:], model.charset, renders.description["fonts"]]
    if not path.is_file():
        loader = make_loader(replace(renders, split="train", seed=1), BATCH, workers=1, seed=1)
        reader = fit_reader(loader, steps, "reader", kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, reader.state_dict(), {"ruler": ruler})
    reader, (weights, metadata) = Reader(kind), read_tensors(path)
    reads = metadata.get("ruler")
    if reads != ruler:
        raise InputError(f"{path} reads {reads}, not {ruler}; name another --reader")
    reader.load_state_dict(weights)
    return reader.to(pick_device()).eval()

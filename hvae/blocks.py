"""The config language: lists of tuples become layers, and layers have mirrors.

    [('conv', 32), ('pool', 2)]  --plan-->  [Layer, Layer]  --Block-->  nn.Module
                                              |
                                           mirror: reversed, conv <-> transposed conv,
                                                   pool <-> upsample

`plan` computes every channel and size before a module exists. A bad config is thus reported by
block and layer, and `mirror` restores odd sizes exactly.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvae.validate import MAX_PIXELS, InputError, is_int

Size = tuple[int, ...]  # (H, W) of a feature map, () for a vector, whose product is 1

MIRROR = {
    "conv": "convt",
    "convt": "conv",
    "pool": "upsample",
    "upsample": "pool",
    "res": "res",
    "skip-up": "skip-down",
    "skip-down": "skip-up",
    "dense": "undense",
    "undense": "dense",
}
OUTER_TUPLES = ("conv", "conv-bn", "pool", "res", "dense")
INNER_TUPLES = (*OUTER_TUPLES, "convt", "convt-bn", "upsample", "skip-up", "skip-down")
MAX_WEIGHTS = 2**28  # of one layer: 1 GB


class Layer(NamedTuple):
    """One line of a plan: what the layer does, and the shapes it maps between."""

    kind: str
    c_in: int
    c_out: int
    size_in: Size
    size_out: Size
    arg: int = 1  # the stride of a convolution, the factor of a pooling, the index of a skip
    bn: bool = False
    c_skip: int = 0  # skip-down: channels of the map it receives


# ---------------------------------------------------------------------------- config -> plan


def plan(config: Sequence[tuple], channels: int, size: Size, name: str) -> list[Layer]:
    """Works out the layers of one block.

    Args:
        config: list of tuples, see the table in the README.
        channels, size: of the block's input; size is (H, W), or () for a vector.
        name: 'outer_config' or 'inner_config[i]', for messages; it decides what is allowed.

    Raises:
        ValueError: naming the block and the layer, such as
            "inner_config[1][4] ('skip-down', 3): no 'skip-up' with index 3 before it".
    """
    if isinstance(config, (str, bytes)) or not isinstance(config, Sequence) or not config:
        raise InputError(f"{name}: expected a non-empty list of tuples, got {config!r}")
    allowed = OUTER_TUPLES if name == "outer_config" else INNER_TUPLES
    planner = Planner(channels, size)
    for position, item in enumerate(config):
        try:
            planner.add(*parse_tuple(item, allowed))
        except InputError as error:
            raise InputError(f"{name}[{position}] {item!r}: {error}") from None
    if planner.open_skips:
        raise InputError(
            f"{name}: 'skip-up' with index {min(planner.open_skips)} has no 'skip-down'"
        )
    return planner.layers


def parse_tuple(item: tuple, allowed: Sequence[str]) -> tuple[str, int, int]:
    """Checks a tuple by itself; returns its kind, its first number, and its stride or 1."""
    if not isinstance(item, (tuple, list)) or not item or not isinstance(item[0], str):
        raise InputError("expected a tuple such as ('conv', 32)")
    kind, *args = item
    if kind not in allowed:
        problem = "is not allowed in outer_config" if kind in INNER_TUPLES else "is unknown"
        raise InputError(f"{kind!r} {problem}; use one of {', '.join(allowed)}")
    has_stride = kind in ("conv", "conv-bn")
    if not 1 <= len(args) <= 1 + has_stride:
        numbers = "one or two numbers" if has_stride else "one number"
        raise InputError(f"{kind!r} takes {numbers}, got {len(args)}")
    minimum = 0 if kind.startswith("skip") else 1
    for arg in args:
        if not is_int(arg, minimum):
            raise InputError(f"expected a whole number >= {minimum}, got {arg!r}")
    return kind, args[0], args[1] if len(args) == 2 else 1


class Planner:
    """Builds a plan layer by layer, and keeps what later layers refer back to."""

    def __init__(self, channels: int, size: Size):
        self.channels, self.size = channels, size
        self.layers: list[Layer] = []
        self.open_skips: dict[int, Layer] = {}  # the skip-ups that no skip-down has received yet
        self.used_skips: set[int] = set()
        self.reductions: list[list] = []  # [factor still to undo, size before it], newest last

    def add(self, kind: str, arg: int, stride: int) -> None:
        if self.layers and self.layers[-1].kind == "dense":
            raise InputError("'dense' must be the last layer of its block")
        if self.size == () and kind != "dense":
            raise InputError("needs a feature map, but a 'dense' before it left a vector")
        bn, kind = kind.endswith("-bn"), kind.removesuffix("-bn")
        layer = Layer(kind, self.channels, self.channels, self.size, self.size, bn=bn)
        if kind in ("conv", "convt", "res"):
            layer = self.convolution(layer, arg, stride)
        elif kind == "pool":
            layer = self.pool(layer, arg)
        elif kind == "upsample":
            layer = layer._replace(arg=arg, size_out=self.undo_reductions(arg))
        elif kind == "dense":
            layer = layer._replace(c_out=arg, size_out=())
        else:
            layer = self.skip(layer, arg)
        if math.prod(layer.size_out) > MAX_PIXELS:
            raise InputError(f"its map would have more than {MAX_PIXELS:,} pixels")
        if kind == "dense":
            inputs = layer.c_in * math.prod(layer.size_in)
        else:  # 3x3 convolutions
            inputs = 9 * max(layer.c_in + layer.c_skip, layer.c_out)
        if inputs * layer.c_out > MAX_WEIGHTS:
            raise InputError(f"would have more than {MAX_WEIGHTS:,} weights")
        self.layers.append(layer)
        self.channels, self.size = layer.c_out, layer.size_out

    def convolution(self, layer: Layer, channels: int, stride: int) -> Layer:
        if stride > max(self.size):
            raise InputError(f"the stride is larger than its {show(self.size)} map")
        if stride > 1:
            self.reductions.append([stride, self.size])
        size_out = tuple(-(-n // stride) for n in self.size)
        return layer._replace(c_out=channels, arg=stride, size_out=size_out)

    def pool(self, layer: Layer, factor: int) -> Layer:
        if factor > min(self.size):
            raise InputError(f"the pool is larger than its {show(self.size)} map")
        if factor > 1:
            self.reductions.append([factor, self.size])
        return layer._replace(arg=factor, size_out=tuple(n // factor for n in self.size))

    def skip(self, layer: Layer, index: int) -> Layer:
        if layer.kind == "skip-up":
            if index in self.open_skips or index in self.used_skips:
                raise InputError(f"a second 'skip-up' with index {index}")
            self.open_skips[index] = layer = layer._replace(arg=index)
            return layer
        if index not in self.open_skips:
            unused = "unused " if index in self.used_skips else ""
            raise InputError(f"no {unused}'skip-up' with index {index} before it")
        up = self.open_skips.pop(index)
        self.used_skips.add(index)
        if up.size_in != self.size:
            raise InputError(
                f"its map is {show(self.size)}, but 'skip-up' {index} remembered {show(up.size_in)}"
            )
        return layer._replace(arg=index, c_skip=up.c_in)

    def undo_reductions(self, factor: int) -> Size:
        """The size after an upsampling: that before the reductions it undoes, else a multiple."""
        size = self.size
        while factor > 1 and self.reductions:
            left, before = self.reductions[-1]
            if factor % left == 0:  # undoes all of this reduction, and perhaps the one before it
                self.reductions.pop()
                size, factor = before, factor // left
            elif left % factor == 0:  # undoes a part of it
                self.reductions[-1][0] = left // factor
                break
            else:  # undoes nothing: from here on the map has a size of its own
                self.reductions.clear()
        return tuple(n * factor for n in size)


def mirror(layers: Sequence[Layer]) -> list[Layer]:
    """The same layers undone: reversed, c_in and c_out swapped, every size restored exactly."""
    c_skip = {layer.arg: layer.c_in for layer in layers if layer.kind == "skip-down"}
    return [
        Layer(
            kind=MIRROR[layer.kind],
            c_in=layer.c_out,
            c_out=layer.c_in,
            size_in=layer.size_out,
            size_out=layer.size_in,
            arg=layer.arg,
            bn=layer.bn,
            c_skip=c_skip[layer.arg] if layer.kind == "skip-up" else 0,
        )
        for layer in reversed(layers)
    ]


def show(size: Size) -> str:
    return "x".join(map(str, size))


# ---------------------------------------------------------------------------- plan -> module


class Block(nn.Module):
    """Runs a plan: (B, c_in, *size_in) -> (B, c_out, *size_out)."""

    def __init__(self, layers: Sequence[Layer]):
        super().__init__()
        self.plan = list(layers)
        self.layers = nn.ModuleList(build(layer) for layer in layers)

    def forward(self, h: Tensor) -> Tensor:
        remembered = {}
        for layer, module in zip(self.plan, self.layers, strict=True):
            if layer.kind == "skip-up":
                remembered[layer.arg] = h
            elif layer.kind == "skip-down":
                h = torch.cat([h, remembered[layer.arg]], dim=1)
            h = module(h)
        return h

    def __str__(self) -> str:
        """In a few words: 'conv 32/2, pool 2' (channels, or the factor or index; the stride)."""
        words = []
        for layer in self.plan:
            has_channels = layer.kind not in ("pool", "upsample", "skip-up", "skip-down")
            stride = f"/{layer.arg}" if layer.kind in ("conv", "convt") and layer.arg > 1 else ""
            number = layer.c_out if has_channels else layer.arg
            kind = f"{layer.kind}-bn" if layer.bn else layer.kind
            words.append(f"{kind} {number}{stride}")
        return ", ".join(words)


def build(layer: Layer) -> nn.Module:
    """The module of one layer."""
    if layer.kind == "conv":
        conv = nn.Conv2d(layer.c_in, layer.c_out, 3, layer.arg, padding=1, bias=not layer.bn)
        return activated(conv, layer)
    if layer.kind == "convt":
        return activated(ConvTranspose(layer), layer)
    if layer.kind == "res":
        return Res(layer.c_in, layer.c_out, layer.size_in)
    if layer.kind == "pool":
        exact = layer.size_out == tuple(n // layer.arg for n in layer.size_in)
        return nn.MaxPool2d(layer.arg) if exact else nn.AdaptiveMaxPool2d(layer.size_out)
    if layer.kind == "upsample":
        return nn.Upsample(size=layer.size_out)
    if layer.kind == "dense":
        linear = nn.Linear(layer.c_in * math.prod(layer.size_in), layer.c_out)
        return nn.Sequential(nn.Flatten(), linear, nn.SiLU())
    if layer.kind == "undense":
        linear = nn.Linear(layer.c_in, layer.c_out * math.prod(layer.size_out))
        return nn.Sequential(linear, nn.SiLU(), nn.Unflatten(1, (layer.c_out, *layer.size_out)))
    if layer.kind == "skip-down":
        return nn.Conv2d(layer.c_in + layer.c_skip, layer.c_out, 1)
    return nn.Identity()  # skip-up: Block remembers the map


def activated(conv: nn.Module, layer: Layer) -> nn.Sequential:
    """convolution (-> batch normalisation, which brings the bias) -> activation"""
    if layer.bn:
        return nn.Sequential(conv, nn.BatchNorm2d(layer.c_out), nn.SiLU())
    return nn.Sequential(conv, nn.SiLU())


class ConvTranspose(nn.ConvTranspose2d):
    """A 3x3 transposed convolution to the exact size of the input that it mirrors.

    It makes stride times its input's size, and cuts off the rest: oneDNN is slow where the output
    paddings of height and width differ.
    """

    def __init__(self, layer: Layer):
        stride, bias = layer.arg, not layer.bn
        super().__init__(layer.c_in, layer.c_out, 3, stride, 1, stride - 1, bias=bias)
        self.size = layer.size_out

    def forward(self, h: Tensor) -> Tensor:
        height, width = self.size
        return super().forward(h)[..., :height, :width]


class Res(nn.Module):
    """Pre-activation residual block (He et al. 2016): h + conv(act(conv(act(norm(h))))).

    Group normalisation has no statistics of batches: training and sampling see one function.
    """

    def __init__(self, c_in: int, c_out: int, size: Size):
        super().__init__()
        self.norm = group_norm(math.gcd(8, c_in), c_in, size)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.conv2.weight.data *= 0.25  # keeps the variance of a stack of twenty near its input's

    def forward(self, h: Tensor) -> Tensor:
        return self.shortcut(h) + self.conv2(F.silu(self.conv1(F.silu(self.norm(h)))))


def group_norm(groups: int, c: int, size: Size) -> nn.Module:
    """Group normalisation. Groups of one value, which it would set to 0, are merged into one."""
    if c * math.prod(size) == 1:
        return nn.Identity()
    return nn.GroupNorm(1 if c * math.prod(size) == groups else groups, c)


def project(c_in: int, c_out: int, size: Size) -> nn.Module:
    """A linear map between channels: a convolution for feature maps, nn.Linear for vectors."""
    return nn.Conv2d(c_in, c_out, 1) if size else nn.Linear(c_in, c_out)

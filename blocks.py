"""The config language: lists of tuples become layers, and layers have mirrors.

    [('conv', 32), ('pool', 2)]  --plan-->  [Layer, Layer]  --Block-->  nn.Module
                                              |
                                           mirror: reversed, conv <-> transposed conv, pool <-> upsample

`plan` works out every channel and every size before a module exists, so a bad config is refused with the
name of its block and layer, and `mirror` can restore odd sizes exactly.
"""

import math
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, ...]  # (H, W) of a feature map, () for a vector

MIRROR = {"conv": "convt", "convt": "conv", "pool": "upsample", "upsample": "pool", "res": "res",
          "skip-up": "skip-down", "skip-down": "skip-up", "dense": "undense", "undense": "dense"}
MOST_PIXELS = 2**24  # of an image or a map: more than 4096 x 4096 is a slip, or somebody's joke
OUTER_TUPLES = ("conv", "conv-bn", "pool", "res", "dense")
INNER_TUPLES = OUTER_TUPLES + ("convt", "convt-bn", "upsample", "skip-up", "skip-down")


class Layer(NamedTuple):
    """One line of a plan: what the layer does and the shapes it does it between."""

    kind: str
    c_in: int
    c_out: int
    size_in: Size
    size_out: Size
    arg: int = 1  # the stride of a convolution, the factor of a pooling, the index of a skip
    bn: bool = False
    c_skip: int = 0  # skip-down only: channels of the map it receives

    def __str__(self) -> str:
        shape = lambda c, size: "x".join(map(str, (c, *size)))
        extra = f", {self.arg}" if self.kind not in ("res", "dense", "undense") and self.arg != 1 else ""
        return f"{self.kind}{'-bn' * self.bn}{extra}: {shape(self.c_in, self.size_in)} -> {shape(self.c_out, self.size_out)}"


# ------------------------------------------------------------------------------------------------ config -> plan


def plan(config: Sequence[tuple], channels: int, size: Size, name: str) -> list[Layer]:
    """Works out the layers of one block.

    Args:
        config: list of tuples, see the table in the README.
        channels, size: of the block's input; size is (H, W), or () if the input is a vector.
        name: 'outer_config' or 'inner_config[i]', for error messages; it decides which tuples are allowed.

    Raises:
        ValueError: naming the block and the layer, e.g. "inner_config[1][4] ('skip-down', 3): no 'skip-up' ...".
    """
    if isinstance(config, (str, bytes)) or not isinstance(config, Sequence) or len(config) == 0:
        raise ValueError(f"{name}: expected a non-empty list of tuples, got {config!r}")
    layers: list[Layer] = []
    memory: dict[int, Layer] = {}  # skip-ups that no skip-down has taken yet
    spent: set[int] = set()
    reductions: list[list] = []  # [factor still to undo, size before it], innermost last

    for position, item in enumerate(config):
        where = f"{name}[{position}] {item!r}"
        kind, arg, stride = _parse(item, where, OUTER_TUPLES if name == "outer_config" else INNER_TUPLES)
        if layers and layers[-1].kind == "dense":
            raise ValueError(f"{where}: 'dense' must be the last layer of its block")
        if size == () and kind != "dense":
            raise ValueError(f"{where}: needs a feature map, but a 'dense' before it left a vector")
        bn, kind = kind.endswith("-bn"), kind.removesuffix("-bn")
        layer = Layer(kind, channels, channels, size, size, bn=bn)

        if kind in ("conv", "convt", "res"):
            layer = layer._replace(c_out=arg, arg=stride, size_out=tuple(-(-n // stride) for n in size))
            if stride > 1:
                reductions.append([stride, size])
        elif kind == "pool":
            if arg > min(size):
                raise ValueError(f"{where}: the pool is larger than its {size[0]}x{size[1]} map")
            layer = layer._replace(arg=arg, size_out=tuple(n // arg for n in size))
            if arg > 1:
                reductions.append([arg, size])
        elif kind == "upsample":
            layer = layer._replace(arg=arg, size_out=_undo(reductions, arg, size))
        elif kind == "dense":
            layer = layer._replace(c_out=arg, size_out=())
        elif kind == "skip-up":
            if arg in memory or arg in spent:
                raise ValueError(f"{where}: a second 'skip-up' with index {arg}")
            layer = memory[arg] = layer._replace(arg=arg)
        elif kind == "skip-down":
            if arg not in memory:
                raise ValueError(f"{where}: no {'unused ' * (arg in spent)}'skip-up' with index {arg} before it")
            up = memory.pop(arg)
            spent.add(arg)
            if up.size_in != size:
                raise ValueError(f"{where}: its map is {size[0]}x{size[1]}, but 'skip-up' {arg} remembered "
                                 f"{up.size_in[0]}x{up.size_in[1]}")
            layer = layer._replace(arg=arg, c_skip=up.c_in)
        if pixels(layer.size_out) > MOST_PIXELS:
            raise ValueError(f"{where}: its map would have more than {MOST_PIXELS:,} pixels")
        layers.append(layer)
        channels, size = layer.c_out, layer.size_out

    if memory:
        raise ValueError(f"{name}: 'skip-up' with index {min(memory)} has no 'skip-down'")
    return layers


def _parse(item: tuple, where: str, allowed: Sequence[str]) -> tuple[str, int, int]:
    """Checks one tuple on its own; returns (kind, first argument, stride)."""
    if not isinstance(item, (tuple, list)) or not item or not isinstance(item[0], str):
        raise ValueError(f"{where}: expected a tuple such as ('conv', 32)")
    kind, *args = item
    if kind not in allowed:
        known = "is not allowed in outer_config" if kind in INNER_TUPLES else "is unknown"
        raise ValueError(f"{where}: {kind!r} {known}; use one of {', '.join(allowed)}")
    most = 2 if kind in ("conv", "conv-bn") else 1
    if not 1 <= len(args) <= most:
        raise ValueError(f"{where}: {kind!r} takes {'one or two numbers' if most == 2 else 'one number'}, got {len(args)}")
    lowest = 0 if kind.startswith("skip") else 1
    for arg in args:
        if not whole(arg, lowest):
            raise ValueError(f"{where}: expected {'a positive whole number' if lowest else 'a whole number >= 0'}, got {arg!r}")
    return kind, args[0], args[1] if len(args) == 2 else 1


def _undo(reductions: list[list], factor: int, size: Size) -> Size:
    """The size after an upsampling: that before the reductions it undoes, or simply `factor` times larger."""
    while factor > 1 and reductions:
        left, before = reductions[-1]
        if factor % left == 0:  # undoes this reduction whole, and perhaps the next one too
            reductions.pop()
            size, factor = before, factor // left
        elif left % factor == 0:  # undoes a part of it
            reductions[-1][0] = left // factor
            break
        else:  # undoes nothing: from here on the map has a size of its own
            reductions.clear()
    return tuple(n * factor for n in size)


def mirror(layers: Sequence[Layer]) -> list[Layer]:
    """The same layers undone: reversed, c_in and c_out swapped, every size restored exactly."""
    c_skip = {layer.arg: layer.c_in for layer in layers if layer.kind == "skip-down"}
    return [Layer(MIRROR[layer.kind], layer.c_out, layer.c_in, layer.size_out, layer.size_in, layer.arg, layer.bn,
                  c_skip[layer.arg] if layer.kind == "skip-up" else 0)
            for layer in reversed(layers)]


# ------------------------------------------------------------------------------------------------ plan -> module


class Block(nn.Module):
    """Runs a plan: (B, c_in, *size_in) -> (B, c_out, *size_out)."""

    def __init__(self, layers: Sequence[Layer]):
        super().__init__()
        self.plan = list(layers)
        self.layers = nn.ModuleList(build(layer) for layer in layers)

    def forward(self, h: Tensor) -> Tensor:
        memory = {}
        for layer, module in zip(self.plan, self.layers):
            if layer.kind == "skip-up":
                memory[layer.arg] = h
            elif layer.kind == "skip-down":
                h = torch.cat([h, memory[layer.arg]], dim=1)
            h = module(h)
        return h


def build(layer: Layer) -> nn.Module:
    """The module of one layer."""
    if layer.kind == "conv":
        return activated(nn.Conv2d(layer.c_in, layer.c_out, 3, layer.arg, padding=1, bias=not layer.bn), layer)
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
        return nn.Sequential(nn.Flatten(), nn.Linear(layer.c_in * pixels(layer.size_in), layer.c_out), nn.SiLU())
    if layer.kind == "undense":
        linear = nn.Linear(layer.c_in, layer.c_out * pixels(layer.size_out))
        return nn.Sequential(linear, nn.SiLU(), nn.Unflatten(1, (layer.c_out, *layer.size_out)))
    if layer.kind == "skip-down":
        return nn.Conv2d(layer.c_in + layer.c_skip, layer.c_out, 1)
    return nn.Identity()  # skip-up: Block remembers the map


def activated(conv: nn.Module, layer: Layer) -> nn.Sequential:
    """convolution (-> batch normalisation, which brings the bias) -> activation"""
    return nn.Sequential(conv, *[nn.BatchNorm2d(layer.c_out)] * layer.bn, nn.SiLU())


class ConvTranspose(nn.ConvTranspose2d):
    """A 3x3 transposed convolution to an exact size: of the `stride` possible ones, the one it mirrors."""

    def __init__(self, layer: Layer):
        super().__init__(layer.c_in, layer.c_out, 3, layer.arg, padding=1, bias=not layer.bn)
        self.size = layer.size_out

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h, output_size=self.size)


class Res(nn.Module):
    """Pre-activation residual block (He et al. 2016): h + conv(act(conv(act(norm(h))))).

    Group normalisation keeps no statistics between batches, so training and sampling see the same function.
    """

    def __init__(self, c_in: int, c_out: int, size: Size):
        super().__init__()
        self.norm = group_norm(math.gcd(8, c_in), c_in, size)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.conv2.weight.data *= 0.25  # so that the variance of a stack of twenty stays near its input's

    def forward(self, h: Tensor) -> Tensor:
        return self.shortcut(h) + self.conv2(F.silu(self.conv1(F.silu(self.norm(h)))))


def group_norm(groups: int, c: int, size: Size) -> nn.Module:
    """Group normalisation; never of single values, of which it would leave nothing."""
    if c * pixels(size) == 1:
        return nn.Identity()
    return nn.GroupNorm(1 if c * pixels(size) == groups else groups, c)


def whole(n, lowest: float = float("-inf")) -> bool:
    """Whether n is a whole number, and not a truth value, from `lowest` up."""
    return isinstance(n, int) and not isinstance(n, bool) and n >= lowest


def pixels(size: Size) -> int:
    """Positions of a map of this size; 1 for a vector."""
    n = 1
    for side in size:
        n *= side
    return n


def project(c_in: int, c_out: int, size: Size) -> nn.Module:
    """A linear map between channels: a convolution for feature maps, nn.Linear for vectors."""
    return nn.Conv2d(c_in, c_out, 1) if size else nn.Linear(c_in, c_out)

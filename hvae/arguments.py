"""The arguments of HVAE: their checks, and the defaults that depend on the blocks."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

from hvae.blocks import Size
from hvae.distributions import LIKELIHOODS
from hvae.validate import (
    InputError,
    is_int,
    validate_charset,
    validate_choice,
    validate_image_size,
    validate_int,
    validate_number,
)

MAX_LATENT = 2**16  # channels of a latent


def plain(value):
    """A config as lists of tuples of plain values, whatever sequences and numbers it came in."""
    if isinstance(value, (list, tuple)):
        values = [plain(part) for part in value]
        return tuple(values) if values and isinstance(values[0], str) else values
    for kind, plain_kind in ((bool, bool), (str, str), (Integral, int), (Real, float)):
        if isinstance(value, kind):  # numpy's are, but they are not JSON
            return plain_kind(value)
    return value


def latent_width(c: int, size: Size) -> int:
    """Channels of a latent beside c features of this size, if none are given.

    Half of a vector's features; of a map the fewer, the more positions it has: 8 at 4x10, 4 at
    8x20, 2 at 15x40, 1 from 30x40 up.
    """
    if not size:
        return max(1, c // 2)
    return max(1, min(c, round(50 / math.prod(size) ** 0.5)))


def channels_per_level(
    latent_channels: int | Sequence[int] | None, widths: Sequence[int], sizes: Sequence[Size]
) -> list[int]:
    if latent_channels is None:
        return [latent_width(c, size) for c, size in zip(widths, sizes, strict=True)]
    levels = len(widths)
    is_list = isinstance(latent_channels, (list, tuple))
    channels = list(latent_channels) if is_list else [latent_channels] * levels
    if len(channels) != levels or not all(is_int(c, 1) and c <= MAX_LATENT for c in channels):
        raise InputError(
            f"latent_channels: expected a whole number from 1 to {MAX_LATENT}, or {levels} "
            f"(one per level), got {latent_channels!r}"
        )
    return channels


def flow_couplings(flow: int | None, c_z: int, size: Size, by_default: bool) -> int:
    """The number of couplings of p(z_L)'s flow."""
    possible = not size and c_z > 1
    if flow is None:
        return 24 if possible and by_default else 0
    validate_int("flow", flow, 0, 1000)
    if flow and not possible:
        raise InputError(
            f"flow: {flow} couplings need a z_L that is a vector of two numbers or more; "
            "end the last block with a 'dense'"
        )
    return flow


def validate_arguments(**arguments) -> None:
    """Raises InputError naming the first argument of HVAE that cannot be right.

    The configs are checked by plan(), the widths by channels_per_level().
    """
    validate_image_size("input_size", arguments["input_size"])
    inner_config, sigma = arguments["inner_config"], arguments["sigma"]
    if not isinstance(inner_config, (list, tuple)):
        raise InputError(f"inner_config: expected a list of lists of tuples, got {inner_config!r}")
    validate_int("input_channels", arguments["input_channels"], 1)
    validate_int("mixtures", arguments["mixtures"], 1, 1000)
    validate_choice("inference", arguments["inference"], ("top-down", "bottom-up"))
    validate_choice("likelihood", arguments["likelihood"], tuple(LIKELIHOODS))
    for name in ("context", "prior_context"):
        window = arguments[name]
        pair = isinstance(window, (tuple, list)) and len(window) == 2
        if window is not None and not (pair and all(is_int(n, 1) for n in window)):
            raise InputError(f"{name}: expected (rows, columns), both >= 1, got {window!r}")
    if arguments["context"] is not None and arguments["likelihood"] == "gaussian":
        raise InputError("context: the likelihood 'gaussian' has none; pass context=None")
    if sigma is not None:
        validate_number("sigma", sigma, 1e-30, 1e30)
    if arguments["text_length"] is not None:
        validate_int("text_length", arguments["text_length"], 1, 1000)
        validate_charset(arguments["charset"])
        lengths, length = arguments["lengths"], arguments["text_length"]
        if lengths is not None:
            is_list = isinstance(lengths, (list, tuple)) and len(lengths) == length
            is_number = lambda n: isinstance(n, Real) and 0 <= n < math.inf
            if not (is_list and all(map(is_number, lengths)) and sum(lengths) > 0):
                raise InputError(f"lengths: expected {length} numbers >= 0, one > 0: {lengths!r}")

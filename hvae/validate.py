"""Checks of what enters from outside: arguments of constructors, train() and command lines."""

import math
from collections.abc import Collection, Sequence
from numbers import Real

MAX_PIXELS = 2**24  # of an image or a feature map: more than 4096 x 4096 is a typing error


class InputError(ValueError):
    """An argument or a file that cannot be used. Command lines print it as one line."""


def is_int(value, minimum: float = -math.inf) -> bool:
    """Whether a value is an int >= minimum; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def validate_int(name: str, value, minimum: float = -math.inf, maximum: float = math.inf) -> None:
    """Raises InputError unless the value is an int with minimum <= value <= maximum."""
    if is_int(value, minimum) and value <= maximum:
        return
    limits = "" if minimum == -math.inf else f" >= {minimum}"
    limits = limits if maximum == math.inf else f" from {minimum} to {maximum}"
    raise InputError(f"{name}: expected a whole number{limits}, got {value!r}")


def validate_number(name: str, value, low: float, high: float = math.inf) -> None:
    """Raises InputError unless the value is a finite number with low <= value <= high."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and low <= value <= high and value < math.inf:
        return
    limits = f" from {low:g} to {high:g}" if high < math.inf else f" >= {low:g}"
    raise InputError(f"{name}: expected a number{limits}, got {value!r}")


def validate_choice(name: str, value, choices: Collection) -> None:
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")


def validate_image_size(name: str, size, minimum: int = 1) -> None:
    """Raises InputError unless size is (height, width), both >= minimum, of at most MAX_PIXELS."""
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not pair or not all(is_int(side, minimum) for side in size):
        raise InputError(f"{name}: expected (height, width), both >= {minimum}, got {size!r}")
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(f"{name}: {size[0]}x{size[1]} has more than {MAX_PIXELS:,} pixels")


def validate_charset(charset) -> None:
    if not isinstance(charset, str) or not charset or len(set(charset)) != len(charset):
        raise InputError(f"charset: expected a string of different symbols, got {charset!r}")


def per_level(name: str, value: float | Sequence[float], levels: int) -> list[float]:
    """A number >= 0 for each level, z_1 first, from one for all or one each."""
    each = list(value) if isinstance(value, (list, tuple)) else [value]
    each = each * levels if len(each) == 1 else each
    if len(each) != levels or not all(isinstance(n, Real) and 0 <= n < math.inf for n in each):
        raise InputError(
            f"{name}: expected a number >= 0, or {levels} (one per level), got {value!r}"
        )
    return [float(n) for n in each]

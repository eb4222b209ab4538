"""Texts as indices into a charset, and back. The index after the last symbol is a blank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hvae.validate import InputError

DIGITS = "0123456789"
UPPERCASE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def encode_text(text: str, charset: str = DIGITS + UPPERCASE, length: int | None = None) -> Tensor:
    """The text as indices into the charset, int64 (T,), filled up with blanks to a length.

    Raises:
        ValueError: naming the first symbol that is not in the charset, or a text that is too long.
    """
    for symbol in text:
        if symbol not in charset:
            raise InputError(f"text {text!r}: {symbol!r} is not in the charset {charset!r}")
    length = len(text) if length is None else length
    if len(text) > length:
        raise InputError(f"text {text!r}: expected at most {length} symbols")
    blanks = [len(charset)] * (length - len(text))
    return torch.tensor([*map(charset.index, text), *blanks], dtype=torch.long)


def match_case(text: str, charset: str) -> str:
    """The text, upper-cased if the charset has no lower-case letters."""
    return text if any(symbol.islower() for symbol in charset) else text.upper()


def possible_lengths(frequencies: Sequence[float]) -> list[int]:
    """The numbers of symbols that texts have, from how frequent texts of 1, 2, ... symbols are."""
    return [i + 1 for i, frequency in enumerate(frequencies) if frequency > 0]


def span(numbers: Sequence[int]) -> str:
    """How many symbols texts have, for messages: "4", "4 to 6", or "3 or 5"."""
    first, last = min(numbers), max(numbers)
    if len(numbers) <= last - first:  # not all between them
        return " or ".join(map(str, numbers))
    return f"{last}" if first == last else f"{first} to {last}"


def decode_text(indices: Tensor | Sequence[int], charset: str = DIGITS + UPPERCASE) -> str:
    """The text of indices (T,) into the charset, without blanks; undoes encode_text.

    Raises:
        ValueError: the indices are not one row, or naming the first that is outside the charset.
    """
    indices = torch.as_tensor(indices)
    if indices.dim() != 1:
        raise InputError(f"expected the indices of one text, (T,), got {tuple(indices.shape)}")
    for i in indices.tolist():
        if not 0 <= i <= len(charset):
            raise InputError(f"index {i} is outside 0..{len(charset)}, of the charset and a blank")
    return "".join([*charset, ""][i] for i in indices.tolist())

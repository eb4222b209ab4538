"""What the command lines share: the look of --help, and errors as one line."""

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from hvae.validate import InputError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends an option's default to its help, unless it is None or False."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def make_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        usage="%(prog)s [options]", description=description, formatter_class=HelpFormatter
    )


def path_argument(value: str) -> str:
    """The type of an option that names a file or a folder: an empty string is an error."""
    if not value:
        raise argparse.ArgumentTypeError("expected a path, got an empty string")
    return value


@contextmanager
def one_line_errors(parser: argparse.ArgumentParser, after_interrupt: str = "") -> Iterator[None]:
    """Ends the program with one line and status 2 (130 after Ctrl-C) instead of a traceback.

    This covers bad input, files that cannot be read or written, and lack of GPU memory. Any
    other error is a defect, and keeps its traceback.
    """
    try:
        yield
    except (InputError, OSError, FloatingPointError) as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
    except (MemoryError, torch.OutOfMemoryError):
        parser.exit(2, f"{parser.prog}: error: not enough memory\n")
    except KeyboardInterrupt:
        parser.exit(130, f"interrupted{after_interrupt}\n")


def one_line(error: Exception) -> str:
    """The message of an error; from a data worker, which sends its traceback, the last line."""
    text = str(error) or type(error).__name__
    return " ".join((text.splitlines()[-1] if text.startswith("Caught ") else text).split())


def given_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, args: argparse.Namespace
) -> set[str]:
    """Which of the parsed args are on the command line, and not defaults: their names."""
    not_given = object()
    namespace = argparse.Namespace(**dict.fromkeys(vars(args), not_given))
    parsed = parser.parse_args(arguments, namespace)
    return {name for name, value in vars(parsed).items() if value is not not_given}


def reject_unused(
    parser: argparse.ArgumentParser, given: set[str], unused: Mapping[str, Collection[str]]
) -> None:
    """Ends the program if an option is given that has no effect; the keys say why."""
    for cause, names in unused.items():
        for name in sorted(given & set(names)):
            parser.error(f"--{name.replace('_', '-')} has no effect {cause}")

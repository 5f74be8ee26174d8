"""The options that the sub-commands share, and the types of their values."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path

from gpu_hodlr.devices import DEVICES
from gpu_hodlr.errors import ArgumentError

PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def add_common_options(
    parser: argparse.ArgumentParser,
    *,
    maxiter: int | None = 500,
    damping: bool = True,
    dtype: str = "the matrix's own",
    picture: str = "the blocks coloured by rank, and error against storage",
) -> None:
    """The options that every sub-command has.

    Args:
        parser: of the sub-command.
        maxiter: the default of that option; None where there is none.
        damping: whether it is free to choose.
        dtype: the default, in words.
        picture: what is drawn.
    """
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu", help="where to work (default cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32"),
        help=f"numbers to work in (default {dtype})",
    )
    parser.add_argument(
        "--seed",
        type=whole_number,
        default=0,
        metavar="NUMBER",
        help="of all random choices (default 0)",
    )
    if damping:
        parser.add_argument(
            "--damping",
            type=non_negative,
            metavar="NUMBER",
            help="factorize K + NUMBER*I (default: measured error times the Frobenius norm, with"
            " which the compressed matrix is positive definite)",
        )
    if maxiter is not None:
        parser.add_argument(
            "--maxiter",
            type=whole_number,
            default=maxiter,
            metavar="NUMBER",
            help="most CG iterations, with the factor and without; 0 stands for no CG"
            f" (default {maxiter})",
        )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write all results to this file"
    )
    parser.add_argument(
        "--plot",
        type=plot_file,
        metavar="FILE",
        help=f"draw {picture}; .png, .pdf or .svg",
    )


def whole_number(text: str, least: int = 0) -> int:
    """An option's value: an integer, 0 or more."""
    value = int(text) if text.strip().isdecimal() else -1
    if value < least:
        raise argparse.ArgumentTypeError(f"wanted an integer, {least} or more, got {text!r}")
    return value


def positive(text: str) -> int:
    """An option's value: an integer, 1 or more."""
    return whole_number(text, 1)


def _number(text: str, wanted: str, allowed: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"wanted a {wanted}, got {text!r}")
    return value


def non_negative(text: str) -> float:
    """An option's value: a finite number, 0 or more."""
    return _number(text, "finite number, 0 or more", lambda value: 0.0 <= value < math.inf)


def above_zero(text: str) -> float:
    """An option's value: a finite number above 0."""
    return _number(text, "finite number above 0", lambda value: 0.0 < value < math.inf)


def list_of(allowed: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, each once."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return names

    return parse


def tolerance(text: str) -> float:
    """An option's value: a relative error, which that of the zero matrix is no more."""
    return _number(text, "number above 0 and below 1", lambda value: 0.0 < value < 1.0)


def output_file(text: str) -> Path:
    """An option's value: a file that can be written, found out before the work and not after."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    new = not os.path.lexists(path)
    try:
        with open(path, "ab"):  # rights, a full quota, a name too long
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}: {error.strerror}") from None
    return path


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse to write one file twice, or over the one that is read.

    Raises:
        ArgumentError: it would be.
    """
    written: dict[str, str] = {}
    file = getattr(args, "file", None)
    if file is not None:
        written[os.path.realpath(file)] = "the matrix"
    for option in ("save", "json", "plot"):
        path = getattr(args, option, None)
        if path is None:
            continue
        before = written.setdefault(os.path.realpath(path), f"--{option}")
        if before != f"--{option}":
            raise ArgumentError(f"--{option} {path} is also the file of {before}")


def plot_file(text: str) -> Path:
    """An option's value: a picture file that can be written."""
    if not text.lower().endswith(PLOT_SUFFIXES):
        raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(PLOT_SUFFIXES)}")
    return output_file(text)

"""The command line: `python -m gpu_hodlr table`, `compress FILE.npy`, `bench sc17`, `pareto`.

Here: the parser, what every sub-command shares, and how an error becomes one line. The library
itself prints nothing; all printing is done on this floor.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gpu_hodlr.devices import DEVICES
from gpu_hodlr.errors import GpuHodlrError

if TYPE_CHECKING:
    from tqdm import tqdm


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
EXTRAS = {"torch": "demo", "mlxtend": "demo", "matplotlib": "plot"}  # module -> pip extra
PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, default `sys.argv[1:]`.

    Returns:
        The exit status: 0, 2 for bad input (one line on stderr), 130 when interrupted.
    """
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except (GpuHodlrError, ModuleNotFoundError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `... | head`: not an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"gpu-hodlr: error: {_explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu-hodlr: interrupted", file=sys.stderr)
        return 130
    return 0


def _explain(error: Exception) -> str:
    """One line for an error; a missing module names the extra to install, or is raised again."""
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise error
        extra = EXTRAS[module]
        return f'this needs {module}, which is not installed: pip install "gpu_hodlr[{extra}]"'
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; each one brings its own options and its `run`."""
    from gpu_hodlr.cli import bench, file_command, pareto, table

    parser = argparse.ArgumentParser(
        prog="python -m gpu_hodlr",
        description="Compress, multiply by and invert large symmetric positive definite matrices.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    table.add_parser(commands)
    file_command.add_parser(commands)
    bench.add_parser(commands)
    pareto.add_parser(commands)
    return parser


def add_common_options(
    parser: argparse.ArgumentParser,
    *,
    maxiter: int = 500,
    damping: bool = True,
    picture: str = "the blocks coloured by rank, and error against storage",
) -> None:
    """The options that every sub-command has.

    Args:
        parser: of the sub-command.
        maxiter: the default of that option.
        damping: whether it is free to choose.
        picture: what is drawn.
    """
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where (default cpu)")
    parser.add_argument("--dtype", choices=("float64", "float32"), help="numbers to work in")
    parser.add_argument(
        "--seed", type=whole_number, default=0, help="of all random choices (default 0)"
    )
    if damping:
        parser.add_argument(
            "--damping",
            type=non_negative,
            help="factorize K + DAMPING*I (default: measured error times the Frobenius norm, with"
            " which the compressed matrix is positive definite)",
        )
    parser.add_argument(
        "--maxiter",
        type=whole_number,
        default=maxiter,
        help=f"most CG iterations, with the factor and without (default {maxiter}; 0: no CG)",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the results here")
    parser.add_argument(
        "--plot",
        type=plot_file,
        metavar="FILE",
        help=f"picture of {picture} (png, pdf, svg)",
    )


def whole_number(text: str) -> int:
    """An option's value: an integer, 0 or more."""
    value = int(text) if text.strip().isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"wanted an integer, 0 or more, got {text!r}")
    return value


def positive(text: str) -> int:
    """An option's value: an integer, 1 or more."""
    value = whole_number(text)
    if value == 0:
        raise argparse.ArgumentTypeError("wanted an integer, 1 or more, got 0")
    return value


def non_negative(text: str) -> float:
    """An option's value: a finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted a finite number, 0 or more, got {text!r}")
    return value


def above_zero(text: str) -> float:
    """An option's value: a finite number above 0."""
    value = non_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError("wanted a number above 0, got 0")
    return value


def list_of(allowed: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, each once."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return names

    return parse


def output_file(text: str) -> Path:
    """An option's value: a file that can be written, found out before the work and not after."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}")
    return path


def plot_file(text: str) -> Path:
    """An option's value: a picture file that can be written."""
    if not text.lower().endswith(PLOT_SUFFIXES):
        raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(PLOT_SUFFIXES)}")
    return output_file(text)


def require(*modules: str) -> None:
    """Fail now rather than after minutes of work when an optional module is missing."""
    import importlib.util

    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


@contextlib.contextmanager
def warnings_as_notes(notes: list[str]) -> Iterator[None]:
    """Append the warnings of the block to `notes`, a line each, instead of showing them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            lines = [" ".join(str(warning.message).split()) for warning in caught]
            notes.extend(line for line in dict.fromkeys(lines) if line not in notes)


class Progress:
    """A bar over the named steps of a run on stderr; nothing where stderr is not a terminal.

    Attributes:
        shown: whether there is a bar.
    """

    def __init__(self, steps: int) -> None:
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            with contextlib.suppress(ModuleNotFoundError):
                from tqdm import tqdm

                self._bar = tqdm(total=steps, unit="step", leave=False, file=sys.stderr)
        self.shown = self._bar is not None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show the name while the block runs; count it when it is done."""
        if self._bar is not None:
            self._bar.set_description(name)
        yield
        if self._bar is not None:
            self._bar.update(1)

    def write(self, line: str) -> None:
        """Print a line on stdout, above the bar if there is one."""
        if self._bar is not None:
            self._bar.clear()
        print(line, flush=True)

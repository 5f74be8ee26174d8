"""The command line: `python -m gpu_hodlr table`, `compress FILE.npy`, `bench sc17`, `laplace`, ...

Here: the parser, how an error becomes one line, and what every sub-command shares. The library
itself prints nothing; all printing is done on this floor.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import gpu_hodlr as gh
from gpu_hodlr import errors

if TYPE_CHECKING:
    from tqdm import tqdm


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
EXTRAS = {"torch": "demo", "mlxtend": "demo", "matplotlib": "plot"}  # module -> pip extra
NAME = "gpu-hodlr"
DONE, NOT_DONE, CANNOT_BE_USED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141  # exit status
_CANNOT_BE_USED = (
    errors.ArgumentError, errors.ShapeError, errors.DtypeError, errors.DeviceError,
    errors.FileFormatError, errors.UnsupportedLayerError, ModuleNotFoundError, FileNotFoundError,
    IsADirectoryError, NotADirectoryError, PermissionError,
)  # fmt: skip


class UnfinishedError(Exception):
    """Something that was asked for was not done; what was done is printed and written by then."""


class Parser(argparse.ArgumentParser):
    """One whose errors are one line each, of the command they belong to."""

    def error(self, message: str) -> NoReturn:
        """See `argparse`, which would print the usage as well."""
        self.exit(CANNOT_BE_USED, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse`, where a typing error is one of the main command."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], options, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, default `sys.argv[1:]`.

    Returns:
        The exit status: 0; 1 where something that was asked for was not done; 2 for options or
        files that cannot be used (1, 2: one line on stderr); 130 when interrupted; 141 where
        nobody reads what is printed.
    """
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (errors.GpuHodlrError, UnfinishedError, ModuleNotFoundError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED
        print(f"{NAME}: error: {_explain(error)}", file=sys.stderr)
        return CANNOT_BE_USED if isinstance(error, _CANNOT_BE_USED) else NOT_DONE
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


def _explain(error: Exception) -> str:
    """One line for an error; a missing module names the extra to install, or is raised again."""
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise error
        extra = EXTRAS[module]
        return f'this needs {module}, which is not installed: pip install "gpu_hodlr[{extra}]"'
    if isinstance(error, OSError) and error.strerror is not None:
        file = "output" if error.filename is None else os.fsdecode(error.filename)
        return f"{file}: {error.strerror}"
    return " ".join(str(error).split())


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; each one brings its own options and its `run`."""
    from gpu_hodlr.cli import bench, file_command, laplace, pareto, prune, spectrum, table, train

    program = os.path.basename(sys.argv[0])
    parser = Parser(
        prog=NAME if program.startswith(NAME) else "python -m gpu_hodlr",
        description="Compress, multiply by and invert large symmetric positive definite matrices.",
        epilog="COMMAND --help describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {gh.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    table.add_parser(commands)
    file_command.add_parser(commands)
    bench.add_parser(commands)
    pareto.add_parser(commands)
    laplace.add_parser(commands)
    spectrum.add_parser(commands)
    prune.add_parser(commands)
    train.add_parser(commands)
    return parser


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
        if sys.stderr is not None and sys.stderr.isatty():
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

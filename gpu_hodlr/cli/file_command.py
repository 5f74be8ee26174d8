"""`compress`: compress, multiply by and invert a user's own dense matrix."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import gpu_hodlr as gh
from gpu_hodlr.cli import Commands, Progress, require
from gpu_hodlr.cli.measure import (
    STEPS,
    Preset,
    Result,
    Settings,
    measure_product,
    measure_solves,
    require_done,
)
from gpu_hodlr.cli.options import (
    add_common_options,
    check_outputs,
    non_negative,
    output_file,
    positive,
    tolerance,
)
from gpu_hodlr.cli.schemes import compared
from gpu_hodlr.cli.summary import scientific
from gpu_hodlr.cli.table import report
from gpu_hodlr.compression.options import NAMES
from gpu_hodlr.devices import HostArray, resolve_device
from gpu_hodlr.errors import ArgumentError, DtypeError, FileFormatError, ShapeError
from gpu_hodlr.ordering import ORDERINGS

DEFAULT = Preset(rtol=1e-4, max_rank=256, leaf_size=256)


def add_parser(commands: Commands) -> None:
    """Add the sub-command `compress` and its options."""
    parser = commands.add_parser(
        "compress",
        help="compress, multiply by and invert a dense matrix of your own",
        description="Compress the dense symmetric matrix K in FILE, time a product, factorize"
        " K + damping*I, solve with it, and print what was reached.",
        epilog="example: python -m gpu_hodlr compress K.npy --rtol 1e-5 --save K.hss",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a NumPy .npy file, (N, N)")
    parser.add_argument(
        "--rtol",
        type=tolerance,
        default=DEFAULT.rtol,
        metavar="NUMBER",
        help=f"wanted relative Frobenius error (default {scientific(DEFAULT.rtol)})",
    )
    parser.add_argument(
        "--max-rank",
        type=positive,
        default=DEFAULT.max_rank,
        metavar="RANK",
        help=f"largest rank of a block (default {DEFAULT.max_rank})",
    )
    parser.add_argument(
        "--leaf-size",
        type=positive,
        default=DEFAULT.leaf_size,
        metavar="ROWS",
        help=f"rows of a dense diagonal block (default {DEFAULT.leaf_size})",
    )
    parser.add_argument(
        "--ordering",
        choices=ORDERINGS,
        default="auto",
        metavar="NAME",
        help=f"{', '.join(ORDERINGS[:-1])} or {ORDERINGS[-1]} (default auto)",
    )
    parser.add_argument(
        "--scheme",
        choices=NAMES,
        default="hss",
        metavar="NAME",
        help=f"{', '.join(NAMES[:-1])} or {NAMES[-1]} (default hss)",
    )
    parser.add_argument(
        "--budget",
        type=non_negative,
        default=0.0,
        metavar="SHARE",
        help="share of N^2 that the near field of scheme fmm may have (default 0)",
    )
    parser.add_argument(
        "--save", type=output_file, metavar="FILE", help="save the compressed matrix for gh.load"
    )
    add_common_options(parser)
    parser.set_defaults(run=run)


def load_matrix(path: Path) -> HostArray:
    """The array in a .npy file, left on disk until it is read.

    Raises:
        OSError: the file cannot be read.
        FileFormatError: it is not one numeric array in NumPy's format.
    """
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            raise FileFormatError(f"{path} is an archive of arrays; save the matrix alone as .npy")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise FileFormatError(f"{path} is not a .npy file with one numeric array") from error
    return np.asarray(array)


def operator_of(path: Path, device: str, dtype: str | None = None) -> gh.Operator:
    """The matrix in a .npy file; what is wrong with it is said of the file.

    Args:
        path: of the file.
        device: where the matrix is to be.
        dtype: what its numbers are turned into first; None leaves them.

    Raises:
        OSError, FileFormatError: see `load_matrix`.
        ArgumentError, DtypeError, ShapeError: it is no finite symmetric matrix of floats.
    """
    array = load_matrix(path)
    if dtype and array.dtype.kind == "f":  # what is no matrix at all is refused as it is
        array = array.astype(dtype)
    try:
        op = gh.DenseOperator(array)
    except (ArgumentError, DtypeError, ShapeError) as error:
        said = str(error).replace("array.dtype", "the type").replace("array", "the matrix", 1)
        raise type(error)(f"{path}: {said}") from None
    return op.to(device)


def run(args: argparse.Namespace) -> None:
    """The sub-command."""
    require(*(["matplotlib"] if args.plot else []))
    check_outputs(args)
    device = resolve_device(args.device)
    settings = Settings(
        name=args.file.stem,
        accuracy=scientific(args.rtol),
        preset=Preset(args.rtol, args.max_rank, args.leaf_size, args.budget),
        seed=args.seed,
        maxiter=args.maxiter,
        damping=args.damping,
        scheme=args.scheme,
        ordering=args.ordering,
        dtype=args.dtype,
        device=device,
    )
    op = operator_of(args.file, device)
    compared([args.scheme], op)
    with Progress(len(STEPS)) as progress:
        K, result = measure_product(op, settings, progress)
        if args.save:
            K.save(args.save)
        measure_solves(op, K, result, settings, progress)
    print(describe(result))
    report([result], {}, args)
    require_done([result], rtol=True)


def describe(result: Result) -> str:
    """How the matrix was compressed, and what it takes, for people."""
    phases = ", ".join(f"{name} {spent:.2f} s" for name, spent in result.phase_seconds.items())
    return (
        f"{result.name}: {result.size:,} x {result.size:,} {result.dtype},"
        f" {result.ordering} ordering, sampled by {result.sampler}\n"
        + (f"{result.choice}\n" if result.choice else "")
        + f"{result.nbytes / 1e6:.1f} MB stored,"
        f" {100 * result.storage_fraction:.3g} % of the matrix;"
        f" relative error {scientific(result.error)}, wanted {scientific(result.rtol)}\n"
        f"compressed in {result.compress_seconds:.2f} s ({phases})"
    )

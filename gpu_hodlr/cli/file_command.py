"""`compress`: compress, multiply by and invert a user's own dense matrix."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import gpu_hodlr as gh
from gpu_hodlr.cli import Commands, Progress, add_common_options, output_file, require
from gpu_hodlr.cli.measure import (
    STEPS,
    Preset,
    Result,
    Settings,
    measure_inverse,
    measure_product,
)
from gpu_hodlr.cli.summary import scientific
from gpu_hodlr.cli.table import report
from gpu_hodlr.compression.options import NAMES
from gpu_hodlr.devices import HostArray, resolve_device
from gpu_hodlr.errors import FileFormatError

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
        type=float,
        default=DEFAULT.rtol,
        help=f"wanted relative Frobenius error (default {DEFAULT.rtol:g})",
    )
    parser.add_argument(
        "--max-rank",
        type=int,
        default=DEFAULT.max_rank,
        help=f"largest rank of a block (default {DEFAULT.max_rank})",
    )
    parser.add_argument(
        "--leaf-size",
        type=int,
        default=DEFAULT.leaf_size,
        help=f"rows of a dense diagonal block (default {DEFAULT.leaf_size})",
    )
    parser.add_argument(
        "--ordering",
        default="auto",
        help="natural, gram, angle, geometric, random or auto (default auto)",
    )
    parser.add_argument("--scheme", default="hss", help=f"{', '.join(NAMES)} (default hss)")
    parser.add_argument(
        "--budget",
        type=float,
        default=0.0,
        help="share of N^2 for the near field of scheme fmm (default 0)",
    )
    parser.add_argument(
        "--save", type=output_file, metavar="OUT", help="write the compressed matrix here"
    )
    add_common_options(parser)
    parser.set_defaults(run=run)


def load_matrix(path: Path) -> HostArray:
    """The array in a .npy file, left on disk until it is read.

    Raises:
        OSError: the file cannot be read.
        FileFormatError: it is not one numeric array in NumPy's format.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FileFormatError(f"{path} is not a .npy file with one numeric array") from error
    if not isinstance(array, np.ndarray):
        raise FileFormatError(f"{path} is an archive of arrays; save the matrix alone as .npy")
    return np.asarray(array)


def run(args: argparse.Namespace) -> None:
    """The sub-command."""
    require(*(["matplotlib"] if args.plot else []))
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
    op = gh.DenseOperator(load_matrix(args.file)).to(device)
    with Progress(len(STEPS)) as progress:
        K, result = measure_product(op, settings, progress)
        if args.save:
            K.save(args.save)
        measure_inverse(op, K, result, settings, progress)
    print(describe(result))
    report([result], {}, args)


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

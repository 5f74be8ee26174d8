"""`pareto`: error against storage of every scheme, and what its factor is worth to CG."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_hodlr as gh
from gpu_hodlr.cli import Commands, Progress, UnfinishedError, networks, require
from gpu_hodlr.cli.digits import NUM_DIGITS
from gpu_hodlr.cli.file_command import operator_of
from gpu_hodlr.cli.measure import (
    Preset,
    Result,
    Settings,
    cg_iterations,
    measure_product,
    preconditioner,
    right_hand_side,
)
from gpu_hodlr.cli.options import add_common_options, check_outputs, positive, tolerance
from gpu_hodlr.cli.schemes import (
    add_scheme_options,
    compared,
    near_budgets,
    notes_of,
    row_of,
)
from gpu_hodlr.cli.summary import Columns, iterations, scientific, write_json
from gpu_hodlr.devices import resolve_device
from gpu_hodlr.errors import MemoryEstimateError, NotPositiveDefiniteError, closeness_unsaid
from gpu_hodlr.matrices import NAMES, matrix

RTOLS = (1e-1, 1e-2, 1e-3, 1e-4)
DEFAULT = Preset(rtol=RTOLS[-1], max_rank=1024, leaf_size=128, budget=0.01)
DAMPINGS = (1e-1, 1e-2, 1e-3)  # times the mean of the diagonal
CG = [f"CG {damping:g}" for damping in DAMPINGS]
WIDTHS = {"scheme": 12, "rtol": 6, "%K": 6, "error": 6, "rank": 5, "Comp s": 8}
NOTE = (
    "Comp s: CPU seconds of all threads (wall seconds on a GPU). CG d: iterations to 1e-8 on the"
    " exact matrix + d mean(diagonal) I with the row's factor (of FMM the HSS factor that its own"
    " solves use, whose damping may be larger; of KFE the sparse inverse factor); -: not positive"
    " definite there"
)


def add_parser(commands: Commands) -> None:
    """Add the sub-command `pareto` and its options."""
    parser = commands.add_parser(
        "pareto",
        help="error against storage of every scheme",
        description="Compress one matrix in every scheme to several tolerances: error, storage, and"
        " CG iterations to 1e-8 on the exact matrix with each factor at three dampings.",
        epilog="example: python -m gpu_hodlr pareto --matrix K04 --plot pareto.png",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "file", type=Path, nargs="?", metavar="FILE", help="a NumPy .npy file, (N, N)"
    )
    which.add_argument(
        "--net", choices=[*networks.LAYERS], help="the network of a founding table (needs [demo])"
    )
    which.add_argument(
        "--matrix", choices=NAMES, metavar="NAME", help=f"a test matrix: {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--n",
        type=positive,
        default=4096,
        metavar="ROWS",
        help="rows of --matrix (default 4096)",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=1000,
        metavar="NUMBER",
        help=f"digits of --net, 1 to {NUM_DIGITS} (default 1000)",
    )
    parser.add_argument(
        "--rtol",
        type=_tolerances,
        default=RTOLS,
        metavar="LIST",
        help="wanted relative Frobenius errors, separated by commas (default 1e-1,1e-2,1e-3,1e-4)",
    )
    add_scheme_options(parser, DEFAULT, networks=True)
    add_common_options(parser, damping=False, picture="error against storage, a line a scheme")
    parser.set_defaults(run=run)


def _tolerances(text: str) -> tuple[float, ...]:
    return tuple(tolerance(part) for part in text.split(","))


def _operator(args: argparse.Namespace, device: str) -> tuple[str, Any]:
    """Name and operator of the matrix asked for."""
    if args.net:
        net = networks.train(args.net, args.samples, args.seed)
        return args.net, gh.GGNOperator(
            net.model, net.loss, net.inputs, net.targets, dtype=args.dtype, device=device
        )
    if args.matrix:
        op = matrix(args.matrix, args.n, args.seed, args.dtype or "float64")
        return args.matrix, op.to(device)
    return args.file.stem, operator_of(args.file, device, args.dtype)


def _for_cg(op: gh.Operator) -> gh.Operator:
    """The exact matrix, formed where a product would form it anew and it fits."""
    if isinstance(op, gh.KernelOperator):
        with contextlib.suppress(MemoryEstimateError):
            return gh.DenseOperator(op.to_dense())
    return op


def run(args: argparse.Namespace) -> None:
    """The sub-command."""
    require(*(["torch", "mlxtend"] if args.net else []), *(["matplotlib"] if args.plot else []))
    check_outputs(args)
    device = resolve_device(args.device)
    name, op = _operator(args, device)
    n = op.shape[0]
    schemes = compared(args.scheme, op)
    budgets = near_budgets(schemes, args.budget, DEFAULT.budget, n, args.leaf_size)
    exact = _for_cg(op) if args.maxiter else op
    dampings = [damping * float(op.diagonal().mean()) for damping in DAMPINGS]
    columns = Columns(WIDTHS | (dict.fromkeys(CG, 8) if args.maxiter else {}) | {"note": 4})
    results: dict[str, list[Result]] = {}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    left_out: list[str] = []
    with Progress(3 * len(budgets) * len(args.rtol) + 1) as progress:
        progress.write(f"{name}: {n:,} x {n:,} {op.dtype}\n{columns.header}")
        for scheme, budget in budgets.items():
            for rtol in args.rtol:
                settings = Settings(
                    name=name,
                    accuracy=scientific(rtol),
                    preset=Preset(rtol, args.max_rank, args.leaf_size, budget),
                    seed=args.seed,
                    maxiter=args.maxiter,
                    scheme=scheme,
                    device=device,
                )
                try:
                    K, result = measure_product(op, settings, progress)
                except MemoryEstimateError as error:
                    left_out.append(f"{scheme.upper()} {settings.accuracy} does not fit")
                    progress.write(f"{left_out[-1]}: {error}")
                    continue
                with progress.step(f"{name} {scheme} cg"):
                    known, cg = _with_factors(exact, K, dampings, args)
                del K  # before the next is made
                counts = [count if yes else "-" for yes, count in zip(known, cg, strict=True)]
                row = row_of(scheme, result) | {"rtol": result.accuracy}
                progress.write(columns.line(row | _cells(counts, args.maxiter)))
                notes += notes_of(f"{row['scheme']} {result.accuracy}", result)
                results.setdefault(scheme.upper(), []).append(result)
                rows.append(asdict(result) | {"factorized": known, "cg": cg})
        plain: list[int | None] = []
        if args.maxiter:
            with progress.step(f"{name} plain cg"):
                b = right_hand_side(exact, args.seed + 1)
                plain = [cg_iterations(exact, b, d, None, args.maxiter) for d in dampings]
            progress.write(columns.line({"scheme": "plain CG"} | _cells(plain, args.maxiter)))
    print("\n".join([*notes, NOTE]))
    if args.json:
        write_json(args.json, args, rows, dampings=dampings, cg_plain=plain)
    if args.plot:
        from gpu_hodlr.cli.plot import draw_lines

        draw_lines(args.plot, results, f"{name}: error against storage")
    if left_out:
        raise UnfinishedError("; ".join(left_out))


def _with_factors(
    exact: gh.Operator, K: gh.CompressedMatrix, dampings: Sequence[float], args: argparse.Namespace
) -> tuple[list[bool], list[int | None]]:
    """Whether there is a factor at each damping, and the CG iterations with it if they are enough.

    Args:
        exact: the matrix that CG multiplies by.
        K: compressed.
        dampings: largest first.
        args: of the command.
    """
    known = [False] * len(dampings)
    counts: list[int | None] = [None] * len(dampings)
    if args.maxiter:
        b = right_hand_side(K, args.seed + 1)
        enough = 0.0
        for i, damping in reversed(list(enumerate(dampings))):
            if 2 * damping < enough:  # as a failure with less has told, to a factor of 2
                continue
            try:
                with closeness_unsaid():  # of a preconditioner none is expected
                    M = preconditioner(K.factorize(damping))
            except NotPositiveDefiniteError as error:
                enough = error.damping or 0.0
                continue
            if M is not None:
                known[i] = True
                counts[i] = cg_iterations(exact, b, damping, M, args.maxiter)
    return known, counts


def _cells(counts: list[Any], maxiter: int) -> dict[str, str]:
    said = [count if count == "-" else iterations(count, maxiter) for count in counts]
    return dict(zip(CG, said, strict=True))

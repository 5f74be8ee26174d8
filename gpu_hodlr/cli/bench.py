"""`bench sc17`: every scheme on the matrices of the GOFMM paper, published times beside ours."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.cli import Commands, Progress, require
from gpu_hodlr.cli.measure import (
    STEPS,
    Preset,
    Result,
    Settings,
    measure_product,
    measure_solves,
    require_done,
    timed,
)
from gpu_hodlr.cli.options import add_common_options, check_outputs, list_of, positive, tolerance
from gpu_hodlr.cli.schemes import add_scheme_options, near_budgets, notes_of, row_of
from gpu_hodlr.cli.summary import Columns, fixed, iterations, scientific, write_json
from gpu_hodlr.devices import resolve_device
from gpu_hodlr.matrices import CASES, NAMES, matrix

DEFAULT = Preset(rtol=1e-4, max_rank=512, leaf_size=256, budget=0.03)
LEAVES = 32  # at least, by default
FOLD = 4  # N is so many times the largest rank, at least, by default
# SC17, Table 3: compress and evaluate seconds of 24 Haswell cores, N = 36K (K17 32K, G03 65K),
# leaf 512, 1024 right-hand sides, error about 1e-4 (K17 1e-1 for all, STRUMPACK's G03 3e-2).
PUBLISHED = {
    "K02": {"HODLR": (0.6, 2.7), "STRUMPACK HSS": (9.2, 0.6), "GOFMM": (1.0, 0.3)},
    "K04": {"HODLR": (0.7, 2.7), "STRUMPACK HSS": (508, 7.8), "GOFMM": (1.0, 0.5)},
    "K07": {"HODLR": (0.9, 3.1), "STRUMPACK HSS": (528, 8.2), "GOFMM": (0.6, 0.2)},
    "K12": {"HODLR": (0.7, 2.7), "STRUMPACK HSS": (18.8, 0.8), "GOFMM": (0.6, 0.2)},
    "K17": {"HODLR": (862, 37.6), "STRUMPACK HSS": (663, 8.2), "GOFMM": (48.8, 3.1)},
    "G03": {"HODLR": (12.9, 9.7), "STRUMPACK HSS": (29.8, 1.3), "GOFMM": (0.5, 0.8)},
}
NOTE = (
    "Comp s, Mult s: CPU seconds of all threads (wall seconds on a GPU); Fact s, Solve s: wall"
    " seconds. SC17: Table 3 there, seconds of 24 Haswell cores, N = 36K (K17 32K, G03 65K), 1024"
    " right-hand sides, error about 1e-4 (K17 1e-1, STRUMPACK's G03 3e-2); the parameters of our"
    " matrices are our own"
)
WIDTHS = {
    "scheme": 18, "N": 7, "%K": 6, "error": 6, "rank": 5, "Comp s": 7, "Mult s": 7, "Fact s": 6,
    "Solve s": 7, "damping": 7, "true residual": 13,
}  # fmt: skip


def add_parser(commands: Commands) -> None:
    """Add the sub-command `bench` and its benchmarks."""
    parser = commands.add_parser(
        "bench",
        help="benchmarks: sc17",
        description="Benchmarks of every scheme.",
        epilog="example: python -m gpu_hodlr bench sc17 --matrix K02,K04 --n 4096",
    )
    benchmarks = parser.add_subparsers(metavar="BENCHMARK", required=True)
    sc17 = benchmarks.add_parser(
        "sc17",
        help="the matrices of the GOFMM paper",
        description="Compress, multiply by, factorize and solve with matrices like K02-K18 and"
        " G01-G05 of the GOFMM paper (SC17) in every scheme, its published times beside ours."
        " All but K04-K07 are formed: N^2 numbers.",
        epilog="example: python -m gpu_hodlr bench sc17 --matrix K02,K04 --n 4096",
    )
    sc17.add_argument(
        "--matrix",
        type=list_of(NAMES),
        default=list(NAMES),
        metavar="NAMES",
        help=f"separated by commas, of {', '.join(NAMES)} (default all)",
    )
    sc17.add_argument(
        "--n", type=positive, default=16384, metavar="ROWS", help="rows (default 16384)"
    )
    sc17.add_argument(
        "--rtol",
        type=tolerance,
        default=DEFAULT.rtol,
        metavar="NUMBER",
        help="wanted relative Frobenius error (default 1e-4)",
    )
    sc17.add_argument(
        "--rhs",
        type=positive,
        default=1024,
        metavar="COLUMNS",
        help="columns of the product (default 1024)",
    )
    add_scheme_options(
        sc17,
        DEFAULT,
        max_rank=f"{DEFAULT.max_rank}, or N / {FOLD} if that is less",
        leaf_size=f"{DEFAULT.leaf_size}, or N / {LEAVES} if that is less",
    )
    add_common_options(sc17, maxiter=0, picture="storage and error by matrix")
    sc17.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """The sub-command."""
    require(*(["matplotlib"] if args.plot else []))
    check_outputs(args)
    device = resolve_device(args.device)
    leaf_size = args.leaf_size or min(DEFAULT.leaf_size, max(1, args.n // LEAVES))
    max_rank = args.max_rank or min(DEFAULT.max_rank, max(1, args.n // FOLD))
    cg = {"CG": 5, "CG plain": 8} if args.maxiter else {}
    columns = Columns(WIDTHS | cg | {"note": 4})
    results: dict[str, list[Result]] = {}
    rows: list[dict[str, Any]] = []
    with Progress((len(STEPS) + 1) * len(args.matrix) * len(args.scheme)) as progress:
        for name in args.matrix:
            op = matrix(name, args.n, args.seed, args.dtype or "float64").to(device)
            budgets = near_budgets(args.scheme, args.budget, DEFAULT.budget, op.shape[0], leaf_size)
            progress.write(f"\n{name}: {CASES[name].description}\n{columns.header}")
            notes = []
            for scheme, budget in budgets.items():
                settings = Settings(
                    name=name,
                    accuracy=scientific(args.rtol),
                    preset=Preset(args.rtol, max_rank, leaf_size, budget),
                    seed=args.seed,
                    maxiter=args.maxiter,
                    damping=args.damping,
                    scheme=scheme,
                    device=device,
                )
                K, result = measure_product(op, settings, progress)
                with progress.step(f"{name} {scheme} product, {args.rhs} columns"):
                    product = product_seconds(K, args.rhs, args.seed)
                measure_solves(op, K, result, settings, progress)
                del K  # before the next is made
                row = row_of(scheme, result) | _solved(result, product, args.maxiter)
                progress.write(columns.line(row))
                notes += notes_of(f"{name} {row['scheme']}", result)
                results.setdefault(scheme.upper(), []).append(result)
                rows.append(asdict(result) | {"rhs": args.rhs, "product_cpu_seconds": product})
            for what, (spent, product) in PUBLISHED.get(name, {}).items():
                row = {"scheme": f"SC17 {what}", "Comp s": f"{spent}", "Mult s": f"{product}"}
                progress.write(columns.line(row))
            for note in notes:
                progress.write(note)
            if args.json:  # what there is so far: a long run may be interrupted
                write_json(args.json, args, rows, published=PUBLISHED)
    print(f"\n{NOTE}")
    if args.plot:
        from gpu_hodlr.cli.plot import draw_matrices

        draw_matrices(
            args.plot, results, f"bench sc17, N = {args.n:,}, rtol {scientific(args.rtol)}"
        )

    require_done([result for each in results.values() for result in each])


def product_seconds(K: gh.CompressedMatrix, columns: int, seed: int) -> float:
    """CPU seconds of all threads for a product with so many columns; wall seconds on a GPU."""
    v = batched.normal_source((seed, 1), K.device)((K.shape[0], columns), K.dtype)
    return timed(lambda: K @ v, K.device, cpu=True)[1]


def _solved(result: Result, product: float, maxiter: int) -> dict[str, str]:
    return {
        "Mult s": fixed(product, 2),
        "Fact s": fixed(result.factor_seconds, 2),
        "Solve s": fixed(result.solve_seconds, 3),
        "damping": scientific(result.damping),
        "true residual": scientific(result.true_residual),
        "CG": iterations(result.cg_with, maxiter),
        "CG plain": iterations(result.cg_without, maxiter),
    }

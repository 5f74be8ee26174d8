"""What storage and factors in fewer bits than float64 save: bytes, CPU seconds, errors.

    python profiling/mixed_precision.py --json profiling/results/mixed_precision.json
    python profiling/mixed_precision.py --net enco --rtols 1e-1

The GGN of mnist in float64, HSS. Damping is the Frobenius norm of the compression's error, as in
the founding tables. Factors in float32 are refined, see `gpu_hodlr.factor.RefinedFactor`; backward
errors are those of the solution of 64 columns, of the matrix as it is stored. Seconds are CPU
seconds of all threads, the least of some runs that alternate.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import auto_choice
import numpy as np
from environment import environment

import gpu_hodlr as gh

COLUMNS = 64
STORED = (None, "float32", "bfloat16", "tfloat32")


def cpu_seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def compressed(op: gh.Operator, rtol: float, stored: str | None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gh.compress(op, rtol=rtol, max_rank=512, leaf_size=128, storage_dtype=stored)


def backward_error(K: Any, damping: float, x: Any, b: Any) -> float:
    exact = K._exact()  # products in float64 of what is stored
    residual = np.linalg.norm(exact @ x + damping * x - b)
    scale = (K.report.frobenius_norm + damping) * np.linalg.norm(x) + np.linalg.norm(b)
    return float(residual / scale)


def rows(op: gh.Operator, rtol: float, runs: int) -> list[dict[str, Any]]:
    """A row for every type of what is stored, of the factor, or both."""
    matrices: dict[str | None, Any] = {}
    compress: dict[str | None, list[float]] = {stored: [] for stored in STORED}
    for _ in range(runs):
        for stored in STORED:
            matrices[stored], seconds = cpu_seconds(lambda s=stored: compressed(op, rtol, s))
            compress[stored].append(seconds)
    wide = matrices[None].report
    damping = wide.error * wide.frobenius_norm
    b = np.random.default_rng(0).standard_normal((op.shape[0], COLUMNS))
    kinds = [(s, d) for s in STORED for d in ("float64", "float32")]
    seconds: dict[Any, dict[str, list[float]]] = {kind: {} for kind in kinds}
    found: dict[Any, dict[str, Any]] = {}
    for _ in range(runs):
        for kind in kinds:
            K = matrices[kind[0]]
            took = seconds[kind]
            _, product = cpu_seconds(lambda K=K: K @ b)
            F, factor = cpu_seconds(lambda K=K, d=kind[1]: K.factorize(damping, dtype=d))
            x, solve = cpu_seconds(lambda F=F: F.solve(b))
            _, one = cpu_seconds(lambda F=F: F.solve(b[:, 0]))
            named = {"product_64": product, "factor_seconds": factor, "solve_64": solve}
            for name, value in (named | {"solve_1": one}).items():
                took.setdefault(name, []).append(value)
            info = getattr(F, "info", None)
            found[kind] = {
                "matrix_bytes": K.nbytes, "factor_bytes": F.nbytes,
                "steps": None if info is None else info.iterations,
                "backward_error": backward_error(K, damping, x, b),
            }  # fmt: skip
    return [
        {
            "rtol": rtol, "stored": stored or "float64", "factor": dtype, "damping": damping,
            "error": matrices[stored].report.error, "compress": min(compress[stored]),
            **{name: min(values) for name, values in seconds[stored, dtype].items()},
            **found[stored, dtype],
        }
        for stored, dtype in kinds
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--net", default="mnist", help="mnist or enco, default mnist")
    parser.add_argument("--rtols", type=float, nargs="+", default=(1e-2, 1e-3))
    parser.add_argument("--runs", type=int, default=3, help="default 3")
    parser.add_argument("--samples", type=int, default=1000, help="default 1000")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    op = auto_choice.operator(options.net, options.samples, dtype="float64")
    results = []
    for rtol in options.rtols:
        for row in rows(op, rtol, options.runs):
            results.append(row)
            print(
                f"rtol {rtol:g}  stored {row['stored']}  factor {row['factor']}  "
                f"error {row['error']:.2g}  compress {row['compress']:.3g}  "
                f"K {row['matrix_bytes'] / 1e6:.1f} MB  F {row['factor_bytes'] / 1e6:.1f} MB  "
                f"product 64 {row['product_64']:.3g}  factor {row['factor_seconds']:.3g}  "
                f"solve 1 {row['solve_1']:.3g}  64 {row['solve_64']:.3g}  steps {row['steps']}  "
                f"backward error {row['backward_error']:.1g}",
                flush=True,
            )
    if options.json:
        content = {"environment": environment(), "N": op.shape[0], "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

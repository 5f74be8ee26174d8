"""From which N on compress + factorize + solve needs fewer seconds than a dense Cholesky.

    python profiling/crossover.py --json profiling/results/crossover.json
    python profiling/crossover.py --dimensions 3 --rtols 1e-4 --largest 16384

Points uniform in the unit cube, Matern 3/2 kernel of length scale 0.2 in one to three dimensions
and 1 in six, nugget 0.1, HSS, one right-hand side, CPU seconds of all threads. Dense is the
entries, `scipy.linalg.cho_factor` and a solve, measured up to N = 8,192 and taken to grow as N^3
beyond. N goes up by doubling; the crossover is where the compressed matrix becomes faster, by
interpolation of the logarithms between the last two.
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

import numpy as np
from environment import environment
from scipy.linalg import cho_factor, cho_solve

import gpu_hodlr as gh

SMALLEST, LARGEST, DENSE = 1 << 9, 1 << 14, 1 << 13
DIMENSIONS, RTOLS = (1, 2, 3, 6), (1e-2, 1e-4, 1e-6)
NUGGET = 0.1


def operator(n: int, dimension: int) -> gh.KernelOperator:
    points = np.random.default_rng(n).uniform(size=(n, dimension))
    return gh.KernelOperator(points, "matern32", 0.2 if dimension <= 3 else 1.0, nugget=NUGGET)


def cpu_seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def dense(sizes: list[int], dimension: int) -> dict[int, float]:
    """Entries, factor and solve by N; beyond `DENSE` rows predicted."""
    seconds: dict[int, float] = {}
    for n in sizes:
        if n > DENSE:
            seconds[n] = seconds[DENSE] * (n / DENSE) ** 3
            continue
        op, b = operator(n, dimension), np.ones(n)
        seconds[n] = cpu_seconds(lambda: solved(op, b))[1]  # noqa: B023
    return seconds


def solved(op: gh.KernelOperator, b: Any) -> Any:
    factor = cho_factor(op.to_dense(), lower=True, overwrite_a=True, check_finite=False)
    return cho_solve(factor, b, check_finite=False)


def compressed(n: int, dimension: int, rtol: float) -> dict[str, Any]:
    op, b = operator(n, dimension), np.ones(n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        K, compress = cpu_seconds(
            lambda: gh.compress(op, rtol=rtol, max_rank=n // 2, leaf_size=128)
        )
    row: dict[str, Any] = {
        "compress": compress, "error": K.report.error, "stored_fraction": K.storage_fraction,
        "largest_rank": max(max(level) for level in K.ranks),
    }  # fmt: skip
    damping = 2 * K.report.error * K.report.frobenius_norm  # positive definite for certain
    F, row["factor"] = cpu_seconds(lambda: K.factorize(damping))
    _, row["solve"] = cpu_seconds(lambda: F.solve(b))
    return row


def crossover(rows: list[dict[str, Any]]) -> float | None:
    """N from which on all larger ones measured are faster; None where the largest is not."""
    ratio = np.log([row["seconds"] / row["dense"] for row in rows])
    slower = np.nonzero(ratio >= 0)[0]
    if not slower.size:
        return float(rows[0]["N"])
    last = int(slower[-1])
    if last + 1 == len(rows):
        return None
    part = ratio[last] / (ratio[last] - ratio[last + 1])
    return float(rows[last]["N"] * (rows[last + 1]["N"] / rows[last]["N"]) ** part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dimensions", type=int, nargs="+", default=DIMENSIONS)
    parser.add_argument("--rtols", type=float, nargs="+", default=RTOLS)
    parser.add_argument("--largest", type=int, default=LARGEST, help=f"N, default {LARGEST:,}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.largest < SMALLEST:
        parser.error(f"--largest must be {SMALLEST} or more")
    gh.compress(operator(SMALLEST, 2), rtol=1e-2).factorize(1.0)  # imports, threads
    sizes = [SMALLEST << i for i in range((options.largest // SMALLEST).bit_length())]
    results = []
    for dimension in options.dimensions:
        by_dense = dense(sizes, dimension)
        for rtol in options.rtols:
            rows = []
            for n in sizes:
                row = {"N": n, "dense": by_dense[n], **compressed(n, dimension, rtol)}
                row["seconds"] = row["compress"] + row["factor"] + row["solve"]
                rows.append(row)
            found = crossover(rows)
            said = "beyond the largest" if found is None else f"{found:,.0f}"
            last = rows[-1]
            print(
                f"{dimension}-D, rtol {rtol:g}: crossover {said}; at N {last['N']:,} "
                f"{last['seconds']:.3g} s against {last['dense']:.3g} dense, "
                f"rank {last['largest_rank']}, stored {100 * last['stored_fraction']:.3g} %",
                flush=True,
            )
            results.append({"dimension": dimension, "rtol": rtol, "crossover": found, "rows": rows})
    if options.json:
        content = {"environment": environment(), "kernel": "matern32", "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

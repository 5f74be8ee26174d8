"""Growth of compression, product, factor and solve with N, and its log-log slope.

    python profiling/complexity.py --json profiling/results/complexity.json \
        --plot profiling/results/complexity.png
    python profiling/complexity.py --rtol 1e-4 --json profiling/results/complexity_accuracy.json
    python profiling/complexity.py --device cuda --largest 1048576

Points uniform in the square, Laplace kernel exp(-r / 0.2) plus nugget 0.1, leaf 128, rank capped
at 64 and tolerance out of reach, so that the lower levels have rank 64 at every N (the top ones
need a little less: what the lower ones left out is not fitted there). With `--rtol` the accuracy is
held instead of the rank: the Matern 3/2 kernel of that length scale, up to that error. On the CPU
it counts the CPU seconds of all threads, on a GPU the wall seconds until its work is done; there
the smallest N is run once before, which compiles kernels.
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
from peak_memory import memory_peak

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.devices import DEVICES, gpu_name, move, resolve_device, synchronize
from gpu_hodlr.errors import DeviceError

SMALLEST, LARGEST = 1 << 12, 1 << 17
RANK, LEAF = 64, 128
JOBS = ("compress", "product", "factor", "solve")


def least_seconds(function: Callable[[], Any], device: str, repeat: int = 1) -> tuple[Any, float]:
    """The result, and the least seconds of `repeat` calls: CPU seconds, or the GPU's."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    best = np.inf
    for _ in range(repeat):
        synchronize(device)
        start = clock()
        result = function()
        synchronize(device)
        best = min(best, clock() - start)
    return result, best


def measure(n: int, device: str, rtol: float | None = None) -> dict[str, float]:
    points = np.random.default_rng(n).uniform(size=(n, 2))
    kernel = "laplace" if rtol is None else "matern32"
    op = gh.KernelOperator(move(points, device), kernel, 0.2, nugget=0.1)
    aim = {"rtol": 1e-12, "max_rank": RANK} if rtol is None else {"rtol": rtol, "max_rank": 1024}
    b = batched.normal_source((n,), device)((n, 8), np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gh.errors.RankCapWarning)
        K, compress = least_seconds(lambda: gh.compress(op, **aim, leaf_size=LEAF), device)
    peak = memory_peak(device) / 1e6
    _, product = least_seconds(lambda: K @ b, device, 5)
    damping = 0.5 * np.sqrt(n) if rtol is None else 2 * rtol * K.report.frobenius_norm
    F, factor = least_seconds(lambda: K.factorize(damping), device)
    _, solve = least_seconds(lambda: F.solve(b), device, 5)
    return {"N": n, "compress": compress, "product": product, "factor": factor, "solve": solve,
            "stored_per_row": K.num_stored / n, "error": K.report.error,
            "largest_rank": max(map(max, K.ranks)), "num_samples": K.report.num_samples,
            "stored_MB": K.nbytes / 1e6, "peak_MB": peak}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default cpu")
    parser.add_argument(
        "--largest", type=int, default=LARGEST,
        help=f"N goes from {SMALLEST:,} to here by doubling, default {LARGEST:,}",
    )  # fmt: skip
    parser.add_argument("--rtol", type=float, help="hold this accuracy instead of the rank")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.largest < 2 * SMALLEST:
        parser.error(f"--largest must be {2 * SMALLEST} or more: a slope needs two sizes")
    try:
        device = resolve_device(options.device)
    except DeviceError as error:
        parser.error(str(error))
    if device == "cuda":
        measure(SMALLEST, device, options.rtol)
    rows: list[dict[str, float]] = []
    n = SMALLEST
    while n <= options.largest:
        rows.append(measure(n, device, options.rtol))
        n *= 2
        print("  ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
    x = np.log([row["N"] for row in rows])
    slopes = {j: float(np.polyfit(x, np.log([row[j] for row in rows]), 1)[0]) for j in JOBS}
    reference = float(np.polyfit(x, x + np.log(x), 1)[0])
    print("log-log slopes:", {k: round(v, 3) for k, v in slopes.items()},
          f"(N log N itself: {reference:.3f})")  # fmt: skip
    if options.json:
        content = {
            "environment": environment(),
            "device": device,
            "rank": RANK if options.rtol is None else None,
            "rtol": options.rtol,
            "leaf_size": LEAF,
            "rows": rows,
            "slopes": slopes,
            "slope_of_N_log_N": reference,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, slopes, device, options.rtol, options.plot)
    return 0


def plot(
    rows: list[dict[str, float]],
    slopes: dict[str, float],
    device: str,
    rtol: float | None,
    path: Path,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    n = np.array([row["N"] for row in rows])
    for job in JOBS:
        axes.loglog(n, [row[job] for row in rows], "o-", label=f"{job}: slope {slopes[job]:.2f}")
    guide = n * np.log(n)
    axes.loglog(n, guide * rows[0]["compress"] / guide[0] * 0.6, "k--", lw=1, label="N log N")
    axes.set_xlabel("N, rows")
    clock = "CPU seconds" if device == "cpu" else f"seconds on {gpu_name(device)}"
    axes.set_ylabel(f"{clock} (products and solves: 8 columns)")
    held = f"Laplace kernel in 2-D, rank {RANK}"
    held = held if rtol is None else f"Matern 3/2 kernel in 2-D, rtol {rtol:g}"
    axes.set_title(f"{held}, leaf {LEAF}, float64")
    axes.legend(loc="upper left", fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=200)


if __name__ == "__main__":
    sys.exit(main())

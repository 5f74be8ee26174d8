"""How near compression, product, factor and solve come to the device's bandwidth and GEMM rate.

    python profiling/roofline.py --matrix mnist
    python profiling/roofline.py --device cuda --matrix kernel --n 1048576 --json FILE

Matrices: mnist and enco are the founding tables' Gauss-Newton matrices ("low" accuracy); kernel
is exp(-r / 0.2) of N points uniform in the unit cube, rtol 1e-2.

Seconds are the median of several runs after one that is not counted; on a GPU between CUDA events
on the current stream, on the CPU wall time. Short jobs are run several times in a row, those of
more than 10 s once (on a GPU after one that is not counted). The phases of compress are timed by
its own PhaseTimer, on a GPU between events as well.

Measured in the same run and the same type of number: the copy bandwidth (bytes read + bytes
written of a large array) and the rate of `batched.matmul` on stacks of 256 x 256.

Floors, with v bytes a number of the vectors and s bytes a stored number; a level has q nodes, of
m rows each, r of them skeleton rows and e = m - r others (T is e x r, B is r x r for two nodes);
n0 rows are left at the root:

    product, k columns   bytes  all stored arrays, indices too, + 2 N k v
                         again  s sum(q e r): T, on the way down
                         flops  2 k (|D| + 2 |T| + 2 |B|)
    factor               bytes  all stored arrays + v (sum q (e (e + 1) / 2 + e r) + n0^2 / 2)
                         flops  sum q (2 e r m + 3 e^2 r + e^3 / 3 + 2 e r^2) + n0^3 / 3
    solve, k columns     bytes  v (sum q (e (e + 1) / 2 + 2 e r) + n0^2 / 2) + indices + 2 N k v
                         again  v sum q (e (e + 1) / 2 + 2 e r): L, W, T, on the way down
                         flops  k (sum q (2 e^2 + 8 e r) + 2 n0^2)

n0^2 / 2 stands for n0 (n0 + 1) / 2. "bytes" counts every array once, which no implementation can
undercut unless it lies in a cache. "again" is what a second pass reads when the cache has lost it:
the way down can begin only when the way up has ended. Both are shown as shares of the bandwidth
(`% copy` without, `2 passes` with it).

In compress, every call of a primitive or of the matrix counts for itself, its operands once:

    a product with k columns   2 N k v; flops as the operator states them (about 4 N n k for a
                               Gauss-Newton matrix of n samples)
    entries                    v for each; flops as the operator states them (2 n; for a kernel in
                               d dimensions 20 + 3 d, of which a root and an exponential are 18)
    GEMM (p x k)(k x c)        its three operands; 2 p k c
    pivoted QR, k steps        S (m x t) and R; 4 t m k - 2 (t + m) k^2 + 4 k^3 / 3
    interpolation              R's first r rows and T; e r^2

What moves rows about (gathers, permutations) and what NumPy or SciPy does on the host is in the
seconds and not in the floors. Entries' flops are nominal: units of a network that are not coupled
cost nothing, so that their share of the GEMM rate may exceed 100 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from counted_costs import CallCounter, Cost
from environment import environment

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.batched.threads import over_spans
from gpu_hodlr.devices import (
    DEVICES,
    Array,
    free_bytes,
    gpu_name,
    move,
    namespace_on,
    resolve_device,
)
from gpu_hodlr.errors import GpuHodlrError
from gpu_hodlr.structures import Telescope

MATRICES = ("mnist", "enco", "kernel")
KERNEL = {"rtol": 1e-2, "max_rank": 512, "leaf_size": 128}
PRODUCT_COLUMNS, SOLVE_COLUMNS = (1, 16, 256), (1, 64)
GEMM_ORDER = 256
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 29}  # of the array copied: far beyond the caches
GEMM_STACK = {"cpu": 32, "cuda": 512}
REPEATS = 7
SHORT, LONG = 2e-3, 10.0  # seconds: shorter jobs are run in a row, longer ones measured once
MOST_IN_A_ROW = 50
VECTORS_HELD = 8  # right-hand side, result and what lies between, in vectors


# ---- Floors ---------------------------------------------------------------------------------


def _triangle(n: int) -> float:
    return n * (n + 1) / 2


def _index_bytes(t: Telescope) -> int:
    orders = sum(level.order.nbytes for level in t.levels if level.order is not None)
    return int(t.leaves.nbytes + orders)


def _stored_bytes(t: Telescope) -> int:
    return int(sum(a.nbytes for a in t.arrays())) + _index_bytes(t)


def _root_order(t: Telescope) -> int:
    return 2 * t.levels[-1].rank if t.levels else int(t.D.shape[1])


def product_cost(t: Telescope, columns: int, dtype: np.dtype[Any]) -> Cost:
    """A product with so many columns; see the top of this file."""
    T = sum(level.T.size for level in t.levels)
    B = sum(level.B.size for level in t.levels)
    return Cost(
        _stored_bytes(t) + 2 * t.n * columns * dtype.itemsize,
        2 * columns * (t.D.size + 2 * T + 2 * B),
        sum(level.T.nbytes for level in t.levels),
    )


def _sizes(t: Telescope) -> list[tuple[int, int, int]]:
    """(q, e, r) of every level."""
    return [level.T.shape for level in t.levels]


def factor_cost(t: Telescope, dtype: np.dtype[Any]) -> Cost:
    """The ULV-Cholesky factorization; see the top of this file."""
    n0 = _root_order(t)
    written = sum(q * (_triangle(e) + e * r) for q, e, r in _sizes(t)) + _triangle(n0)
    flops = n0**3 / 3 + sum(
        q * (2 * e * r * (e + r) + 3 * e**2 * r + e**3 / 3 + 2 * e * r**2) for q, e, r in _sizes(t)
    )
    return Cost(_stored_bytes(t) + written * dtype.itemsize, flops)


def solve_cost(t: Telescope, columns: int, dtype: np.dtype[Any]) -> Cost:
    """A solve with so many columns; see the top of this file."""
    v, n0 = dtype.itemsize, _root_order(t)
    levels = v * sum(q * (_triangle(e) + 2 * e * r) for q, e, r in _sizes(t))
    vectors = 2 * t.n * columns * v
    flops = columns * (sum(q * (2 * e**2 + 8 * e * r) for q, e, r in _sizes(t)) + 2 * n0**2)
    return Cost(levels + _triangle(n0) * v + _index_bytes(t) + vectors, flops, levels)


# ---- Seconds --------------------------------------------------------------------------------


def elapsed(work: Callable[[], object], device: str) -> float:
    """Seconds of a call: between CUDA events on the current stream, or on the clock."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    cuda = namespace_on(device).cuda
    first, last = cuda.Event(), cuda.Event()
    first.record()
    work()
    last.record()
    last.synchronize()
    return float(cuda.get_elapsed_time(first, last)) / 1e3


def median_seconds(work: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """Median over runs, after one that is not counted; of short jobs a run makes many calls."""
    first = elapsed(work, device)
    if first > LONG:
        return first if device == "cpu" else elapsed(work, device)
    calls = int(min(MOST_IN_A_ROW, max(1.0, SHORT / max(elapsed(work, device), 1e-9))))

    def in_a_row() -> None:
        for _ in range(calls):
            work()

    return float(statistics.median(elapsed(in_a_row, device) for _ in range(repeats))) / calls


def copy_bandwidth(device: str, dtype: np.dtype[Any], size: int, repeats: int = REPEATS) -> float:
    """Bytes read and written a second by the copy of a large array."""
    xp = namespace_on(device)
    source = xp.ones(size // dtype.itemsize, dtype)
    target = xp.zeros_like(source)

    def copy(start: int, stop: int) -> None:
        xp.copyto(target[start:stop], source[start:stop])

    def work() -> None:
        if device == "cpu":  # by all threads, as the CPU's primitives work
            over_spans(copy, len(source))
        else:
            copy(0, len(source))

    return 2.0 * float(source.nbytes) / median_seconds(work, device, repeats)


def gemm_rate(device: str, dtype: np.dtype[Any], stack: int, repeats: int = REPEATS) -> float:
    """Operations a second of `batched.matmul` on stacks of square matrices."""
    normal = batched.normal_source((1,), device)
    columns = normal((GEMM_ORDER**2, 2 * stack), dtype)
    a, b = columns.T.reshape(2, stack, GEMM_ORDER, GEMM_ORDER)
    seconds = median_seconds(lambda: batched.matmul(a, b), device, repeats)
    return 2.0 * stack * GEMM_ORDER**3 / seconds


# ---- The measurement ------------------------------------------------------------------------


def matrix(name: str, n: int | None, dtype: str, device: str) -> tuple[Any, dict[str, Any]]:
    """The operator of a case, and the arguments it is compressed with."""
    if name == "kernel":
        points = np.random.default_rng(0).random((n or 1 << 14, 3)).astype(dtype)
        return gh.KernelOperator(move(points, device), "laplace", 0.2), dict(KERNEL)
    from gpu_hodlr.cli.networks import train

    net = train(name, samples=1000, seed=0)
    op = gh.GGNOperator(net.model, net.loss, net.inputs, net.targets, dtype=dtype, device=device)
    return op, table_options(name)


def table_options(name: str) -> dict[str, Any]:
    """What a network of the founding tables is compressed with."""
    from gpu_hodlr.cli.table import PRESETS

    preset = PRESETS[name, "low"]
    return {"rtol": preset.rtol, "max_rank": preset.max_rank, "leaf_size": preset.leaf_size}


def measure(
    op: Any,
    options: dict[str, Any],
    *,
    repeats: int = REPEATS,
    copy_bytes: int | None = None,
    gemm_stack: int | None = None,
) -> dict[str, Any]:
    """Compress, multiply, factorize and solve; seconds, floors and shares of everything.

    Args:
        op: the exact matrix, on the device to measure.
        options: for `compress`.
        repeats: runs the medians are taken of.
        copy_bytes: of the array copied for the bandwidth.
        gemm_stack: matrices multiplied for the GEMM rate.
    """
    device, dtype = op.device, np.dtype(op.dtype)
    bandwidth = copy_bandwidth(device, dtype, copy_bytes or COPY_BYTES[device], repeats)
    rate = gemm_rate(device, dtype, gemm_stack or GEMM_STACK[device], repeats)
    rows: list[dict[str, Any]] = []

    def add(job: str, seconds: float, cost: Cost) -> None:
        rows.append(row(job, seconds, cost, bandwidth, rate))

    K, total, phases, costs = _compressions(op, options, repeats)
    add("compress", total, sum(costs.values(), Cost()))
    for phase, seconds in phases.items():
        add(f"  {phase}", seconds, costs.get(phase, Cost()))
    add("  outside the phases", max(total - sum(phases.values()), 0.0), Cost())
    normal = batched.normal_source((2,), device)
    telescope, n = K.structure, K.shape[0]
    skipped = []

    def with_columns(name: str, call: Callable[[Array], Array], floor: Any, k: int) -> None:
        job = f"{name}, {k} column{'s' * (k > 1)}"
        if VECTORS_HELD * n * k * dtype.itemsize > free_bytes(device):
            skipped.append(job)
            return
        b = normal((n, k), dtype)
        add(job, median_seconds(lambda: call(b), device, repeats), floor(telescope, k, dtype))

    for k in PRODUCT_COLUMNS:
        with_columns("product", K.matmat, product_cost, k)
    damping = K.report.error * K.report.frobenius_norm
    seconds = median_seconds(lambda: K.factorize(damping), device, repeats)
    add("factor", seconds, factor_cost(telescope, dtype))
    F = K.factorize(damping)
    for k in SOLVE_COLUMNS:
        with_columns("solve", F.solve, solve_cost, k)
    return {
        "device": device,
        "gpu": gpu_name(device),
        "N": n,
        "dtype": str(dtype),
        "compress": options,
        "error": K.report.error,
        "rank_cap_hit": K.report.rank_cap_hit,
        "damping": damping,
        "ranks": [max(level) for level in K.ranks],
        "stored_bytes": K.nbytes,
        "factor_bytes": F.nbytes,
        "copy_bytes_per_s": bandwidth,
        "gemm_flops_per_s": rate,
        "jobs": rows,
        "skipped_for_memory": skipped,
    }


def _compressions(
    op: Any, options: dict[str, Any], repeats: int
) -> tuple[Any, float, dict[str, float], dict[str, Cost]]:
    """The matrix, its seconds in all and by phase (medians), and the floors by phase."""
    counter = CallCounter()
    found: list[Any] = []

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gh.errors.RankCapWarning)
            found.clear()  # one compressed matrix at a time
            found.append(gh.compress(op, **options))

    with counter.watching(op):
        first = elapsed(work, op.device)
    runs = [{"": first, **found[0].report.seconds}]
    if op.device == "cuda" or first <= LONG:
        runs.clear()
        for _ in range(1 if first > LONG else min(3, repeats)):
            seconds = elapsed(work, op.device)
            runs.append({"": seconds, **found[0].report.seconds})
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return found[0], medians.pop(""), medians, counter.costs


def row(job: str, seconds: float, cost: Cost, bandwidth: float, rate: float) -> dict[str, Any]:
    """Rates and shares of a job; None where no floor is known."""

    def a_second(amount: float, unit: float) -> float | None:
        return amount / seconds / unit if amount else None

    return {
        "job": job.strip(),
        "part_of": "compress" if job.startswith(" ") else None,
        "seconds": seconds,
        "bytes": cost.bytes or None,
        "bytes_again": cost.again or None,
        "flops": cost.flops or None,
        "GB_per_s": a_second(cost.bytes, 1e9),
        "GF_per_s": a_second(cost.flops, 1e9),
        "share_of_copy": a_second(cost.bytes, bandwidth),
        "share_of_copy_2_passes": a_second(cost.bytes + cost.again, bandwidth),
        "share_of_gemm": a_second(cost.flops, rate),
    }


def describe(result: dict[str, Any], where: str) -> str:
    """The measurement as text."""
    head = (
        f"N = {result['N']:,} {result['dtype']} on {where}: error {result['error']:.2g},"
        f" {result['stored_bytes'] / 1e6:.4g} MB stored, factor"
        f" {result['factor_bytes'] / 1e6:.4g} MB more, largest ranks"
        f" {' '.join(map(str, result['ranks'])) or '-'}\n"
        f"measured here: copy {result['copy_bytes_per_s'] / 1e9:.4g} GB/s,"
        f" batched GEMM of order {GEMM_ORDER} {result['gemm_flops_per_s'] / 1e9:.4g} GF/s"
    )
    table = [("", "seconds", "GB", "GF", "GB/s", "GF/s", "% copy", "2 passes", "% GEMM")]
    for job in result["jobs"]:
        table.append(
            (
                "  " * (job["part_of"] is not None) + job["job"],
                f"{job['seconds']:.3g}",
                _number(job["bytes"], 1e-9),
                _number(job["flops"], 1e-9),
                _number(job["GB_per_s"]),
                _number(job["GF_per_s"]),
                _number(job["share_of_copy"], 100),
                _number(job["share_of_copy_2_passes"] if job["bytes_again"] else None, 100),
                _number(job["share_of_gemm"], 100),
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )
    notes = [f"not run, too little memory: {job}" for job in result["skipped_for_memory"]]
    return "\n".join([head, *lines, *notes])


def _number(value: float | None, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default cpu")
    parser.add_argument("--matrix", choices=MATRICES, default="kernel", help="default kernel")
    parser.add_argument("--n", type=int, help="order of the kernel matrix, default 16,384")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"default {REPEATS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(argv)
    if options.n is not None and (options.matrix != "kernel" or options.n < 2):
        parser.error("--n is the order of the kernel matrix, 2 or more")
    if options.repeats < 1:
        parser.error("--repeats must be 1 or more")
    try:
        device = resolve_device(options.device)
        op, how = matrix(options.matrix, options.n, options.dtype, device)
    except (GpuHodlrError, ModuleNotFoundError) as error:
        parser.error(" ".join(str(error).split()))
    result = {"matrix": options.matrix, **measure(op, how, repeats=options.repeats)}
    about = environment()
    where = result["gpu"] or f"{about['processor']}, threads: {about['threads']}"
    print(f"{options.matrix}: {describe(result, where)}")
    if options.json:
        content = {"environment": about, "result": result}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

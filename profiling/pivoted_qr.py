"""Pivoted QR of samples alone: one pivot after the other, and by products of Gram matrices.

    python profiling/pivoted_qr.py
    python profiling/pivoted_qr.py --device cuda --json FILE

Samples S (nodes, m, s) of levels of mnist and enco, whose singular values fall by four digits. On
the CPU the seconds are of one thread and one node: GEQP3 (after an unpivoted QR where s > 1.3 m)
beside `blocked_id`. On a GPU they are of the level: a block a matrix beside `blocked_id`; where the
first is faster, `_BLOCKED` of cupy_linalg is too small.

The floor is the operations of `blocked_id`, m^2 s of S S^T and m^3 / 3 of its factor (less what
min(m, s) pivots leave), at the rate of GEMM measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from gpu_hodlr import batched
from gpu_hodlr.devices import DEVICES, Array, move, namespace_on, resolve_device, synchronize

LEVELS = (
    (128, 131, 320), (64, 236, 320), (32, 408, 320), (32, 408, 640), (16, 732, 640),
    (16, 732, 1280), (8, 910, 1280), (4, 1318, 1280), (4, 1318, 1810), (2, 1650, 1810),
    (4, 2048, 1546),
)  # fmt: skip
DIGITS = 4  # by which the singular values fall
NEGLIGIBLE = 1e-9  # of a node's squared norm
REPEATS = 3
GEMM_ORDER = 1024


def samples(m: int, s: int) -> Any:
    """One node."""
    rng, k = np.random.default_rng(0), min(m, s)
    fall = 10.0 ** (-DIGITS * np.arange(k) / k)
    return (rng.standard_normal((m, k)) * fall) @ rng.standard_normal((k, s)) / k**0.5


def operations(m: int, s: int) -> float:
    """Of a Gram matrix, by its symmetry, and of a Cholesky factor of min(m, s) pivots."""
    k = min(m, s)
    return m**2 * s + (m**3 - (m - k) ** 3) / 3


def seconds(work: Callable[[], object], device: str) -> float:
    """The least of several runs: of this thread on the CPU, of the clock on a GPU."""
    clock = time.thread_time if device == "cpu" else time.perf_counter
    found = []
    for _ in range(REPEATS + (device != "cpu")):  # the first compiles
        synchronize(device)
        start = clock()
        work()
        synchronize(device)
        found.append(clock() - start)
    return min(found)


def gemm_rate(device: str, order: int) -> float:
    """Operations a second of a product of square matrices."""
    a = move(np.random.default_rng(1).standard_normal((1, order, order)), device)
    return 2.0 * order**3 / seconds(lambda: batched.matmul(a, a), device)


def ways(S: Array, negligible: float, device: str) -> dict[str, Callable[[], object]]:
    """One pivot after the other, and by products."""
    if device == "cpu":
        return {
            "one by one": lambda: batched.pivoted_qr(S),
            "products": lambda: batched.pivoted_qr(S, None, negligible),
        }
    from gpu_hodlr.batched import blocked_id, cupy_linalg

    steps = min(S.shape[1:])
    return {
        "one by one": lambda: cupy_linalg.pivoted_qr_by_blocks(S, steps, negligible),
        "products": lambda: blocked_id.pivoted_qr(S, steps, negligible),
    }


def measure(nodes: int, m: int, s: int, device: str, rate: float) -> dict[str, Any]:
    """Milliseconds of a level, on the CPU of a node."""
    S = samples(m, s)[None]
    negligible = NEGLIGIBLE * float((S**2).sum())
    nodes = 1 if device == "cpu" else nodes
    on_device = namespace_on(device).concatenate([move(S, device)] * nodes)
    measured = {
        name: 1e3 * seconds(work, device)
        for name, work in ways(on_device, negligible, device).items()
    }
    return {
        "nodes": nodes,
        "m": m,
        "s": s,
        "floor": 1e3 * nodes * operations(m, s) / rate,
    } | measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default cpu")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--small", action="store_true", help="small levels, to see that it runs")
    options = parser.parse_args()
    device = resolve_device(options.device)
    levels = ((4, 20, 30), (2, 40, 30)) if options.small else LEVELS
    with batched.one_blas_thread():
        rate = gemm_rate(device, 64 if options.small else GEMM_ORDER)
        print(f"GEMM {rate / 1e9:.0f} GF/s; milliseconds")
        print("nodes     m     s     floor  one by one  products  ratio")
        rows = []
        for level in levels:
            row = measure(*level, device, rate)
            ratio = row["one by one"] / row["products"]
            print(
                f"{row['nodes']:5} {row['m']:5} {row['s']:5} {row['floor']:9.2f} "
                f"{row['one by one']:11.2f} {row['products']:9.2f} {ratio:6.2f}",
                flush=True,
            )
            rows.append(row)
    if options.json:
        result = {"GF_per_s": rate / 1e9, "levels": rows, "environment": environment()}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Pivoted QR of samples alone: one pivot after the other, and by products of Gram matrices.

    python profiling/pivoted_qr.py
    python profiling/pivoted_qr.py --device cuda --json FILE
    python profiling/pivoted_qr.py --compress enco --rtol 1e-2 --max-rank 1000 --json FILE

Samples S (nodes, m, s) of levels of mnist and enco, whose singular values fall by four digits. On
the CPU the seconds are of one thread and one node: GEQP3 (after an unpivoted QR where s > 1.3 m)
beside `blocked_id`. On a GPU they are of the level: a block a matrix beside `blocked_id`; where the
first is faster, `_BLOCKED` of cupy_linalg is too small.

The floor is the operations of `blocked_id`, m^2 s of S S^T and m^3 / 3 of its factor (less what
min(m, s) pivots leave), at the rate of GEMM measured in the same run.

--compress: of a whole compression by HSS on the CPU, both ways in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import benchmark
import numpy as np
from environment import environment

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.batched import numpy_linalg
from gpu_hodlr.devices import DEVICES, Array, move, namespace_on, resolve_device, synchronize
from gpu_hodlr.errors import RankCapWarning

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


def compressions(
    name: str, rtol: float, max_rank: int, runs: int, *, small: bool = False
) -> Iterator[dict[str, Any]]:
    """Seconds of compressing a network's matrix, the ways of pivoted QR in turns."""
    op = benchmark.operator(name, "float64", "cpu", small)
    never = math.inf  # columns a row: then no Gram matrix is formed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankCapWarning)
        for _ in range(runs):
            for way, wide in (("one by one", never), ("products", numpy_linalg._WIDE)):
                with patch.object(numpy_linalg, "_WIDE", wide):
                    K = gh.compress(op, rtol=rtol, max_rank=max_rank, leaf_size=128)
                report = K.report
                yield {
                    "way": way, "cpu_s": report.cpu_seconds, "s": sum(report.seconds.values()),
                    "pivoted_qr_s": report.seconds["pivoted QR"], "error": report.error,
                    "rank": max(max(level) for level in K.ranks), "N": K.shape[0],
                    "samples": report.num_samples, "passes": report.passes,
                }  # fmt: skip


def tell_compressions(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print them, and how many times faster the least of one way is than that of the other."""
    done = []
    print("way           CPU-s       s  pivoted QR, s  error     rank  samples  passes")
    for row in rows:
        print(
            f"{row['way']:10} {row['cpu_s']:8.2f} {row['s']:7.2f} {row['pivoted_qr_s']:14.2f}"
            f"  {row['error']:.2e} {row['rank']:5} {row['samples']:8} {row['passes']:7}",
            flush=True,
        )
        done.append(row)
    for what in ("cpu_s", "s", "pivoted_qr_s"):
        least = [
            min(row[what] for row in done if row["way"] == way)
            for way in ("one by one", "products")
        ]
        print(f"{what}: {least[0] / least[1]:.2f} times faster by products")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default cpu")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--small", action="store_true", help="small levels, to see that it runs")
    parser.add_argument("--compress", choices=("mnist", "enco"), help="a network's whole matrix")
    parser.add_argument("--rtol", type=float, default=1e-2, help="of --compress, default 1e-2")
    parser.add_argument("--max-rank", type=int, default=1000, help="likewise, default 1000")
    parser.add_argument("--runs", type=int, default=2, help="likewise, of each way, default 2")
    options = parser.parse_args()
    if options.compress:
        compressed = tell_compressions(
            compressions(options.compress, options.rtol, options.max_rank, options.runs,
                         small=options.small)
        )  # fmt: skip
        write(options.json, {"compressions": compressed})
        return
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
    write(options.json, {"GF_per_s": rate / 1e9, "levels": rows})


def write(file: Path | None, result: dict[str, Any]) -> None:
    """To the file, where there is one, with the environment."""
    if file is not None:
        text = json.dumps({**result, "environment": environment()}, indent=1)
        file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

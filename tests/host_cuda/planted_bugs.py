"""Planted bugs: kernel sources executed on the host with one barrier left out at a time.

    python -m host_cuda.planted_bugs NAME CACHE

prints, for each barrier of the source, how many of the schedules noticed that it was gone: other
bits in the result, an error of the harness, or a crash. A process of its own, for the crashes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from host_cuda import launches
from host_cuda.runner import HostExecutionError, HostKernels

from gpu_hodlr.kernel_sources import read_source

SEEDS = (1, 2, 3, 4, 5)


def _pivoted_qr(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    # Stopped early, or nothing would be left over to sum up at the end.
    return launches.pivoted_qr(kernels, rng.standard_normal((1, 40, 12)), max_rank=8, **schedule)


def _point_entries(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    points, rows = rng.standard_normal((40, 20)), rng.permutation(40)[None]
    cols = rows[:, ::-1].copy()
    blocks = launches.point_entries(kernels, points, "gaussian", 3.0, 0.1, rows, cols, **schedule)
    return (blocks,)


def _khatri_rao_entries(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    features, gram = rng.standard_normal((5, 40)), rng.standard_normal((3, 3, 40))
    rows, tables = np.arange(40)[None], (rng.integers(5, size=40), rng.integers(3, size=40))
    cols = rows[:, ::-1].copy()
    blocks = launches.khatri_rao_entries(kernels, features, *tables, gram, rows, cols, **schedule)
    return (blocks,)


JOBS: dict[str, Callable[..., Any]] = {
    "pivoted_qr": _pivoted_qr,
    "point_entries": _point_entries,
    "khatri_rao_entries": _khatri_rao_entries,
}


def _noticed(name: str, kernels: HostKernels, expected: Any, seed: int, barrier: int) -> bool:
    """Run one schedule in a child: a bug may take the whole process down."""
    child = os.fork()
    if child == 0:
        same = False
        try:
            got = JOBS[name](kernels, np.random.default_rng(0), seed=seed, removed_barrier=barrier)
            same = all(a.tobytes() == b.tobytes() for a, b in zip(got, expected, strict=True))
        except HostExecutionError:
            pass
        finally:
            os._exit(0 if same else 1)
    return os.waitpid(child, 0)[1] != 0


def main(name: str, cache: str) -> None:
    """Print, as JSON, how many of SEEDS noticed each barrier's absence, in the source's order."""
    kernels = HostKernels(name, read_source(name), Path(cache))
    expected = JOBS[name](kernels, np.random.default_rng(0))
    counts = [
        sum(_noticed(name, kernels, expected, seed, barrier) for seed in SEEDS)
        for barrier in range(-1, kernels.num_barriers)  # -1: none left out
    ]
    print(json.dumps({"intact": counts[0], "barriers": counts[1:]}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Planted bugs: kernel sources executed on the host with one barrier left out at a time.

    python -m host_cuda.planted_bugs CACHE NAME ...

prints, for each barrier of the sources, how many of the schedules noticed that it was gone: other
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
from host_cuda import factor_launches, launches, sampling_launches
from host_cuda.runner import HostExecutionError, HostKernels

from gpu_hodlr import batched
from gpu_hodlr.batched import PivotedQR, PointKernel
from gpu_hodlr.kernel_sources import read_source

SEEDS = (1, 2, 3, 4, 5)


def _pivoted_qr(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    # Stopped early, or nothing would be left over to sum up at the end.
    S = rng.standard_normal((1, 40, 12))
    return tuple(
        result
        for tall in (False, True)
        for result in factor_launches.pivoted_qr(kernels, S, max_rank=8, tall=tall, **schedule)
    )


def _pivoted_cholesky(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    # Two panels, and three warps.
    S = rng.standard_normal((1, 90, 100))
    gram = S @ S.swapaxes(1, 2)
    return factor_launches.pivoted_cholesky(kernels, gram, np.zeros(1), 40, 50, **schedule)


def _point_entries(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    points, rows = rng.standard_normal((40, 20)), rng.permutation(40)[None]
    cols = rows[:, ::-1].copy()
    kernel, nugget = PointKernel("gaussian"), np.full(1, 0.1)
    blocks = launches.point_entries(kernels, points / 3, kernel, nugget, rows, cols, **schedule)
    return (blocks,)


def _khatri_rao_entries(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    features, gram = rng.standard_normal((5, 40)), rng.standard_normal((3, 3, 40))
    rows, tables = np.arange(40)[None], (rng.integers(5, size=40), rng.integers(3, size=40))
    cols = rows[:, ::-1].copy()
    blocks = launches.khatri_rao_entries(kernels, features, *tables, gram, rows, cols, **schedule)
    return (blocks,)


def _basis_products(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    # 8 columns and blocks of more than 256 rows: staged in several goes, both ways.
    tall, wide = rng.standard_normal((1, 600, 9)), rng.standard_normal((1, 9, 600))
    x, z = rng.standard_normal((1, 609, 8)), rng.standard_normal((1, 600, 8))
    return (
        launches.restrict_rows(kernels, tall, x, None, **schedule),
        launches.prolong_rows(kernels, wide, z, None, **schedule),
    )  # those of bfloat16 are the same lines


def _block_sparse(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    # The second block row has terms of both kinds; 8 columns are staged in two goes.
    pattern = batched.block_pattern(np.array([[0, 1], [1, 2], [0, 2]]), 3, np.empty(0))
    results = []
    for m, k in ((300, 8), (40, 33)):
        blocks, (x, y) = rng.standard_normal((3, m, m)), rng.standard_normal((2, 3, m, k))
        results.append(launches.block_sparse(
            kernels, blocks, pattern.starts, pattern.terms, x, y, **schedule
        ))  # fmt: skip
    return tuple(results)


def _inner_products(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    x, index = rng.standard_normal((70, 600)), rng.permutation(70)[None]
    return (launches.inner_products(kernels, x, index, index[:, :8].copy(), **schedule),)


def _merge_smallest(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    # Lists of more than a warp's lanes, and new ones.
    rows, candidates = rng.permutation(12)[None], rng.permutation(90)[None]
    results = []
    for long in (False, True):
        lists = np.full((12, 40), np.inf), np.full((12, 40), -1)
        for found in rng.standard_normal((2, 1, 12, 90)):
            arguments = (*lists, rows, found, candidates)
            lists = launches.merge_smallest(kernels, *arguments, long=long, **schedule)
        results += lists
    return tuple(results)


def _triangular(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    lower, b = (
        rng.standard_normal((1, 150, 150)) / 12 + np.eye(150),
        rng.standard_normal((1, 150, 1)),
    )
    return tuple(
        factor_launches.solve_lower(kernels, lower, b, transpose=transpose, **schedule)
        for transpose in (False, True)
    )


def _ulv_steps(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    # Fewer and more columns than a block's three warps take at a time.
    results: list[Any] = []
    for rest, r in ((70, 20), (40, 100)):
        T, W = rng.standard_normal((2, 1, rest, r)) / 20
        L = rng.standard_normal((1, rest, rest)) / 12 + np.eye(rest)
        index = rng.permutation(rest + r)[None]
        x, y, w = (rng.standard_normal((1, n, 8)) for n in (rest + r, rest, r))
        for name, vectors, out in (("eliminate", (x,), (y, w)), ("substitute", (y, w), (x,))):
            results += factor_launches.ulv_step(
                kernels, name, (T, L, W), index, vectors, out, rest + r, **schedule
            )
    return tuple(results)


def _hodlr_steps(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    # Chunks of more than a tile, fewer columns than a kernel's, parts that one group of threads
    # adds up, or several.
    results: list[Any] = []
    for rows, chunk, r, parts, k in ((270, 270, 40, 5, 5), (70, 50, 3, 9, 8)):
        Q, P = rng.standard_normal((2, 1, rows, r)) / 20
        Y = rng.standard_normal((1, r, r)) / 20 + np.eye(r)
        level, x = (Q, P, Y), rng.standard_normal((2 * rows, k))
        w, p = rng.standard_normal((2, 1, parts, r, k))
        for applied, sums, following, transpose in (
            (None, (None, None), level, False), (level, (w, p), level, True),
            (level, (w, None), None, False),
        ):  # fmt: skip
            results += factor_launches.hodlr_step(
                kernels, applied, sums, following, x, chunk=chunk, transpose=transpose, **schedule
            )
    return tuple(results)


def _householder_qr(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    a = rng.standard_normal((1, 70, 60))
    return tuple(
        result
        for tall in (False, True)
        for result in factor_launches.householder_qr(kernels, a, tall=tall, **schedule)
    )


def _interpolation(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    # Two blocks of unknowns, and of the columns of T; the second matrix has a low rank.
    r = np.triu(rng.standard_normal((2, 50, 90))) + 8 * np.eye(50, 90)
    r[1, 40:] = 0
    pivots, padding = np.stack([rng.permutation(90) for _ in r]), rng.random((2, 90)) < 0.2
    tails = np.cumsum((r**2).sum(axis=2)[:, ::-1], axis=1)[:, ::-1]
    qr = PivotedQR(pivots, r, np.hstack([tails, np.zeros((2, 1))]))
    return factor_launches.interpolation(kernels, qr, np.zeros(2), 50, padding, **schedule)


def _dots(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    u, v = rng.standard_normal((2, 200, 8))
    return (launches.column_dots(kernels, u, v, **schedule),)


def _splits(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    index, distance = rng.permutation(300).reshape(3, 100), rng.random((3, 100))
    return (sampling_launches.farthest(kernels, index, distance, **schedule),)


def _gram_rounds(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    samples = rng.standard_normal((2, 20, 30)) * 2.0 ** rng.integers(-40, 40, (2, 20, 30))
    return factor_launches.sample_powers(kernels, samples, **schedule)


def _draws(kernels: HostKernels, rng: np.random.Generator, **schedule: int) -> Any:
    # Three warps, several times; few are certain.
    count = rng.integers(1, 9, (2, 300))
    chance = sampling_launches.draw_chances(kernels, count, 200, warps=3, **schedule)
    first, start = np.cumsum(count, axis=1) - count, rng.random((2, 1))
    certain = np.full(count.shape, 0.2)
    drawn = sampling_launches.draw_systematic(
        kernels, first, count, certain, 200, start, warps=3, **schedule
    )
    return (chance, *drawn)


JOBS: dict[str, Callable[..., Any]] = {
    "pivoted_qr": _pivoted_qr,
    "pivoted_cholesky": _pivoted_cholesky,
    "point_entries": _point_entries,
    "khatri_rao_entries": _khatri_rao_entries,
    "basis_products": _basis_products,
    "block_sparse": _block_sparse,
    "inner_products": _inner_products,
    "merge_smallest": _merge_smallest,
    "triangular": _triangular,
    "ulv_steps": _ulv_steps,
    "hodlr_steps": _hodlr_steps,
    "householder_qr": _householder_qr,
    "interpolation": _interpolation,
    "dots": _dots,
    "splits": _splits,
    "gram_rounds": _gram_rounds,
    "draws": _draws,
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


def main(cache: str, *names: str) -> None:
    """Print, as JSON, how many of SEEDS noticed each barrier's absence, in the sources' order."""
    noticed = {}
    for name in names:
        kernels = HostKernels(name, read_source(name), Path(cache))
        expected = JOBS[name](kernels, np.random.default_rng(0))
        counts = [
            sum(_noticed(name, kernels, expected, seed, barrier) for seed in SEEDS)
            for barrier in range(-1, kernels.num_barriers)  # -1: none left out
        ]
        noticed[name] = {"intact": counts[0], "barriers": counts[1:]}
    print(json.dumps(noticed))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Ranks that pass whole vectors of different values are refused, all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from matrix_cases import toeplitz
from mpi_runs import on_ranks
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.errors import ArgumentError

N = 160
EXACT = toeplitz(N)


def swapped(rank: int) -> Any:
    b = np.arange(float(N))
    if rank:
        b[:2] = b[1::-1].copy()
    return b


VECTORS: dict[str, Callable[[int], Any]] = {
    "twice": lambda rank: np.ones(N) * (1 + rank),
    "own noise": lambda rank: np.random.default_rng(rank).standard_normal(N),
    "same sum": lambda rank: np.random.default_rng(0).standard_normal(N)[:: 1 - 2 * rank],
    "sign": lambda rank: (1 - 2 * rank) * np.sin(np.arange(float(N))),
    "one entry": lambda rank: np.ones(N) + 1e-3 * rank * (np.arange(N) == 7),
    "two swapped": swapped,
    "columns": lambda rank: np.eye(N, 2)[:, :: 1 - 2 * rank],
}
DOORS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "product": lambda K, F, b: K @ b,
    "solve": lambda K, F, b: F.solve(b),
    "square root": lambda K, F, b: F.sqrt_matmat(b),
    "its inverse": lambda K, F, b: F.sqrt_solve(b),
    "cg": lambda K, F, b: gh.cg(K, b, damping=1.0),
    "cg from": lambda K, F, b: gh.cg(K, np.ones_like(b), damping=1.0, x0=b),
    "cg of an operator": lambda K, F, b: gh.cg(
        gh.DenseOperator(EXACT), b, damping=1.0, comm=K.owners.comm
    ),
}


def ends(comm: Any) -> list[str]:
    """Which door accepts which vector, when it should not; then all go on together."""
    K = gh.compress(EXACT, rtol=1e-3, leaf_size=20, comm=comm)
    F, rank = K.factorize(1.0), K.owners.comm.rank
    said = []
    for door, run in DOORS.items():
        for kind, make in VECTORS.items():
            try:
                run(K, F, make(rank))
                said.append(f"{door}, {kind}: accepted")
            except ArgumentError as e:
                if "differs between ranks" not in str(e):
                    said.append(f"{door}, {kind}: {e}")
    K @ np.ones(N)
    return said


def test_every_kind_at_every_door():
    assert on_threads(2, ends) == [[], []]


def test_by_mpi():
    assert on_ranks(2, ends) == [[], []]


def test_equal_values_are_equal():
    """In any order of memory, and any type that holds them."""

    def job(comm: Any) -> Any:
        K = gh.compress(EXACT, rtol=1e-3, leaf_size=20, comm=comm)
        b = np.arange(2.0 * N).reshape(N, 2)
        return K @ [b, np.asfortranarray(b), b.astype(np.float32)][comm.rank]

    first, *others = on_threads(3, job)
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_on_a_gpu_only_where_asked(
    stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch, asked: str | None
):
    """There it would have to be waited for."""
    xp = stand_in.cupy
    op = gh.DenseOperator(xp.asarray(EXACT))
    if asked is not None:
        monkeypatch.setenv("GPU_HODLR_CHECK_VECTORS", asked)

    def job(comm: Any) -> Any:
        K = gh.compress(op, rtol=1e-3, leaf_size=20, comm=comm)
        return K @ xp.full(N, 1.0 + comm.rank)

    found = on_threads(2, job)
    assert all(isinstance(each, ArgumentError) == (asked == "1") for each in found), found


def test_not_compared_where_not_wanted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GPU_HODLR_CHECK_VECTORS", "0")

    def job(comm: Any) -> Any:
        return gh.compress(EXACT, leaf_size=20, comm=comm) @ np.full(N, 1.0 + comm.rank)

    assert all(isinstance(each, np.ndarray) for each in on_threads(2, job))

"""Stacks of few tall matrices: inner products, orthonormal columns, pivoted rows."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from stacks import close, stack

from gpu_hodlr import batched
from gpu_hodlr.batched import tall
from gpu_hodlr.devices import to_host


def test_inner_products_of_tall_matrices(xp: ModuleType, dtype: Any):
    a, b = stack(2, 24, 3, dtype=dtype), stack(2, 24, 5, dtype=dtype, seed=1)
    got = tall.inner(xp.asarray(a), xp.asarray(b), 6)
    close(got, a.swapaxes(1, 2) @ b)
    close(tall.inner(xp.asarray(a)[:, :12], xp.asarray(b)[:, 12:], 12),
          a[:, :12].swapaxes(1, 2) @ b[:, 12:])  # fmt: skip


def test_orthonormal_columns(xp: ModuleType, dtype: Any):
    """Ill-conditioned and badly scaled columns, and zero columns."""
    eps = float(np.finfo(dtype).eps)
    a = stack(3, 40, 6, dtype=np.float64)
    a[1, :, 3] = a[1, :, 2] + 10 * eps**0.5 * a[1, :, 3]
    a[1] *= 10.0 ** np.arange(-9, 9, 3)
    a[2, :, [1, 4]] = 0
    a = a.astype(dtype)
    Q, S, info = (to_host(x) for x in tall.orthonormal(xp.asarray(a), 8))
    assert not info.any()
    unit = np.tile(np.eye(6), (3, 1, 1))
    unit[2, [1, 4], [1, 4]] = 0
    np.testing.assert_allclose(Q.swapaxes(1, 2) @ Q, unit, rtol=0, atol=30 * eps)
    norms = np.linalg.norm(a, axis=1, keepdims=True)
    assert (np.abs(Q @ S.swapaxes(1, 2) - a) <= 30 * eps * norms).all()
    assert not np.triu(S, 1).any()
    np.testing.assert_array_equal(S[2, [1, 4], [1, 4]], 1)


def test_pivots_by_tournament(xp: ModuleType, dtype: Any, monkeypatch: pytest.MonkeyPatch):
    """As good as pivoting all rows together, and the tails are the errors of all rows."""
    monkeypatch.setattr(tall, "_MOST_ROWS", 64)
    x = np.sort(np.random.default_rng(0).random(1024)).reshape(2, 512)
    S = 1 / (0.1 + x[:, :, None] + np.linspace(0, 1, 12))
    S[:, -3:] = 0
    S = S.astype(dtype)
    qr = tall.pivoted_qr(xp.asarray(S))
    np.testing.assert_array_equal(
        np.sort(to_host(qr.pivots), axis=1), np.tile(np.arange(512), (2, 1))
    )
    plain = to_host(batched.pivoted_qr(xp.asarray(S)).tails)
    rank = 4 if dtype == np.float64 else 3
    assert (to_host(qr.tails)[:, rank] < 10 * plain[:, rank]).all()
    padding = np.zeros((2, 512), bool)
    padding[:, -3:] = True
    order, T, ranks = (to_host(a) for a in batched.interpolation(qr, rank, xp.asarray(padding)))
    assert (ranks == rank).all()
    rows = np.take_along_axis(S, order[:, :, None], axis=1).astype(np.float64)
    left = np.linalg.norm(rows[:, rank:] - T @ rows[:, :rank], axis=(1, 2)) ** 2
    np.testing.assert_allclose(left, to_host(qr.tails)[:, rank], rtol=0.02)


def test_tails_of_a_tournament(xp: ModuleType, dtype: Any, monkeypatch: pytest.MonkeyPatch):
    """Sums from the end: what is left after many pivots is not lost in what was there before."""
    monkeypatch.setattr(tall, "_MOST_ROWS", 64)
    S = stack(2, 512, 10, dtype=np.float64) * 10.0 ** -np.arange(0, 30, 3)
    qr = tall.pivoted_qr(xp.asarray(S.astype(dtype)))
    r = to_host(qr.r)
    energy = (r * r).sum(axis=2, dtype=np.float64)
    tails = to_host(qr.tails)
    for k in range(11):
        np.testing.assert_allclose(tails[:, k], energy[:, k:].sum(axis=1), rtol=1e-12)
    if xp is np and dtype == np.float64:  # one addition after the other
        want = np.zeros((2, 11))
        for k in range(9, -1, -1):
            want[:, k] = want[:, k + 1] + energy[:, k]
        np.testing.assert_array_equal(tails, want)


def test_a_tournament_asks_for_the_same_whatever_the_columns(
    stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tall, "_MOST_ROWS", 64)
    counts = []
    for s in (4, 8):
        S = stand_in.cupy.asarray(stack(2, 512, s, dtype=np.float64))
        stand_in.counters.reset()
        tall.pivoted_qr(S)
        counts.append(stand_in.counters.array_operations)
        assert stand_in.counters.synchronizations == 0
    assert counts[0] == counts[1]

"""Solves with the levels of a HODLR factor, against dense W: NumPy, and CuPy's stand-in."""

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpu_hodlr as gh
from gpu_hodlr.batched import pair_solves
from gpu_hodlr.batched.level_products import NARROW
from gpu_hodlr.batched.pair_solves import Pairs, Turn
from gpu_hodlr.devices import to_host

LEAVES, M = 8, 40


def factors(ranks: tuple[int, ...], dtype: Any) -> list[tuple[np.ndarray, ...]]:
    """(Q, P, Y) of levels, leaf level first: Q orthonormal, Y Y^T = I - P^T P."""
    rng, found = np.random.default_rng(sum(ranks)), []
    for level, r in enumerate(ranks):
        pairs, rows = LEAVES >> (level + 1), M << level
        Q = np.linalg.qr(rng.standard_normal((pairs, rows, rows)))[0][:, :, :r]
        P = 0.4 * np.linalg.qr(rng.standard_normal((pairs, rows, rows)))[0][:, :, :r]
        P = P * rng.random(r) @ np.linalg.qr(rng.standard_normal((pairs, r, r)))[0]  # Y is full
        Y = np.linalg.cholesky(np.eye(r) - P.swapaxes(1, 2) @ P)
        found.append(tuple(a.astype(dtype) for a in (Q, P, Y)))
    return found


def dense(level: tuple[np.ndarray, ...]) -> np.ndarray:
    """W of all pairs of a level."""
    Q, P, Y = (a.astype(float) for a in level)
    pairs, rows, r = Q.shape
    W = np.zeros((2 * pairs * rows,) * 2)
    for t in range(pairs):
        even = slice(2 * t * rows, (2 * t + 1) * rows)
        odd = slice((2 * t + 1) * rows, (2 * t + 2) * rows)
        W[even, even] = np.eye(rows) + Q[t] @ (Y[t] - np.eye(r)) @ Q[t].T
        W[even, odd] = Q[t] @ P[t].T
        W[odd, odd] = np.eye(rows)
    return W


def turns(xp: ModuleType, levels: list[tuple[np.ndarray, ...]], transpose: bool) -> list[Turn]:
    """Those of W_1^-1 .. W_depth^-1, or of its transpose."""
    made = [Turn(Pairs(*map(xp.asarray, level), M), transpose) for level in levels]
    return made[::-1] if transpose else made


def solved(levels: list[tuple[np.ndarray, ...]], x: np.ndarray, transpose: bool) -> np.ndarray:
    y = x.reshape(LEAVES * M, -1).astype(float)
    for level in levels[::-1] if transpose else levels:
        W = dense(level)
        y = np.linalg.solve(W.T if transpose else W, y)
    return y.reshape(x.shape)


@pytest.mark.parametrize("k", [0, 1, 5, NARROW, NARROW + 1])
@pytest.mark.parametrize("ranks", [(6, 35, 3), (0, 4, 0), (33,)])
def test_both_ways_and_one_after_the_other(
    xp: ModuleType, dtype: Any, ranks: tuple[int, ...], k: int
):
    levels = factors(ranks, dtype)
    x = np.random.default_rng(k).standard_normal((LEAVES, M, k)).astype(dtype)
    up, down = (turns(xp, levels, transpose) for transpose in (False, True))
    forth, back = solved(levels, x, False), solved(levels, x, True)
    both = solved(levels, forth, True)
    atol = 50 * float(np.finfo(dtype).eps)
    for what, want in ((up, forth), (down, back), ([*up, *down], both)):
        got = xp.asarray(x.copy())
        pair_solves.solve(what, got)
        np.testing.assert_allclose(to_host(got), want, rtol=0, atol=atol)


def test_without_levels(xp: ModuleType):
    """One leaf: its triangle alone."""
    x = xp.asarray(np.ones((1, M, 2)))
    pair_solves.solve([], x)
    np.testing.assert_array_equal(to_host(x), 1.0)
    K = gh.compress(gh.DenseOperator(xp.asarray(2 * np.eye(20))), "hodlr", leaf_size=32)
    np.testing.assert_allclose(to_host(K.factorize(1.0).solve(xp.ones(20))), np.full(20, 1 / 3))


def test_levels_of_which_some_do_not_fit(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Parts that a kernel leaves are added up by what comes after it, and the reverse."""
    from gpu_hodlr.batched import cupy_pair_solves

    levels, k = factors((6, 35, 3), np.float64), 3
    x = np.random.default_rng(0).standard_normal((LEAVES, M, k))
    want = solved(levels, solved(levels, x, False), True)
    chain = [*turns(cupy, levels, False), *turns(cupy, levels, True)]
    for pattern in ([1, 0] * 4, [0, 1] * 4, [0] * 8, [0, 0, 1, 1] * 2, [1] * 8):
        answers = iter(pattern)
        monkeypatch.setattr(cupy_pair_solves, "fits", lambda *_: bool(next(answers)))  # noqa: B023
        got = cupy.asarray(x.copy())
        pair_solves.solve(chain, got)
        np.testing.assert_allclose(to_host(got), want, rtol=0, atol=1e-14)


def test_levels_whose_rows_lie_on_several_ranks(cupy: ModuleType):
    """Towards the root they are no `Pairs`, and keep their own sums; below them kernels go on."""
    levels = factors((6, 35, 3), np.float64)
    x = np.random.default_rng(1).standard_normal((LEAVES, M, 3))

    def spread(turn: Turn) -> Turn:
        own = {
            name: getattr(turn.level, name) for name in ("by_pieces", "sums", "even_sums", "add")
        }
        return Turn(SimpleNamespace(**own, Y=turn.level.Y), turn.transpose)

    up, down = (turns(cupy, levels, transpose) for transpose in (False, True))
    got = cupy.asarray(x.copy())
    pair_solves.solve([up[0], *map(spread, [*up[1:], *down[:2]]), down[2]], got)
    want = solved(levels, solved(levels, x, False), True)
    np.testing.assert_allclose(to_host(got), want, rtol=0, atol=1e-14)


def test_too_little_shared_memory_takes_the_other_way(
    cupy: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    from gpu_hodlr.batched import cupy_linalg, cupy_pair_solves

    def refused(*_: Any) -> None:
        raise AssertionError("the kernel does not fit")

    levels = factors((6, 35, 3), np.float64)
    x = np.random.default_rng(0).standard_normal((LEAVES, M, 2))
    got = cupy.asarray(x.copy())
    for module in (cupy_pair_solves, cupy_linalg):
        monkeypatch.setattr(module, "most_shared", lambda device: 48 << 10)
    monkeypatch.setattr(cupy_pair_solves, "advance", refused)
    many = [Turn(Pairs(*(cupy.zeros((1, n, 900)) for n in (4, 4, 900)), 4))]
    assert not cupy_pair_solves.fits(None, many[0], cupy.zeros((2, 4, 8)))
    monkeypatch.setattr(cupy_pair_solves, "most_shared", lambda device: 0)
    pair_solves.solve(turns(cupy, levels, False), got)
    np.testing.assert_allclose(to_host(got), solved(levels, x, False), rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [0, 1, 3, NARROW + 1])
def test_leaves(xp: ModuleType, dtype: Any, k: int):
    """Rows by number, padding last; those of others' leaves come out as they should."""
    rng, n = np.random.default_rng(k), 2 * M - 3
    leaves = np.full((2, M), -1)
    leaves.ravel()[:M] = rng.permutation(n)[:M]
    leaves[1, : M - 3] = np.setdiff1d(np.arange(n), leaves[0])
    C = (np.tril(rng.standard_normal((2, M, M)) / 10) + 2 * np.eye(M)).astype(dtype)
    b = rng.standard_normal((n, k)).astype(dtype)
    rows = np.where(leaves[:, :, None] < 0, 0, b[leaves]).astype(float)
    x = pair_solves.solve_leaves(*map(xp.asarray, (C, b, leaves)))
    atol = 20 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(to_host(x), np.linalg.solve(C, rows), rtol=0, atol=atol)
    y = pair_solves.solve_leaves_transposed(xp.asarray(C), x, xp.asarray(leaves), n)
    want = np.empty((n, k))
    back = np.linalg.solve(C.swapaxes(1, 2).astype(float), to_host(x).astype(float))
    want[leaves[leaves >= 0]] = back[leaves >= 0]
    np.testing.assert_allclose(to_host(y), want, rtol=0, atol=atol)

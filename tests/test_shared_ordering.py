"""Orderings made by many ranks: the permutation of one rank, exactly, and a share of its work."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import dense_oracles
import numpy as np
import pytest
from host_cupy import HostCupy
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.distributed import Communicator
from gpu_hodlr.interactions import nearest_neighbours
from gpu_hodlr.networks.khatri_rao import KhatriRao
from gpu_hodlr.ordering import bisection, build_tree

RANKS = (1, 2, 3, 4, 5, 7)


def with_zero_columns(n: int) -> gh.DenseOperator:
    rng = np.random.default_rng(n)
    phi = rng.standard_normal((6, n))
    phi[:, rng.random(n) < 0.2] = 0
    return gh.DenseOperator(phi.T @ phi)


def points(n: int, dimension: int, dtype: Any = np.float64) -> gh.KernelOperator:
    x = np.random.default_rng(n).random((n, dimension)).astype(dtype)
    return gh.KernelOperator(x, "laplace", 0.3)


def repeated_points() -> gh.KernelOperator:
    return gh.KernelOperator(np.random.default_rng(3).integers(0, 4, (257, 2)) * 1.0, "matern32")


@cache
def network() -> gh.GGNOperator:
    """N = 1,333, with zero rows; a sketch gives its inner products."""
    pytest.importorskip("torch")
    from network_cases import data, image_network, images

    targets = data((100,), 3, "cross_entropy", n=20)[1]
    model = image_network(100, 13, 3)
    return gh.GGNOperator(model, "cross_entropy", images(10, n=20, border=1), targets)


# Matrix, leaf_size and the least rows of a block; None: as it is.
CASES: dict[str, tuple[Callable[[], gh.Operator], int, int | None]] = {
    "zero columns": (lambda: with_zero_columns(301), 10, 8),
    "all columns alike": (lambda: gh.DenseOperator(np.ones((90, 90))), 5, 5),
    "repeated points": (repeated_points, 9, 8),
    "points, float32": (lambda: points(500, 6, np.float32), 16, 16),
    "a row a leaf": (lambda: points(13, 2), 1, 1),
    "empty leaves": (lambda: points(5, 3), 1, 1),
    "two rows": (lambda: points(2, 2), 1, 1),
    "one leaf": (lambda: points(40, 2), 40, 4),
    "few blocks": (lambda: points(200, 2), 10, 64),
    "many points": (lambda: points(9001, 3), 128, None),
    "dense": (lambda: with_zero_columns(4100), 100, None),
    "network": (network, 20, 30),
}


@pytest.mark.parametrize("ordering", ["gram", "angle", "geometric", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_the_tree_is_that_of_one_rank(case: str, ordering: str, monkeypatch: pytest.MonkeyPatch):
    make, leaf_size, rows = CASES[case]
    op = make()
    if ordering == "geometric" and op.points is None:
        pytest.skip("no points")
    if rows is not None:
        monkeypatch.setattr(bisection, "_BLOCK_ROWS", rows)

    def tree(*comm: Communicator) -> tuple[Any, str]:
        made, name = build_tree(op, ordering, leaf_size, 1, 1e-3, None, *comm)
        return made.leaves, name

    want, chosen = tree()
    np.testing.assert_array_equal(np.sort(want[want >= 0]), np.arange(op.shape[0]))
    for size in RANKS:
        for got in on_threads(size, tree):
            assert not isinstance(got, Exception), got
            np.testing.assert_array_equal(got[0], want)
            assert got[1] == chosen


@pytest.mark.parametrize("ordering", ["gram", "geometric"])
def test_blocks_change_nothing(ordering: str, monkeypatch: pytest.MonkeyPatch):
    """One rank's permutation with large nodes cut into blocks and whole, exact inner products."""
    rng = np.random.default_rng(0)
    phi = rng.integers(-3, 4, size=(5, 700)).astype(float)
    x = gh.KernelOperator(rng.random((700, 2)))
    op = x if ordering == "geometric" else gh.DenseOperator(phi.T @ phi)
    whole = build_tree(op, ordering, 10, 0, 1.0)[0].leaves
    monkeypatch.setattr(bisection, "_BLOCK_ROWS", 16)
    np.testing.assert_array_equal(build_tree(op, ordering, 10, 0, 1.0)[0].leaves, whole)


class Counting(gh.DenseOperator):
    """Counts the entries it is asked for."""

    asked = 0

    def _blocks(self, rows: Any, cols: Any) -> Any:
        self.asked += int(((rows >= 0).sum(axis=1) * (cols >= 0).sum(axis=1)).sum())
        return super()._blocks(rows, cols)


@pytest.mark.parametrize("ordering", ["gram", "angle"])
def test_each_rank_reads_its_share_of_the_entries(ordering: str, monkeypatch: pytest.MonkeyPatch):
    """6 N entries a level in all, no more for many ranks than for one."""
    monkeypatch.setattr(bisection, "_BLOCK_ROWS", 16)
    n, depth = 1000, 6
    K = dense_oracles.distance_matrix(n, lambda d: np.exp(-d / 50))

    def read(*comm: Communicator) -> int:
        op = Counting(K)
        tree = build_tree(op, ordering, 16, 0, 1.0, None, *comm)[0]
        assert tree.depth == depth
        return op.asked

    total = read()
    assert total == 6 * n * depth
    for size in RANKS:
        shares = on_threads(size, read)
        assert sum(shares) == total
        assert max(shares) <= 1.26 * total / size  # whole nodes are dealt out


@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_share_a_sketch(size: int, monkeypatch: pytest.MonkeyPatch):
    """The same chunks of columns, each formed once."""
    op = network()
    monkeypatch.setattr(KhatriRao, "_chunk", lambda self: 3)
    formed: list[int] = []
    pull_back = KhatriRao._pull_back

    def counted(self: KhatriRao, e: Any, out: Any) -> None:
        formed.append(out.shape[1])
        pull_back(self, e, out)

    monkeypatch.setattr(KhatriRao, "_pull_back", counted)
    want = op.gram_vectors(16, 5)
    assert formed == [3, 3, 3, 3, 3, 1]
    for got in on_threads(size, lambda comm: op.gram_vectors(16, 5, comm)):
        np.testing.assert_array_equal(got, want)
    assert sorted(formed) == sorted(2 * [3, 3, 3, 3, 3, 1])


@pytest.mark.parametrize("dimension", [6, None])
def test_neighbours_are_those_of_one_rank(dimension: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bisection, "_BLOCK_ROWS", 100)
    op = with_zero_columns(1100) if dimension is None else points(1100, dimension)
    want = nearest_neighbours(op, 8, 0)
    for size in (2, 3, 5):
        for got in on_threads(size, lambda comm: nearest_neighbours(op, 8, 0, comm=comm)):
            np.testing.assert_array_equal(got.index, want.index)
            assert (got.recall, got.trees) == (want.recall, want.trees)


@pytest.mark.parametrize("calls", [0, 2, 60])
def test_what_fails_on_one_rank_fails_on_all(calls: int, monkeypatch: pytest.MonkeyPatch):
    """Where the ranks compute together, and where one is alone."""
    monkeypatch.setattr(bisection, "_BLOCK_ROWS", 16)
    K = with_zero_columns(256).array

    def tree(comm: Communicator) -> Any:
        left = iter(range(calls))

        def entries(i: Any, j: Any) -> Any:
            if comm.rank == 1 and next(left, None) is None:
                raise OSError("a rank's own trouble")
            return K[np.ix_(i, j)]

        op = gh.FunctionOperator(256, entries=entries, diagonal=K.diagonal)
        return build_tree(op, "gram", 8, 0, 1.0, None, comm)

    for error in on_threads(3, tree):
        assert isinstance(error, OSError)


@pytest.mark.parametrize("ordering", ["gram", "angle", "geometric"])
def test_on_a_gpu(stand_in: HostCupy, ordering: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bisection, "_BLOCK_ROWS", 16)
    op = points(300, 2).to("cuda")
    want = build_tree(op, ordering, 10, 0, 1.0)[0].leaves
    for got in on_threads(3, lambda comm: build_tree(op, ordering, 10, 0, 1.0, None, comm)[0]):
        assert not isinstance(got, Exception), got
        np.testing.assert_array_equal(got.leaves, want)

"""Nearest neighbours against a dense search."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from host_cupy import HostCupy
from matrix_cases import entries_only, products_only

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.interactions import Neighbours, nearest_neighbours


class WithVectors(gh.DenseOperator):
    """K = Phi^T Phi that hands out Phi^T itself as its sketch."""

    def __init__(self, phi: np.ndarray) -> None:
        super().__init__(phi.T @ phi)
        self._phi = phi

    def gram_vectors(self, num: int, seed: int, comm: Any = None) -> Any:
        return self._phi.T


def point_distances(x: np.ndarray) -> np.ndarray:
    return ((x[:, None] - x) ** 2).sum(axis=2)


def matrix_distances(K: np.ndarray, name: str) -> np.ndarray:
    norms = np.diagonal(K)
    if name == "gram":
        return norms[:, None] + norms - 2 * K
    product = np.outer(norms, norms)
    return 1 - np.where(product > 0, K**2 / np.where(product > 0, product, 1), 0)


def recall(found: Neighbours, distances: np.ndarray) -> float:
    """Share of the k nearest found, ties counted, after checks of what was found."""
    n, count = found.index.shape
    d = distances.copy()
    np.fill_diagonal(d, np.inf)
    kth = np.sort(d, axis=1)[:, count - 1]
    assert found.index.min() >= -1
    assert (found.index != np.arange(n)[:, None]).all()
    for row in found.index:
        assert len(np.unique(row[row >= 0])) == np.count_nonzero(row >= 0)
    mine = np.take_along_axis(d, np.maximum(found.index, 0), axis=1)
    near = (mine <= kth[:, None] + 1e-5 * np.abs(kth[:, None]) + 1e-12) & (found.index >= 0)
    return float(near.mean())


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_points_in_low_dimension_exactly(dimension: int):
    x = np.random.default_rng(0).random((700, dimension))
    found = nearest_neighbours(gh.KernelOperator(x), 7, 0)
    assert found.index.shape == (700, 7)
    assert (found.recall, found.trees) == (1.0, 0)
    assert recall(found, point_distances(x)) == 1.0
    np.testing.assert_array_equal(found.weight, 1)


@pytest.mark.parametrize("dimension", [5, 6, 20])
def test_points_in_high_dimension(dimension: int):
    x = np.random.default_rng(0).standard_normal((1500, dimension)) + 100.0
    found = nearest_neighbours(gh.KernelOperator(x), 10, 0)
    assert found.trees >= 1
    assert found.recall >= 0.8
    assert recall(found, point_distances(x)) == pytest.approx(found.recall, abs=0.08)


def test_close_clusters_far_from_each_other():
    """Squared norms would lose digits: 1e-3 within clusters 1e3 apart."""
    rng = np.random.default_rng(0)
    centers = np.repeat(1e3 * rng.standard_normal((10, 6)), 60, axis=0)
    x = centers + 1e-3 * rng.standard_normal((600, 6))
    found = nearest_neighbours(gh.KernelOperator(x), 5, 0)
    assert recall(found, point_distances(x)) > 0.7


@pytest.mark.parametrize("name", ["gram", "angle"])
@pytest.mark.parametrize("kind", ["entries", "dense", "sketch"])
def test_distances_of_a_matrix(kind: str, name: str):
    rng = np.random.default_rng(1)
    phi = rng.standard_normal((8, 900)) * rng.random(900)
    K = phi.T @ phi
    op = {"entries": entries_only, "dense": gh.DenseOperator}.get(kind, lambda _: WithVectors(phi))
    found = nearest_neighbours(op(K), 12, 3, name)
    assert found.recall >= 0.8
    assert recall(found, matrix_distances(K, name)) == pytest.approx(found.recall, abs=0.08)
    there = found.index >= 0
    wanted = np.take_along_axis(K, np.maximum(found.index, 0), axis=1) ** 2
    np.testing.assert_allclose(found.weight[there], wanted[there], rtol=1e-3, atol=1e-4)
    assert not found.weight[~there].any()


@pytest.mark.parametrize("kind", ["dense", "points"])
def test_any_library(xp: ModuleType, kind: str):
    """The same neighbours, wherever the matrix is."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((600, 6))
    K = dense_oracles.random_spd(600)
    make = gh.KernelOperator if kind == "points" else gh.DenseOperator
    data = x if kind == "points" else K
    found = nearest_neighbours(make(xp.asarray(data)), 8, 0)
    assert isinstance(found.index, xp.ndarray)
    assert isinstance(found.weight, xp.ndarray)
    found = replace(found, index=to_host(found.index))
    distances = point_distances(x) if kind == "points" else matrix_distances(K, "gram")
    assert recall(found, distances) == pytest.approx(found.recall, abs=0.08)
    host = nearest_neighbours(make(data), 8, 0)
    assert (found.index == host.index).mean() > 0.95


def test_one_leaf_is_exact():
    K = dense_oracles.random_spd(120)
    found = nearest_neighbours(gh.DenseOperator(K), 5, 0)
    assert (found.trees, found.recall) == (1, 1.0)
    assert recall(found, matrix_distances(K, "gram")) == 1.0


@pytest.mark.parametrize("name", ["gram", "angle"])
@pytest.mark.parametrize(
    "K", [np.zeros((400, 400)), np.ones((400, 400)), np.eye(400)], ids=["zero", "ones", "eye"]
)
def test_ties_everywhere(K: np.ndarray, name: str):
    """Whatever is found is as near as anything; zero columns vote for nobody."""
    found = nearest_neighbours(gh.DenseOperator(K), 6, 0, name)
    assert found.recall == 1.0
    assert recall(found, matrix_distances(K, name)) == 1.0
    wanted = np.take_along_axis(K, found.index, axis=1) ** 2
    np.testing.assert_allclose(found.weight, wanted, atol=1e-12)


def test_zero_columns_are_far_by_angle():
    rng = np.random.default_rng(0)
    zero = rng.random(500) < 0.3
    phi = np.where(zero, 0.0, rng.standard_normal((4, 500)))
    found = nearest_neighbours(gh.DenseOperator(phi.T @ phi), 5, 0, "angle")
    assert not zero[found.index[~zero]].any()
    assert not found.weight[zero].any()


def test_repeated_points():
    x = np.repeat(np.random.default_rng(0).random((40, 2)), 10, axis=0)
    assert recall(nearest_neighbours(gh.KernelOperator(x), 4, 0), point_distances(x)) == 1.0


@pytest.mark.parametrize("n", [2, 3])
def test_fewer_others_than_wanted(n: int):
    for op in (gh.KernelOperator(np.arange(float(n))), gh.DenseOperator(np.eye(n))):
        found = nearest_neighbours(op, 16, 0)
        assert found.index.shape == (n, n - 1)
        assert (found.index >= 0).all()


def test_float32():
    x = np.random.default_rng(0).random((800, 6)).astype(np.float32)
    found = nearest_neighbours(gh.KernelOperator(x), 8, 0)
    assert recall(found, point_distances(x.astype(np.float64))) > 0.7


def test_the_same_seed_gives_the_same_bits():
    op = gh.KernelOperator(np.random.default_rng(0).random((1200, 8)))
    first, again, other = (nearest_neighbours(op, 8, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.index, again.index)
    assert not np.array_equal(first.index, other.index)


def test_products_alone_are_refused():
    with pytest.raises(ArgumentError, match="need entries"):
        nearest_neighbours(products_only(np.eye(30)), 4, 0)


def test_the_host_reads_one_number_of_a_tree(stand_in: HostCupy):
    """However many levels it has: members, keys and lists stay where the points are."""
    others = set()
    for n in (600, 2400):  # 2 levels, and 4
        x = stand_in.cupy.asarray(np.random.default_rng(0).standard_normal((n, 6)))
        op = gh.KernelOperator(x)
        stand_in.counters.reset()
        found = nearest_neighbours(op, 8, 0)
        assert found.trees >= 2
        others.add(stand_in.counters.synchronizations - found.trees)
    assert others == {0}

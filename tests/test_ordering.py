"""Orderings: permutations, what they keep together, and which one `auto` takes."""

from itertools import pairwise
from typing import Any

import dense_oracles
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_hodlr as gh
from gpu_hodlr.batched.distances import angle_distance, gram_distance
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.ordering import ORDERINGS, build_tree
from gpu_hodlr.tree import ClusterTree, num_leaves


def tree_of(op: gh.Operator, ordering: str, leaf_size: int, seed: int = 0) -> ClusterTree:
    return build_tree(op, ordering, leaf_size, seed, 1e-6)[0]


def is_a_permutation(tree: ClusterTree, n: int) -> None:
    np.testing.assert_array_equal(np.sort(tree.permutation), np.arange(n))


@given(
    st.integers(2, 200),
    st.integers(1, 60),
    st.integers(1, 3),
    st.sampled_from(ORDERINGS),
    st.integers(0, 3),
)
def test_every_index_once(n: int, leaf_size: int, dimension: int, ordering: str, seed: int):
    points = np.random.default_rng(seed).random((n, dimension))
    tree = tree_of(gh.KernelOperator(points), ordering, leaf_size, seed)
    is_a_permutation(tree, n)
    assert len(tree.leaves) == num_leaves(n, leaf_size)
    if ordering != "natural":  # its leaves follow the matrix's runs, see test_tree.py
        assert tree.leaf_sizes.max() - tree.leaf_sizes.min() <= 1
    assert tree.leaf_sizes.max() <= leaf_size


@given(st.integers(2, 120), st.integers(1, 40), st.sampled_from(["gram", "angle", "auto"]))
@settings(max_examples=40)
def test_every_index_once_in_degenerate_matrices(n: int, leaf_size: int, ordering: str):
    """Zero, identical and opposite columns: every distance ties."""
    phi = np.random.default_rng(n).integers(-1, 2, size=(2, n)).astype(float)
    for matrix in (phi.T @ phi, np.zeros((n, n)), np.ones((n, n)), np.eye(n)):
        is_a_permutation(tree_of(gh.DenseOperator(matrix), ordering, leaf_size), n)


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_the_same_seed_gives_the_same_tree(ordering: str):
    op = gh.KernelOperator(np.random.default_rng(0).random((300, 4)))
    first, again = (tree_of(op, ordering, 20, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.leaves, again.leaves)
    if ordering in ("gram", "angle", "random"):
        assert not np.array_equal(first.leaves, tree_of(op, ordering, 20, seed=6).leaves)


def gram_of(phi: np.ndarray) -> gh.DenseOperator:
    return gh.DenseOperator(phi.T @ phi)


def with_zero_columns(n: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Phi (6, n) and which of its columns are zero."""
    rng = np.random.default_rng(seed)
    zero = rng.random(n) < share
    return np.where(zero, 0.0, rng.standard_normal((6, n))), zero


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("ordering", ["angle", "gram"])
def test_zero_columns_share_leaves(ordering: str, share: float):
    """At most one leaf has zero and other columns."""
    phi, zero = with_zero_columns(500, share)
    tree = tree_of(gram_of(phi), ordering, 16)
    of_leaf = np.where(tree.leaves >= 0, zero[tree.leaves], False).sum(axis=1)
    assert np.count_nonzero((of_leaf > 0) & (of_leaf < tree.leaf_sizes)) <= 1
    assert np.count_nonzero(of_leaf == tree.leaf_sizes) >= zero.sum() // 16 - 1


def test_zero_rows_of_a_network_share_leaves():
    """The same from the network's sketch instead of entries."""
    pytest.importorskip("torch")
    from network_cases import data, image_network, images

    inputs = images(6, n=20, border=1)
    op = gh.GGNOperator(
        image_network(36, 8, 3),
        "cross_entropy",
        inputs,
        data((36,), 3, "cross_entropy", n=20)[1],
    )
    zero = op.diagonal() == 0
    assert zero.mean() > 0.25
    tree = tree_of(op, "angle", 10)
    of_leaf = np.where(tree.leaves >= 0, zero[tree.leaves], False).sum(axis=1)
    assert np.count_nonzero((of_leaf > 0) & (of_leaf < tree.leaf_sizes)) <= 1


def test_distances():
    """Orthogonal columns and zero columns are as far as can be in angle; parallel ones near."""
    phi = np.array([[1.0, 0, 0], [0, 2, 0], [3, 0, 0], [-1, 0, 0], [0, 0, 0], [1, 1, 0]])
    inner = (phi @ phi.T)[None]
    norms = np.diagonal(inner[0])[None]
    angle = angle_distance(inner, norms, norms)[0]
    np.testing.assert_allclose(angle[0], [0, 1, 0, 0, 1, 0.5], atol=1e-15)
    np.testing.assert_array_equal(angle[4], 1)
    gram = gram_distance(inner, norms, norms)[0]
    np.testing.assert_allclose(gram, ((phi[:, None] - phi) ** 2).sum(axis=2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("ordering", ["angle", "gram"])
def test_two_orthogonal_groups_are_separated(ordering: str):
    """Columns scattered around two orthogonal directions, shuffled: every leaf is pure."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([0, 1], 32))
    phi = np.zeros((4, 64))
    phi[2 * group, np.arange(64)] = 1
    phi[2 * group + 1, np.arange(64)] = 0.05 * rng.standard_normal(64)
    tree = tree_of(gram_of(phi), ordering, 16)
    of_leaf = group[tree.leaves]
    assert (of_leaf == of_leaf[:, :1]).all()


@pytest.mark.parametrize("n", [64, 101])
def test_geometric_on_a_line_sorts(n: int):
    points = np.random.default_rng(n).permutation(n).astype(float)
    tree = tree_of(gh.KernelOperator(points), "geometric", 10)
    leaf_values = [points[leaf[leaf >= 0]] for leaf in tree.leaves]
    for left, right in pairwise(leaf_values):
        assert left.max() < right.min()


def test_geometric_cuts_the_widest_coordinate():
    points = np.random.default_rng(0).random((128, 3)) * [1.0, 10.0, 2.0]
    tree = tree_of(gh.KernelOperator(points), "geometric", 64)
    low, high = (points[leaf][:, 1] for leaf in tree.leaves)
    assert low.max() < high.min() or high.max() < low.min()


@pytest.mark.parametrize("ordering", ["gram", "angle"])
def test_metric_orderings_find_the_order_of_a_line(ordering: str):
    """Sibling leaves of a shuffled smooth kernel matrix are intervals, nearly."""
    position = np.random.default_rng(1).permutation(256)
    K = np.exp(-0.5 * ((position[:, None] - position) / 100.0) ** 2)
    tree = tree_of(gh.DenseOperator(K), ordering, 32)
    extent = np.ptp(position[tree.leaves], axis=1)
    assert np.median(extent) < 64  # 32 at best, about 250 in random order


def test_geometric_needs_points():
    with pytest.raises(ArgumentError, match="'geometric' needs points"):
        tree_of(gh.DenseOperator(np.eye(8)), "geometric", 4)


@pytest.mark.parametrize("ordering", ["gram", "angle"])
def test_metric_orderings_need_entries(ordering: str):
    op = gh.FunctionOperator(8, matmat=lambda v: v)
    with pytest.raises(ArgumentError, match="need entries"):
        tree_of(op, ordering, 4)


def test_unknown_ordering():
    with pytest.raises(ArgumentError, match=r"ordering must be one of natural, .*'sorted'"):
        tree_of(gh.DenseOperator(np.eye(8)), "sorted", 4)


# --- auto ------------------------------------------------------------------------------------


def auto(op: gh.Operator, **options: Any) -> gh.HSSMatrix:
    return gh.compress(op, ordering="auto", rtol=1e-4, **options)


def test_auto_is_geometric_where_there_are_points():
    op = gh.KernelOperator(np.random.default_rng(0).random((100, 2)))
    assert auto(op, leaf_size=20).report.ordering == "geometric"


def test_auto_is_natural_without_entries():
    a = dense_oracles.random_spd(64)
    op = gh.FunctionOperator(64, matmat=lambda v: a @ v)
    assert auto(op, leaf_size=16).report.ordering == "natural"


def test_auto_is_natural_for_one_leaf():
    assert auto(gh.DenseOperator(np.eye(16)), leaf_size=16).report.ordering == "natural"


def test_auto_keeps_an_order_that_is_good():
    K = dense_oracles.distance_matrix(400, lambda d: np.exp(-d / 50))
    assert auto(gh.DenseOperator(K), leaf_size=32).report.ordering == "natural"


@pytest.mark.parametrize("sampler", ["entries", "products+entries"])
def test_auto_improves_on_a_random_permutation(sampler: str):
    """It stores less than half of what the given order needs."""
    rng = np.random.default_rng(0)
    points = rng.random((600, 2))
    K = gh.DenseOperator(dense_oracles.kernel_matrix(points, "matern32", 0.5))
    chosen = auto(K, leaf_size=32, sampler=sampler)
    natural = gh.compress(K, ordering="natural", rtol=1e-4, leaf_size=32, sampler=sampler)
    assert chosen.report.ordering in ("gram", "angle")
    assert chosen.storage_fraction < 0.7 * natural.storage_fraction


def test_auto_is_natural_for_an_autoencoder():
    """The MSE matrix of a wide output layer is block diagonal, one block a unit."""
    torch = pytest.importorskip("torch")
    from network_cases import images

    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(64, 15), nn.Sigmoid(), nn.Linear(15, 64)).double()
    inputs = images(8, n=50, border=1)
    op = gh.GGNOperator(model, "mse", inputs, inputs)
    chosen = gh.compress(op, rtol=1e-2, leaf_size=64, ordering="auto")
    assert chosen.report.ordering == "natural"
    runs = op.runs()
    edges = set(np.cumsum(chosen.tree.leaf_sizes).tolist())
    assert edges <= {*runs.starts.tolist(), op.shape[0]}

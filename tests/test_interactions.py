"""Near and far pairs: every pair of indices exactly once, whatever the tree and the votes."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from hypothesis import given
from hypothesis import strategies as st

from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError, DtypeError
from gpu_hodlr.interactions import (
    InteractionLists,
    Neighbours,
    check_budget,
    interaction_lists,
    leaf_votes,
    near_leaves,
    partners,
)
from gpu_hodlr.tree import ClusterTree, balanced_offsets

DEPTHS = st.integers(0, 6)


@st.composite
def lists_of_any_pairs(draw: Any) -> InteractionLists:
    depth = draw(DEPTHS)
    leaf = st.integers(0, (1 << depth) - 1)
    pairs = draw(st.lists(st.tuples(leaf, leaf), max_size=3 << depth))
    return interaction_lists(depth, np.array(pairs, np.int64).reshape(-1, 2))


@given(lists_of_any_pairs())
def test_every_pair_of_leaves_is_covered_once(lists: InteractionLists):
    covered = np.eye(1 << lists.depth, dtype=int)
    for level, pairs in [(lists.depth, lists.near), *enumerate(lists.far)]:
        width = 1 << (lists.depth - level)
        for a, b in pairs:
            assert a < b
            rows, cols = (slice(t * width, (t + 1) * width) for t in (a, b))
            covered[rows, cols] += 1
            covered[cols, rows] += 1
    np.testing.assert_array_equal(covered, 1)


@given(lists_of_any_pairs())
def test_a_pair_of_nodes_is_near_if_leaves_below_are(lists: InteractionLists):
    near = np.eye(1 << lists.depth, dtype=bool)
    near[lists.near[:, 0], lists.near[:, 1]] = near[lists.near[:, 1], lists.near[:, 0]] = True
    for level, pairs in enumerate(lists.near_nodes):
        nodes, width = 1 << level, 1 << (lists.depth - level)
        wanted = near.reshape(nodes, width, nodes, width).any(axis=(1, 3))
        np.testing.assert_array_equal(pairs, np.argwhere(np.triu(wanted, 1)))
    assert all(not len(pairs) for pairs in lists.far[: lists.top])
    assert lists.top == lists.depth + 1 or len(lists.far[lists.top])


@given(DEPTHS)
def test_no_near_pair_gives_the_hss_structure(depth: int):
    lists = interaction_lists(depth, np.empty((0, 2), np.int64))
    assert not len(lists.near)
    assert lists.top == 1
    for level in range(1, depth + 1):
        np.testing.assert_array_equal(lists.far[level], np.arange(1 << level).reshape(-1, 2))


def test_all_pairs_near_leave_nothing_far():
    lists = interaction_lists(3, np.argwhere(np.ones((8, 8))))
    assert len(lists.near) == 28
    assert lists.top == 4
    assert not any(len(pairs) for pairs in lists.far)


def test_repeats_order_and_a_leaf_with_itself_do_not_matter():
    lists = interaction_lists(2, np.array([[3, 1], [1, 3], [2, 2], [0, 3], [1, 3]]))
    np.testing.assert_array_equal(lists.near, [[0, 3], [1, 3]])


@given(lists_of_any_pairs())
def test_partners(lists: InteractionLists):
    for t, row in enumerate(partners(lists.near, 1 << lists.depth)):
        mine = lists.near[(lists.near == t).any(axis=1)]
        wanted = np.sort(mine.sum(axis=1) - t)
        np.testing.assert_array_equal(row[row >= 0], wanted)
        assert (row[len(wanted) :] == -1).all()


# --- votes -----------------------------------------------------------------------------------


@given(st.integers(8, 90), st.integers(0, 3), st.integers(1, 5), st.floats(0, 1))
def test_votes_and_budget(n: int, depth: int, count: int, budget: float):
    rng = np.random.default_rng(n)
    offsets = balanced_offsets(n, 1 << depth)
    tree = ClusterTree.from_permutation(rng.permutation(n), offsets)
    index = rng.integers(-1, n, size=(n, count))
    weight = np.where(index >= 0, rng.integers(0, 4, size=index.shape), 0).astype(float)
    found = Neighbours(index, weight, 1.0, 1)
    leaf_of = np.searchsorted(offsets[1:], np.argsort(tree.permutation), side="right")
    wanted = np.zeros((1 << depth, 1 << depth))
    for i in range(n):
        for j, w in zip(index[i], weight[i], strict=True):
            a, b = sorted((leaf_of[i], leaf_of[j]))
            wanted[a, b] += w if a != b else 0
    pairs, votes = leaf_votes(tree, found)
    assert len(pairs) == np.count_nonzero(wanted)
    np.testing.assert_array_equal(votes, wanted[pairs[:, 0], pairs[:, 1]])
    assert (np.diff(votes) <= 0).all()
    near = near_leaves(tree, found, budget)
    np.testing.assert_array_equal(near, pairs[: len(near)])
    block_size = tree.leaves.shape[1] ** 2
    assert len(near) * block_size <= budget * n**2
    assert len(near) == len(pairs) or (len(near) + 1) * block_size > budget * n**2


@pytest.mark.parametrize("budget", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_budget_that_is_no_share(budget: float):
    with pytest.raises(ArgumentError, match="budget"):
        check_budget(budget)


@pytest.mark.parametrize("budget", ["3 %", None, 1j, True])
def test_a_budget_that_is_no_number(budget: Any):
    with pytest.raises(DtypeError, match="budget must be a real number"):
        check_budget(budget)


def test_a_budget_without_room_for_a_neighbour_says_what_would_do():
    with pytest.raises(ArgumentError, match=r"smallest useful budget of 64 leaves is 0\.0078"):
        check_budget(0.005, 64)
    assert check_budget(0.0079, 64) == 0.0079
    assert check_budget(0, 64) == 0
    assert check_budget(0.1, 1) == 0.1


def test_votes_where_the_neighbours_are(xp: ModuleType):
    """The same, and the same bits each time: sums have a fixed order."""
    rng = np.random.default_rng(0)
    tree = ClusterTree.from_permutation(rng.permutation(300), balanced_offsets(300, 16))
    index = rng.integers(-1, 300, size=(300, 12))
    weight = np.where(index >= 0, rng.random(index.shape), 0)
    want_pairs, want_votes = leaf_votes(tree, Neighbours(index, weight, 1.0, 1))
    found = Neighbours(xp.asarray(index), xp.asarray(weight), 1.0, 1)
    pairs, votes = leaf_votes(tree, found)
    assert isinstance(votes, xp.ndarray)
    np.testing.assert_array_equal(to_host(pairs), want_pairs)
    np.testing.assert_allclose(to_host(votes), want_votes, rtol=1e-13)
    budget = int(0.1 * 300**2 / tree.leaves.shape[1] ** 2)
    np.testing.assert_array_equal(near_leaves(tree, found, 0.1), want_pairs[:budget])


def test_votes_are_read_once(stand_in: HostCupy):
    """How many pairs there are, and which are near."""
    xp, rng = stand_in.cupy, np.random.default_rng(0)
    for leaves in (4, 32):
        tree = ClusterTree.from_permutation(rng.permutation(300), balanced_offsets(300, leaves))
        index = xp.asarray(rng.integers(300, size=(300, 5)))
        stand_in.counters.reset()
        near_leaves(tree, Neighbours(index, xp.ones(index.shape), 1.0, 1), 0.1)
        assert stand_in.counters.synchronizations == 2

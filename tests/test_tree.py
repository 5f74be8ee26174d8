"""Invariants of cluster trees and of their padding."""

from itertools import pairwise

import numpy as np
import pytest
from host_cupy import HostCupy
from hypothesis import example, given
from hypothesis import strategies as st

from gpu_hodlr.batched import splits
from gpu_hodlr.devices import to_host
from gpu_hodlr.operators.operator import Runs
from gpu_hodlr.ordering.bisection import bisect
from gpu_hodlr.ordering.natural import natural_tree
from gpu_hodlr.tree import (
    ClusterTree,
    balanced_offsets,
    num_leaves,
    pad_segments,
)

SIZES = st.integers(2, 3000)
LEAF_SIZES = st.integers(1, 300)


def holds_every_index_once(tree: ClusterTree, n: int) -> None:
    """Each of 0 .. n - 1 in one leaf, real indices before the padding."""
    assert tree.n == n
    np.testing.assert_array_equal(np.sort(tree.permutation), np.arange(n))
    real = tree.leaves >= 0
    np.testing.assert_array_equal(real, np.arange(real.shape[1]) < tree.leaf_sizes[:, None])
    assert tree.leaf_sizes.max() == tree.leaves.shape[1]
    assert tree.leaf_sizes.sum() == n


@given(SIZES, LEAF_SIZES)
@example(2, 1)
@example(256, 256)
@example(257, 256)
def test_number_of_leaves(n: int, leaf_size: int):
    """The smallest power of two that makes leaves small enough."""
    leaves = num_leaves(n, leaf_size)
    assert leaves & (leaves - 1) == 0
    assert n / leaves <= leaf_size
    assert leaves == 1 or n / (leaves / 2) > leaf_size


@given(SIZES, LEAF_SIZES)
@example(3, 1)
def test_balanced_tree(n: int, leaf_size: int):
    parts = num_leaves(n, leaf_size)
    permutation = np.random.default_rng(n).permutation(n)
    tree = ClusterTree.from_permutation(permutation, balanced_offsets(n, parts))
    holds_every_index_once(tree, n)
    np.testing.assert_array_equal(tree.permutation, permutation)
    assert len(tree.leaves) == parts == 1 << tree.depth
    assert tree.leaf_sizes.max() - tree.leaf_sizes.min() <= 1
    assert tree.leaf_sizes.max() <= leaf_size


@given(st.integers(1, 500), st.integers(0, 6))
def test_nodes_are_unions_of_their_children(n: int, depth: int):
    tree = ClusterTree.from_permutation(np.arange(n), balanced_offsets(n, 1 << depth))
    for level in range(depth):
        node, children = tree.nodes(level), tree.nodes(level + 1)
        assert len(node) == 1 << level
        for t in range(len(node)):
            together = np.concatenate([children[2 * t], children[2 * t + 1]])
            np.testing.assert_array_equal(np.sort(node[t]), np.sort(together))
    np.testing.assert_array_equal(tree.nodes(depth), tree.leaves)


@given(st.integers(1, 400), st.integers(0, 6), st.integers(0, 3))
def test_bisect_gives_a_permutation_for_any_keys(n: int, depth: int, kinds: int):
    """Few distinct keys (all ties when kinds is 0), also more leaves than indices."""
    rng = np.random.default_rng(n)
    order = bisect(n, 1 << depth, lambda t: rng.integers(kinds + 1, size=t.index.shape) * 1.0, np)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


@given(st.integers(2, 400), st.integers(0, 5))
def test_bisect_by_one_key_splits_at_medians(n: int, depth: int):
    """Leaf t holds the t-th slice of the sorted keys."""
    key = np.random.default_rng(n).permutation(n).astype(float)
    order = bisect(n, 1 << depth, lambda level: key[level.index], np)
    edges = balanced_offsets(n, 1 << depth)
    for start, stop in pairwise(edges):
        np.testing.assert_array_equal(np.sort(key[order[start:stop]]), np.arange(start, stop))


def test_pad_segments():
    padded = pad_segments(np.array([5, 6, 7, 8]), np.array([0, 3, 3, 4]))
    np.testing.assert_array_equal(padded, [[5, 6, 7], [-1, -1, -1], [8, -1, -1]])


# --- leaves aligned with runs ----------------------------------------------------------------

RUN_LENGTHS = st.lists(st.integers(1, 24), min_size=1, max_size=40)


def runs_of(lengths: list[int]) -> Runs:
    n = sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(int)
    return Runs(np.random.default_rng(n).permutation(n), starts)


def leaves_needed(lengths: list[int], size: int) -> int:
    """Leaves of at most `size`, filled in order; longer runs are cut in pieces of equal size."""
    leaves, room = 0, 0
    for length in lengths:
        pieces = -(-length // size)
        for p in range(pieces):
            piece = length * (p + 1) // pieces - length * p // pieces
            if piece > room:
                leaves, room = leaves + 1, size
            room -= piece
    return leaves


@given(RUN_LENGTHS, st.integers(0, 5))
@example([7] * 16, 4)
@example([1] * 3, 5)
@example([24, 1, 24], 1)
def test_natural_tree(lengths: list[int], depth: int):
    """In order, at most 25 % larger, and no short run cut wherever a packing exists."""
    runs, n, parts = runs_of(lengths), sum(lengths), 1 << depth
    tree = natural_tree(runs, parts)
    holds_every_index_once(tree, n)
    assert len(tree.leaves) == parts
    np.testing.assert_array_equal(tree.permutation, runs.permutation)
    smallest = -(-n // parts)
    largest = max(smallest, int(1.25 * smallest))
    m = tree.leaves.shape[1]
    assert m <= largest
    packings = [s for s in range(smallest, largest + 1) if leaves_needed(lengths, s) <= parts]
    if not packings:
        assert tree.leaf_sizes.max() - tree.leaf_sizes.min() <= 1
        return
    assert m <= packings[0]
    edges = set(np.cumsum(tree.leaf_sizes).tolist())
    for start, length in zip(runs.starts.tolist(), lengths, strict=True):
        inside = edges.intersection(range(start + 1, start + length))
        assert length > m or not inside


@pytest.mark.parametrize("per_leaf", [1, 2, 4])
def test_natural_leaves_hold_whole_units(per_leaf: int):
    """Equal units, a power of two of them: every leaf holds the same number of units."""
    tree = natural_tree(runs_of([7] * 32), 32 // per_leaf)
    np.testing.assert_array_equal(tree.leaf_sizes, 7 * per_leaf)


def test_long_runs_are_cut_equally():
    tree = natural_tree(runs_of([100, 100]), 8)
    np.testing.assert_array_equal(tree.leaf_sizes, 25)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(0, 4), st.integers(0, 3))
def test_joined_segments_are_the_values_again(sizes: list[int], before: int, padding: int):
    """Of segments that do not begin at 0, of empty ones, and of rows that are longer."""
    offsets = before + np.concatenate([[0], np.cumsum(sizes)])
    values = np.arange(offsets[-1]) * 7
    padded = splits.pad_segments(values, offsets, max(sizes) + padding)
    joined = np.empty(len(values) - before, np.int64)
    splits.join_segments(padded, offsets, joined)
    np.testing.assert_array_equal(joined, values[before:])


def test_bisect_is_not_waited_for(stand_in: HostCupy):
    """Keys that are no numbers, or infinite, come last, and all indices stay."""
    xp, n = stand_in.cupy, 1000
    key = np.random.default_rng(0).permutation(n).astype(np.float32)
    key[key >= n - 20] = [np.nan, np.inf] * 10
    device = xp.asarray(key)
    stand_in.counters.reset()
    order = bisect(n, 8, lambda level: device[level.index], xp)
    assert stand_in.counters.synchronizations == 0
    host = to_host(order)
    np.testing.assert_array_equal(np.sort(host), np.arange(n))
    assert not np.isfinite(key[host[-20:]]).any()
    np.testing.assert_array_equal(host, bisect(n, 8, lambda level: key[level.index], np))

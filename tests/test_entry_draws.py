"""Columns that entry samplers draw: ranked by distance, few of them, and no memory to speak of."""

from __future__ import annotations

import importlib
import tracemalloc
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from test_regions import DEPTH, LISTS, NOTHING, SEARCHED, TREE, far_field

import gpu_hodlr as gh
from gpu_hodlr.bases import FarField, Outside, Sibling
from gpu_hodlr.bases.cells import CellTree
from gpu_hodlr.bases.columns import TreeLevel
from gpu_hodlr.batched import draws
from gpu_hodlr.devices import to_host
from gpu_hodlr.distributed import ALONE
from gpu_hodlr.interactions import interaction_lists
from gpu_hodlr.tree import ClusterTree, balanced_offsets

entry_sampler = importlib.import_module("gpu_hodlr.bases.entry_sampler")
POINTS = np.random.default_rng(3).random((TREE.n, 2))


def matern(n: int, dimensions: int = 2, nugget: float = 0.1) -> gh.KernelOperator:
    points = np.random.default_rng(0).random((n, dimensions))
    return gh.KernelOperator(points, "matern32", 0.2, nugget=nugget)


@pytest.mark.parametrize("points", [None, POINTS], ids=["places", "points"])
@pytest.mark.parametrize("level", range(1, DEPTH + 1))
@pytest.mark.parametrize(
    "region", [Outside(TREE, ALONE, NOTHING), far_field(), Sibling(TREE, ALONE)],
    ids=lambda region: type(region).__name__,
)  # fmt: skip
def test_cells_are_the_columns_of_the_region_once_each(
    region: Outside | FarField | Sibling, level: int, points: np.ndarray | None
):
    columns = region.columns(TreeLevel.of(TREE, level))
    cells = CellTree(TREE, points)
    assert sorted(cells.permutation) == list(range(TREE.n))
    for leaf, edges in zip(TREE.leaves, TreeLevel.of(TREE, DEPTH).offsets, strict=False):
        held = cells.permutation[edges : edges + np.count_nonzero(leaf >= 0)]
        assert set(held) == set(leaf[leaf >= 0])
    ranked = cells.ranked(columns, slice(None))
    for row in range(len(columns.rows)):
        found = [
            np.arange(first, first + count)
            for first, count in zip(ranked.first[row], ranked.count[row], strict=True)
        ]
        found = np.concatenate(found)
        every = np.arange(TREE.n)
        assert sorted(found) == every[columns.holds(np.full(TREE.n, row), every)].tolist()


def test_near_cells_come_first_and_are_small():
    n = 4096
    points = np.random.default_rng(0).random((n, 1))
    order = np.argsort(points[:, 0])
    tree = ClusterTree.from_permutation(order, np.arange(0, n + 1, n // 32))
    cells = CellTree(tree, points)
    columns = Outside(tree, ALONE, NOTHING, points).columns(TreeLevel.of(tree, 5))
    ranked = cells.ranked(columns, slice(None))
    t = 11
    inside = points[tree.leaves[t], 0]
    at = points[cells.permutation, 0]
    real = ranked.count[t] > 0
    gaps = [
        max(at[i : i + c].min() - inside.max(), inside.min() - at[i : i + c].max(), 0.0)
        for i, c in zip(ranked.first[t][real], ranked.count[t][real], strict=True)
    ]
    rank = np.argsort(np.argsort(gaps))
    assert np.abs(rank - np.arange(len(rank))).mean() < 0.1 * len(rank)
    assert ranked.count[t][:8].max() <= 4
    again = cells.ranked(columns, slice(7, 15)).first[4]
    np.testing.assert_array_equal(again[:20], ranked.first[t][:20])


def test_draws_are_distinct_and_as_frequent_as_their_chances():
    columns = Outside(TREE, ALONE, NOTHING).columns(TreeLevel.of(TREE, 2))
    cells, count, runs = CellTree(TREE, POINTS), 12, 4000
    ranked = cells.ranked(columns, slice(None))
    chances = draws.chances(ranked.count, count)
    np.testing.assert_allclose((ranked.count * chances).sum(axis=1), count)
    assert (np.diff(np.where(ranked.count > 0, chances, 0.0), axis=1) <= 1e-12).all()
    assert chances[:, 0].max() == 1.0
    often, expected = np.zeros((4, TREE.n)), np.zeros((4, TREE.n))
    rng = np.random.default_rng(0)
    for _ in range(runs):
        position, chance = draws.systematic(
            ranked.first, ranked.count, chances, count, rng.random((4, 1))
        )
        assert (position >= 0).all()
        assert all(len(set(row)) == count for row in position)
        for t, row in enumerate(position):
            often[t, row] += 1 / runs
            expected[t, row] = chance[t]
    np.testing.assert_allclose(often, expected, atol=0.04)


def test_chances_are_found_again():
    """Of any column of the cells, drawn or not, and none of no column."""
    columns = far_field().columns(TreeLevel.of(TREE, 3))
    ranked = CellTree(TREE, POINTS).ranked(columns, slice(None))
    chances = np.random.default_rng(0).random(ranked.count.shape)
    want = np.full((8, TREE.n), np.nan)
    for row, firsts in enumerate(ranked.first):
        for first, count, chance in zip(firsts, ranked.count[row], chances[row], strict=True):
            want[row, first : first + count] = chance
    every = np.where(np.isnan(want), -1, np.arange(TREE.n))
    found = entry_sampler._chance_at(ranked, chances, every, TREE.n)
    np.testing.assert_array_equal(found, np.nan_to_num(want))


def test_near_columns_are_drawn_in_proportion_to_their_rank():
    count = np.array([[1, 1, 4, 0]])  # the last is padding
    near = np.array([1.0, 1 / 2, 1 / 4.5])  # a cell has the rank of its middle
    want = 0.9 * near / (1 + 1 / 2 + 4 / 4.5) + 0.1 / 6
    np.testing.assert_allclose(draws.chances(count, 1), [[*want, 0.0]])


def test_more_wanted_than_there_are_takes_all():
    columns = far_field().columns(TreeLevel.of(TREE, DEPTH))
    ranked = CellTree(TREE).ranked(columns, slice(None))
    chances = draws.chances(ranked.count, TREE.n)
    assert (chances[ranked.count > 0] == 1.0).all()
    start = np.full((1 << DEPTH, 1), 0.7)
    position, _ = draws.systematic(ranked.first, ranked.count, chances, TREE.n, start)
    np.testing.assert_array_equal((position >= 0).sum(axis=1), columns.count)


def test_samples_are_as_many_as_the_rank_needs():
    """At rtol 1e-7 they jumped to N / 2 for a rank of 169."""
    K = gh.compress(matern(3000), rtol=1e-7, leaf_size=64)
    assert K.report.error <= 1e-7
    assert K.report.num_samples <= 4 * max(map(max, K.ranks))


def of_two_kinds(n: int = 1024) -> gh.KernelOperator:
    """A line, whose nodes need few columns, and a square."""
    square = np.random.default_rng(0).random((n // 4, 2))
    line = np.stack([np.linspace(0, 1, n - len(square)), np.full(n - len(square), 2.0)], axis=1)
    return gh.KernelOperator(np.concatenate([line, square]), "matern32", 0.2, nugget=0.1)


def test_nodes_that_need_more_columns_get_them(monkeypatch: pytest.MonkeyPatch):
    """The others keep what they have, and a rank that it is good for."""
    growing: list[int] = []
    grow = entry_sampler.EntrySampler.grow

    def noted(self, nodes=None):
        growing.append(int(nodes.sum()))
        return grow(self, nodes)

    monkeypatch.setattr(entry_sampler.EntrySampler, "grow", noted)
    monkeypatch.setattr("gpu_hodlr.compression.options.FIRST_COLUMNS", 40)
    K = gh.compress(of_two_kinds(), rtol=1e-6, leaf_size=64)
    assert K.report.error <= 1e-6
    assert growing[0] == 4  # leaves of the square, of 16
    assert max(K.ranks[0]) > 35
    assert sum(rank <= 20 for rank in K.ranks[0]) == 12


def test_columns_of_the_next_level_follow_the_rank():
    """Three for each unit of it; more where it grew, but not all of a sudden."""
    tree = ClusterTree.from_permutation(np.arange(3000), np.array([0, 1500, 3000]))
    region = Outside(tree, ALONE, np.empty((2, 0, 0)))
    sampler = entry_sampler.EntrySampler(matern(3000).reader, region, 40, 1000, 0)
    wanted = [sampler._wanted(rank) for rank in (20, 20, 24, 48, 24, 1, 1000)]
    assert wanted == [60, 60, 86, 216, 72, 40, 1000]
    sampler.reset()
    assert sampler._wanted(24) == 72  # no level below
    sampler.widen()
    sampler.reset()
    assert sampler.num_samples == 80
    assert sampler._wanted(1000) == 2000


def test_errors_keep_to_rtol_whatever_the_depth():
    for n, leaf_size in ((1000, 256), (8000, 64)):
        K = gh.compress(matern(n), rtol=1e-3, leaf_size=leaf_size)
        assert K.report.passes == 1
        assert 1e-4 <= K.report.error <= 1.2e-3


def test_bits_do_not_depend_on_how_many_nodes_are_read_at_once(monkeypatch: pytest.MonkeyPatch):
    op = matern(1500)
    whole = gh.compress(op, rtol=1e-5, leaf_size=64)
    monkeypatch.setattr(entry_sampler, "working_bytes", lambda device: 1)
    monkeypatch.setattr(entry_sampler, "num_threads", lambda: 1)
    parts = gh.compress(op, rtol=1e-5, leaf_size=64)
    v = np.random.default_rng(0).standard_normal(1500)
    assert parts.ranks == whole.ranks
    assert np.array_equal(parts @ v, whole @ v)


def test_samples_of_a_level_are_never_all_there(monkeypatch: pytest.MonkeyPatch):
    n, peaks = 8000, []
    phase = entry_sampler.EntrySampler.samples

    def samples(self):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for sample in phase(self):
            yield sample
            del sample
        peaks.append((tracemalloc.get_traced_memory()[1] - before, self.num_samples))

    monkeypatch.setattr(entry_sampler.EntrySampler, "samples", samples)
    monkeypatch.setattr(entry_sampler, "working_bytes", lambda device: 1 << 20)
    tracemalloc.start()
    try:
        gh.compress(matern(n), rtol=1e-4, leaf_size=64)
    finally:
        tracemalloc.stop()
    peak, columns = peaks[0]
    whole = n * columns * 8
    assert peak <= 0.8 * whole + 3 * (1 << 20)  # R of the pivoted QR, and two parts of the samples


# --- where the matrix is ---------------------------------------------------------------------


def sampler_of(region: Any, xp: ModuleType = np, columns: int = 6) -> Any:
    op = gh.DenseOperator(xp.asarray(np.eye(region.tree.n)))
    return entry_sampler.EntrySampler(op.reader, region, columns, 3 * columns, 0)


def going_up(sampler: Any, tree: ClusterTree) -> Iterator[int]:
    """The levels of a sweep that keeps a row of every node."""
    for level in range(tree.depth, 0, -1):
        yield level
        if level > 1:
            row = tree.nodes(level).max(axis=1, keepdims=True)
            sampler.advance(SimpleNamespace(rank=1), row, ())


def searched_on(xp: ModuleType, tree: ClusterTree = TREE, lists: Any = LISTS) -> FarField:
    around = (np.arange(tree.n)[:, None] + [1, 2, -1]) % tree.n
    index = xp.asarray(SEARCHED if tree is TREE else around)
    return FarField(tree, ALONE, NOTHING, NOTHING, lists, index)


@pytest.mark.parametrize("points", [None, POINTS], ids=["places", "points"])
@pytest.mark.parametrize("kind", ["outside", "far field"])
def test_columns_are_drawn_where_the_matrix_is(
    stand_in: HostCupy, kind: str, points: np.ndarray | None
):
    """The same ones, of the same chances, on every level and when more are drawn."""
    pair = []
    for xp in (np, stand_in.cupy):
        region = Outside(TREE, ALONE, NOTHING, points) if kind == "outside" else searched_on(xp)
        pair.append(sampler_of(region, xp))
    host, device = pair
    assert isinstance(device._position, stand_in.cupy.ndarray)
    for level, _ in zip(going_up(host, TREE), going_up(device, TREE), strict=True):
        for _ in range(2):
            assert host._exact == device._exact
            np.testing.assert_array_equal(to_host(device._position), host._position)
            # Sums in another order: chances differ by rounding, and columns by none of it.
            np.testing.assert_allclose(to_host(device._expected), host._expected, rtol=1e-13)
            if level == DEPTH:
                assert host.grow()
                assert device.grow()


@pytest.mark.parametrize("leaves", [8, 64])
def test_the_host_reads_a_level_once(stand_in: HostCupy, leaves: int):
    """How many pairs of neighbours are left, of the far field; else nothing at all."""
    n, xp = 20 * leaves, stand_in.cupy
    tree = ClusterTree.from_permutation(np.arange(n), balanced_offsets(n, leaves))
    near = np.stack([np.arange(leaves - 1), np.arange(1, leaves)], axis=1)
    lists = interaction_lists(tree.depth, near)
    for region, reads in ((Outside(tree, ALONE, NOTHING), 0), (searched_on(xp, tree, lists), 1)):
        sampler = sampler_of(region, xp)
        stand_in.counters.reset()
        sampler.begin(tree.depth)
        before, seen = 0, []
        for _ in going_up(sampler, tree):
            seen.append(stand_in.counters.synchronizations - before)
            before = stand_in.counters.synchronizations
            sampler._draw(4)
            assert stand_in.counters.synchronizations <= before + reads
            before = stand_in.counters.synchronizations
        assert len(seen) == tree.depth
        assert max(seen) <= reads


def test_neighbours_of_children_are_enough_for_their_parents():
    """What is next to a node is found among what is next to its children, and is not in it."""
    region = searched_on(np)
    sampler = sampler_of(region)
    for level in going_up(sampler, TREE):
        fresh = sampler_of(region)
        fresh.begin(level)
        keys = fresh._next_keys()
        np.testing.assert_array_equal(sampler._next_keys(), keys)
        columns = region.columns(TreeLevel.of(TREE, level))
        place = np.argsort(sampler._permutation)
        row = columns.nodes.owner(place)
        want = set()
        for i, beside in enumerate(SEARCHED):
            for j in place[beside[beside >= 0]]:
                if columns.holds(row[i : i + 1], j[None])[0]:
                    want.add(int(row[i] * TREE.n + j))
        assert keys.tolist() == sorted(want)

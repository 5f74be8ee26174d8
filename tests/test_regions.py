"""Regions: which columns a block row is sampled in; and that one of a test's own is enough."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.bases import (
    EntrySampler,
    FarField,
    Outside,
    ProductSampler,
    Region,
    Sibling,
    bases_of_level,
)
from gpu_hodlr.bases.columns import Columns, TreeLevel
from gpu_hodlr.bases.samplers import Sample, regression_inflation
from gpu_hodlr.bases.sweep import choose_rank
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.interactions import interaction_lists
from gpu_hodlr.operators import SketchColumns
from gpu_hodlr.structures import Level
from gpu_hodlr.tree import ClusterTree

DEPTH = 4


def uneven_tree(seed: int = 0) -> ClusterTree:
    """16 leaves of 0 to 9 indices in random order."""
    sizes = np.random.default_rng(seed).integers(0, 10, 1 << DEPTH)
    n = int(sizes.sum())
    order = np.random.default_rng(seed + 1).permutation(n)
    return ClusterTree.from_permutation(order, np.concatenate([[0], np.cumsum(sizes)]))


TREE = uneven_tree()
NEAR = np.array([[0, 1], [0, 2], [1, 2], [3, 9], [5, 6], [6, 7], [9, 10], [9, 11], [14, 15]])
LISTS = interaction_lists(DEPTH, NEAR)
NOTHING = np.empty((1 << DEPTH, 0, 0))
SEARCHED = np.random.default_rng(2).integers(-1, TREE.n, (TREE.n, 3))


def far_field() -> FarField:
    return FarField(TREE, ALONE, NOTHING, NOTHING, LISTS, SEARCHED)


def wanted(region: Region, level: int, row: int) -> set[int]:
    """The indices of R(t), by what the docstrings say."""
    nodes = [set(node[node >= 0].tolist()) for node in TREE.nodes(level)]
    if isinstance(region, Sibling):
        return nodes[2 * row + 1]
    taken = {row}
    if isinstance(region, FarField):
        for pair in LISTS.near_nodes[level]:
            taken |= set(pair.tolist()) if row in pair else set()
    return set().union(*(node for t, node in enumerate(nodes) if t not in taken))


@pytest.mark.parametrize("level", range(1, DEPTH + 1))
@pytest.mark.parametrize(
    "region", [Outside(TREE, ALONE, NOTHING), far_field(), Sibling(TREE, ALONE)],
    ids=lambda region: type(region).__name__,
)  # fmt: skip
def test_columns_are_those_of_the_region(region: Region, level: int):
    columns = region.columns(TreeLevel.of(TREE, level))
    order, every = TREE.permutation, np.arange(TREE.n)
    assert len(columns.rows) == 1 << region.dealt(level)[1]
    np.testing.assert_array_equal(columns.row_of(columns.rows), np.arange(len(columns.rows)))
    positions = columns.positions(slice(None), every)
    for row in range(len(columns.rows)):
        those = wanted(region, level, row)
        assert columns.count[row] == len(those)
        found = positions[row, : len(those)]
        assert set(order[found].tolist()) == those
        held = columns.holds(np.full(TREE.n, row), every)
        assert set(order[held].tolist()) == those
    part = slice(len(columns.rows) // 2, None)
    np.testing.assert_array_equal(columns.positions(part, every), positions[part])


def test_neighbours_are_those_found_before():
    index = TREE.permutation[5:20]
    np.testing.assert_array_equal(far_field().neighbours(index), SEARCHED[index])
    assert Outside(TREE, ALONE, NOTHING).neighbours(index) is None


# --- products with the columns of a region ---------------------------------------------------

EXACT = toeplitz(TREE.n)
OMEGA = np.random.default_rng(3).standard_normal((TREE.n, 4))


def block(rows: Any, columns: Any) -> Any:
    """Of the matrix, (..., m, k), 0 on padding."""
    i, j = rows[..., :, None], columns[..., None, :]
    return np.where((i >= 0) & (j >= 0), EXACT[i, j], 0.0)


def with_blocks(kind: str) -> Outside | FarField:
    D = block(TREE.leaves, TREE.leaves)
    if kind == "outside":
        return Outside(TREE, ALONE, D)
    near = block(TREE.leaves[LISTS.near[:, 0]], TREE.leaves[LISTS.near[:, 1]])
    return FarField(TREE, ALONE, D, near, LISTS, SEARCHED)


def rows_of(level: int) -> Any:
    return TREE.leaves.reshape(1 << level, -1)


def of_rows(x: Any, level: int) -> Any:
    """The rows of x by nodes, 0 on padding."""
    rows = rows_of(level)
    return np.where(rows[..., None] >= 0, x[rows], 0.0)


def products(region: Region, level: int) -> Any:
    """K(t, R(t)) Omega of every node, by what R(t) is."""
    every = np.zeros((len(rows_of(level)), TREE.n, OMEGA.shape[1]))
    for t, x in enumerate(every):
        columns = sorted(wanted(region, level, t))
        x[:] = EXACT[:, columns] @ OMEGA[columns]
    return np.stack([of_rows(x, level)[t] for t, x in enumerate(every)])


@pytest.mark.parametrize("kind", ["outside", "far field"])
def test_samples_are_products_with_the_region_and_go_up(kind: str):
    """With all rows as skeletons, whose couplings are blocks of the matrix, to rounding."""
    region, y = with_blocks(kind), EXACT @ OMEGA
    S, energy, omega = region.samples(DEPTH, OMEGA, y)
    np.testing.assert_array_equal(omega, of_rows(OMEGA, DEPTH))
    np.testing.assert_allclose(energy, (of_rows(y, DEPTH) ** 2).sum(axis=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(S, products(region, DEPTH), rtol=0, atol=1e-12)
    for level in range(DEPTH, region.top, -1):
        rows, pairs = rows_of(level), region.pairs(level)
        B = block(rows[pairs[:, 0]], rows[pairs[:, 1]])
        [partners] = region.coupled(level, of_rows(OMEGA, level))
        S = region.lifted(S, B, partners, level)
        np.testing.assert_allclose(S, products(region, level - 1), rtol=0, atol=1e-12)
    assert level == region.top + 1 == (2 if kind == "outside" else 3)


@pytest.mark.parametrize("kind", ["outside", "far field"])
def test_samples_of_products_go_up_with_any_bases(kind: str):
    """S_c on the skeletons less B_cb U_b^T Omega_b; so do columns that are drawn above."""
    region, nodes, r = with_blocks(kind), 1 << DEPTH, 3
    source = SketchColumns(gh.DenseOperator(EXACT), 6, 0).to_rows(ALONE)
    sampler = ProductSampler(source, region, 12)
    rng, rows = np.random.default_rng(4), TREE.leaves.shape[1]
    order = rng.permuted(np.tile(np.arange(rows), (nodes, 1)), axis=1)
    T = rng.standard_normal((nodes, rows - r, r))
    pairs = region.pairs(DEPTH)
    B = rng.standard_normal((len(pairs), r, r))
    U = np.zeros((nodes, rows, r))
    basis = np.concatenate([np.broadcast_to(np.eye(r), (nodes, r, r)), T], axis=1)
    np.put_along_axis(U, order[:, :, None], basis, axis=1)
    kept, needed = sampler.carried(order, T)
    brought = region.coupled(DEPTH, *needed)
    sampler.advance(Level(order, T, B, (r,) * nodes), order, [*kept, *brought])
    for columns in (6, 12):
        S, energy, omega = region.samples(DEPTH, source.omega, source.y)
        S = np.take_along_axis(S, order[:, :r, None], axis=1)
        w = U.swapaxes(1, 2) @ omega
        for (a, b), coupling in zip(pairs, B, strict=True):
            S[a] -= coupling @ w[b]
            S[b] -= coupling.T @ w[a]
        [sample] = sampler.samples()
        assert sampler.num_samples == columns
        want = S.reshape(nodes // 2, 2 * r, columns)
        np.testing.assert_allclose(sample.S, want, rtol=0, atol=1e-12)
        noise = batched.squared_rounding(energy[0::2] + energy[1::2], S.dtype)
        np.testing.assert_allclose(sample.noise, noise, rtol=1e-12)
        assert sampler.grow() == (columns == 6)
    every = np.tile(np.arange(2 * r), (nodes // 2, 1))
    assert sampler.check(every, np.zeros((nodes // 2, 0, 2 * r))) is None
    [up] = sampler.carried(every, np.zeros((nodes // 2, 0, 2 * r)))[1]
    np.testing.assert_allclose(up, w.reshape(nodes // 2, 2 * r, columns), rtol=0, atol=1e-12)


def test_a_node_near_to_all_others_has_no_sample():
    """Not even what rounding leaves."""
    leaf = 9
    near = np.array([[leaf, t] for t in range(1 << DEPTH) if t != leaf])
    lists = interaction_lists(DEPTH, np.concatenate([near, [[0, 1]]]))
    blocks = block(TREE.leaves[lists.near[:, 0]], TREE.leaves[lists.near[:, 1]])
    region = FarField(TREE, ALONE, block(TREE.leaves, TREE.leaves), blocks, lists, SEARCHED)
    S = region.samples(DEPTH, OMEGA, EXACT @ OMEGA)[0]
    sizes = (TREE.leaves >= 0).sum(axis=1)
    assert sizes[leaf] > 1
    np.testing.assert_array_equal(S.any(axis=(1, 2)), (np.arange(1 << DEPTH) != leaf) & (sizes > 0))


@pytest.mark.parametrize("level", range(1, DEPTH + 1))
def test_siblings_are_peeled(level: int):
    """Vectors are 0 on even nodes, and what the levels above contribute is taken off."""
    node = np.argsort(TREE.permutation)  # the place of every index, then its node
    node = np.searchsorted(np.cumsum(TREE.leaf_sizes), node, side="right") >> (DEPTH - level)
    apart = (node[:, None] >> 1) != (node >> 1)
    region = Sibling(TREE, ALONE, above=lambda v: of_rows(np.where(apart, EXACT, 0) @ v, DEPTH))
    where = region.where(level, np.float64, "cpu")
    np.testing.assert_array_equal(where[:, 0], node % 2)
    v = where * OMEGA
    S, energy, _ = region.samples(level, v, EXACT @ v)
    even = of_rows(EXACT @ v, level)[0::2]
    np.testing.assert_allclose(energy, (even**2).sum(axis=(1, 2)), rtol=1e-12)
    want = np.where(~apart & (node[:, None] != node), EXACT, 0) @ v
    np.testing.assert_allclose(S, of_rows(want, level)[0::2], rtol=0, atol=1e-12)


# --- a region of this test's own -------------------------------------------------------------


def beyond(tree: ClusterTree, index: Any) -> Any:
    """The indices 31 places on in the tree."""
    place = np.argsort(tree.permutation)
    return tree.permutation[(place[index] + 31) % tree.n]


@dataclass(frozen=True)
class After:
    """R(t) = the columns of all nodes after t, and the products with all others known."""

    tree: ClusterTree
    exact: Any
    owners: Ownership = ALONE
    points: None = None
    stream: ClassVar[int] = 0x7E57

    @property
    def first(self) -> int:
        return self.tree.depth

    def dealt(self, level: int) -> tuple[Ownership, int]:
        return self.owners, level

    def columns(self, nodes: TreeLevel) -> Columns:
        every = np.arange(len(nodes.sizes))
        run = np.stack([nodes.offsets[1:], np.full(len(every), self.tree.n)], axis=1)
        return Columns(nodes, every, run, np.empty((len(every), 0), np.int64))

    def neighbours(self, index: Any) -> Any:
        """Far away ones, which nothing else would often draw."""
        return beyond(self.tree, index)[:, None]

    def part(self, level: int, t: int) -> tuple[Any, Any]:
        """The rows of a node and the columns of its R(t), indices."""
        nodes = self.tree.nodes(level)
        after = nodes[t + 1 :].ravel()
        return nodes[t], after[after >= 0]

    def samples(self, level: int, omega: Any, y: Any) -> tuple[Any, Any, Any]:
        nodes = self.tree.nodes(level)
        S = np.zeros((*nodes.shape, omega.shape[1]))
        for t in range(len(nodes)):
            rows, after = self.part(level, t)
            others = np.setdiff1d(np.arange(self.tree.n), after)
            real = rows >= 0
            S[t, real] = y[rows[real]] - self.exact[np.ix_(rows[real], others)] @ omega[others]
        return S, (S**2).sum(axis=(1, 2)), S[:, :0]


def new_region(n: int = 160) -> tuple[After, gh.DenseOperator]:
    exact = toeplitz(n)
    order = np.random.default_rng(5).permutation(n)
    exact = exact[np.ix_(order, order)]
    tree = ClusterTree.from_permutation(np.argsort(order), np.arange(0, n + 1, n // 16))
    return After(tree, exact), gh.DenseOperator(exact)


class Asked:
    """A reader that notes the columns that are asked for."""

    def __init__(self, op: gh.Operator) -> None:
        self._reader, self.columns = op.reader, []
        self.device, self.dtype = op.device, op.dtype

    def blocks(self, rows: Any, columns: Any) -> Any:
        self.columns.append(columns)
        return self._reader.blocks(rows, columns)


def test_a_new_region_is_enough_for_a_new_entry_sampler():
    region, op = new_region()
    seen = Asked(op)
    sampler = EntrySampler(seen, region, 18, 36, 0)
    for level in (DEPTH, DEPTH - 1):
        sampler.begin(level)
        list(sampler.samples())
        for t, asked in enumerate(seen.columns[-1]):
            after = set(region.part(level, t)[1].tolist())
            assert set(asked[asked >= 0].tolist()) <= after
        # Node 3 has its neighbours 31 on among a third of its columns.
        rows = region.tree.nodes(level)[3]
        beside = beyond(region.tree, rows)
        assert np.isin(seen.columns[-1][3, :6], beside).all()
    assert sampler.grow()
    assert sampler.num_samples == 36
    assert not sampler.grow()


def test_its_columns_are_drawn_as_often_as_expected():
    """Neighbours too, which are drawn in two ways."""
    region, op = new_region()
    sampler = EntrySampler(op.reader, region, 12, 12, 0)
    often, expected = np.zeros((2, 16, 160))
    row, runs = np.arange(16)[:, None], 1000
    for _ in range(runs):
        position, each = sampler._draw(12)
        drawn = np.broadcast_to(row, position.shape)[position >= 0], position[position >= 0]
        np.add.at(often, drawn, 1 / runs)
        expected[drawn] = each[position >= 0]
    np.testing.assert_allclose(often, expected, atol=0.08)
    # Node 3 has 10 neighbours, of which a third of 12 draws take 4.
    assert expected[3, 61:71].min() >= 0.4


def test_its_columns_are_weighted_so_that_squares_are_those_of_the_block():
    region, op = new_region()
    total = np.zeros((16, 10, 10))
    runs = 300
    for seed in range(runs):
        S = next(EntrySampler(op.reader, region, 12, 12, seed).samples()).S
        total += S @ S.swapaxes(1, 2)
    for t in range(15):
        rows, after = region.part(DEPTH, t)
        block = region.exact[np.ix_(rows, after)]
        want = block @ block.T
        got = total[t] / runs
        assert np.linalg.norm(got - want) <= 0.1 * np.linalg.norm(want)
    assert not total[15].any()  # the last node has nothing after it


@pytest.mark.parametrize("start", [40, 5], ids=["enough columns", "too few at first"])
@pytest.mark.parametrize("kind", ["entries", "products"])
def test_its_bases_hold_its_blocks(kind: str, start: int):
    region, op = new_region()
    if kind == "entries":
        sampler: Any = EntrySampler(op.reader, region, start, 120, 0)
    else:
        sampler = ProductSampler(SketchColumns(op, start, 0).to_rows(ALONE), region, 120)
        assert sampler.grow()
        assert sampler.num_samples == 2 * start
    rows = region.tree.leaves
    allowed = 1e-6
    (order, T, _), error = bases_of_level(sampler, rows < 0, allowed, 10)
    assert error <= allowed
    r, missed = T.shape[2], 0.0
    assert 0 < r < 10
    for t in range(16):
        index, after = region.part(DEPTH, t)
        block = region.exact[np.ix_(index[order[t]], after)]
        missed += ((block[r:] - T[t] @ block[:r]) ** 2).sum()
    assert 0 < missed <= 4 * allowed


# --- the rank of a level ---------------------------------------------------------------------


def sample_of(rows: int, columns: int) -> Sample:
    """One that says nothing but its size."""
    S = np.zeros((1, rows, columns))
    return Sample(S, regression_inflation(columns, 1.0), np.zeros(1))


def test_a_sample_of_whole_blocks_needs_no_estimate():
    """Where all rows are kept nothing is left, though few columns say nothing of an error."""
    tail = np.array([[9.0, 4.0, 1.0, 0.0]] * 2)
    assert choose_rank(sample_of(3, 3), tail, 1e-6, 5) == (3, 0.0, True)
    rank, error, trusted = choose_rank(sample_of(4, 3), tail, 1e-6, 5)
    assert (rank, error, trusted) == (3, np.inf, False)  # a fourth row is not there


def test_a_cap_ends_a_levels_growth():
    """No more columns would help: the rank is the largest that may be, and its error is told."""
    tail = np.array([[9.0, 4.0, 1.0]] * 2)
    sample = sample_of(8, 40)
    rank, error, trusted = choose_rank(sample, tail, 1e-6, 2)
    assert (rank, trusted) == (2, True)
    assert error == pytest.approx(39 / (38 * 37))
    assert not choose_rank(sample, tail, 1e-6, 3)[2]


def test_few_columns_are_not_trusted_though_their_estimate_is_good():
    """The rank seen to do is then higher than the one more columns show: each level pays for it."""
    sample = sample_of(30, 20)
    tail = np.array([np.where(np.arange(21) < 9, 1.0, 1e-5)] * 2)
    rank, error, trusted = choose_rank(sample, tail, 1e-6, 30)  # 1e-5 * 19 / (11 * 10) > 1e-6
    assert not trusted
    rank, error, trusted = choose_rank(sample, tail, 1e-5, 30)
    assert (rank, trusted) == (9, False)
    assert error == pytest.approx(1e-5 * 19 / (11 * 10))
    assert choose_rank(sample_of(30, 24), tail[:, :20], 1e-5, 30)[::2] == (9, True)
    exact = np.where(np.arange(21) < 9, 1.0, 0.0)
    assert choose_rank(sample, np.stack([exact, exact + 1e-8]), 1e-5, 30)[::2] == (9, True)


def test_columns_of_products_grow_to_the_limit():
    region, op = new_region()
    sampler = ProductSampler(SketchColumns(op, 10, 0).to_rows(ALONE), region, 21)
    for columns in (20, 21):
        assert sampler.grow()
        assert sampler.num_samples == columns
    assert not sampler.grow()
    once = ProductSampler(SketchColumns(op, 21, 0).to_rows(ALONE), region, 21)
    for grown, drawn in zip(sampler.samples(), once.samples(), strict=True):
        np.testing.assert_allclose(grown.S, drawn.S, rtol=0, atol=1e-12)
        np.testing.assert_allclose(grown.noise, drawn.noise, rtol=1e-10, atol=1e-40)


def test_an_error_seen_on_fresh_columns_is_told():
    """The estimate of the samples times what fresh columns showed more."""
    region, op = new_region()
    missed: list[float] = []

    class Missing(ProductSampler):
        def check(self, order: Any, T: Any) -> np.ndarray | None:
            return np.full(len(T), missed.pop() / len(T)) if missed else None

    def bases(allowed: float) -> tuple[int, float]:
        sampler = Missing(SketchColumns(op, 60, 0).to_rows(ALONE), region, 60)
        (_, T, _), error = bases_of_level(sampler, region.tree.leaves < 0, allowed, 10)
        return T.shape[2], error

    allowed = 1e-4
    _, error = bases(allowed)
    scale = 2.5 * allowed / max(error, 0.1 * allowed)
    assert 1 < scale < 30
    rank, unscaled = bases(allowed / scale)
    missed.append(2.5 * allowed)
    assert bases(allowed) == (rank, pytest.approx(scale * unscaled))


def test_padding_allows_no_error(monkeypatch: pytest.MonkeyPatch):
    """Leaves of unequal size have more rows, with padding, than there are indices."""
    sweep, seen = importlib.import_module("gpu_hodlr.bases.sweep"), []
    bases = sweep.bases_of_level

    def noted(sampler: Any, padding: Any, allowed: float, *options: Any) -> Any:
        seen.append(allowed)
        return bases(sampler, padding, allowed, *options)

    monkeypatch.setattr(sweep, "bases_of_level", noted)
    op = gh.DenseOperator(toeplitz(TREE.n))
    region = Outside(TREE, ALONE, NOTHING)
    sampler = EntrySampler(op.reader, region, 20, 200, 0)
    sweep.sweep_levels(op, region, sampler, 1e-3, 50)
    assert TREE.leaves.size > 1.5 * TREE.n
    assert len(seen) == DEPTH
    assert max(seen) == seen[0] == pytest.approx(1e-6 / DEPTH)

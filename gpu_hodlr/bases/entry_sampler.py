"""Samples made of columns of the matrix itself, for matrices whose products are expensive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.bases.cells import CellTree, Ranked
from gpu_hodlr.bases.columns import Columns, TreeLevel
from gpu_hodlr.bases.regions import Region
from gpu_hodlr.bases.samplers import Carried, Sample, regression_inflation
from gpu_hodlr.batched.threads import num_threads
from gpu_hodlr.devices import (
    Array,
    HostArray,
    HostIndex,
    namespace,
    to_host,
    working_bytes,
)
from gpu_hodlr.operators import BlockReader
from gpu_hodlr.structures import Level

ENTRY_LIMIT = 3  # columns of the matrix may be so many times as many as Gaussian ones
_CHECKED, _CHECKED_TOGETHER = 64, 1024  # fresh columns a basis, and a level, is checked on
_DECAY = 1.0  # the k-th nearest column is drawn in proportion to 1 / k,
_ANYWHERE = 0.1  # but for this share of the draws, for which all are the same
_EACH = 3.0  # columns for each unit of rank that a level begins with,
_GROWTH = 1.5  # times this at most, where ranks grow
_RANKED = 256  # block rows whose columns are ranked at once


class EntrySampler:
    """S_t = K(t, columns of R(t)), near t many of them, far from it few.

    A rough kernel needs the very columns along a node's border, a smooth one some of everywhere.
    Columns are ranked by their distance from t (`CellTree`), the k-th is drawn with probability
    p_k, the least of 1 and a multiple of 0.9 / k + 0.1 / their number, which add up to the
    columns wanted: systematic sampling in that order (Madow, Ann. Math. Statist. 20 (1949)), so
    that none is drawn twice. Where the region has neighbours, a third are drawn of them. Column j
    is weighted by 1 / sqrt(e_j), e_j the number of times it is expected in the draws together, so
    that E[S S^T] = K(t, R(t)) K(R(t), t) (balance heuristic: Veach and Guibas, SIGGRAPH 95). Where
    all columns of R(t) are no more than wanted, S has them all.

    Draws belong to nodes: a rank makes those of its own, the same on any number of ranks.

    Args:
        reader: of the matrix's entries.
        region: what R(t) is.
        start: columns at first.
        limit: columns at most.
        seed: of the draws.
    """

    rows_stand_for_all: ClassVar[bool] = True
    together: ClassVar[bool] = False

    def __init__(
        self, reader: BlockReader, region: Region, start: int, limit: int, seed: int
    ) -> None:
        self._reader, self._region, self._seed = reader, region, seed
        self._start, self._limit = min(start, limit), limit
        self._cells = CellTree(region.tree, region.points)
        self._n, self._permutation = region.tree.n, self._cells.permutation
        self._edges, self._edges_above = self._neighbour_edges()
        self._keys: dict[int, HostIndex] = {}
        self._sampled: HostIndex | None = None
        self._position: HostIndex
        self._expected: HostArray
        self.reset()

    @property
    def num_samples(self) -> int:
        """See `LevelSampler`."""
        return int(self._position.shape[1])

    @property
    def sampled(self) -> HostIndex | None:
        """See `LevelSampler`."""
        return self._sampled

    def reset(self) -> None:
        """See `Sampler`."""
        self._bits = np.random.PCG64((self._seed, self._region.stream))
        self._rng = np.random.Generator(self._bits)
        self._rank = 0  # of the level below
        self.begin(self._region.first)

    def begin(self, level: int) -> None:
        """Go to a level, with all rows of its nodes."""
        mine = self._go_to(level)
        self._choose(self._region.tree.nodes(level)[mine], self._start)

    def widen(self) -> None:
        """See `Sampler`: entries that few columns hold may not have been drawn."""
        self._start, self._limit = 2 * self._start, 2 * self._limit

    def samples(self) -> Iterator[Sample]:
        """See `LevelSampler`."""
        s = self.num_samples
        inflation = np.ones(s + 1) if self._exact else regression_inflation(s, float(s))
        rows = self._rows if self._sampled is None else self._rows[self._sampled]
        for _, S in self._read(rows, self._position, self._expected):
            noise = batched.squared_rounding(batched.squared_norms(S), S.dtype)
            yield Sample(S, inflation, noise)

    def check(self, order: Array, T: Array) -> HostArray | None:
        """See `LevelSampler`: heavy columns may hide in a regression, but not from fresh ones."""
        if self._exact:
            return None
        r = T.shape[2]
        squares = np.zeros(len(T))
        count = max(_CHECKED, _CHECKED_TOGETHER // self._num_rows)
        for nodes, fresh in self._read(self._rows, *self._draw(count)):
            fresh = batched.permute_rows(fresh, order[nodes])
            missed = batched.matmul(T[nodes], fresh[:, :r], subtract_from=fresh[:, r:])
            squares[nodes] = to_host(batched.squared_norms(missed))
        return squares

    def grow(self, nodes: HostArray | None = None) -> bool:
        """See `LevelSampler`: twice the columns, drawn anew."""
        s = self.num_samples
        if self._exact or s >= self._limit:
            return False
        self._choose(self._rows, min(2 * s, self._limit))
        if nodes is not None and not nodes.all():
            [self._sampled] = np.nonzero(nodes)
            self._position = self._position[self._sampled]
            self._expected = self._expected[self._sampled]
        return True

    def carried(self, order: Array, T: Array) -> Carried:
        """See `Sampler`: entries are read anew on every level."""
        return (), ()

    def advance(self, level: Level, skeleton: Array, carried: Sequence[Array]) -> None:
        """See `Sampler`."""
        count = self._wanted(level.rank)
        self._go_to(self._nodes.level - 1)
        self._choose(skeleton.reshape(len(skeleton) // 2, 2 * level.rank), count)

    def _wanted(self, rank: int) -> int:
        """Columns for the parents of a level of such a rank.

        The rank is taken to grow as it did before.
        """
        growth = min(max(rank / max(self._rank, 1), 1.0), _GROWTH) if self._rank else 1.0
        self._rank = rank
        return min(max(int(_EACH * growth * rank), self._start), self._limit)

    def _go_to(self, level: int) -> HostIndex:
        """To a level; the nodes whose rows this rank samples."""
        owners, dealt = self._region.dealt(level)
        self._mine, self._num_rows = owners.mine(dealt), 1 << dealt
        self._nodes = TreeLevel.of(self._region.tree, level)
        self._columns: Columns = self._region.columns(self._nodes)
        self._ranked: list[tuple[slice, Ranked]] = []
        return self._columns.rows[self._mine]

    def _choose(self, rows: Array, count: int) -> None:
        """Draw `count` columns for this rank's block rows."""
        self._rows = rows
        self._sampled = None
        most = int(self._columns.count.max())
        self._exact = most <= count
        if self._exact:
            slots = np.arange(most)
            all_there = self._columns.positions(self._mine, slots)
            there = slots < self._columns.count[self._mine, None]
            self._position = np.where(there, all_there, -1)
            self._expected = np.ones(self._position.shape)
        else:
            self._position, self._expected = self._draw(count)

    def _read(
        self, rows: Array, position: HostIndex, expected: HostArray
    ) -> Iterator[tuple[slice, Array]]:
        """The weighted columns of some nodes after the other, as many as memory lets be."""
        columns = np.where(position >= 0, self._permutation[position], -1)
        nodes, s = position.shape
        node_bytes = rows.shape[1] * s * self._reader.dtype.itemsize
        step = max(num_threads(), working_bytes(self._reader.device) // max(1, node_bytes))
        for start in range(0, nodes, step):
            some = slice(start, start + step)
            S = self._reader.blocks(rows[some], columns[some])
            weight = (1.0 / np.sqrt(expected[some]))[:, None, :].astype(S.dtype)
            S *= namespace(S).asarray(weight)
            yield some, S

    # --- draws -------------------------------------------------------------------------------

    def _random(self, count: int) -> Any:
        """(nodes, count) uniform numbers: this rank's rows of those of all nodes."""
        mine = self._mine
        self._bits.advance(mine.start * count)  # a number takes one step
        numbers = self._rng.random((mine.stop - mine.start, count))
        self._bits.advance((self._num_rows - mine.stop) * count)
        return numbers

    def _draw(self, count: int) -> tuple[HostIndex, HostArray]:
        """Tree positions (nodes, count), -1 for none, and how often each is expected."""
        mine, level = self._mine, self._nodes.level
        if not self._ranked:
            for start in range(mine.start, mine.stop, _RANKED):
                some = slice(start, min(start + _RANKED, mine.stop))
                self._ranked.append((some, self._cells.ranked(self._columns, some)))
        beside: HostIndex | None = None
        if self._edges is not None:
            if level not in self._keys:
                self._keys[level] = self._next_keys()
            beside, total = self._draw_next_to(self._keys[level], count // 3)
            often = np.minimum(1.0, beside.shape[1] / np.maximum(total, 1))
            count -= beside.shape[1]
        start = self._random(1)
        drawn = []
        for some, ranked in self._ranked:
            place = slice(some.start - mine.start, some.stop - mine.start)
            chance = _chances(ranked, count)
            position, expected = _systematic(ranked, chance, count, start[place])
            if beside is not None:
                position = np.concatenate([beside[place], position], axis=1)
                expected = _chance_at(ranked, chance, position, self._n)
                expected += self._is_next(place, position) * often[place]
            drawn.append((position, np.where(position >= 0, expected, 1.0)))
        position, expected = (np.concatenate(x) for x in zip(*drawn, strict=True))
        return position, expected

    def _is_next(self, place: slice, position: HostIndex) -> HostArray:
        """Whether positions are next to the block rows of a part of this rank's."""
        keys = self._keys[self._nodes.level]
        if not len(keys):
            return np.zeros(position.shape, bool)
        wanted = np.arange(place.start, place.stop)[:, None] * self._n + position
        slot = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return (keys[slot] == wanted) & (position >= 0)

    def _neighbour_edges(self) -> tuple[HostIndex | None, HostIndex | None]:
        """(edges, 2) positions of indices and their neighbours; None where there are none.

        Of the indices of this rank; and of those of all ranks the edges that lead from one node of
        the cut to another, which are all that nodes above need.
        """
        owners, tree = self._region.owners, self._region.tree
        ends = np.concatenate([[0], np.cumsum(tree.leaf_sizes)])
        leaves = owners.mine(tree.depth)
        own = slice(int(ends[leaves.start]), int(ends[leaves.stop]))
        found = self._region.neighbours(self._permutation[own])
        if found is None:
            return None, None
        place = np.empty(tree.n, np.int64)
        place[self._permutation] = np.arange(tree.n)
        row, slot = np.nonzero(found >= 0)
        edges = np.stack([own.start + row, place[found[row, slot]]], axis=1)
        return edges, owners.between_ranks(edges, tree.leaf_sizes)

    def _next_keys(self) -> HostIndex:
        """Sorted t * n + position of the columns next to block row t, of this rank's from 0 on."""
        below = self._region.owners.has_siblings(self._nodes.level)
        edges = self._edges if below else self._edges_above
        assert edges is not None
        position = edges[:, 1]
        row = self._columns.row_of(self._nodes.owner(edges[:, 0]))
        mine = (row >= self._mine.start) & (row < self._mine.stop)
        row, position = row[mine], position[mine]
        wanted = self._columns.holds(row, position)
        return np.unique((row[wanted] - self._mine.start) * self._n + position[wanted])

    def _draw_next_to(self, keys: Any, count: int) -> tuple[Any, Any]:
        """Up to `count` of the columns next to each node, and their (nodes, 1) total.

        They are evenly spaced from a random start: every one is as likely (systematic sampling:
        Madow and Madow, Ann. Math. Statist. 15 (1944)).
        """
        n, nodes = self._n, self._mine.stop - self._mine.start
        starts = np.searchsorted(keys // n, np.arange(nodes + 1))
        total, slot = np.diff(starts)[:, None], np.arange(count)
        spaced = ((slot + self._random(1)) * (total / max(count, 1))).astype(np.int64)
        place = np.where(total > count, np.minimum(spaced, total - 1), slot)
        if not len(keys):
            return np.full(place.shape, -1), total
        position = keys[np.minimum(starts[:-1, None] + place, len(keys) - 1)] % n
        return np.where(slot < total, position, -1), total


def _chances(ranked: Ranked, count: int) -> HostArray:
    """(t, q) how probable a column of each cell is drawn; of a row they add up to `count`.

    The nearest ones, for which the multiple of their density would be above 1, are certain.
    """
    density = _density(ranked)
    mass = ranked.count * density
    left = count - (ranked.end - ranked.count)
    rest = np.cumsum(mass[:, ::-1], axis=1)[:, ::-1]  # of a cell and all farther ones
    certain = (~np.logical_or.accumulate(left * density <= rest, axis=1)).sum(axis=1)
    certain = np.minimum(certain, mass.shape[1] - 1)[:, None]
    left, rest = (np.take_along_axis(x, certain, 1) for x in (left, rest))
    multiple = left / np.where(rest > 0, rest, np.inf)
    return np.where(np.arange(mass.shape[1]) < certain, 1.0, np.minimum(1.0, multiple * density))


def _density(ranked: Ranked) -> HostArray:
    """(t, q) what a column's chance is proportional to; decreasing."""
    count = ranked.count
    near = np.maximum(ranked.end - (count - 1) / 2, 1.0) ** -_DECAY
    total = np.cumsum(count * near, axis=1)[:, -1:]  # one by one: padding changes no bit
    number = ranked.end[:, -1:]
    density = (1 - _ANYWHERE) * near / np.maximum(total, 1e-300)
    density += _ANYWHERE / np.maximum(number, 1)
    return np.where(count > 0, density, 0.0)


def _systematic(
    ranked: Ranked, chance: HostArray, count: int, start: HostArray
) -> tuple[HostIndex, HostArray]:
    """Positions (t, count), -1 for none, and their chances; start (t, 1) is uniform in [0, 1)."""
    t, q = chance.shape
    size = ranked.count * chance
    end = np.cumsum(size, axis=1)
    up_to = np.minimum(np.ceil(end - start), count).astype(np.int64)
    hits = np.diff(np.maximum(up_to, 0), axis=1, prepend=0).ravel()
    cell = np.repeat(np.arange(t * q), hits)
    row, total = cell // q, hits.reshape(t, q).sum(axis=1)
    slot = np.arange(len(cell)) - np.repeat(np.cumsum(total) - total, total)
    chance, before = chance.ravel()[cell], (end - size).ravel()[cell]
    local = ((start[row, 0] + slot - before) / chance).astype(np.int64)
    local = np.clip(local, 0, ranked.count.ravel()[cell] - 1)
    position, expected = np.full((t, count), -1), np.ones((t, count))
    position[row, slot] = ranked.first.ravel()[cell] + local
    expected[row, slot] = chance
    return position, expected


def _chance_at(ranked: Ranked, chance: HostArray, position: HostIndex, n: int) -> HostArray:
    """The chances of positions (t, k); 0 for none."""
    row, slot = np.nonzero(ranked.count)
    key = row * n + ranked.first[row, slot]
    order = np.argsort(key)
    wanted = np.arange(len(position))[:, None] * n + position
    found = np.maximum(np.searchsorted(key[order], wanted, side="right") - 1, 0)
    return np.where(position >= 0, chance[row, slot][order][found], 0.0)

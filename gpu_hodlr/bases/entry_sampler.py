"""Samples made of columns of the matrix itself, for matrices whose products are expensive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.bases.cells import CellTree, Ranked
from gpu_hodlr.bases.columns import Columns, TreeLevel
from gpu_hodlr.bases.regions import Region
from gpu_hodlr.bases.samplers import Carried, Sample, regression_inflation
from gpu_hodlr.batched import draws
from gpu_hodlr.batched.threads import num_threads
from gpu_hodlr.devices import (
    Array,
    HostArray,
    HostIndex,
    namespace,
    namespace_on,
    to_host,
    working_bytes,
)
from gpu_hodlr.operators import BlockReader
from gpu_hodlr.structures import Level

ENTRY_LIMIT = 3  # columns of the matrix may be so many times as many as Gaussian ones
_CHECKED, _CHECKED_TOGETHER = 64, 1024  # fresh columns a basis, and a level, is checked on
_EACH = 3.0  # columns for each unit of rank that a level begins with,
_GROWTH = 1.5  # times this at most, where ranks grow
_ROW_BYTES = 1 << 16  # that ranking takes for a block row


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

    Draws belong to nodes: a rank makes those of its own, the same on any number of ranks. Columns
    are ranked and drawn where the matrix is, of random numbers of the host's: on a GPU the host
    reads how many pairs of neighbours are left on a level, and what fresh columns show, no more.

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
        self._xp = namespace_on(reader.device)
        self._cells = CellTree(region.tree, region.points, reader.device)
        self._n, self._permutation = region.tree.n, self._cells.permutation
        self._beside, self._edges_above = self._neighbours()
        self._keys: dict[int, Array] = {}
        self._below: tuple[Array, Array] | None = None
        self._sampled: HostIndex | None = None
        self._position: Array
        self._expected: Array
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
        self._below = None
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
        squares = []
        count = max(_CHECKED, _CHECKED_TOGETHER // self._num_rows)
        for nodes, fresh in self._read(self._rows, *self._draw(count)):
            fresh = batched.permute_rows(fresh, order[nodes])
            missed = batched.matmul(T[nodes], fresh[:, :r], subtract_from=fresh[:, r:])
            squares.append(batched.squared_norms(missed))
        return to_host(self._xp.concatenate(squares))

    def grow(self, nodes: HostArray | None = None) -> bool:
        """See `LevelSampler`: twice the columns, drawn anew."""
        s = self.num_samples
        if self._exact or s >= self._limit:
            return False
        self._choose(self._rows, min(2 * s, self._limit))
        if nodes is not None and not nodes.all():
            [self._sampled] = np.nonzero(nodes)
            places = self._xp.asarray(self._sampled)
            self._position, self._expected = self._position[places], self._expected[places]
        return True

    def carried(self, order: Array, T: Array) -> Carried:
        """See `Sampler`: entries are read anew on every level."""
        return (), ()

    def advance(self, level: Level, skeleton: Array, carried: Sequence[Array]) -> None:
        """See `Sampler`."""
        count = self._wanted(level.rank)
        self._below = self._parents_of_keys()
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
        columns = self._region.columns(self._nodes)
        self._most = int(columns.count.max())
        self._columns: Columns = columns.on(self._reader.device)
        self._ranked: list[tuple[slice, Ranked]] = []
        rows: HostIndex = np.asarray(columns.rows)[self._mine]
        return rows

    def _choose(self, rows: Array, count: int) -> None:
        """Draw `count` columns for this rank's block rows."""
        self._rows = rows
        self._sampled = None
        self._exact = self._most <= count
        if self._exact:
            xp, slots = self._xp, self._xp.arange(self._most)
            all_there = self._columns.positions(self._mine, slots)
            there = slots < self._columns.count[self._mine, None]
            self._position = xp.where(there, all_there, -1)
            self._expected = xp.ones(self._position.shape)
        else:
            self._position, self._expected = self._draw(count)

    def _read(self, rows: Array, position: Array, expected: Array) -> Iterator[tuple[slice, Array]]:
        """The weighted columns of some nodes after the other, as many as memory lets be."""
        columns = self._xp.where(position >= 0, self._permutation[position], -1)
        nodes, s = position.shape
        node_bytes = rows.shape[1] * s * self._reader.dtype.itemsize
        step = max(num_threads(), working_bytes(self._reader.device) // max(1, node_bytes))
        for start in range(0, nodes, step):
            some = slice(start, start + step)
            S = self._reader.blocks(rows[some], columns[some])
            S *= (1.0 / self._xp.sqrt(expected[some]))[:, None, :].astype(S.dtype)
            yield some, S

    # --- draws -------------------------------------------------------------------------------

    def _random(self) -> Array:
        """(nodes, 1) uniform numbers: this rank's of those of all nodes."""
        mine = self._mine
        self._bits.advance(mine.start)  # a number takes one step
        numbers = self._rng.random((mine.stop - mine.start, 1))
        self._bits.advance(self._num_rows - mine.stop)
        return self._xp.asarray(numbers)

    def _draw(self, count: int) -> tuple[Array, Array]:
        """Tree positions (nodes, count), -1 for none, and how often each is expected."""
        xp, mine = self._xp, self._mine
        if not self._ranked:
            step = max(1, working_bytes(self._reader.device) // _ROW_BYTES)
            for first in range(mine.start, mine.stop, step):
                some = slice(first, min(first + step, mine.stop))
                self._ranked.append((some, self._cells.ranked(self._columns, some)))
        beside: Array | None = None
        if self._beside is not None:
            keys = self._next_keys()
            beside, total = self._draw_next_to(keys, count // 3)
            often = xp.minimum(1.0, beside.shape[1] / xp.maximum(total, 1))
            count -= beside.shape[1]
        start = self._random()
        drawn = []
        for some, ranked in self._ranked:
            place = slice(some.start - mine.start, some.stop - mine.start)
            chance = draws.chances(ranked.count, count)
            position, expected = draws.systematic(
                ranked.first, ranked.count, chance, count, start[place]
            )
            if beside is not None:
                position = xp.concatenate([beside[place], position], axis=1)
                expected = _chance_at(ranked, chance, position, self._n)
                expected += self._is_next(keys, place, position) * often[place]
            drawn.append((position, xp.where(position >= 0, expected, 1.0)))
        position, expected = (xp.concatenate(x) for x in zip(*drawn, strict=True))
        return position, expected

    def _is_next(self, keys: Array, place: slice, position: Array) -> Array:
        """Whether positions are next to the block rows of a part of this rank's."""
        xp = self._xp
        if not len(keys):
            return xp.zeros(position.shape, bool)
        wanted = xp.arange(place.start, place.stop)[:, None] * self._n + position
        slot = xp.minimum(xp.searchsorted(keys, wanted), len(keys) - 1)
        return (keys[slot] == wanted) & (position >= 0)

    def _neighbours(self) -> tuple[Array | None, Array | None]:
        """Positions of the neighbours of this rank's positions, (rows, q), -1 for none.

        And (pairs, 2) of all ranks, of those that lead from one node of the cut to another, which
        are all that nodes above need. None where nothing was searched.
        """
        xp, owners, tree = self._xp, self._region.owners, self._region.tree
        leaves, ends = owners.mine(tree.depth), np.cumsum(tree.leaf_sizes)
        self._first = int(ends[leaves.start - 1]) if leaves.start else 0
        found = self._region.neighbours(self._permutation[self._first : int(ends[leaves.stop - 1])])
        if found is None:
            return None, None
        place = xp.empty(tree.n, np.int64)
        place[self._permutation] = xp.arange(tree.n)
        beside = xp.where(found >= 0, place[found], -1)
        return beside, owners.between_ranks(self._first, beside, tree.leaf_sizes)

    def _next_keys(self) -> Array:
        """Sorted t * n + position of the columns next to block row t, of this rank's from 0 on."""
        xp, columns, n, level = self._xp, self._columns, self._n, self._nodes.level
        if level in self._keys:
            return self._keys[level]
        assert self._beside is not None
        assert self._edges_above is not None
        if self._below is not None:
            node, position = self._below
        elif self._region.owners.has_siblings(level):
            own = xp.arange(self._first, self._first + len(self._beside))
            node = columns.nodes.owner(own)[:, None]
            position = self._beside
        else:
            node = columns.nodes.owner(self._edges_above[:, 0])
            position = self._edges_above[:, 1]
        row = xp.broadcast_to(columns.row_of(node), position.shape)
        first, nodes = self._mine.start, self._mine.stop - self._mine.start
        wanted = (row >= first) & (row < first + nodes) & columns.holds(row, position)
        # What is not wanted gets the largest number of all, so that the host reads a size once.
        key = xp.where(wanted, (row - first) * n + position, nodes * n)
        key = xp.unique(xp.concatenate([key.ravel(), xp.full(1, nodes * n)]))
        self._keys[level] = key[:-1]
        return self._keys[level]

    def _parents_of_keys(self) -> tuple[Array, Array] | None:
        """The parents of the nodes of this level's keys, and the positions: all for the parents'.

        R(t) of a parent t lies in that of its children: what is not next to these, or is inside,
        need not be looked at again.
        """
        keys, level = self._keys.get(self._nodes.level), self._nodes.level
        if keys is None or not self._region.owners.has_siblings(level - 1):
            return None
        node = self._columns.rows[keys // self._n + self._mine.start]
        return node >> 1, keys % self._n

    def _draw_next_to(self, keys: Array, count: int) -> tuple[Array, Array]:
        """Up to `count` of the columns next to each node, and their (nodes, 1) total.

        They are evenly spaced from a random start: every one is as likely (systematic sampling:
        Madow and Madow, Ann. Math. Statist. 15 (1944)).
        """
        xp, n, nodes = self._xp, self._n, self._mine.stop - self._mine.start
        starts = xp.searchsorted(keys, xp.arange(nodes + 1) * n)
        total, slot = (starts[1:] - starts[:-1])[:, None], xp.arange(count)
        spaced = ((slot + self._random()) * (total / max(count, 1))).astype(np.int64)
        place = xp.where(total > count, xp.minimum(spaced, total - 1), slot)
        if not len(keys):
            return xp.full(place.shape, -1), total
        position = keys[xp.minimum(starts[:-1, None] + place, len(keys) - 1)] % n
        return xp.where(slot < total, position, -1), total


def _chance_at(ranked: Ranked, chance: Array, position: Array, n: int) -> Array:
    """The chances of positions (t, k); 0 for none."""
    xp = namespace(chance)
    first = xp.where(ranked.count > 0, ranked.first, n)  # padding comes last
    order = xp.argsort(first, axis=1)
    row = xp.arange(len(first))[:, None] * (n + 1)
    keys = (row + xp.take_along_axis(first, order, 1)).ravel()
    found = xp.maximum(xp.searchsorted(keys, row + position, side="right") - 1, 0)
    return xp.where(position >= 0, xp.take_along_axis(chance, order, 1).ravel()[found], 0.0)

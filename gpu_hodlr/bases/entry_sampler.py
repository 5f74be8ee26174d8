"""Samples made of columns of the matrix itself, for matrices whose products are expensive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.bases.columns import Columns, TreeLevel
from gpu_hodlr.bases.regions import Region
from gpu_hodlr.bases.samplers import Carried, Sample, regression_inflation
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.operators import BlockReader
from gpu_hodlr.structures import Level

ENTRY_LIMIT = 3  # columns of the matrix may be so many times as many as Gaussian ones
_CHECKED = 64  # fresh columns a basis is checked on
_BESIDE = 16  # without points: positions on either side of a node, few enough to take all


class EntrySampler:
    """S_t = K(t, columns of R(t)), drawn in thirds: next to t, near t, and anywhere in R(t).

    Next to t: the region's neighbours of its points (rough kernels need the very columns along a
    node's border), or the positions beside t in the tree order. Near: the region's nodes near t.
    Column j is weighted by 1 / sqrt(e_j), e_j the number of times it is expected in the three draws
    together, so that E[S S^T] = K(t, R(t)) K(R(t), t) (balance heuristic: Veach and Guibas,
    SIGGRAPH 95). Where all columns of R(t) are no more than wanted, S has them all.

    Rows of the draws belong to nodes: a rank draws those of its own, which one rank draws alike.

    Args:
        reader: of the matrix's entries.
        region: what R(t) is.
        start: columns at first.
        limit: columns at most.
        seed: of the draws.
    """

    def __init__(
        self, reader: BlockReader, region: Region, start: int, limit: int, seed: int
    ) -> None:
        self._reader, self._region, self._seed = reader, region, seed
        self._start, self._limit = min(start, limit), limit
        self._n, self._permutation = region.tree.n, region.tree.permutation
        self._edges, self._edges_above = self._neighbour_edges()
        self._keys: dict[int, Any] = {}
        self.reset()

    @property
    def num_samples(self) -> int:
        """Columns of the sample."""
        return int(self._raw.shape[2])

    def reset(self) -> None:
        """See `Sampler`."""
        self._bits = np.random.PCG64((self._seed, self._region.stream))
        self._rng = np.random.Generator(self._bits)
        self.begin(self._region.first)

    def begin(self, level: int) -> None:
        """Go to a level, with all rows of its nodes."""
        rows = self._go_to(level)
        self._read(self._region.tree.nodes(level)[rows], self._start)

    def widen(self) -> None:
        """See `Sampler`: entries that few columns hold may not have been drawn."""
        self._start, self._limit = 4 * self._start, 4 * self._limit

    def sample(self) -> Sample:
        """See `Sampler`."""
        s = self.num_samples
        if self._exact:
            S, inflation = self._raw, np.ones(s + 1)
        else:
            weight = 1.0 / np.sqrt(self._expected)
            S = self._raw * self._on_device(weight)
            inflation = regression_inflation(s, float(s))
        noise = batched.squared_rounding(batched.squared_norms(S), S.dtype)
        return Sample(S, inflation, noise)

    def check(self, order: Array, T: Array) -> float:
        """See `Sampler`: a few heavy columns may hide in a regression, but not from fresh ones."""
        if self._exact:
            return 0.0
        position, expected = self._draw(_CHECKED)
        columns = np.where(position >= 0, self._permutation[position], -1)
        fresh = self._reader.blocks(self._rows, columns)
        fresh *= self._on_device(1.0 / np.sqrt(expected))
        fresh = batched.permute_rows(fresh, order)
        r = T.shape[2]
        missed = batched.matmul(T, fresh[:, :r], subtract_from=fresh[:, r:])
        squares = to_host((missed * missed).sum(axis=(1, 2), dtype=np.float64))
        owners, level = self._region.dealt(self._nodes.level)
        return float(owners.sum_of_nodes(squares, level))

    def _on_device(self, weight: Any) -> Array:
        """Weights (nodes, columns) beside the entries they belong to."""
        raw = self._raw
        return namespace(raw).asarray(weight[:, None, :].astype(raw.dtype))

    def grow(self) -> bool:
        """See `Sampler`: twice the columns, drawn anew."""
        s = self.num_samples
        if self._exact or s >= self._limit:
            return False
        self._read(self._rows, min(2 * s, self._limit))
        return True

    def carried(self, order: Array, T: Array) -> Carried:
        """See `Sampler`: entries are read anew on every level."""
        return (), ()

    def advance(self, level: Level, skeleton: Array, carried: Sequence[Array]) -> None:
        """See `Sampler`."""
        if self._nodes.level > 1:
            count = min(max(self.num_samples, self._start), self._limit)
            self._go_to(self._nodes.level - 1)
            self._read(skeleton.reshape(len(skeleton) // 2, 2 * level.rank), count)

    def _go_to(self, level: int) -> Any:
        """To a level; the nodes whose rows this rank samples."""
        owners, dealt = self._region.dealt(level)
        self._mine, self._num_rows = owners.mine(dealt), 1 << dealt
        self._nodes = TreeLevel.of(self._region.tree, level)
        self._columns: Columns = self._region.columns(self._nodes)
        self._itself = self._columns.rows[self._mine]
        self._available = self._columns.count[self._mine, None]
        return self._itself

    def _read(self, rows: Array, count: int) -> None:
        """Draw `count` columns for this rank's block rows, and read their entries."""
        self._rows = rows
        most = int(self._columns.count.max())
        self._exact = most <= count
        if self._exact:
            slots = np.arange(most)
            all_there = self._columns.positions(self._mine, slots)
            position = np.where(slots < self._available, all_there, -1)
        else:
            position, self._expected = self._draw(count)
        columns = np.where(position >= 0, self._permutation[position], -1)
        self._raw = self._reader.blocks(rows, columns)

    # --- draws -------------------------------------------------------------------------------

    def _random(self, count: int) -> Any:
        """(nodes, count) uniform numbers: this rank's rows of those of all nodes."""
        mine = self._mine
        self._bits.advance(mine.start * count)  # a number takes one step
        numbers = self._rng.random((mine.stop - mine.start, count))
        self._bits.advance((self._num_rows - mine.stop) * count)
        return numbers

    def _draw(self, count: int) -> tuple[Any, Any]:
        """Tree positions (nodes, count), -1 for none, and how often each is expected."""
        level = self._nodes.level
        if level not in self._keys:
            self._keys[level] = self._next_keys()
        next_keys = self._keys[level]
        next_to, next_total = self._draw_next_to(next_keys, count // 3)
        near_nodes = self._region.near(self._nodes, self._itself)
        near, near_total = self._draw_near(near_nodes, count // 3)
        anywhere = self._available
        v = self._random(count - 2 * (count // 3)) * anywhere
        drawn = self._columns.positions(self._mine, v.astype(np.int64))
        far = np.where(v < anywhere, drawn, -1)
        position = np.concatenate([next_to, near, far], axis=1)
        key = np.arange(len(position))[:, None] * self._n + position
        slot = np.minimum(np.searchsorted(next_keys, key), max(len(next_keys) - 1, 0))
        is_next = next_keys[slot] == key if len(next_keys) else np.zeros(key.shape, bool)
        owner = self._nodes.owner(position)
        is_near = (owner[:, :, None] == near_nodes[:, None, :]).any(axis=2)
        expected = (
            is_next * np.minimum(1.0, next_to.shape[1] / np.maximum(next_total, 1))
            + is_near * np.where(near_total > 0, near.shape[1] / np.maximum(near_total, 1), 0.0)
            + v.shape[1] / np.maximum(anywhere, 1)
        )
        return position, np.where(position >= 0, expected, 1.0)

    def _neighbour_edges(self) -> tuple[Any, Any]:
        """(edges, 2) tree positions of points and their neighbours; None where those beside count.

        Of the points of this rank; and of those of all ranks the edges that lead from one node of
        the cut to another, which are all that nodes above need.
        """
        owners, sizes = self._region.owners, self._region.tree.leaf_sizes
        ends = np.concatenate([[0], np.cumsum(sizes)])
        leaves = owners.mine(self._region.tree.depth)
        own = slice(int(ends[leaves.start]), int(ends[leaves.stop]))
        found = self._region.neighbours(own)
        if found is None:
            return None, None
        row, slot = np.nonzero(found >= 0)
        edges = np.stack([own.start + row, found[row, slot]], axis=1)
        return edges, owners.between_ranks(edges, sizes)

    def _next_keys(self) -> HostIndex:
        """Sorted t * n + position of the columns next to block row t, of this rank's from 0 on."""
        node, position = self._beside() if self._edges is None else self._along_edges()
        row = self._columns.row_of(node)
        mine = (row >= self._mine.start) & (row < self._mine.stop)
        row, position = row[mine], position[mine]
        wanted = self._columns.holds(row, position)
        return np.unique((row[wanted] - self._mine.start) * self._n + position[wanted])

    def _beside(self) -> tuple[Any, Any]:
        """Nodes of the level and the tree positions next to them, (k,) each."""
        node, steps = self._itself[:, None], np.arange(_BESIDE)
        offsets = self._nodes.offsets
        before, after = offsets[node] - 1 - steps, offsets[node + 1] + steps
        position = np.concatenate([before, after], axis=1)
        valid = (position >= 0) & (position < self._n)
        return np.broadcast_to(node, position.shape)[valid], position[valid]

    def _along_edges(self) -> tuple[Any, Any]:
        """Nodes of the level and neighbours of what is in them, (k,) each."""
        below = self._region.owners.has_siblings(self._nodes.level)
        edges = self._edges if below else self._edges_above
        return self._nodes.owner(edges[:, 0]), edges[:, 1]

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

    def _draw_near(self, near_nodes: Any, count: int) -> tuple[Any, Any]:
        """Positions (nodes, count) drawn evenly from the near nodes, and their (nodes, 1) total."""
        itself = self._itself[:, None]
        sizes = np.where(near_nodes == itself, 0, self._nodes.sizes[near_nodes])
        ends = np.cumsum(sizes, axis=1)
        w = (self._random(count) * ends[:, -1:]).astype(np.int64)
        box = (w[:, :, None] >= ends[:, None, :]).sum(axis=2)
        box = np.minimum(box, near_nodes.shape[1] - 1)
        first = self._nodes.offsets[np.take_along_axis(near_nodes, box, axis=1)]
        position = first + w - np.take_along_axis(ends - sizes, box, axis=1)
        return np.where(ends[:, -1:] > 0, position, -1), ends[:, -1:]

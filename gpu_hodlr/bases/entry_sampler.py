"""Samples made of columns of the matrix itself, for matrices whose products are expensive."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from gpu_hodlr import batched, streams
from gpu_hodlr.bases.samplers import Carried, Sample, regression_inflation, squared_rounding
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.interactions import nearest_points
from gpu_hodlr.operators import Operator
from gpu_hodlr.structures import Level
from gpu_hodlr.tree import ClusterTree

ENTRY_LIMIT = 3  # columns of the matrix may be so many times as many as Gaussian ones
_NEAR_NODES = 6  # nodes a node's near columns are drawn from
_NEIGHBOURS = 8  # of a point
_NEIGHBOUR_DIMENSIONS = 4  # in more, neighbour search costs more than it helps
_CHECKED = 64  # fresh columns a basis is checked on
_BESIDE = 16  # without points: positions on either side of a node, few enough to take all


class EntrySampler:
    """S_t = K(t, columns outside t), drawn in thirds: next to t, near t, and anywhere.

    Next to t: the nearest neighbours of its points that lie outside (rough kernels need the very
    columns along a node's border), or without points the positions beside t in the tree order.
    Near: the nodes whose centers are nearest. Column j is weighted by 1 / sqrt(e_j), e_j the number
    of times it is expected in the three draws together, so that
    E[S S^T] = K(t, outside) K(outside, t) (balance heuristic: Veach and Guibas, SIGGRAPH 95). Where
    all columns outside are no more than wanted, S has them all.

    Rows of the draws belong to nodes: a rank draws those of its own, which one rank draws alike.

    Args:
        operator: with entries.
        tree: the cluster tree.
        start: columns at first.
        limit: columns at most.
        seed: of the draws.
        owners: which rank has what.
    """

    def __init__(
        self,
        operator: Operator,
        tree: ClusterTree,
        start: int,
        limit: int,
        seed: int,
        owners: Ownership = ALONE,
    ) -> None:
        self._owners = owners
        self._operator, self._tree, self._seed = operator, tree, seed
        self._start, self._limit = min(start, limit), limit
        self._permutation, self._leaf_sizes = tree.permutation, tree.leaf_sizes
        self._points = None if operator.points is None else to_host(operator.points)
        self._edges, self._edges_above = self._neighbour_edges()
        self._keys: dict[int, Any] = {}
        self.reset()

    @cached_property
    def _leaf_sums(self) -> Any:
        """(leaves, d) sums of the points of every leaf."""
        assert self._points is not None
        leaves = self._tree.leaves
        return np.where(leaves[:, :, None] >= 0, self._points[leaves], 0).sum(axis=1)

    @property
    def num_samples(self) -> int:
        """Columns of the sample."""
        return int(self._raw.shape[2])

    def reset(self) -> None:
        """See `Sampler`."""
        self._start_draws(streams.ENTRY_COLUMNS)
        depth = self._tree.depth
        self._begin(depth, self._tree.leaves[self._owners.mine(depth)], self._start)

    def _start_draws(self, purpose: int) -> None:
        self._bits = np.random.PCG64((self._seed, purpose))
        self._rng = np.random.Generator(self._bits)

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
        return Sample(S, inflation, squared_rounding(batched.squared_norms(S), S.dtype))

    def check(self, order: Array, T: Array) -> float:
        """See `Sampler`: a few heavy columns may hide in a regression, but not from fresh ones."""
        if self._exact:
            return 0.0
        position, expected = self._draw(_CHECKED)
        columns = np.where(position >= 0, self._permutation[position], -1)
        fresh = self._operator.reader.blocks(self._rows, columns)
        fresh *= self._on_device(1.0 / np.sqrt(expected))
        fresh = batched.permute_rows(fresh, order)
        r = T.shape[2]
        missed = batched.matmul(T, fresh[:, :r], subtract_from=fresh[:, r:])
        squares = to_host((missed * missed).sum(axis=(1, 2), dtype=np.float64))
        owners, level = self._dealt()
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
        self._begin(self._level, self._rows, min(2 * s, self._limit))
        return True

    def carried(self, order: Array, T: Array) -> Carried:
        """See `Sampler`: entries are read anew on every level."""
        return (), ()

    def advance(self, level: Level, skeleton: Any, carried: Sequence[Array]) -> None:
        """See `Sampler`."""
        if self._level > 1:
            count = min(max(self.num_samples, self._start), self._limit)
            pairs = skeleton.reshape(len(skeleton) // 2, 2 * level.rank)
            self._begin(self._level - 1, pairs, count)

    def _begin(self, level: int, rows: Any, count: int) -> None:
        """Draw `count` columns for this rank's nodes of a level, and read their entries."""
        self._level, self._rows = level, rows
        owners, dealt = self._dealt()
        self._mine, self._num_nodes = owners.mine(dealt), 1 << dealt
        self._sizes = self._leaf_sizes.reshape(1 << level, -1).sum(axis=1)
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes)])
        outside = self._num_outside()
        self._exact = int(outside.max()) <= count
        self._available = outside[self._mine, None]
        if self._exact:
            slots = np.arange(int(outside.max()))
            position = np.where(slots < self._available, self._outside(slots), -1)
        else:
            position, self._expected = self._draw(count)
        columns = np.where(position >= 0, self._permutation[position], -1)
        self._raw = self._operator.reader.blocks(rows, columns)

    # --- which nodes -------------------------------------------------------------------------

    def _dealt(self) -> tuple[Ownership, int]:
        """The level whose nodes the ranks have as they have the samples."""
        return self._owners, self._level

    def _row_nodes(self) -> Any:
        """(nodes,) the nodes of the level whose rows are sampled."""
        return np.arange(self._mine.start, self._mine.stop)

    def _num_outside(self) -> Any:
        """How many columns the sample is drawn from, for the nodes of all ranks."""
        return self._tree.n - self._sizes

    def _outside(self, slots: Any) -> Any:
        """The tree positions (nodes, k) of the v-th columns outside each node."""
        first, sizes = self._offsets[:-1], self._sizes
        inside_or_after = slots >= first[self._mine, None]
        return slots + np.where(inside_or_after, sizes[self._mine, None], 0)

    def _sampled_for(self, node: Any, other: Any) -> tuple[Any, Any]:
        """Which of the sampled nodes has the rows of `node`, and whether it samples `other`."""
        return node, node != other

    def _owner(self, position: Any) -> Any:
        """The node of the level that a tree position belongs to."""
        return np.searchsorted(self._offsets, position, side="right") - 1

    # --- draws -------------------------------------------------------------------------------

    def _random(self, count: int) -> Any:
        """(nodes, count) uniform numbers: this rank's rows of those of all nodes."""
        mine = self._mine
        self._bits.advance(mine.start * count)  # a number takes one step
        numbers = self._rng.random((mine.stop - mine.start, count))
        self._bits.advance((self._num_nodes - mine.stop) * count)
        return numbers

    def _draw(self, count: int) -> tuple[Any, Any]:
        """Tree positions (nodes, count), -1 for none, and how often each is expected."""
        if self._level not in self._keys:
            self._keys[self._level] = self._next_keys()
        next_keys = self._keys[self._level]
        next_to, next_total = self._draw_next_to(next_keys, count // 3)
        near_nodes = self._near_nodes()
        near, near_total = self._draw_near(near_nodes, count // 3)
        anywhere = self._available
        v = self._random(count - 2 * (count // 3)) * anywhere
        far = np.where(v < anywhere, self._outside(v.astype(np.int64)), -1)
        position = np.concatenate([next_to, near, far], axis=1)
        key = np.arange(len(position))[:, None] * self._tree.n + position
        slot = np.minimum(np.searchsorted(next_keys, key), max(len(next_keys) - 1, 0))
        is_next = next_keys[slot] == key if len(next_keys) else np.zeros(key.shape, bool)
        is_near = (self._owner(position)[:, :, None] == near_nodes[:, None, :]).any(axis=2)
        expected = (
            is_next * np.minimum(1.0, next_to.shape[1] / np.maximum(next_total, 1))
            + is_near * np.where(near_total > 0, near.shape[1] / np.maximum(near_total, 1), 0.0)
            + v.shape[1] / np.maximum(anywhere, 1)
        )
        return position, np.where(position >= 0, expected, 1.0)

    def _neighbour_edges(self) -> tuple[Any, Any]:
        """(edges, 2) tree positions of points and their nearest neighbours.

        Of the points of this rank; and of those of all ranks the edges that lead from one node of
        the cut to another, which are all that nodes above need.
        """
        owners, sizes = self._owners, self._leaf_sizes
        ends = np.concatenate([[0], np.cumsum(sizes)])
        leaves = owners.mine(self._tree.depth)
        own = slice(int(ends[leaves.start]), int(ends[leaves.stop]))
        found = self._neighbour_positions(own)
        row, slot = np.nonzero(found >= 0)
        edges = np.stack([own.start + row, found[row, slot]], axis=1)
        if owners.alone:
            return edges, edges
        cut = ends[:: len(sizes) >> owners.cut]
        nodes = np.searchsorted(cut, edges, side="right")
        crossing = edges[nodes[:, 0] != nodes[:, 1]]
        return edges, owners.comm.allgather(crossing, owners.comm.share(len(crossing)))

    def _neighbour_positions(self, own: slice) -> Any:
        """(positions, k) neighbours of the points in a run of tree positions; -1 for none."""
        points = self._points
        if points is None or points.shape[1] > _NEIGHBOUR_DIMENSIONS:
            return np.empty((own.stop - own.start, 0), np.int64)
        return nearest_points(points[self._permutation], own, _NEIGHBOURS + 1)

    def _next_keys(self) -> Any:
        """Sorted node * n + position of the columns next to each node, nodes from 0 on."""
        node, position = self._beside()
        row, wanted = self._sampled_for(node, self._owner(position))
        wanted &= (row >= self._mine.start) & (row < self._mine.stop)
        return np.unique((row[wanted] - self._mine.start) * self._tree.n + position[wanted])

    def _beside(self) -> tuple[Any, Any]:
        """Nodes of the level and tree positions next to them or in them, (k,) each."""
        if self._points is None:
            node, steps = self._row_nodes()[:, None], np.arange(_BESIDE)
            before, after = self._offsets[node] - 1 - steps, self._offsets[node + 1] + steps
            position = np.concatenate([before, after], axis=1)
            valid = (position >= 0) & (position < self._tree.n)
            return np.broadcast_to(node, position.shape)[valid], position[valid]
        return self._along_edges()

    def _along_edges(self) -> tuple[Any, Any]:
        edges = self._edges if self._level > self._owners.cut else self._edges_above
        return self._owner(edges[:, 0]), edges[:, 1]

    def _draw_next_to(self, keys: Any, count: int) -> tuple[Any, Any]:
        """Up to `count` of the columns next to each node, and their (nodes, 1) total.

        They are evenly spaced from a random start: every one is as likely (systematic sampling:
        Madow and Madow, Ann. Math. Statist. 15 (1944)).
        """
        n, nodes = self._tree.n, self._mine.stop - self._mine.start
        starts = np.searchsorted(keys // n, np.arange(nodes + 1))
        total, slot = np.diff(starts)[:, None], np.arange(count)
        spaced = ((slot + self._random(1)) * (total / max(count, 1))).astype(np.int64)
        place = np.where(total > count, np.minimum(spaced, total - 1), slot)
        if not len(keys):
            return np.full(place.shape, -1), total
        position = keys[np.minimum(starts[:-1, None] + place, len(keys) - 1)] % n
        return np.where(slot < total, position, -1), total

    def _near_nodes(self) -> Any:
        """(nodes, q) the nodes near columns are drawn from; a node itself if there are too few."""
        itself, nodes = self._row_nodes()[:, None], len(self._sizes)
        if self._points is None:
            steps = np.array([s * k for k in range(1, _NEAR_NODES // 2 + 1) for s in (1, -1)])
            beside = itself + steps
            return np.where((beside >= 0) & (beside < nodes), beside, itself)
        sums = self._leaf_sums.reshape(nodes, -1, self._leaf_sums.shape[1]).sum(axis=1)
        centers = sums / np.maximum(self._sizes, 1)[:, None]
        filled = np.nonzero(self._sizes)[0]
        count = min(_NEAR_NODES + 1, len(filled))
        tree = KDTree(centers[filled])
        return filled[tree.query(centers[self._mine], k=np.arange(1, count + 1))[1]]

    def _draw_near(self, near_nodes: Any, count: int) -> tuple[Any, Any]:
        """Positions (nodes, count) drawn evenly from the near nodes, and their (nodes, 1) total."""
        itself = self._row_nodes()[:, None]
        sizes = np.where(near_nodes == itself, 0, self._sizes[near_nodes])
        ends = np.cumsum(sizes, axis=1)
        w = (self._random(count) * ends[:, -1:]).astype(np.int64)
        box = (w[:, :, None] >= ends[:, None, :]).sum(axis=2)
        box = np.minimum(box, near_nodes.shape[1] - 1)
        first = self._offsets[np.take_along_axis(near_nodes, box, axis=1)]
        position = first + w - np.take_along_axis(ends - sizes, box, axis=1)
        return np.where(ends[:, -1:] > 0, position, -1), ends[:, -1:]

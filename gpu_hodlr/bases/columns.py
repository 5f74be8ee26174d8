"""Sets of columns of a matrix, one for every block row of a level of the tree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpu_hodlr.devices import HostArray, HostIndex
from gpu_hodlr.tree import ClusterTree


@dataclass(frozen=True, eq=False)
class TreeLevel:
    """The nodes of a level as runs of tree positions: of places in `ClusterTree.permutation`.

    Attributes:
        level: root = 0.
        sizes: (2^level,) how many indices each has.
    """

    level: int
    sizes: HostIndex

    @classmethod
    def of(cls, tree: ClusterTree, level: int) -> TreeLevel:
        """That of a tree."""
        return cls(level, tree.leaf_sizes.reshape(1 << level, -1).sum(axis=1))

    @cached_property
    def offsets(self) -> HostIndex:
        """(2^level + 1,) node t has the positions offsets[t] .. offsets[t + 1] - 1."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    def owner(self, position: HostIndex) -> HostIndex:
        """The nodes that tree positions belong to."""
        return np.searchsorted(self.offsets, position, side="right") - 1


@dataclass(frozen=True, eq=False)
class Columns:
    """R(t) for the block rows t of a level: a run of tree positions, less some whole nodes.

    All are host arrays, of the block rows of all ranks.

    Attributes:
        nodes: the level.
        rows: (t,) the nodes whose rows they are, ascending.
        run: (t, 2) the first tree position of the run and the last one + 1.
        without: (t, q) nodes of the run that are left out, ascending, padded with 2^level.
    """

    nodes: TreeLevel
    rows: HostIndex
    run: HostIndex
    without: HostIndex

    @cached_property
    def _sizes_left_out(self) -> HostIndex:
        return np.append(self.nodes.sizes, 0)[self.without]

    @cached_property
    def count(self) -> HostIndex:
        """(t,) columns of each."""
        return self.run[:, 1] - self.run[:, 0] - self._sizes_left_out.sum(axis=1)

    def positions(self, mine: slice, v: HostIndex) -> HostIndex:
        """The tree positions (mine, k) of the v-th columns, v (k,) or (mine, k), of some rows."""
        sizes, first = self._sizes_left_out[mine], self.run[mine, :1]
        before = self.nodes.offsets[self.without[mine]] - first
        free_before = before - (np.cumsum(sizes, axis=1) - sizes)
        position = np.broadcast_to(v, (len(sizes), v.shape[-1])).copy()
        for size, free in zip(sizes.T, free_before.T, strict=True):
            position += np.where(v >= free[:, None], size[:, None], 0)
        return position + first

    def overlap(self, mine: slice, first: HostIndex, stop: HostIndex) -> HostIndex:
        """How many columns of some rows there are among positions first .. stop - 1, (mine, k)."""
        run, without = self.run[mine], self.without[mine]
        count = np.minimum(stop, run[:, 1:]) - np.maximum(first, run[:, :1])
        count = np.maximum(count, 0)
        ends = np.append(self.nodes.offsets, self.nodes.offsets[-1])
        for node in without.T:
            left, right = ends[node][:, None], ends[node + 1][:, None]
            count -= np.maximum(np.minimum(stop, right) - np.maximum(first, left), 0)
        return count

    def holds(self, row: HostIndex, position: HostIndex) -> HostArray:
        """(k,) whether tree positions are among the columns of block rows, (k,) each."""
        first, stop = self.run[row].T
        inside = (position >= first) & (position < stop)
        other, most = self.nodes.owner(position), len(self.nodes.sizes) + 1
        if self.without.shape[1] == 1:  # of most regions, and quick
            return inside & (other != self.without[row, 0])
        keys = np.arange(len(self.rows))[:, None] * most + self.without
        return inside & ~np.isin(row * most + other, keys)

    def row_of(self, node: HostIndex) -> HostIndex:
        """The block rows of nodes, -1 of those that have none."""
        row = np.full(len(self.nodes.sizes), -1)
        row[self.rows] = np.arange(len(self.rows))
        return row[node]

"""Sets of columns of a matrix, one for every block row of a level of the tree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpu_hodlr.devices import Array, move, namespace
from gpu_hodlr.tree import ClusterTree


@dataclass(frozen=True, eq=False)
class TreeLevel:
    """The nodes of a level as runs of tree positions: of places in `ClusterTree.permutation`.

    Its arrays are of one library, as those of `Columns`.

    Attributes:
        level: root = 0.
        sizes: (2^level,) how many indices each has.
    """

    level: int
    sizes: Array

    @classmethod
    def of(cls, tree: ClusterTree, level: int) -> TreeLevel:
        """That of a tree, in host arrays."""
        return cls(level, tree.leaf_sizes.reshape(1 << level, -1).sum(axis=1))

    @cached_property
    def offsets(self) -> Array:
        """(2^level + 1,) node t has the positions offsets[t] .. offsets[t + 1] - 1."""
        xp = namespace(self.sizes)
        return xp.concatenate([xp.zeros(1, np.int64), xp.cumsum(self.sizes)])

    def owner(self, position: Array) -> Array:
        """The nodes that tree positions belong to."""
        return namespace(self.sizes).searchsorted(self.offsets, position, side="right") - 1


@dataclass(frozen=True, eq=False)
class Columns:
    """R(t) for the block rows t of a level: a run of tree positions, less some whole nodes.

    Of the block rows of all ranks. A region makes them in host arrays; `on` takes them to where
    the matrix is, and nothing there is read by the host.

    Attributes:
        nodes: the level.
        rows: (t,) the nodes whose rows they are, ascending.
        run: (t, 2) the first tree position of the run and the last one + 1.
        without: (t, q) nodes of the run that are left out, ascending, padded with 2^level.
    """

    nodes: TreeLevel
    rows: Array
    run: Array
    without: Array

    def on(self, device: str) -> Columns:
        """The same with its arrays there."""
        nodes = TreeLevel(self.nodes.level, move(self.nodes.sizes, device))
        return Columns(nodes, *(move(x, device) for x in (self.rows, self.run, self.without)))

    @cached_property
    def _sizes_left_out(self) -> Array:
        xp, sizes = namespace(self.rows), self.nodes.sizes
        return xp.concatenate([sizes, xp.zeros(1, np.int64)])[self.without]

    @cached_property
    def count(self) -> Array:
        """(t,) columns of each."""
        return self.run[:, 1] - self.run[:, 0] - self._sizes_left_out.sum(axis=1)

    def positions(self, mine: slice, v: Array) -> Array:
        """The tree positions (mine, k) of the v-th columns, v (k,) or (mine, k), of some rows."""
        xp, first = namespace(self.rows), self.run[mine, :1]
        position = xp.broadcast_to(v, (len(first), v.shape[-1])).copy()
        left_out = xp.zeros_like(first)
        for q in range(self.without.shape[1]):
            size = self._sizes_left_out[mine, q, None]
            free = self.nodes.offsets[self.without[mine, q]][:, None] - first - left_out
            position += xp.where(v >= free, size, 0)
            left_out = left_out + size
        return position + first

    def left_out(self, mine: slice) -> tuple[Array, Array]:
        """The first positions and sizes of what is left out of some rows, (mine, q) each."""
        return self.nodes.offsets[self.without[mine]], self._sizes_left_out[mine]

    def holds(self, row: Array, position: Array) -> Array:
        """Whether tree positions are among the columns of block rows, of one shape (k, ...)."""
        xp = namespace(self.rows)
        inside = (position >= self.run[row, 0]) & (position < self.run[row, 1])
        if self.without.shape[1] == 0:
            return inside
        other, most = self.nodes.owner(position), len(self.nodes.sizes) + 1
        if self.without.shape[1] == 1:  # of most regions, and quick
            return inside & (other != self.without[row, 0])
        keys = (xp.arange(len(self.rows))[:, None] * most + self.without).ravel()  # ascending
        wanted = row * most + other
        slot = xp.minimum(xp.searchsorted(keys, wanted), len(keys) - 1)
        return inside & (keys[slot] != wanted)

    def row_of(self, node: Array) -> Array:
        """The block rows of nodes, -1 of those that have none."""
        xp = namespace(self.rows)
        row = xp.full(len(self.nodes.sizes), -1)
        row[self.rows] = xp.arange(len(self.rows))
        return row[node]

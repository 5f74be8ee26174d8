"""The columns of every block row in the order of their distance from it, as runs of few cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_hodlr.bases.columns import Columns
from gpu_hodlr.batched import ranking, splits
from gpu_hodlr.devices import Array, HostArray, HostIndex, namespace, namespace_on
from gpu_hodlr.tree import ClusterTree

_FINEST = 4  # columns of a cell that is not split
_SPLIT = 64  # cells of a level that are split for a leaf: the nearest
_SURFACE = 2 / 3  # a node of M times as many rows has M^(2/3) times the border, or less


@dataclass(frozen=True, eq=False)
class Ranked:
    """Cells of the block rows t, disjoint, together R(t), nearest first.

    Attributes:
        first: (t, q) the first position of each cell.
        count: (t, q) columns in it, 0 for padding.
    """

    first: Array
    count: Array


class CellTree:
    """The cluster tree, its leaves halved on, with the bounding box of every node.

    Positions are places in `permutation`: a leaf has those of the cluster tree, in another order.
    Sizes follow from those of the leaves, so that on a GPU the host reads nothing.

    Args:
        tree: the cluster tree.
        points: (N, d) host array of coordinates; without them the places in the tree are taken.
        device: where the cells are, and what is ranked.

    Attributes:
        permutation: (N,) the indices in the order of the finest cells.
    """

    def __init__(
        self, tree: ClusterTree, points: HostArray | None = None, device: str = "cpu"
    ) -> None:
        self._depth = self._leaf_level = tree.depth
        if points is None:
            points = np.empty((tree.n, 1))
            points[tree.permutation, 0] = np.arange(tree.n)
        xp, sizes = namespace_on(device), tree.leaf_sizes
        x = xp.asarray(points)
        cells = xp.asarray(tree.leaves[:, : max(1, int(sizes.max()))])
        while cells.shape[1] > _FINEST:
            cells = _halved(cells, x)
            sizes = np.stack([sizes - sizes // 2, sizes // 2], axis=1).ravel()
            self._depth += 1
        offsets = xp.asarray(_edges(sizes))
        self.permutation = xp.empty(tree.n, np.int64)
        splits.join_segments(cells, offsets, self.permutation)
        low, high = _boxes(cells, x)
        self._low, self._high, self._offsets = [low], [high], [offsets]
        for _ in range(self._depth):
            low, high = xp.minimum(low[0::2], low[1::2]), xp.maximum(high[0::2], high[1::2])
            self._low.insert(0, low)
            self._high.insert(0, high)
            self._offsets.insert(0, xp.ascontiguousarray(self._offsets[0][::2]))

    def ranked(self, columns: Columns, rows: slice) -> Ranked:
        """The cells of some block rows.

        From the root down the nearest cells are split, and those that are in R(t) in part: cells
        are the smaller, the nearer they are, and a block row has a few for every level.

        Args:
            columns: R(t), on the device of the cells.
            rows: which of its block rows.
        """
        level, itself = columns.nodes.level, columns.rows[rows]
        xp = namespace(itself)
        seen_from = ranking.Rows(
            self._low[level][itself], self._high[level][itself], columns.run[rows],
            *columns.left_out(rows),
        )  # fmt: skip
        leaves = 1 << (self._leaf_level - level)
        split = max(int(_SPLIT * leaves**_SURFACE), 2 + columns.without.shape[1])
        # As many as there may be, padded: the number of those that are would have to be read.
        divided = self._divided(split)
        width = 1 + sum(divided)
        cell, at = xp.zeros((len(itself), 1), np.int64), 0
        kept = (
            *(xp.empty((len(itself), width), np.int64) for _ in range(2)),
            xp.empty((len(itself), width), seen_from.low.dtype),
        )
        for depth, count in enumerate([*divided, 0]):
            boxes = ranking.Boxes(self._offsets[depth], self._low[depth], self._high[depth])
            seen = ranking.examined(cell, boxes, seen_from)
            order, before = xp.argsort(seen[2], axis=1, kind="stable"), cell.shape[1]
            cell = ranking.divided(order, count, cell, seen, kept, at)
            at += before - count
        order = xp.argsort(kept[2], axis=1, kind="stable")
        return Ranked(*(xp.take_along_axis(x, order, 1) for x in kept[:2]))

    def _divided(self, split: int) -> list[int]:
        """How many cells are divided on each level but the last, of at most `split`."""
        counts = [1]
        while len(counts) < self._depth:
            counts.append(min(split, 2 * counts[-1]))
        return counts[: self._depth]


def _edges(counts: HostIndex) -> HostIndex:
    return np.concatenate([[0], np.cumsum(counts)])


def _boxes(cells: Array, points: Array) -> tuple[Array, Array]:
    """(cells, d) the least and largest coordinates; infinite ones of an empty cell."""
    xp = namespace(cells)
    x, real = points[cells], (cells >= 0)[:, :, None]
    low, high = xp.where(real, x, np.inf).min(axis=1), xp.where(real, x, -np.inf).max(axis=1)
    return low, high


def _halved(cells: Array, points: Array) -> Array:
    """Every cell split at the median of its widest coordinate; (cells, m), padded with -1."""
    xp, m = namespace(cells), cells.shape[1]
    low, high = _boxes(cells, points)
    key = points[cells, (high - low).argmax(axis=1)[:, None]]
    order = xp.argsort(xp.where(cells >= 0, key, np.inf), axis=1, kind="stable")
    ordered = xp.take_along_axis(cells, order, 1)
    real = (cells >= 0).sum(axis=1)[:, None]
    left, slot = real - real // 2, xp.arange(m - m // 2)
    right = xp.take_along_axis(ordered, xp.minimum(left + slot, m - 1), 1)
    halves = [
        xp.where(slot < left, ordered[:, : len(slot)], -1),
        xp.where(slot < real - left, right, -1),
    ]
    return xp.stack(halves, axis=1).reshape(2 * len(cells), -1)

"""The columns of every block row in the order of their distance from it, as runs of few cells."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpu_hodlr.bases.columns import Columns
from gpu_hodlr.devices import HostArray, HostIndex
from gpu_hodlr.tree import ClusterTree, pad_segments

_FINEST = 4  # columns of a cell that is not split
_SPLIT = 64  # cells of a level that are split for a leaf: the nearest
_SURFACE = 2 / 3  # a node of M times as many rows has M^(2/3) times the border, or less
_BY_CENTER = 1e-3  # of the squared distance of centers: it orders cells that touch


@dataclass(frozen=True, eq=False)
class Ranked:
    """Cells of the block rows t, disjoint, together R(t), nearest first.

    All are host arrays.

    Attributes:
        first: (t, q) the first position of each cell.
        count: (t, q) columns in it, 0 for padding.
    """

    first: HostIndex
    count: HostIndex

    @cached_property
    def end(self) -> HostIndex:
        """(t, q) columns in a cell and all nearer ones."""
        return np.cumsum(self.count, axis=1)


class CellTree:
    """The cluster tree, its leaves halved on, with the bounding box of every node.

    Positions are places in `permutation`: a leaf has those of the cluster tree, in another order.

    Args:
        tree: the cluster tree.
        points: (N, d) host array of coordinates; without them the places in the tree are taken.

    Attributes:
        permutation: (N,) the indices in the order of the finest cells.
    """

    def __init__(self, tree: ClusterTree, points: HostArray | None = None) -> None:
        self._depth = self._leaf_level = tree.depth
        if points is None:
            points = np.empty((tree.n, 1))
            points[tree.permutation, 0] = np.arange(tree.n)
        cells = tree.leaves
        while cells.shape[1] > _FINEST:
            cells = _halved(cells, points)
            self._depth += 1
        self.permutation = cells[cells >= 0]
        x = points[cells]
        real = (cells >= 0)[:, :, None]
        low = np.where(real, x, np.inf).min(axis=1, initial=np.inf)
        high = np.where(real, x, -np.inf).max(axis=1, initial=-np.inf)
        counts = np.count_nonzero(cells >= 0, axis=1)
        self._low, self._high, self._offsets = [low], [high], [_edges(counts)]
        for _ in range(self._depth):
            low, high = np.minimum(low[0::2], low[1::2]), np.maximum(high[0::2], high[1::2])
            self._low.insert(0, low)
            self._high.insert(0, high)
            self._offsets.insert(0, self._offsets[0][::2])

    def ranked(self, columns: Columns, rows: slice) -> Ranked:
        """The cells of some block rows.

        From the root down the nearest cells are split, and those that are in R(t) in part: cells
        are the smaller, the nearer they are, and a block row has a few for every level.
        """
        level, itself = columns.nodes.level, columns.rows[rows]
        box = self._low[level][itself][:, None], self._high[level][itself][:, None]
        leaves = 1 << (self._leaf_level - level)
        split = max(int(_SPLIT * leaves**_SURFACE), 2 + columns.without.shape[1])
        cell = np.zeros((len(itself), 1), np.int64)
        kept: list[list[HostArray]] = []
        for depth in range(self._depth + 1):
            offsets = self._offsets[depth]
            first, stop = offsets[cell], offsets[cell + 1]
            stop = np.where(cell < 0, first, stop)
            held = columns.overlap(rows, first, stop)
            distance = _distance(*box, self._low[depth][cell], self._high[depth][cell])
            distance = np.where(held > 0, distance, np.inf)
            distance = np.where((held > 0) & (held < stop - first), -1.0, distance)
            last = depth == self._depth
            order = np.argsort(distance, axis=1, kind="stable")
            stay = order[:, 0 if last else split :]
            kept.append([np.take_along_axis(x, stay, 1) for x in (first, held, distance)])
            cell = np.take_along_axis(np.where(held > 0, cell, -1), order[:, :split], 1)
            cell = np.stack([2 * cell, 2 * cell + 1], axis=2).reshape(len(cell), -1)
            cell = np.maximum(cell, -1)
        first, count, distance = (np.concatenate(x, axis=1) for x in zip(*kept, strict=True))
        order = np.argsort(distance, axis=1, kind="stable")
        order = order[:, : max(1, int(np.count_nonzero(count, axis=1).max(initial=0)))]
        return Ranked(*(np.take_along_axis(x, order, 1) for x in (first, count)))


def _edges(counts: HostIndex) -> HostIndex:
    return np.concatenate([[0], np.cumsum(counts)])


def _halved(cells: HostIndex, points: HostArray) -> HostIndex:
    """Every cell split at the median of its widest coordinate; (cells, m), padded with -1."""
    x = np.where((cells >= 0)[:, :, None], points[cells], np.nan)
    real = np.count_nonzero(cells >= 0, axis=1)
    x[real == 0] = 0
    axis = (np.nanmax(x, axis=1) - np.nanmin(x, axis=1)).argmax(axis=1)
    key = np.take_along_axis(x, axis[:, None, None], 2)[:, :, 0]
    order = np.argsort(np.where(cells >= 0, key, np.inf), axis=1, kind="stable")
    sizes = np.stack([real - real // 2, real // 2], axis=1).ravel()
    sorted_cells = np.take_along_axis(cells, order, 1)
    return pad_segments(sorted_cells[sorted_cells >= 0], _edges(sizes))


def _distance(
    low: HostArray, high: HostArray, others_low: HostArray, others_high: HostArray
) -> HostArray:
    """Squared distances of boxes, and a little of their centers' where boxes touch."""
    with np.errstate(invalid="ignore"):  # of empty nodes, whose boxes are infinite
        gap = np.maximum(np.maximum(others_low - high, low - others_high), 0)
        centers = (others_low + others_high - low - high) / 2
        squares = (gap * gap + _BY_CENTER * centers * centers).sum(axis=2)
    return np.where(np.isfinite(squares), squares, np.finfo(squares.dtype).max)

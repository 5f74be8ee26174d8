"""The geometric order: a k-d tree of the points."""

from __future__ import annotations

from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.ordering.bisection import bisect
from gpu_hodlr.tree import IndexArray


def geometric_permutation(points: Array, parts: int) -> IndexArray:
    """Split every node at the median of its widest coordinate (Bentley, CACM 18 (1975))."""
    xp = namespace(points)

    def widest_coordinate(index: Array) -> Array:
        real = (index >= 0)[:, :, None]
        inside = points[index]
        extent = xp.where(real, inside, -xp.inf).max(1) - xp.where(real, inside, xp.inf).min(1)
        axis = extent.argmax(axis=1)
        return xp.take_along_axis(inside, axis[:, None, None], axis=2)[:, :, 0]

    return bisect(len(points), parts, widest_coordinate, xp)

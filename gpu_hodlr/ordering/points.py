"""The geometric order: a k-d tree of the points."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr.devices import Array, to_host
from gpu_hodlr.ordering.bisection import bisect

IndexArray = np.ndarray[Any, Any]


def geometric_permutation(points: Array, parts: int) -> IndexArray:
    """Split every node at the median of its widest coordinate (Bentley, CACM 18 (1975))."""
    x = to_host(points)

    def widest_coordinate(index: IndexArray) -> IndexArray:
        real = (index >= 0)[:, :, None]
        inside = x[index]
        extent = np.where(real, inside, -np.inf).max(1) - np.where(real, inside, np.inf).min(1)
        axis = extent.argmax(axis=1)
        return np.take_along_axis(inside, axis[:, None, None], axis=2)[:, :, 0]

    return bisect(len(x), parts, widest_coordinate)

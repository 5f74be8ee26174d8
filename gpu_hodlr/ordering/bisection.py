"""Recursive bisection, a level at a time: every node is split at the median of a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr.tree import balanced_offsets, pad_segments

IndexArray = np.ndarray[Any, Any]


def bisect(n: int, parts: int, keys: Callable[[IndexArray], IndexArray]) -> IndexArray:
    """The permutation whose balanced parts are the leaves of the bisection.

    Args:
        n: N.
        parts: leaves, a power of two.
        keys: maps the (nodes, rows) indices of a level, -1 for padding, to sorting keys of the
            same shape.
    """
    permutation = np.arange(n)
    offsets = balanced_offsets(n, parts)
    width = parts
    while width > 1:  # width: leaves under a node of this level
        index = pad_segments(permutation, offsets[::width])
        key = np.where(index >= 0, keys(index), np.inf)
        order = np.argsort(key, axis=1, kind="stable")
        ordered = np.take_along_axis(index, order, axis=1)
        permutation = ordered[ordered >= 0]
        width //= 2
    return permutation

"""Recursive bisection, a level at a time: every node is split at the median of a key."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.tree import IndexArray, balanced_offsets, pad_segments


def bisect(n: int, parts: int, keys: Callable[[Array], Array], xp: ModuleType) -> IndexArray:
    """The permutation whose balanced parts are the leaves of the bisection.

    Args:
        n: N.
        parts: leaves, a power of two.
        keys: maps the (nodes, rows) indices of a level, -1 for padding, to sorting keys of the
            same shape.
        xp: the library that keys works with.
    """
    permutation = xp.arange(n)
    offsets = balanced_offsets(n, parts)
    width = parts
    while width > 1:  # width: leaves under a node of this level
        index = pad_segments(permutation, offsets[::width])
        key = xp.where(index >= 0, keys(index), xp.inf)
        order = xp.argsort(key, axis=1, kind="stable")
        ordered = xp.take_along_axis(index, order, axis=1)
        permutation = ordered[ordered >= 0]
        width //= 2
    return to_host(permutation)


def random_members(index: Array, count: int, rng: np.random.Generator) -> Array:
    """(nodes, count) random members of the rows of index (nodes, m), where padding is last."""
    xp = namespace(index)
    draw = xp.asarray(rng.random((len(index), count))) * (index >= 0).sum(axis=1)[:, None]
    return xp.take_along_axis(index, draw.astype(np.int64), axis=1)

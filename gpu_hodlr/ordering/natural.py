"""The natural order, its leaves aligned with the runs of the matrix (a layer's units)."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from gpu_hodlr.devices import HostIndex
from gpu_hodlr.operators.operator import Runs
from gpu_hodlr.tree import ClusterTree, balanced_offsets, pad_segments

_STRETCH = 1.25  # an aligned leaf may be this much larger than a balanced one


def natural_tree(runs: Runs, parts: int) -> ClusterTree:
    """Leaves that cut no short run, and long runs in equal pieces.

    The smallest leaf size whose packing needs at most `parts` leaves is taken; without one within
    25 % of N / parts the leaves are balanced and not aligned. Unused leaves stay empty.
    """
    n = len(runs.permutation)
    lengths = np.diff(np.append(runs.starts, n))
    smallest = -(-n // parts)
    if lengths.max() == 1:  # nothing to align with
        return ClusterTree(pad_segments(runs.permutation, balanced_offsets(n, parts)))
    for size in np.unique(np.linspace(smallest, _STRETCH * smallest, 33).astype(int)):
        offsets = _pack(lengths, int(size), parts)
        if offsets is not None:
            return ClusterTree(pad_segments(runs.permutation, offsets))
    return ClusterTree(pad_segments(runs.permutation, balanced_offsets(n, parts)))


def _pack(lengths: HostIndex, size: int, parts: int) -> HostIndex | None:
    """Offsets (parts + 1,) of leaves of at most `size`, or None if more leaves are needed."""
    pieces = -(-lengths // size)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    total = np.repeat(lengths, pieces)
    count = np.repeat(pieces, pieces)
    ends = np.cumsum(total * (within + 1) // count - total * within // count).tolist()
    offsets = [0]
    while offsets[-1] < ends[-1] and len(offsets) <= parts:
        offsets.append(ends[bisect_right(ends, offsets[-1] + size) - 1])  # of a list: quick
    if offsets[-1] < ends[-1]:
        return None
    return np.array(offsets + [offsets[-1]] * (parts + 1 - len(offsets)))

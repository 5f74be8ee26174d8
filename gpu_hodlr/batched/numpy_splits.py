"""NumPy implementation of the steps of a bisection."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.batched.distances import DISTANCES
from gpu_hodlr.devices import HostArray, HostIndex


def _inside(offsets: HostIndex, width: int, step: int) -> tuple[HostIndex, HostArray]:
    """(segments, width) places in the values, and whether they are in the row's segment."""
    edges = offsets[::step]
    place = edges[:-1, None] + np.arange(width)
    return place, place < edges[1:, None]


def pad_segments(values: HostIndex, offsets: HostIndex, width: int, step: int) -> HostIndex:
    """See `splits.pad_segments`."""
    place, inside = _inside(offsets, width, step)
    if not len(values):
        return np.full(place.shape, -1)
    return np.where(inside, values[np.minimum(place, len(values) - 1)], -1)


def join_segments(
    rows: HostIndex, offsets: HostIndex, out: HostIndex, order: HostIndex | None, step: int
) -> None:
    """See `splits.join_segments`."""
    ordered = rows if order is None else np.take_along_axis(rows, order, axis=1)
    out[:] = ordered[_inside(offsets, rows.shape[1], step)[1]]


def sort_segments(
    rows: HostIndex, key: HostArray, offsets: HostIndex, out: HostIndex, step: int
) -> None:
    """See `splits.sort_segments`."""
    last = float(np.finfo(key.dtype).max)  # what is no number comes before padding
    key = np.where(rows >= 0, np.fmin(key, last), np.inf)
    join_segments(rows, offsets, out, np.argsort(key, axis=1, kind="stable"), step)


def distances(
    name: str, inner: HostArray, norms: HostArray, rows: HostIndex, cols: HostIndex, summed: bool
) -> HostArray:
    """See `splits.distances`."""
    found = np.asarray(DISTANCES[name](inner, norms[rows], norms[cols]))
    return found.sum(axis=2) if summed else found


def farthest(index: HostIndex, distance: HostArray) -> HostIndex:
    """See `splits.farthest`."""
    slot = np.where(index >= 0, distance, -np.inf).argmax(axis=1)
    return np.take_along_axis(index, slot[:, None], axis=1)


def split_keys(near: HostArray, far: HostArray, norms: HostArray, index: HostIndex) -> HostArray:
    """See `splits.split_keys`."""
    return np.where(norms[index] > 0, near - far, np.finfo(near.dtype).max)

"""NumPy implementation of the ranking of cells."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.batched.ranking import Boxes, Examined, Rows
from gpu_hodlr.devices import HostArray, HostIndex

_BY_CENTER = 1e-3  # of the squared distance of centers: it orders cells that touch


def examined(cell: HostIndex, boxes: Boxes, rows: Rows) -> Examined:
    """See `ranking.examined`."""
    offsets = np.asarray(boxes.offsets)
    first, stop = offsets[cell], offsets[cell + 1]
    stop = np.where(cell < 0, first, stop)
    held = _overlap(rows, first, stop)
    low, high, others_low, others_high = (
        np.asarray(x) for x in (rows.low, rows.high, boxes.low, boxes.high)
    )
    distance = _distance(low[:, None], high[:, None], others_low[cell], others_high[cell])
    distance = np.where(held > 0, distance, np.inf)
    return first, held, np.where((held > 0) & (held < stop - first), -1.0, distance)


def divided(
    order: HostIndex, split: int, cell: HostIndex, seen: Examined, kept: Examined, at: int
) -> HostIndex:
    """See `ranking.divided`."""
    stay = order[:, split:]
    for x, to in zip(map(np.asarray, seen), kept, strict=True):
        to[:, at : at + stay.shape[1]] = np.take_along_axis(x, stay, axis=1)
    cell = np.where(np.asarray(seen[1]) > 0, cell, -1)
    cell = np.take_along_axis(cell, order[:, :split], axis=1)
    halves = np.stack([2 * cell, 2 * cell + 1], axis=2).reshape(len(cell), 2 * split)
    return np.maximum(halves, -1)


def _overlap(rows: Rows, first: HostIndex, stop: HostIndex) -> HostIndex:
    """How many columns of the rows there are among positions first .. stop - 1, (rows, k)."""
    k = first.shape[1]
    before = _before(rows, np.concatenate([first, stop], axis=1))
    return before[:, k:] - before[:, :k]


def _before(rows: Rows, position: HostIndex) -> HostIndex:
    """How many columns of the rows there are before positions, (rows, k)."""
    run, left, size = (np.asarray(x) for x in (rows.run, rows.left, rows.size))
    before = np.minimum(np.maximum(position, run[:, :1]), run[:, 1:]) - run[:, :1]
    q = left.shape[1]
    if q == 0:
        return before
    if q == 1:  # of most regions, and quick
        return before - np.minimum(np.maximum(position - left, 0), size)
    # The last run left out that begins before a position, of all rows at once: the numbers of a
    # row come after all those of the rows before.
    row, n = np.arange(len(left))[:, None], max(int(left.max()), int(position.max(initial=0)))
    last = np.searchsorted((left + row * (n + 1)).ravel(), position + row * (n + 1)) - 1
    there, last = last >= row * q, np.maximum(last, 0)
    whole = (size.cumsum(axis=1) - size).ravel()[last]
    part = np.minimum(position - left.ravel()[last], size.ravel()[last])
    return before - np.where(there, whole + part, 0)


def _distance(
    low: HostArray, high: HostArray, others_low: HostArray, others_high: HostArray
) -> HostArray:
    """Squared distances of boxes, and a little of their centers' where boxes touch."""
    with np.errstate(invalid="ignore"):  # of empty nodes, whose boxes are infinite
        gap = np.maximum(np.maximum(others_low - high, low - others_high), 0)
        centers = (others_low + others_high - low - high) / 2
        squares = (gap * gap + _BY_CENTER * centers * centers).sum(axis=2)
    return np.where(np.isfinite(squares), squares, float(np.finfo(squares.dtype).max))

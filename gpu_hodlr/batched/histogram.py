"""Histograms of weighted rows, of the same bits every time."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.devices import Array, HostArray, namespace, to_host

_UNIT = 1 << 30  # of a square of a bin: fewer than 2^33 are a sum


def weighted_histogram(bins: Array, values: Array, edges: Array, weights: Array) -> Array:
    """(2, count) of values (rows, columns): how many are in a bin, and the sum of their squares.

    On a GPU each square is rounded to 1e-9 of its bin's edge's, and nothing is waited for.

    Args:
        bins: (rows, columns) int64, from 0 to count - 1.
        values: (rows, columns) float64.
        edges: (count,) float64, positive, which absolute values of a bin do not exceed but by
            rounding.
        weights: (rows,) float64, of every row's part in both.
    """
    if namespace(values) is np:
        return _counted(to_host(bins), to_host(values), to_host(weights), len(edges))
    return _sorted(bins, values, edges, weights)


def _counted(bins: HostArray, values: HostArray, weights: HostArray, count: int) -> HostArray:
    each, place = np.broadcast_to(weights[:, None], values.shape), bins.ravel()
    return np.stack(
        [
            np.bincount(place, weight.ravel(), minlength=count)
            for weight in (each, each * values * values)
        ]
    )


def _sorted(bins: Array, values: Array, edges: Array, weights: Array) -> Array:
    """By sorting the bins of every row.

    CuPy's `bincount` adds in any order. Squares are integers of their bin here, whose sums have one
    value in any order, and whose running sums lose nothing.
    """
    xp, rows, count = namespace(values), len(bins), len(edges)
    keys = (bins + count * xp.arange(rows)[:, None]).ravel()
    order = xp.argsort(keys)
    starts = xp.searchsorted(keys[order], xp.arange(rows * count + 1))
    share = xp.rint(_UNIT * (values / edges[bins]) ** 2).astype(np.int64).ravel()
    sums = xp.concatenate([xp.zeros(1, np.int64), xp.cumsum(share[order])])[starts]
    numbers, squares = (
        (ends[1:] - ends[:-1]).reshape(rows, count).astype(np.float64) for ends in (starts, sums)
    )
    both = xp.concatenate([numbers, squares * (edges**2 / _UNIT)], axis=1)
    return (weights[None] @ both).reshape(2, count)

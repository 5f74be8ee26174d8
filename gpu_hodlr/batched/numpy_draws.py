"""NumPy implementation of draws of columns."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.devices import HostArray, HostIndex

ANYWHERE = 0.1  # share of the draws for which all columns are the same
_ONE = 2.0**40  # a chance of 1, in whole numbers: their sums ascend in whatever order they are made


def chances(count: HostIndex, wanted: int) -> HostArray:
    """See `draws.chances`."""
    end = count.cumsum(axis=1)
    density = _density(count, end)
    mass = count * density
    left = wanted - (end - count)
    rest = np.cumsum(np.ascontiguousarray(mass[:, ::-1]), axis=1)[:, ::-1]  # and all farther ones
    enough = left * density <= rest
    certain = (np.cumsum(enough, axis=1, dtype=np.int64) == 0).sum(axis=1)
    certain = np.minimum(certain, mass.shape[1] - 1)[:, None]
    left, rest = (np.take_along_axis(x, certain, 1) for x in (left, rest))
    multiple = left / np.where(rest > 0, rest, np.inf)
    return np.where(np.arange(mass.shape[1]) < certain, 1.0, np.minimum(1.0, multiple * density))


def _density(count: HostIndex, end: HostIndex) -> HostArray:
    """(t, q) what a column's chance is proportional to; decreasing."""
    near = np.maximum(end - (count - 1) / 2, 1.0) ** -1.0
    total = np.cumsum(count * near, axis=1)[:, -1:]  # one by one: padding changes no bit
    density = (1 - ANYWHERE) * near / np.maximum(total, 1e-300)
    density += ANYWHERE / np.maximum(end[:, -1:], 1)
    return np.where(count > 0, density, 0.0)


def systematic(
    first: HostIndex, count: HostIndex, chance: HostArray, wanted: int, start: HostArray
) -> tuple[HostIndex, HostArray]:
    """See `draws.systematic`."""
    t, q = chance.shape
    size = np.rint(count * chance * _ONE).astype(np.int64)
    end = np.cumsum(size, axis=1)
    up_to = np.minimum(np.ceil(end / _ONE - start), wanted)
    up_to = np.maximum(up_to, 0).astype(np.int64)
    # Slot k is in the first cell up to whose end there are more than k: all rows are searched at
    # once, each after all numbers of those before.
    row, slot = np.arange(t)[:, None], np.arange(wanted)
    ends = (up_to + row * (wanted + 1)).ravel()
    cell = np.searchsorted(ends, row * (wanted + 1) + slot, side="right") - row * q
    there = cell < q
    cell = np.minimum(cell, q - 1)
    chance, before, first, number = (
        np.take_along_axis(x, cell, 1) for x in (chance, end - size, first, count)
    )
    local = ((start + slot - before / _ONE) / np.where(there, chance, 1.0)).astype(np.int64)
    local = np.minimum(np.maximum(local, 0), number - 1)
    return np.where(there, first + local, -1), np.where(there, chance, 1.0)

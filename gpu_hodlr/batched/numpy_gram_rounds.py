"""NumPy implementation of what is around the factorization of Gram matrices."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.batched import tall
from gpu_hodlr.devices import HostArray

_MOST_EXPONENT = 1000


def scaled(samples: HostArray) -> tuple[HostArray, HostArray, HostArray]:
    """See `blocked_id.scaled`."""
    largest = np.maximum(samples.max(axis=(1, 2)), -samples.min(axis=(1, 2)))
    largest = largest.astype(np.float64)
    usual = (largest > 0) & np.isfinite(largest)
    power = np.floor(np.log2(np.where(usual, largest, 1.0)))
    power = np.clip(power, -_MOST_EXPONENT, _MOST_EXPONENT).astype(np.int32)
    one = np.ones(len(samples), np.float64)
    down, up = np.ldexp(one, -power), np.ldexp(one, power)
    return samples.astype(np.float64) * down[:, None, None], down, up


def limits(
    energy: HostArray, enough: HostArray, rounding: float, reach: float
) -> tuple[HostArray, HostArray, HostArray]:
    """See `blocked_id.limits`."""
    unknown = rounding * energy
    exact = ~(unknown > enough)  # written so that a NaN is left at that
    return unknown, exact, np.where(exact, enough, reach * energy)


def left_and_tails(
    energy: HostArray, unknown: HostArray, squares: HostArray
) -> tuple[HostArray, HostArray]:
    """See `blocked_id.left_and_tails`."""
    left = energy - squares.sum(axis=1)
    left = np.where((left <= unknown) & np.isfinite(energy), 0.0, left)
    return left, np.asarray(tall.tails_of(squares, left))


def seen(exact: HostArray, ranks: HostArray, done: HostArray, most: int) -> HostArray:
    """See `blocked_id.seen`."""
    done += ranks
    ended = exact | (done >= most)
    return np.array([exact.all(), ended.all(), ranks.max()], np.int64)

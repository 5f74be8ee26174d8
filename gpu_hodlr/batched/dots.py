"""Dot products of chosen pairs; those of whole arrays are in `batched`."""

from __future__ import annotations

from gpu_hodlr.batched import _implementation
from gpu_hodlr.devices import Array, HostIndex


def pair_dots(c: Array, u: HostIndex, v: HostIndex) -> Array:
    """Sums over o of c[u[i], o] c[v[i], o], (pairs, k), for c (n, outputs, k).

    Args:
        c: real numbers.
        u: (pairs,) host array.
        v: likewise.
    """
    result: Array = _implementation("dots", c).pair_dots(c, u, v)
    return result

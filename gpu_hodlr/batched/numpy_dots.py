"""NumPy implementation of dot products and squared norms."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.devices import HostArray, HostIndex


def column_dots(u: HostArray, v: HostArray) -> HostArray:
    """See `batched.column_dots`."""
    return np.einsum("ij,ij->j", u, v)


def squared_norms(x: HostArray) -> HostArray:
    """See `batched.squared_norms`; the sums are of x's type."""
    result: HostArray = np.einsum("ij,ij->i" if x.ndim == 2 else "tij,tij->t", x, x)
    return result.astype(np.float64)


def pair_dots(c: HostArray, u: HostIndex, v: HostIndex) -> HostArray:
    """See `dots.pair_dots`."""
    result = np.zeros((len(u), c.shape[2]), c.dtype)
    for rows in c.swapaxes(0, 1):  # one output after the other: few
        result += rows[u] * rows[v]
    return result

"""NumPy implementation of dot products and squared norms."""

from __future__ import annotations

from typing import Any

import numpy as np

NDArray = np.ndarray[Any, Any]


def column_dots(u: NDArray, v: NDArray) -> NDArray:
    """See `batched.column_dots`."""
    return np.einsum("ij,ij->j", u, v)


def squared_norms(x: NDArray) -> NDArray:
    """See `batched.squared_norms`; the sums are of x's type."""
    result: NDArray = np.einsum("ij,ij->i" if x.ndim == 2 else "tij,tij->t", x, x)
    return result.astype(np.float64)

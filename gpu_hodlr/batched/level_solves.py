"""A level of a solve with the factor V (K + damping I) V^T = [[D11, W^T L^T], [L W, L L^T]] of ULV.

Few right-hand sides on a GPU are one launch a level, each way (kernels/ulv_steps.cu).
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched.level_products import NARROW
from gpu_hodlr.devices import Array, namespace


def _kernels(T: Array, x: Array) -> ModuleType | None:
    """The raw kernels, where x is narrow, on a GPU and of T's type, and they are the faster way."""
    if namespace(x) is np or not 0 < x.shape[-1] <= NARROW or T.dtype != x.dtype:
        return None
    kernels = importlib.import_module("gpu_hodlr.batched.cupy_level_solves")
    return kernels if kernels.fits(T, x) else None


def eliminate(T: Array, L: Array, W: Array, index: Array, x: Array) -> tuple[Array, Array]:
    """Up: y = L^-1 (x2 - T x1), w = x1 - W^T y; x1 the first r of a node's rows, x2 the others.

    Args:
        T: (nodes, rows - r, r).
        L: (nodes, rows - r, rows - r) lower triangles.
        W: (nodes, rows - r, r).
        index: (nodes, rows) a node's rows, padding -1 last.
        x: (nodes, rows, k) of which they are numbers in the node, or (n, k).

    Returns:
        y (nodes, rows - r, k) and w (nodes, r, k).
    """
    kernels = _kernels(T, x)
    if kernels is not None:
        return kernels.eliminate(T, L, W, index, x)
    rows = batched.gather_rows(x, index) if x.ndim == 2 else batched.permute_rows(x, index)
    r = T.shape[2]
    w, rest = rows[:, :r].copy(), rows[:, r:].copy()
    batched.matmul(T, w, subtract_from=rest)
    y = batched.solve_triangular(L, rest)
    return y, batched.matmul(W, y, transpose_a=True, subtract_from=w)


def substitute(
    T: Array, L: Array, W: Array, index: Array, y: Array, w: Array, n: int | None = None
) -> Array:
    """The transpose of `eliminate`: z = L^-T (y - W w), and a node's rows of x are [w - T^T z; z].

    y and w may be overwritten.

    Args:
        T: see `eliminate`.
        L: see `eliminate`.
        W: see `eliminate`.
        index: see `eliminate`.
        y: (nodes, rows - r, k).
        w: (nodes, r, k).
        n: rows of x, all of them in `index`; None where it is (nodes, rows, k).
    """
    kernels = _kernels(T, w)
    if kernels is not None:
        return kernels.substitute(T, L, W, index, y, w, n)
    z = batched.matmul(W, w, subtract_from=y)
    z = batched.solve_triangular(L, z, transpose=True)
    rows = batched.join_rows(batched.matmul(T, z, transpose_a=True, subtract_from=w), z)
    if n is None:
        return batched.unpermute_rows(rows, index)
    return batched.scatter_rows(rows, index, n, every=True)

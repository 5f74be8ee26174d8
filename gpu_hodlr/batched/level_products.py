"""Products with the interpolative bases U = P [I; T] of a level, and with its couplings.

Wide right-hand sides are GEMMs; for a few columns on a GPU, where each launch counts, every
product here is one raw kernel (kernels/basis_products.cu) that reads its blocks once.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace

NARROW = 8  # columns up to here go to the raw kernels, which have as many sums a thread


def _kernels(stored: Array, x: Array) -> ModuleType | None:
    """The raw kernels, where x is narrow and on a GPU, and they read what is stored."""
    if namespace(x) is np or x.shape[-1] > NARROW:
        return None
    kernels = importlib.import_module("gpu_hodlr.batched.cupy_level_products")
    return kernels if kernels.reads(stored.dtype, x.dtype) else None


def restrict(T: Array, order: Array | None, x: Array) -> Array:
    """U^T x = x1 + T^T x2, (nodes, r, k), for x (nodes, rows, k).

    Args:
        T: (nodes, rows - r, r).
        order: (nodes, rows) the rows, skeleton first; None where they lie so.
        x: (nodes, rows, k).
    """
    kernels = _kernels(T, x)
    if kernels is not None:
        return kernels.restrict(T, order, x)
    r = T.shape[2]
    if order is None:
        skeleton, rest = x[:, :r].copy(), x[:, r:]
    else:
        skeleton, rest = (batched.permute_rows(x, i) for i in (order[:, :r], order[:, r:]))
    return batched.matmul(T, rest, transpose_a=True, add_to=skeleton)


def prolong(T: Array, order: Array | None, z: Array, *, add_to: Array | None = None) -> Array:
    """U z = P [z; T z], (nodes, rows, k), or add_to + U z written into add_to.

    Args:
        T: (nodes, rows - r, r).
        order: see `restrict`.
        z: (nodes, r, k).
        add_to: (nodes, rows, k).
    """
    kernels = _kernels(T, z)
    if kernels is not None:
        return kernels.prolong(T, order, z, add_to)
    if add_to is not None and order is None:
        add_to[:, : z.shape[1]] += z
        batched.matmul(T, z, add_to=add_to[:, z.shape[1] :])
        return add_to
    rows = batched.join_rows(z, batched.matmul(T, z))
    if order is not None:
        rows = batched.unpermute_rows(rows, order)
    if add_to is None:
        return rows
    add_to += rows
    return add_to


def couple(B: Array, w: Array, *, add_to: Array | None = None) -> Array:
    """Siblings through their coupling: z[2p] = B[p] w[2p + 1], z[2p + 1] = B[p]^T w[2p].

    Args:
        B: (pairs, r, r).
        w: (2 pairs, r, k).
        add_to: (2 pairs, r, k), z is added to it in place.
    """
    kernels = _kernels(B, w)
    if kernels is not None:
        return kernels.couple(B, w, add_to)
    z = namespace(w).zeros_like(w) if add_to is None else add_to
    batched.matmul(B, w[1::2], add_to=z[0::2])
    batched.matmul(B, w[0::2], transpose_a=True, add_to=z[1::2])
    return z


def leaf_product(D: Array, v: Array, leaves: Array) -> tuple[Array, Array]:
    """The rows x of v (n, k) by leaves, (nodes, m, k), and D x for blocks D (nodes, m, m)."""
    x = batched.gather_rows(v, leaves)
    kernels = _kernels(D, v)
    return x, batched.matmul(D, x) if kernels is None else kernels.leaf_product(D, v, leaves)

"""Products with the interpolative bases U = P [I; T] of a level, and with its couplings.

Wide right-hand sides are GEMMs; for a few columns on a GPU, where each launch counts, every
product here is one raw kernel (kernels/basis_products.cu) that reads its blocks once.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from types import ModuleType

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched.branches import Branch, branch
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
        x: (nodes, rows, k); or (n, k), whose rows `order` numbers as a whole, -1 for none.
    """
    kernels = _kernels(T, x)
    if kernels is not None:
        return kernels.restrict(T, order, x)
    r = T.shape[2]
    if x.ndim == 2:
        assert order is not None
        x, order = batched.gather_rows(x, order), None
    if order is None:
        skeleton, rest = x[:, :r].copy(), x[:, r:]
    else:
        aside = branch(x)
        with aside:
            skeleton = batched.permute_rows(x, order[:, :r])
        rest = batched.permute_rows(x, order[:, r:])
        aside.join()
    return batched.matmul(T, rest, transpose_a=True, add_to=skeleton)


def prolong(T: Array, order: Array | None, z: Array, *, add_to: Array | None = None) -> Array:
    """U z = P [z; T z], (nodes, rows, k), or add_to + U z written into add_to.

    Args:
        T: (nodes, rows - r, r).
        order: see `restrict`.
        z: (nodes, r, k).
        add_to: (nodes, rows, k); or (n, k), see `restrict`.
    """
    kernels = _kernels(T, z)
    if kernels is not None:
        return kernels.prolong(T, order, z, add_to)
    nodes, rest, r = T.shape
    aside = branch(z)
    if add_to is not None and order is None:
        with aside:
            add_to[:, :r] += z
        batched.matmul(T, z, add_to=add_to[:, r:])
        aside.join()
        return add_to
    rows = namespace(z).empty((nodes, rest + r, z.shape[2]), z.dtype)
    with aside:
        rows[:, :r] = z
    batched.matmul(T, z, write_to=rows[:, r:])
    aside.join()
    if order is not None and add_to is not None and add_to.ndim == 2:
        rows = batched.scatter_rows(rows, order, len(add_to))
    elif order is not None:
        rows = batched.unpermute_rows(rows, order)
    if add_to is None:
        return rows
    add_to += rows
    return add_to


def couple(
    B: Array, w: Array, *, add_to: Array | None = None, subtract_from: Array | None = None
) -> Array:
    """Siblings through their coupling: z[2p] = B[p] w[2p + 1], z[2p + 1] = B[p]^T w[2p].

    Args:
        B: (pairs, r, r).
        w: (2 pairs, r, k).
        add_to: (2 pairs, r, k), z is added to it in place.
        subtract_from: (2 pairs, r, k), z is taken off it in place.
    """
    kernels = _kernels(B, w)
    if kernels is not None:
        if subtract_from is None:
            return kernels.couple(B, w, add_to)
        subtract_from -= kernels.couple(B, w, None)
        return subtract_from
    if subtract_from is not None:
        batched.matmul(B, w[1::2], subtract_from=subtract_from[0::2])
        batched.matmul(B, w[0::2], transpose_a=True, subtract_from=subtract_from[1::2])
        return subtract_from
    if add_to is None:
        z = namespace(w).empty_like(w)
        batched.matmul(B, w[1::2], write_to=z[0::2])
        batched.matmul(B, w[0::2], transpose_a=True, write_to=z[1::2])
        return z
    batched.matmul(B, w[1::2], add_to=add_to[0::2])
    batched.matmul(B, w[0::2], transpose_a=True, add_to=add_to[1::2])
    return add_to


def leaf_product(
    D: Array, v: Array, leaves: Array, aside: Branch | None = None, *, gathered: bool = True
) -> tuple[Array, Array]:
    """The rows x of v (n, k) by leaves, (nodes, m, k), and D x for blocks D (nodes, m, m).

    Args:
        D: see above.
        v: see above.
        leaves: (nodes, m) rows of v, every one of them; padding -1.
        aside: D x is made there.
        gathered: False: both as (n, k), rows of v, where that is as good for `restrict` and
            `prolong` with the leaves for an order.
    """
    kernels = _kernels(D, v)
    if kernels is not None:
        x = batched.gather_rows(v, leaves) if gathered else v
        with aside or nullcontext():
            return x, kernels.leaf_product(D, v, leaves, not gathered)
    x = batched.gather_rows(v, leaves)
    with aside or nullcontext():
        return x, batched.matmul(D, x)

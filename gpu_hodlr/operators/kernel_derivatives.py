"""Derivatives of a kernel matrix in its length scales, as bilinear forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostArray, namespace, to_host
from gpu_hodlr.distributed import ALONE, Communicator, OrderedSum, shares
from gpu_hodlr.operators.point_blocks import PointBlocks
from gpu_hodlr.operators.point_kernel import KernelOperator

_TERMS = 64  # of a product: what ranks that share it send of each other's


def lengthscale_forms(
    op: KernelOperator, columns: Array, comm: Communicator = ALONE.comm
) -> tuple[HostArray, Array]:
    """u^T dK u of columns, dK = dK / d log lengthscale, and dK u of the first one, float64.

    dK_ij / d log l_c = -variance k'(r) / r (x_ic - x_jc)^2 in length scales, and the sum over c for
    one length scale. Exact, O(N^2 (d + k)): strips of dK, which is symmetric, are formed from the
    diagonal on, multiplied and dropped; the ranks share them. A function of the user's is
    differentiated by central differences.

    Args:
        op: K.
        columns: (N, k) the vectors u.
        comm: the ranks; all get the same bits, on any number of them.

    Returns:
        (p, k) and (N, p), p = 1, or d where every coordinate has its length scale.
    """
    entries, groups = op._entries, _groups(op)
    n = len(entries.x)
    xp = namespace(entries.x)
    every = _long_beside_short(list(entries.strips(range(n), range(n))))
    rounds = [every[part] for part in shares(len(every), min(len(every), _TERMS))]
    shape = max(1, len(groups)), columns.shape[1]
    products = OrderedSum(comm, len(rounds), n)
    mine = rounds[products.own]
    forms = xp.zeros((len(mine), *shape), np.float64)

    def terms() -> Iterator[Array]:
        for form, strips in zip(forms, mine, strict=True):
            term = xp.zeros((n, shape[0]), np.float64)
            for here, rows, cols in strips:
                _add_strip(op, groups, (here, rows, cols[:, here.start :]), columns, form, term)
            yield term

    first = products(terms(), xp.zeros((n, shape[0]), np.float64))
    counts = [part.stop - part.start for part in shares(len(rounds), comm.size)]
    return to_host(comm.allgather(forms, counts).sum(axis=0)), first


def _add_strip(
    op: KernelOperator,
    groups: list[list[int]],
    strip: tuple[slice, Array, Array],
    columns: Array,
    forms: Array,
    first: Array,
) -> None:
    """Add what a strip of dK, right of the diagonal, has of `lengthscale_forms`.

    Args:
        op: K.
        groups: see `_groups`.
        strip: which rows, their indices, and the columns' from the first of these rows on.
        columns: (N, k), see `lengthscale_forms`.
        forms: (p, k), overwritten, as the next.
        first: (N, p).
    """
    here, rows, cols = strip
    height, xp = here.stop - here.start, namespace(columns)
    # What stands right of the strips stands below them as well, and counts twice.
    every = xp.concatenate([columns[here.start :, :1], 2 * columns[here.start :]], axis=1)
    every[:height, 1:] = columns[here]
    squared = op._entries.squared_distances(rows, cols)
    slope = _slope(op._entries, squared)
    for c in range(len(forms)):
        weight = _squares(op._entries.x, groups[c], rows, cols) if groups else squared
        weight *= slope
        product = batched.matmul(weight, xp.broadcast_to(every, (len(rows), *every.shape)))
        own = product.reshape(-1, every.shape[1])[:height]
        forms[c] += (columns[here] * own[:, 1:]).sum(axis=0, dtype=np.float64)
        below = batched.matmul(weight, columns[rows, :1], transpose_a=True).sum(axis=0)[height:, 0]
        first[here, c] += own[:, 0]
        first[here.stop :, c] += below


def _long_beside_short(strips: list[Any]) -> list[Any]:
    """The first, the last, the second and so on: consecutive ones are as much work anywhere."""
    n = len(strips)
    return [strips[i // 2 if i % 2 == 0 else n - 1 - i // 2] for i in range(n)]


def _groups(op: KernelOperator) -> list[list[int]]:
    """Scaled coordinates that belong to every length scale; none where there is one for all."""
    if isinstance(op.lengthscale, float):
        return []
    d, scaled = op.points.shape[1], op.coordinates.shape[1]
    return [list(range(c, scaled, d)) for c in range(d)]


def _squares(x: Array, group: list[int], rows: Array, cols: Array) -> Array:
    """Squared differences in some coordinates, (t, m, k)."""
    parts = [x[rows, c][:, :, None] - x[cols, c][:, None] for c in group]
    for part in parts:
        part *= part
    return sum(parts[1:], start=parts[0])


def _slope(entries: PointBlocks, squared: Array) -> Array:
    """-variance k'(r) / r of r^2; 0 for r = 0, where it may be infinite and r^2 times it is 0."""
    xp, kernel = namespace(squared), entries.kernel
    r = xp.sqrt(squared)
    apart = xp.where(squared > 0, r, r.dtype.type(1))
    if entries.own is not None:
        step = float(np.finfo(r.dtype).eps) ** (1 / 3)
        nearer, farther = (entries.own_values(r * r.dtype.type(np.exp(e))) for e in (-step, step))
        slope = (nearer - farther) / (apart * apart) * r.dtype.type(0.5 / step)
    elif kernel.profile == "gaussian":
        slope = xp.exp(squared * -0.5)
    elif kernel.profile == "laplace":
        slope = xp.exp(-r) / apart
    elif kernel.profile == "matern32":
        slope = 3 * xp.exp(r * -(3.0**0.5))
    elif kernel.profile == "matern52":
        r *= 5.0**0.5
        slope = (5.0 / 3.0) * (1 + r) * xp.exp(-r)
    elif kernel.profile == "rational_quadratic":
        slope = xp.exp(xp.log1p(squared / (2 * kernel.parameter)) * -(kernel.parameter + 1))
    else:  # spherical
        slope = xp.where(r < 1, 1.5 / apart - 1.5 * r, r.dtype.type(0))
    return xp.where(squared > 0, slope * kernel.variance, r.dtype.type(0))

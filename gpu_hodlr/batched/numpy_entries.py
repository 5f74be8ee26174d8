"""NumPy implementation of the entry generators: batches of blocks of a matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from gpu_hodlr.batched.numpy_linalg import matmul
from gpu_hodlr.batched.threads import over_nodes
from gpu_hodlr.devices import HostArray

if TYPE_CHECKING:
    from gpu_hodlr.batched import GramRows, PointKernel


_DIRECT_DIMENSIONS = 3  # up to here coordinate differences are cheaper than a matrix product
_CANCELLED = 1e-3  # of |x|^2 + |y|^2: smaller squared distances are taken again, by differences
_STRIP_BYTES = 1 << 17  # of the entries that are made together
_SQRT3, _SQRT5 = 3.0**0.5, 5.0**0.5


def _blank_padding(block: HostArray, rows: HostArray, cols: HostArray) -> None:
    block[rows < 0] = 0
    block[:, cols < 0] = 0


def dense_entries(array: HostArray, rows: HostArray, cols: HostArray) -> HostArray:
    """See `batched.dense_entries`."""
    out = np.empty((*rows.shape, cols.shape[1]), array.dtype)

    def work(t: int) -> None:
        out[t] = array[rows[t][:, None], cols[t]]
        _blank_padding(out[t], rows[t], cols[t])

    over_nodes(work, len(rows))
    return out


def _squared_differences(x: HostArray, y: HostArray, out: HostArray) -> None:
    """|x - y|^2 of few coordinates, y in column-major order."""
    np.subtract(x[:, :1], y[:, 0], out=out)
    out *= out
    if x.shape[1] > 1:
        difference = np.empty_like(out)
        for a in range(1, x.shape[1]):
            np.subtract(x[:, a : a + 1], y[:, a], out=difference)
            difference *= difference
            out += difference


def _squared_by_products(x: HostArray, y: HostArray, out: HostArray) -> None:
    """|x|^2 + |y|^2 - 2 x^T y, where it does not cancel."""
    if not len(y):  # beside a level of rank 0; there is no mean
        return
    center = y.mean(axis=0)
    x, y = x - center, y - center
    np.matmul(x, -2 * y.T, out=out)
    sizes = np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y)
    out += sizes
    # Where the sum cancels (close points) the difference is taken after all.
    i, j = np.nonzero(out <= _CANCELLED * sizes)
    out[i, j] = ((x[i] - y[j]) ** 2).sum(axis=1)


def _apply_profile(profile: str, r: HostArray, parameter: float) -> None:
    """k(r) in place of r^2, r in units of the length scale; kernels/point_entries.cu.

    gaussian exp(-r^2 / 2), laplace exp(-r), matern32 (1 + sqrt(3) r) exp(-sqrt(3) r),
    matern52 (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r), rational_quadratic
    (1 + r^2 / (2 alpha))^-alpha; Rasmussen and Williams, Gaussian Processes for Machine Learning
    (2006), section 4.2. spherical (1 - r)^2 (1 + r / 2) for r < 1, else 0; Chiles and Delfiner,
    Geostatistics (2012), section 2.5.1. squared_distance r^2.
    """
    if profile == "squared_distance":
        return
    if profile == "gaussian":
        r *= -0.5
        np.exp(r, out=r)
        return
    if profile == "rational_quadratic":
        r /= 2 * parameter
        np.log1p(r, out=r)
        r *= -parameter
        np.exp(r, out=r)
        return
    np.sqrt(r, out=r)
    if profile == "spherical":
        inside = np.maximum(1 - r, 0)
        r /= 2
        r += 1
        r *= inside
        r *= inside
        return
    if profile != "laplace":
        r *= _SQRT3 if profile == "matern32" else _SQRT5
    exponential = np.negative(r)
    np.exp(exponential, out=exponential)
    if profile == "laplace":
        r[:] = exponential
        return
    if profile == "matern52":
        r += r * r / 3
    r += 1
    r *= exponential


def _strips(block: HostArray) -> Iterator[slice]:
    """Of rows, each so small that what is done to it is done in the cache."""
    height = max(1, _STRIP_BYTES // max(1, block.itemsize * block.shape[1]))
    for start in range(0, len(block), height):
        yield slice(start, start + height)


def point_entries(
    points: HostArray, kernel: PointKernel, nugget: HostArray, rows: HostArray, cols: HostArray
) -> HostArray:
    """See `batched.point_entries`."""
    every_row = np.broadcast_to(nugget, len(points))
    on_diagonal = bool(nugget.any())
    out = np.empty((*rows.shape, cols.shape[1]), points.dtype)

    def work(t: int) -> None:
        block, x, y = out[t], points[rows[t]], points[cols[t]]
        direct = x.shape[1] <= _DIRECT_DIMENSIONS
        if direct:
            y = np.asfortranarray(y)
        else:
            _squared_by_products(x, y, block)
        for strip in _strips(block):
            if direct:
                _squared_differences(x[strip], y, block[strip])
            _apply_profile(kernel.profile, block[strip], kernel.parameter)
            if kernel.variance != 1.0:
                block[strip] *= points.dtype.type(kernel.variance)
        if on_diagonal and rows.shape[1]:
            ascending = np.sort(rows[t])
            place = np.minimum(np.searchsorted(ascending, cols[t]), len(ascending) - 1)
            [there] = np.nonzero(ascending[place] == cols[t])
            i, j = np.nonzero(rows[t][:, None] == cols[t][there])
            out[t][i, there[j]] += every_row[rows[t][i]]
        _blank_padding(out[t], rows[t], cols[t])

    over_nodes(work, len(rows))
    return out


def inner_products(x: HostArray, rows: HostArray, cols: HostArray) -> HostArray:
    """See `batched.inner_products`."""
    return matmul(x[rows], x[cols], False, True, None, 1)


def khatri_rao_entries(
    features: HostArray,
    feature_of: HostArray,
    unit_of: HostArray,
    unit_gram: GramRows,
    rows: HostArray,
    cols: HostArray,
) -> HostArray:
    """See `batched.khatri_rao_entries`.

    For each distinct unit u on the side with fewer of them: one panel X[f(J)] * G[u, u(j)] and
    one GEMM with the rows of that unit, 2 n operations an entry.
    """
    out = np.zeros((*rows.shape, cols.shape[1]), features.dtype)

    def work(t: int) -> None:
        row_slots, col_slots = np.nonzero(rows[t] >= 0)[0], np.nonzero(cols[t] >= 0)[0]
        if row_slots.size and col_slots.size:
            i, j = rows[t][row_slots], cols[t][col_slots]
            out[t][np.ix_(row_slots, col_slots)] = block(i, j)

    def block(i: HostArray, j: HostArray) -> HostArray:
        row_units, col_units = np.unique(unit_of[i]), np.unique(unit_of[j])
        if len(col_units) < len(row_units):
            return block_by_row_units(j, i, col_units, row_units).T
        return block_by_row_units(i, j, row_units, col_units)

    def block_by_row_units(
        i: HostArray, j: HostArray, row_units: HostArray, col_units: HostArray
    ) -> HostArray:
        result = np.zeros((len(i), len(j)), features.dtype)
        x_rows, x_cols = features[feature_of[i]], features[feature_of[j]]
        slot = np.searchsorted(col_units, unit_of[j])
        for u in row_units:
            gram = unit_gram.rows(int(u), col_units)
            seen = np.nonzero(gram.any(axis=1)[slot])[0]  # an elementwise output layer: few
            mine = np.nonzero(unit_of[i] == u)[0]
            if seen.size == len(j):
                result[mine] = x_rows[mine] @ (x_cols * gram[slot]).T
            elif seen.size:
                panel = x_cols[seen] * gram[slot[seen]]
                result[np.ix_(mine, seen)] = x_rows[mine] @ panel.T
        return result

    over_nodes(work, len(rows))
    return out

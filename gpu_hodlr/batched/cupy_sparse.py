"""CuPy implementation of sparse rows; kernels/sparse_rows.cu."""

from __future__ import annotations

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import launch, suffix
from gpu_hodlr.batched.level_products import NARROW
from gpu_hodlr.devices import Array

_WARPS = 8


class SparseRows:
    """See `batched.SparseRows`.

    S^T is kept by its rows as well: sums into rows met in any order would need atomics, whose order
    and so whose bits change from run to run.
    """

    def __init__(self, starts: Array, columns: Array, values: Array, width: int) -> None:
        columns = columns.astype(np.int32)
        self._by_rows = cupy.ascontiguousarray(starts), columns, cupy.ascontiguousarray(values)
        order = cupy.argsort(columns)  # stable: the rows of a column ascend
        row = cupy.searchsorted(starts[1:], cupy.arange(len(columns)), side="right")
        # Not bincount, which reads the smallest and the largest column.
        every = cupy.arange(width + 1, dtype=np.int32)
        ends = cupy.searchsorted(columns[order], every).astype(np.int64)
        self._by_columns = ends, row[order].astype(np.int32), self._by_rows[2][order]

    def matmul(self, x: Array) -> Array:
        """See `batched.SparseRows`."""
        return _multiply(self._by_rows, x)

    def transposed_matmul(self, x: Array) -> Array:
        """See `batched.SparseRows`."""
        return _multiply(self._by_columns, x)


def sums_by_key(keys: Array, values: Array) -> tuple[Array, Array]:
    """See `batched.sums_by_key`; sums by rows of kernels/sparse_rows.cu, one read of their number.

    A sum by `bincount` would be one of atomics.
    """
    keys = cupy.maximum(keys, -1)
    order = cupy.argsort(keys)  # stable: the values of a key stay in order
    ordered = keys[order]
    found = cupy.unique(cupy.concatenate([cupy.full(1, -1), keys]))  # of none first, always there
    starts = cupy.searchsorted(ordered, found)
    ends = cupy.concatenate([starts[1:], cupy.full(1, len(keys))])
    columns, one = cupy.zeros(len(keys), np.int32), cupy.ones((1, 1), values.dtype)
    return found[1:], _multiply((ends, columns, values[order]), one)[:, 0]


def _multiply(by_rows: tuple[Array, Array, Array], x: Array) -> Array:
    rows, k = len(by_rows[0]) - 1, x.shape[1]
    y = cupy.empty((rows, k), x.dtype)
    if not y.size:
        return y
    x = cupy.ascontiguousarray(x)
    kind, tiles = ("narrow", 1) if k <= NARROW else ("wide", -(-k // 32))
    launch(
        "sparse_rows", f"sparse_rows_{kind}_{suffix(x.dtype)}", (-(-rows // _WARPS), tiles),
        (32, _WARPS), (*by_rows, x, y, np.int64(rows), k),
    )  # fmt: skip
    return y

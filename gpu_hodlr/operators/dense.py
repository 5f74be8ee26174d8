"""A symmetric matrix that fits in memory."""

from __future__ import annotations

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import as_array, check_finite
from gpu_hodlr.devices import AnyArray, Array, device_of, move, namespace, resolve_device
from gpu_hodlr.errors import ArgumentError, ShapeError
from gpu_hodlr.operators.operator import Operator

_STRIP = 1024  # rows looked at together by the symmetry check

_CACHED = 1 << 26  # bytes of a matrix that is not read from memory for every product
_TOGETHER = 10  # columns: of 16,384 rows they take three times as long as one


class DenseOperator(Operator):
    """A dense symmetric matrix (it is not copied).

    Args:
        array: (N, N) NumPy, CuPy or torch, float32 or float64, symmetric to rounding.
        definite: whether it is positive semi-definite, see `Operator`.

    Raises:
        ShapeError: not square, or N < 2.
        DtypeError: not a real floating array.
        ArgumentError: NaN or infinity, or not symmetric.

    Example:
        >>> op = gh.DenseOperator(np.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> op.shape, op.definite
        ((2, 2), True)
        >>> op @ np.array([1.0, 0.0])
        array([2., 1.])
    """

    entry_cost = 10.0  # a random read, in units of an operation in a matrix product

    def __init__(self, array: AnyArray, *, definite: bool = True) -> None:
        array = as_array(array, "array")
        if array.ndim != 2 or array.shape[0] != array.shape[1]:
            raise ShapeError(f"array must be square, got shape {tuple(array.shape)}")
        super().__init__(array.shape[0], array.dtype, resolve_device(None, array))
        check_finite(array, "array")
        _check_symmetric(array)
        self.array = array
        self.definite = bool(definite)
        self.product_cost = 2.0 * array.size
        self.least_columns = _TOGETHER if array.nbytes > _CACHED else 1

    def _move_data(self, device: str) -> None:
        self.array = move(self.array, device)

    def _matmat(self, v: Array) -> Array:
        # A strip of rows a task: products with one column are as parallel as with many.
        n = self.shape[0]
        strips = max(1, min(64, n // 256))
        whole = n - n % strips
        top = batched.matmul(
            self.array[:whole].reshape(strips, whole // strips, n),
            namespace(v).broadcast_to(v, (strips, *v.shape)),
        ).reshape(whole, -1)
        # Not @: BLAS's own threads would sum in another order.
        rest = batched.matmul(self.array[None, whole:], v[None])[0]
        return namespace(v).concatenate([top, rest])

    def _blocks(self, rows: Array, cols: Array) -> Array:
        return batched.dense_entries(self.array, rows, cols)

    def _diagonal(self) -> Array:
        return self.array.diagonal().copy()


def _check_symmetric(array: Array) -> None:
    n = array.shape[0]
    xp = namespace(array)
    largest = float(max(-float(array.min()), float(array.max()), 0.0))
    allowed = 100 * np.finfo(array.dtype).eps * largest
    for start in range(0, n, _STRIP):
        strip = array[start : start + _STRIP]
        gap = float(xp.abs(strip - array[:, start : start + _STRIP].T).max())
        if gap > allowed:
            raise ArgumentError(
                f"array must be symmetric: |K - K^T| reaches {gap:.3g} where |K| reaches "
                f"{largest:.3g} (device {device_of(array)}); pass (K + K.T) / 2 if that is meant"
            )

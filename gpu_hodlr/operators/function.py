"""A matrix given by the user's own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import as_array, check_finite
from gpu_hodlr.devices import (
    Array,
    check_memory,
    device_of,
    namespace,
    namespace_on,
    resolve_device,
    to_host,
)
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from gpu_hodlr.operators.base import Operator, by_blocks


class FunctionOperator(Operator):
    """A symmetric matrix behind `matmat`, `entries` and `diagonal` functions.

    Args:
        n: the order N.
        matmat: V (N, k) -> K V (N, k).
        entries: rows (m,), cols (k,) integer arrays -> K[rows, cols] (m, k).
        diagonal: () -> (N,); taken from `entries` or `matmat` when missing.
        dtype: float32 or float64; results are converted to it.
        product_cost: operations of a product with one column, if known; it steers which way
            the matrix is sampled.
        device: "cpu", or "cuda": then the functions get and give CuPy arrays (indices stay NumPy).

    Raises:
        ArgumentError: neither matmat nor entries; later, a function's result has NaN or infinity.
        DtypeError: an argument that should be callable is not; a result is not an array.
        ShapeError: N < 2; later, a function's result has the wrong shape.
    """

    entry_cost = 20.0

    def __init__(
        self,
        n: int,
        matmat: Callable[[Array], Any] | None = None,
        entries: Callable[[Array, Array], Any] | None = None,
        diagonal: Callable[[], Any] | None = None,
        dtype: Any = np.float64,
        product_cost: float | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__(n, dtype, resolve_device(device))
        if matmat is None and entries is None:
            raise ArgumentError("FunctionOperator needs matmat or entries (or both), got neither")
        for name, function in (("matmat", matmat), ("entries", entries), ("diagonal", diagonal)):
            if function is not None and not callable(function):
                raise DtypeError(f"{name} must be callable, got {type(function).__name__}")
        self._functions = (matmat, entries, diagonal)
        self.has_products, self.has_entries = matmat is not None, entries is not None
        self.product_cost = 20.0 * n if product_cost is None else float(product_cost)

    def _checked(self, result: Any, shape: tuple[int, ...], name: str) -> Array:
        array = as_array(result, f"the result of {name}")
        if device_of(array) != self.device:
            raise DeviceError(
                f"{name} must give arrays on {self.device}, got one on {device_of(array)}"
            )
        if array.shape != shape:
            raise ShapeError(f"{name} must give shape {shape}, got {tuple(array.shape)}")
        check_finite(array, f"the result of {name}")
        return array.astype(self.dtype, copy=False)

    def _matmat(self, v: Array) -> Array:
        matmat = self._functions[0]
        if matmat is None:
            return self._matmat_by_blocks(v, max(1, v.shape[1]))
        v = namespace(v).ascontiguousarray(v)  # what a user's own kernel may count on
        return self._checked(matmat(v), v.shape, "matmat")

    def _matmat_by_blocks(self, v: Array, width: int) -> Array:
        if self.has_products:
            return super()._matmat_by_blocks(v, width)
        n = self.shape[0]
        out = namespace(v).empty_like(v)
        strip = max(1, (1 << 24) // n)
        for start in range(0, n, strip):
            rows = np.arange(start, min(n, start + strip))
            block = self._entries(rows[None], np.arange(n)[None])

            def multiply(part: Array, block: Array = block) -> Array:
                product: Array = batched.matmul(block, part[None])[0]
                return product

            out[start : start + strip] = by_blocks(multiply, v, width)
        return out

    def _entries(self, rows: Array, cols: Array) -> Array:
        entries = self._functions[1]
        if entries is None:
            raise ArgumentError("this FunctionOperator has no entries, only matmat")
        xp = namespace_on(self.device)
        rows, cols = to_host(rows), to_host(cols)
        out = xp.zeros((*rows.shape, cols.shape[1]), self.dtype)
        # The user's function may not be thread-safe: one block after the other.
        for block, row, col in zip(out, rows, cols, strict=True):
            i, j = np.nonzero(row >= 0)[0], np.nonzero(col >= 0)[0]
            if i.size and j.size:
                values = self._checked(entries(row[i], col[j]), (i.size, j.size), "entries")
                block[xp.asarray(i)[:, None], xp.asarray(j)] = values
        return out

    def _diagonal(self) -> Array:
        _, entries, diagonal = self._functions
        n = self.shape[0]
        if diagonal is not None:
            return self._checked(diagonal(), (n,), "diagonal")
        if entries is not None:
            one_by_one = np.arange(n)[:, None]
            return self._entries(one_by_one, one_by_one)[:, 0, 0]
        needed = 3 * n * n * self.dtype.itemsize
        check_memory(needed, "a diagonal from matmat alone", "N", self.device)
        return self._matmat(namespace_on(self.device).eye(n, dtype=self.dtype)).diagonal().copy()

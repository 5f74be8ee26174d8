"""A matrix given by the user's own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.devices import Array, HostIndex, namespace, resolve_device
from gpu_hodlr.errors import ArgumentError, DtypeError
from gpu_hodlr.operators.operator import Operator

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDevice, AnyDtype


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
        definite: whether the matrix is positive semi-definite, see `Operator`.

    Raises:
        ArgumentError: neither matmat nor entries; later, a function's result has NaN or infinity.
        DtypeError: an argument that should be callable is not; a result is not an array.
        ShapeError: N < 2; later, a function's result has the wrong shape.

    Example:
        >>> d = np.arange(1.0, 6.0)
        >>> op = gh.FunctionOperator(
        ...     5,
        ...     matmat=lambda v: d[:, None] * v,
        ...     entries=lambda rows, cols: np.where(rows[:, None] == cols, d[rows][:, None], 0),
        ... )
        >>> op.diagonal()
        array([1., 2., 3., 4., 5.])
    """

    entry_cost = 20.0

    def __init__(
        self,
        n: int,
        matmat: Callable[[Array], Any] | None = None,
        entries: Callable[[HostIndex, HostIndex], Any] | None = None,
        diagonal: Callable[[], Any] | None = None,
        dtype: AnyDtype = np.float64,
        product_cost: float | None = None,
        device: AnyDevice | None = None,
        definite: bool = True,
    ) -> None:
        super().__init__(n, dtype, resolve_device(device))
        if matmat is None and entries is None:
            raise ArgumentError("FunctionOperator needs matmat or entries (or both), got neither")
        for name, function in (("matmat", matmat), ("entries", entries), ("diagonal", diagonal)):
            if function is not None and not callable(function):
                raise DtypeError(f"{name} must be callable, got {type(function).__name__}")
        self._functions = (matmat, entries, diagonal)
        self.has_products, self.has_entries = matmat is not None, entries is not None
        self.definite = bool(definite)
        self.product_cost = 20.0 * n if product_cost is None else float(product_cost)

    def _matmat(self, v: Array) -> Array:
        matmat = self._functions[0]
        if matmat is None:
            return super()._matmat(v)
        v = namespace(v).ascontiguousarray(v)  # what a user's own kernel may count on
        return self.reader.checked(matmat(v), v.shape, "matmat")

    def _block(self, rows: HostIndex, cols: HostIndex) -> Array:
        entries = self._functions[1]
        if entries is None:
            return super()._block(rows, cols)
        return self.reader.checked(entries(rows, cols), (len(rows), len(cols)), "entries")

    def _diagonal(self) -> Array:
        diagonal = self._functions[2]
        if diagonal is None:
            return super()._diagonal()
        return self.reader.checked(diagonal(), self.shape[:1], "diagonal")

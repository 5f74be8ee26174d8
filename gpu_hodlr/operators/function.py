"""A matrix given by the user's own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.devices import AnyArray, Array, HostIndex, device_of, namespace, resolve_device
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from gpu_hodlr.operators.operator import Operator
from gpu_hodlr.operators.points import as_points

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
        points: (N, d) or (N,) coordinates of the rows, if they have any, copied: rows that are near
            have large entries. Ordering "geometric" and neighbours go by them.

    Raises:
        ArgumentError: neither matmat nor entries; points with NaN or infinity; later, a function's
            result has them.
        DtypeError: an argument that should be callable is not; points, or a result, are not an
            array of real floating numbers.
        ShapeError: N < 2, or points of another shape; later, a function's result has the wrong one.
        DeviceError: the points are on another device.

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
        points: AnyArray | None = None,
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
        self.points = None if points is None else self._own_points(points)

    @property
    def has_diagonal(self) -> bool:
        """Whether there are entries or a function of its own."""
        return self.has_entries or self._functions[2] is not None

    def _own_points(self, points: AnyArray) -> Array:
        found = as_points(points, "points")
        if len(found) != self.shape[0]:
            raise ShapeError(
                f"points must have shape ({self.shape[0]}, d), got {tuple(found.shape)}"
            )
        if device_of(found) != self.device:
            raise DeviceError(
                f"points are on {device_of(found)}, the functions work on {self.device}"
            )
        return found.copy()

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

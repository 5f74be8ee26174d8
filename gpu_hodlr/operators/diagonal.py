"""A diagonal matrix."""

from __future__ import annotations

from gpu_hodlr.arrays import as_array, check_finite
from gpu_hodlr.devices import AnyArray, Array, move, namespace, resolve_device
from gpu_hodlr.errors import ShapeError
from gpu_hodlr.operators.operator import Operator


class Diagonal(Operator):
    """diag(d): an operator, and what a compressed matrix can be added to (`K + gh.Diagonal(d)`).

    Args:
        d: (N,) NumPy, CuPy or torch, float32 or float64; it is not copied.

    Attributes:
        d: the same, as an array of the operator's library.

    Raises:
        ShapeError: not (N,), or N < 2.
        DtypeError: not a real floating array.
        ArgumentError: NaN or infinity.

    Example:
        >>> d = np.array([1.0, 2.0, 3.0])
        >>> K = gh.compress(np.ones((3, 3))) + gh.Diagonal(d)
        >>> (K @ np.ones(3)).round(6)
        array([4., 5., 6.])
    """

    entry_cost = 1.0

    def __init__(self, d: AnyArray) -> None:
        d = as_array(d, "d")
        if d.ndim != 1:
            raise ShapeError(f"d must have shape (N,), got {tuple(d.shape)}")
        super().__init__(len(d), d.dtype, resolve_device(None, d))
        check_finite(d, "d")
        self.d = d
        self.definite = bool((d >= 0).all())
        self.product_cost = float(len(d))

    def _move_data(self, device: str) -> None:
        self.d = move(self.d, device)

    def _matmat(self, v: Array) -> Array:
        return self.d[:, None] * v

    def _blocks(self, rows: Array, cols: Array) -> Array:
        xp = namespace(self.d)
        rows, cols = xp.asarray(rows)[:, :, None], xp.asarray(cols)[:, None, :]
        return xp.where((rows == cols) & (rows >= 0), self.d[rows], self.d.dtype.type(0))

    def _diagonal(self) -> Array:
        return self.d.copy()

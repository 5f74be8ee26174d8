"""Kernel matrices of points."""

from __future__ import annotations

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import as_array, check_finite
from gpu_hodlr.checks import check_number
from gpu_hodlr.devices import AnyArray, Array, move, namespace, resolve_device
from gpu_hodlr.errors import ArgumentError, ShapeError
from gpu_hodlr.operators.operator import Operator
from gpu_hodlr.operators.reader import by_blocks

KERNELS = ("gaussian", "laplace", "matern32", "matern52", "rational_quadratic")
_STRIP = 512  # columns of K formed together by an exact product


class KernelOperator(Operator):
    """K[i, j] = k(|x_i - x_j| / lengthscale) + nugget [i = j].

    gaussian k(r) = exp(-r^2 / 2), laplace exp(-r), matern32 (1 + sqrt(3) r) exp(-sqrt(3) r),
    matern52 (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r), rational_quadratic (1 + r^2 / 4)^-2 (of
    order 2). Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), section 4.2.

    Args:
        points: (N, d), or (N,) for points on a line; float32 or float64.
        kernel: one of the names above.
        lengthscale: in the units of the points, > 0.
        nugget: added to the diagonal, >= 0.

    Raises:
        ShapeError: points not (N, d), or N < 2.
        DtypeError: points not real floating.
        ArgumentError: an unknown kernel, a bad length scale or nugget, NaN, infinite or
            overflowing points.

    Example:
        >>> op = gh.KernelOperator(np.array([0.0, 1.0, 3.0]), "laplace", 2.0, nugget=0.1)
        >>> op.to_dense().round(3)
        array([[1.1  , 0.607, 0.223],
               [0.607, 1.1  , 0.368],
               [0.223, 0.368, 1.1  ]])
    """

    entry_cost = 20.0
    points: Array

    def __init__(
        self,
        points: AnyArray,
        kernel: str = "gaussian",
        lengthscale: float = 1.0,
        nugget: float = 0.0,
    ) -> None:
        points = as_array(points, "points")
        if points.ndim == 1:
            points = points[:, None]
        if points.ndim != 2 or points.shape[1] == 0:
            raise ShapeError(f"points must have shape (N, d), got {tuple(points.shape)}")
        super().__init__(points.shape[0], points.dtype, resolve_device(None, points))
        check_finite(points, "points")
        if kernel not in KERNELS:
            raise ArgumentError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        self.lengthscale = check_number(lengthscale, "lengthscale", positive=True)
        self.nugget = check_number(nugget, "nugget")
        self.points, self.kernel = points, kernel
        # squared distances, at most (2 reach)^2 d, must not overflow
        reach = float(np.sqrt(np.finfo(points.dtype).max / points.shape[1])) / 2.0
        if float(abs(points).max()) / self.lengthscale > reach:
            raise ArgumentError(
                f"points must lie within {reach:.0e} length scales of 0 in {points.dtype}, got "
                f"{float(abs(points).max()):.3g} with lengthscale {self.lengthscale:.3g}"
            )
        self.entry_cost += 3.0 * points.shape[1]
        self.product_cost = (2.0 + self.entry_cost) * points.shape[0] ** 2

    def _move_data(self, device: str) -> None:
        self.points = move(self.points, device)

    def _matmat(self, v: Array) -> Array:
        return self._by_strips(v, max(1, v.shape[1]))

    def _matmat_by_blocks(self, v: Array, width: int) -> Array:
        return self._by_strips(v, width)

    def _by_strips(self, v: Array, width: int) -> Array:
        """Exact, O(N^2): K is formed in strips of columns that are multiplied and dropped."""
        xp = namespace(v)
        n = self.shape[0]
        every = xp.arange(n)
        out = xp.empty_like(v)
        per_call = max(1, (1 << 25) // (n * _STRIP))  # strips held at a time: about 256 MB
        starts = range(0, n, _STRIP * per_call)
        for start in starts:
            stop = min(n, start + _STRIP * per_call)
            count = -(-(stop - start) // _STRIP)
            rows = xp.full((count, _STRIP), -1)
            rows.reshape(-1)[: stop - start] = every[start:stop]
            strips = self._blocks(rows, xp.broadcast_to(every, (count, n)))

            def multiply(part: Array, strips: Array = strips) -> Array:
                product = batched.matmul(strips, xp.broadcast_to(part, (len(strips), *part.shape)))
                return product.reshape(len(strips) * _STRIP, part.shape[1])

            out[start:stop] = by_blocks(multiply, v, width)[: stop - start]
        return out

    def _blocks(self, rows: Array, cols: Array) -> Array:
        return batched.point_entries(
            self.points, self.kernel, self.lengthscale, self.nugget, rows, cols
        )

    def _diagonal(self) -> Array:
        xp = namespace(self.points)
        return xp.full(self.shape[0], 1.0 + self.nugget, dtype=self.dtype)

"""Kernel matrices of points."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr.arrays import check_dtype
from gpu_hodlr.batched import PointKernel
from gpu_hodlr.checks import check_number
from gpu_hodlr.devices import AnyArray, Array, HostArray, move, namespace, resolve_device
from gpu_hodlr.errors import ArgumentError, DeviceError, ShapeError
from gpu_hodlr.operators.cross_kernel import CrossKernel
from gpu_hodlr.operators.operator import Operator
from gpu_hodlr.operators.point_blocks import PointBlocks, Profile
from gpu_hodlr.operators.points import as_points, check_noise, check_numbers, nearest_to_origin

# What the kernels are made of: a periodic one is gaussian on circles.
_PROFILES = {
    "gaussian": "gaussian",
    "laplace": "laplace",
    "matern32": "matern32",
    "matern52": "matern52",
    "rational_quadratic": "rational_quadratic",
    "inverse_multiquadric": "rational_quadratic",
    "spherical": "spherical",
    "periodic": "gaussian",
}
KERNELS = tuple(_PROFILES)
_ALIASES = {"rbf": "gaussian", "matern12": "laplace", "exponential": "laplace"}
_SPHERICAL_DIMENSIONS = 3  # in more it is not positive definite


class KernelOperator(Operator):
    """K[i, j] = variance k(r_ij) + nugget_i [i = j], r_ij = |(x_i - x_j) / lengthscale|.

    ====================  ================================================  ===========
    kernel                k(r)                                              also called
    ====================  ================================================  ===========
    gaussian              exp(-r^2 / 2)                                     rbf
    laplace               exp(-r)                                           matern12
    matern32              (1 + sqrt(3) r) exp(-sqrt(3) r)
    matern52              (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r)
    rational_quadratic    (1 + r^2 / (2 alpha))^-alpha
    inverse_multiquadric  (1 + r^2)^(-1/2)
    spherical             1 - 3 r / 2 + r^3 / 2 for r < 1, else 0; d <= 3
    periodic              exp(-2 sum_c (sin(pi d_c / p_c) / l_c)^2)
    ====================  ================================================  ===========

    In "periodic" d is x - y, p the period, l the length scale of coordinate c.

    Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), section 4.2; the
    spherical one: Chiles and Delfiner, Geostatistics (2012), section 2.5.1; the periodic one:
    MacKay, Introduction to Gaussian Processes (1998), section 5. On a line it is scikit-learn's
    ExpSineSquared; in more dimensions that one, of the distance, is not positive definite, and this
    is the product over the coordinates, which is.

    All arrays are copied. The point of their bounding box nearest to the origin is subtracted from
    the points in float64, before they are scaled: map coordinates lose no digit that they have.
    (In float32 they have lost some before: pass float64 and `dtype="float32"`.)

    Args:
        points: (N, d), or (N,) for points on a line; float32 or float64.
        kernel: one of the names above, or k itself: a function of an array of distances r, of any
            shape, of the library of the points, that gives k of each; it is called on whole blocks.
        lengthscale: > 0, in the units of the points; of the periodic kernel a plain number. Or one
            for every coordinate, (d,).
        nugget: added to the diagonal, >= 0: a number, or one for every row, (N,).
        variance: > 0.
        alpha: of rational_quadratic, > 0, by default 2.
        period: of periodic, > 0, by default 1: a number, or one for every coordinate, (d,).
        definite: whether K is positive semi-definite, see `Operator`; the named kernels are, of a
            function of your own you say it.
        dtype: of the matrix; that of the points by default.

    Attributes:
        kernel: the name, or "own".
        lengthscale, nugget, variance: as they were given.

    Raises:
        ShapeError: points not (N, d), N < 2, or a length scale, period or nugget of another shape.
        DtypeError: points not real floating; a number that is none.
        ArgumentError: an unknown kernel, or one that has no alpha or period, or is not positive
            definite in so many dimensions; a bad number; NaN, infinite or overflowing points.

    Example:
        >>> op = gh.KernelOperator(np.array([0.0, 1.0, 3.0]), "laplace", 2.0, nugget=0.1)
        >>> op.to_dense().round(3)
        array([[1.1  , 0.607, 0.223],
               [0.607, 1.1  , 0.368],
               [0.223, 0.368, 1.1  ]])
        >>> points = np.array([[0.0, 0.0], [1.0, 100.0]])
        >>> noise = np.array([0.1, 0.2])
        >>> op = gh.KernelOperator(points, "rbf", [1.0, 100.0], noise, variance=2.0)
        >>> op.to_dense().round(3)
        array([[2.1  , 0.736],
               [0.736, 2.2  ]])
        >>> gh.KernelOperator(points, lambda r: 1 / (1 + r)).entries([0], [1]).round(4)
        array([[0.0099]])
    """

    entry_cost = 20.0
    points: Array

    def __init__(
        self,
        points: AnyArray,
        kernel: str | Profile = "gaussian",
        lengthscale: float | AnyArray = 1.0,
        nugget: float | AnyArray = 0.0,
        *,
        variance: float = 1.0,
        alpha: float | None = None,
        period: float | AnyArray | None = None,
        definite: bool = True,
        dtype: DTypeLike | None = None,
    ) -> None:
        found = as_points(points, "points")
        wanted = found.dtype if dtype is None else check_dtype(dtype, "dtype")
        super().__init__(found.shape[0], wanted, resolve_device(None, found))
        d = found.shape[1]
        self.kernel, profile, own = _kernel(kernel, d)
        self.lengthscale = check_numbers(lengthscale, "lengthscale", d)
        self.variance = check_number(variance, "variance", positive=True)
        self.alpha = _own_number(alpha, "alpha", self.kernel, "rational_quadratic", 2.0, 1)
        self.period = _own_number(period, "period", self.kernel, "periodic", 1.0, d)
        noise = check_noise(nugget, "nugget", self.shape[0], self.dtype, self.device)
        self.nugget: float | Array = noise if len(noise) > 1 else float(noise[0])
        self.definite = bool(definite)
        self.points = found.copy()
        self._origin: Array = nearest_to_origin(found)
        parameter = 0.5 if self.kernel == "inverse_multiquadric" else float(self.alpha or 1.0)
        self._entries = PointBlocks(
            self._scaled(found), PointKernel(profile, parameter, self.variance), noise, own
        )
        self.entry_cost += 3.0 * d
        self.product_cost = (2.0 + self.entry_cost) * float(self.shape[0]) ** 2

    @property
    def coordinates(self) -> Array:
        """The points in length scales, from their corner; of the periodic kernel on circles."""
        return self._entries.x

    def cross(self, new_points: AnyArray) -> CrossKernel:
        """The kernel matrix between other points and these, without the nugget: for predictions.

        Args:
            new_points: (M, d), or (M,) on a line, where the points are.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: they are not such points.

        Example:
            >>> op = gh.KernelOperator(np.array([0.0, 1.0, 3.0]), "laplace", nugget=0.1)
            >>> weights = gh.compress(op).factorize().solve(np.array([0.0, 1.0, 0.0]))
            >>> (op.cross(np.array([1.0, 2.0])) @ weights).round(3)
            array([0.896, 0.294])
        """
        found = as_points(new_points, "new_points")
        resolved = resolve_device(None, found)
        if resolved != self.device:
            raise DeviceError(f"new_points are on {resolved}, the operator is on {self.device}")
        if found.shape[1] != self.points.shape[1]:
            raise ShapeError(
                f"new_points must have shape (M, {self.points.shape[1]}), got {tuple(found.shape)}"
            )
        return CrossKernel(self._entries, self._scaled(found, "new_points"))

    def _scaled(self, points: Array, name: str = "points") -> Array:
        """In length scales, in the matrix's dtype.

        Raises:
            ArgumentError: their squared distances could overflow.
        """
        xp = namespace(points)
        length = xp.asarray(np.asarray(self.lengthscale))
        with np.errstate(over="ignore"):
            scaled = points.astype(np.float64) - self._origin
            if self.period is not None:
                # exp(-|e(x) - e(y)|^2 / (2 l^2)), e(x) = (cos, sin)(2 pi x / period).
                scaled *= 2 * np.pi / xp.asarray(np.asarray(self.period))
                scaled = xp.concatenate([xp.cos(scaled) / length, xp.sin(scaled) / length], axis=1)
            else:
                scaled /= length
            scaled = scaled.astype(self.dtype)
        # squared distances, at most (2 reach)^2 d, must not overflow
        reach = float(np.sqrt(np.finfo(self.dtype).max / scaled.shape[1])) / 2.0
        if scaled.size and not float(abs(scaled).max()) <= reach:
            raise ArgumentError(
                f"{name} must lie within {reach:.0e} length scales of each other in {self.dtype}, "
                f"got lengthscale {self.lengthscale}"
            )
        return scaled

    def _move_data(self, device: str) -> None:
        self.points, self._origin = move(self.points, device), move(self._origin, device)
        self._entries = self._entries.on(device)
        if not isinstance(self.nugget, float):
            self.nugget = self._entries.nugget

    def _matmat(self, v: Array) -> Array:
        return self._product(v, max(1, v.shape[1]))

    def _matmat_by_blocks(self, v: Array, width: int) -> Array:
        return self._product(v, width)

    def _product(self, v: Array, width: int) -> Array:
        every = range(self.shape[0])
        return self._entries.product(every, every, v, width)

    def _blocks(self, rows: Array, cols: Array) -> Array:
        return self._entries.blocks(rows, cols)

    def _diagonal(self) -> Array:
        return self._entries.diagonal()


def _kernel(kernel: object, d: int) -> tuple[str, str, Profile | None]:
    """Its name, the name of its profile, and the user's own function.

    Raises:
        ArgumentError: it is unknown, or not positive definite in d dimensions.
    """
    if callable(kernel):
        return "own", "squared_distance", kernel
    name = _ALIASES.get(kernel, kernel) if isinstance(kernel, str) else kernel
    if not isinstance(name, str) or name not in _PROFILES:
        raise ArgumentError(
            f"kernel must be one of {', '.join((*KERNELS, *_ALIASES))}, or a function of "
            f"distances, got {kernel!r}"
        )
    if name == "spherical" and d > _SPHERICAL_DIMENSIONS:
        raise ArgumentError(
            f"kernel 'spherical' is positive definite in up to {_SPHERICAL_DIMENSIONS} dimensions, "
            f"got points in {d}"
        )
    return name, _PROFILES[name], None


def _own_number(
    value: float | AnyArray | None, name: str, kernel: str, owner: str, usual: float, count: int
) -> float | HostArray | None:
    """A number that one kernel has, None for the others.

    Raises:
        ArgumentError, DtypeError, ShapeError: given to another kernel, or no number > 0.
    """
    if kernel != owner:
        if value is not None:
            raise ArgumentError(f"{name} belongs to kernel {owner!r}, got kernel {kernel!r}")
        return None
    if value is None:
        return usual
    return check_numbers(value, name, count)

"""The numbers a Gaussian process is fitted by: variance, length scales and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from gpu_hodlr.applications.likelihood import LogMarginalLikelihood
from gpu_hodlr.arrays import as_array
from gpu_hodlr.checks import check_number
from gpu_hodlr.devices import Array, HostArray, HostIndex, is_array, namespace, to_host
from gpu_hodlr.errors import ArgumentError, DtypeError, ShapeError
from gpu_hodlr.operators.points import check_noise, check_numbers

NAMES = ("variance", "lengthscale", "noise")  # in the order of theta
_SPAN = 1e4  # bounds by default, over and under where the optimization starts
_OF_SPREAD = 0.5  # a length scale to start at, of the standard deviation of the coordinates
_OF_SQUARE = 0.1  # noise to start at, of the mean square of y, and of the variance

Bounds = tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Hyperparameters:
    """Of K + diag(noise rows), K of a variance and length scales.

    Attributes:
        variance: of the prior.
        lengthscale: a number, or (d,).
        noise: variance of the noise; of rows a common factor of them.
        rows: (N,) known variances of the noise of every sample; None for a number.
        bounds: of each of `NAMES`; None of what is fixed.
    """

    variance: float
    lengthscale: float | HostArray
    noise: float
    rows: HostArray | None
    bounds: Mapping[str, Bounds]

    @classmethod
    def read(cls, given: Mapping[str, Any], points: Array, y: HostArray | None) -> Self:
        """What the user gives; the rest is taken from the data, from what is seen of them.

        Args:
            given: `NAMES` and their bounds, `NAME_bounds`.
            points: (N, d).
            y: (N,); None before there are any.

        Raises:
            DtypeError, ShapeError, ArgumentError: a number, array or pair of bounds that cannot be.
        """
        square = 1.0 if y is None else float(np.mean(y**2)) or 1.0
        variance = given["variance"]
        variance = square if variance is None else check_number(
            variance, "variance", positive=True
        )  # fmt: skip
        noise, rows = given["noise"], None
        if noise is None:
            noise = _OF_SQUARE * square
        elif getattr(noise, "ndim", 0) or isinstance(noise, (list, tuple)):
            rows, noise = _rows(noise, len(points), checked=y is not None), 1.0
        else:
            noise = check_number(noise, "noise", positive=True)
        scales = _lengthscale(given["lengthscale"], points)
        start = {"variance": variance, "lengthscale": scales, "noise": noise}
        bounds = {name: _bounds(given[f"{name}_bounds"], start[name], name) for name in NAMES}
        return cls(variance, scales, noise, rows, bounds)

    @property
    def free(self) -> list[str]:
        """Those that are fitted."""
        return [name for name in NAMES if self.bounds[name] is not None]

    @property
    def theta(self) -> HostArray:
        """(p,) their logarithms."""
        return np.concatenate([np.zeros(0), *(np.log(self._values(name)) for name in self.free)])

    @property
    def limits(self) -> HostArray:
        """(p, 2) between which these may be."""
        pairs = [self.bounds[name] for name in self.free for _ in self._values(name)]
        return np.log(np.array(pairs, np.float64).reshape(-1, 2))

    @property
    def direct(self) -> HostArray:
        """(p,) whether it is the number itself that steps change, not its logarithm: the noise.

        Where there is less noise than signal the likelihood is almost quadratic in it. Variance and
        length scales make a ridge, which is straight in their logarithms.
        """
        return np.array([name == "noise" for name in self.free for _ in self._values(name)], bool)

    def at(self, theta: HostArray) -> Self:
        """With other logarithms."""
        found: dict[str, Any] = {}
        for name in self.free:
            size = len(self._values(name))
            part, theta = np.exp(theta[:size]), theta[size:]
            found[name] = part if np.ndim(getattr(self, name)) else float(part[0])
        return replace(self, **found)

    def fixed(self) -> Self:
        """With nothing that is fitted."""
        return replace(self, bounds=dict.fromkeys(NAMES))

    def gradient(self, found: LogMarginalLikelihood) -> HostArray:
        """(p,) of what was found, in theta."""
        parts = [np.atleast_1d(found.gradient[name]) for name in self.free]
        return np.concatenate([np.zeros(0), *parts])

    def of_rows(self, index: HostIndex) -> Self:
        """Of some of the samples."""
        return self if self.rows is None else replace(self, rows=self.rows[index])

    @property
    def damping(self) -> float | HostArray:
        """What the noise adds to the diagonal: a number, or (N,)."""
        return self.noise if self.rows is None else self.noise * self.rows

    @property
    def least_noise(self) -> float:
        """Of all samples."""
        return float(np.min(self.damping))

    def _values(self, name: str) -> HostArray:
        return np.atleast_1d(np.asarray(getattr(self, name), np.float64))


def _lengthscale(given: Any, points: Array) -> float | HostArray:
    """A number, or one of every coordinate; "auto" and "each" begin at half of the spread."""
    d = points.shape[1]
    if isinstance(given, str):
        spread = to_host(namespace(points).std(points, axis=0))
        if given == "each":
            return np.where(spread > 0, _OF_SPREAD * spread, 1.0)
        if given == "auto":
            return _OF_SPREAD * float(np.sqrt(np.mean(spread**2))) or 1.0
        raise ArgumentError(
            f"lengthscale must be 'auto', 'each', a number or ({d},), got {given!r}"
        )
    return check_numbers(given, "lengthscale", d)


def _rows(given: Any, n: int, *, checked: bool) -> HostArray | None:
    """(N,) of every sample; None where there are none yet.

    Raises:
        DtypeError, ShapeError, ArgumentError: it is not, or not positive.
    """
    if isinstance(given, (list, tuple)):
        given = np.array([check_number(x, "noise", positive=True) for x in given])
    rows = to_host(as_array(given, "noise")).astype(np.float64)
    if not checked:
        return None
    if rows.shape != (n,):
        raise ShapeError(f"noise must be a number or ({n},), one of every sample, got {rows.shape}")
    check_noise(rows, "noise", n, rows.dtype, "cpu")
    if not (rows > 0).all():
        raise ArgumentError("noise must be > 0 everywhere")
    return rows


def _bounds(given: Any, start: float | HostArray, name: str) -> Bounds:
    """A pair of numbers, or None where the hyper-parameter is not fitted.

    Raises:
        DtypeError, ArgumentError: they are none, or the start is not between them.
    """
    name = f"{name}_bounds"
    if isinstance(given, str) and given == "fixed":
        return None
    if given is None:
        return float(np.min(start)) / _SPAN, float(np.max(start)) * _SPAN
    if not (isinstance(given, (tuple, list)) or is_array(given)) or len(given) != 2:
        raise DtypeError(f"{name} must be a pair of numbers, 'fixed' or None, got {given!r}")
    low, high = (check_number(x, name, positive=True) for x in given)
    if not low <= np.min(start) <= np.max(start) <= high:
        raise ArgumentError(f"{name} must have {start} between them, got {low}, {high}")
    return low, high

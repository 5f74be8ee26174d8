"""What is known of a spectrum: rules of quadrature, and what sums over it give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpu_hodlr.applications.pictures import Curve, draw_densities
from gpu_hodlr.checks import check_number
from gpu_hodlr.devices import HostArray
from gpu_hodlr.errors import ArgumentError, DtypeError, NotPositiveDefiniteError, ShapeError

_POINTS = 1000  # of a curve

Rule = tuple[HostArray, HostArray]  # nodes and weights, (steps, probes) each


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """What `spectrum` found.

    Errors are one standard error, of so many probes, with half of what the quadratures of Gauss and
    of Radau differ by, and what a quarter of the steps less would change.

    Attributes:
        n: N.
        eigenvalues: ascending, those of the largest absolute values, computed one by one.
        trace: the sum of all eigenvalues.
        trace_error: of it; 0 where the matrix gives its diagonal.
        frobenius: norm(K)_F.
        frobenius_error: of it.
        largest: eigenvalue, from below.
        largest_error: there is an eigenvalue within that of `largest`.
        smallest: eigenvalue, from above.
        smallest_error: likewise.

    Example:
        >>> found = gh.spectrum(np.diag(np.r_[np.ones(300), 50.0, -20.0]))
        >>> found.eigenvalues[[0, -1]].round(6), round(found.trace), round(found.frobenius, 3)
        (array([-20.,  50.]), 330, 56.569)
        >>> value, error = found.density(np.array([1.0, 30.0]), width=0.5)
        >>> value.round(3)  # 300 of 302 eigenvalues are at 1, none near 30
        array([0.793, 0.   ])
    """

    n: int
    eigenvalues: HostArray
    trace: float = field(init=False)
    trace_error: float = field(init=False)
    frobenius: float = field(init=False)
    frobenius_error: float = field(init=False)
    largest: float = field(init=False)
    largest_error: float = field(init=False)
    smallest: float = field(init=False)
    smallest_error: float = field(init=False)
    _gauss: Rule
    _radau: Rule
    _shorter: Rule
    _residuals: HostArray
    _bound: float
    _end: float
    _exact_trace: float | None

    def __post_init__(self) -> None:
        """Sums over the spectrum, and its ends."""
        found = np.concatenate([self.eigenvalues, self._gauss[0].ravel()])
        size = float(abs(found).max()) or 1.0  # squares may leave the range of numbers
        mean, error = self._sum(lambda x: x / size)
        square, squares_error = self._sum(lambda x: (x / size) ** 2)
        norm = float(np.sqrt(square))
        bounds = np.full(len(self.eigenvalues), self._bound)
        missed = np.concatenate([bounds, np.hypot(self._residuals.ravel(), self._bound)])
        high, low = int(found.argmax()), int(found.argmin())
        exact = self._exact_trace
        values = {
            "trace": size * float(mean) if exact is None else exact,
            "trace_error": size * float(error) if exact is None else 0.0,
            "frobenius": size * norm,
            "frobenius_error": size * float(squares_error) / (2 * norm) if norm else 0.0,
            "largest": float(found[high]),
            "largest_error": float(missed[high]),
            "smallest": float(found[low]),
            "smallest_error": float(missed[low]),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return (
            f"Spectrum(N = {self.n}, {self.smallest:.3g} .. {self.largest:.3g}, trace "
            f"{self.trace:.4g} +- {self.trace_error:.1g}, Frobenius norm {self.frobenius:.4g} +- "
            f"{self.frobenius_error:.1g})"
        )

    def density(self, grid: Any, width: float) -> tuple[HostArray, HostArray]:
        """The density of the eigenvalues, each spread to a Gaussian; its integral is one.

        phi(t) = 1/N sum_i exp(-(t - lambda_i)^2 / (2 width^2)) / (sqrt(2 pi) width)

        Args:
            grid: (t,) where.
            width: standard deviation of the Gaussians, > 0. What lies closer cannot be told apart.

        Returns:
            (t,) the density and (t,) its errors.

        Raises:
            ArgumentError, DtypeError, ShapeError: the grid is not (t,) or not finite, a bad width.

        Example:
            >>> found = gh.spectrum(np.diag(np.linspace(0, 1, 500)))
            >>> value, error = found.density(np.array([-0.5, 0.5, 1.5]), width=0.05)
            >>> bool(abs(value[1] - 1) < 0.1), value[[0, 2]].round(3)
            (True, array([0., 0.]))
        """
        points = _numbers(grid, "grid")
        if points.ndim != 1:
            raise ShapeError(f"grid must have shape (t,), got {points.shape}")
        return self._smoothed(points, check_number(width, "width", positive=True), lambda x: x)

    def effective_dimension(self, damping: Any) -> tuple[HostArray, HostArray]:
        """tr(K (K + damping I)^-1) = sum_i lambda_i / (lambda_i + damping).

        How many directions the data determine against a prior of that precision (MacKay, Neural
        Computation 4 (1992), section 4). Between the rules of Gauss and Radau lies what infinitely
        many steps would give: the value is their mean, the error includes half of what is between
        them, which tells of a damping so small that `steps` do not do. A matrix of which no
        negative Ritz value was seen is taken to be positive semi-definite.

        Args:
            damping: a number, or an array of them, > 0; of a matrix that is not positive
                semi-definite it must exceed minus its smallest eigenvalue.

        Returns:
            The effective dimension and its error, each of the shape of damping.

        Raises:
            NotPositiveDefiniteError: K + damping I is not positive definite.
            ArgumentError, DtypeError: a damping is not a finite number > 0.

        Example:
            >>> found = gh.spectrum(np.diag(np.r_[np.zeros(96), 1.0, 1.0, 3.0, 3.0]))
            >>> found.effective_dimension(np.array([1.0, 3.0]))[0].round(6)
            array([2.5, 1.5])
        """
        d = _numbers(damping, "damping")
        if not (d > 0).all():
            raise ArgumentError(f"damping must be > 0, got {d.min()}")
        least = min(self.smallest, self._end)
        if (d <= -least).any():
            raise NotPositiveDefiniteError(
                f"the matrix plus damping {d.min():.3g} may not be positive definite: its smallest "
                f"eigenvalue is between {least:.6g} and {self.smallest:.6g}",
                curvature=self.smallest + float(d.min()),
            )
        return self._sum(lambda x: x[..., None] / (x[..., None] + d.ravel()), d.shape)

    def plot(
        self,
        path: str | Path,
        *others: Spectrum,
        labels: Sequence[str] = (),
        width: float = 0.1,
        threshold: float | None = None,
    ) -> None:
        """A picture of the density, fit for a paper; needs matplotlib.

        Both axes are logarithmic: x = sign(lambda) log10(1 + |lambda| / c), which is linear below
        c, and eigenvalues for each decade of lambda, each spread over `width` decades. A band shows
        the errors, ticks below show the eigenvalues that were computed one by one.

        Args:
            path: .png, .pdf or .svg.
            others: more spectra in the same picture, such as of later checkpoints.
            labels: of all spectra, for a legend.
            width: of the Gaussians, > 0, in decades.
            threshold: c, > 0; by default what the steps can tell apart near zero: the range of the
                eigenvalues that were not computed one by one, over the steps.

        Raises:
            ArgumentError, DtypeError: not a label for each spectrum; a bad width or threshold.

        Example:
            >>> gh.spectrum(np.diag(np.geomspace(1e-6, 1, 200))).plot("density.png")
        """
        every = (self, *others)
        check_number(width, "width", positive=True)
        if labels and len(labels) != len(every):
            raise ArgumentError(f"labels must be {len(every)}, one a spectrum, got {len(labels)}")
        ends = [x for one in every for x in (one.smallest, one.largest)]
        c = max(one._resolution for one in every) or max(map(abs, ends)) or 1.0
        if threshold is not None:
            c = check_number(threshold, "threshold", positive=True)

        def modulus(x: HostArray) -> HostArray:
            result: HostArray = np.sign(x) * np.log10(1 + abs(x) / c)
            return result

        begin, end = modulus(np.array([min(ends), max(ends)])) + 6 * width * np.array([-1, 1])
        grid = np.linspace(begin, end, max(_POINTS, int(8 * (end - begin) / width)))
        curves = []
        for one, label in zip(every, labels or [""] * len(every), strict=True):
            value, error = one._smoothed(grid, width, modulus)
            curves.append(
                Curve(label, grid, one.n * value, one.n * error, modulus(one.eigenvalues))
            )
        draw_densities(Path(path), curves, c, width)

    @property
    def _resolution(self) -> float:
        """How far apart Ritz values are, on average."""
        nodes = self._gauss[0]
        return float(np.ptp(nodes)) / len(nodes) if nodes.size else 0.0

    def _smoothed(
        self, grid: HostArray, width: float, place: Callable[[HostArray], HostArray]
    ) -> tuple[HostArray, HostArray]:
        """The density, and its errors, of where eigenvalues are placed."""

        def gaussians(x: HostArray) -> HostArray:
            with np.errstate(over="ignore"):
                result: HostArray = np.exp(-0.5 * ((grid - place(x)[..., None]) / width) ** 2)
            return result

        value, error = self._sum(gaussians, grid.shape)
        height = np.sqrt(2 * np.pi) * width * self.n
        return value / height, error / height

    def _sum(
        self, function: Callable[[HostArray], HostArray], shape: tuple[int, ...] = ()
    ) -> tuple[HostArray, HostArray]:
        """The sum of a function over all eigenvalues, and its error.

        Args:
            function: of (...), gives (...), or with one more axis, which is given the shape.
            shape: of the result.
        """
        rest, probes = self.n - len(self.eigenvalues), self._gauss[0].shape[1]

        def means(rule: Rule) -> tuple[HostArray, HostArray]:
            """Of the function and its square, over the eigenvalues that are left."""
            total: list[Any] = [0.0, 0.0]
            for x, w in zip(rule[0].T, rule[1].T, strict=True):
                y = function(x)
                total[0], total[1] = total[0] + w @ y, total[1] + w @ y**2
            return total[0] / probes, total[1] / probes

        (gauss, square), (radau, _), (shorter, _) = map(
            means, (self._gauss, self._radau, self._shorter)
        )
        between = rest * (radau - gauss) / 2
        # The variance of u^T B u on the sphere in m dimensions is 2 / (m + 2) of that of the
        # eigenvalues of B: nearer than what a few probes are apart by.
        variance = 2 / (rest + 2) * np.maximum(square - gauss**2, 0) / probes
        error = np.hypot(rest * variance**0.5, np.hypot(between, rest * (shorter - gauss)))
        total = function(self.eigenvalues).sum(axis=0) + rest * gauss + between
        return np.reshape(total, shape), np.reshape(error, shape)


def _numbers(x: Any, name: str) -> HostArray:
    """Finite real numbers, float64.

    Raises:
        DtypeError: no numbers.
        ArgumentError: NaN or infinity.
    """
    try:
        found = np.asarray(x)
    except (TypeError, ValueError, RuntimeError):
        found = np.empty(0, object)
    if found.dtype.kind not in "fiu":
        raise DtypeError(f"{name} must be real numbers, got {type(x).__name__}")
    if not np.isfinite(found).all():
        raise ArgumentError(f"{name} must be finite")
    return found.astype(np.float64)

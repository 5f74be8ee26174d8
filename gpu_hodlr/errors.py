"""Exceptions and warnings of the package.

Every exception is a `GpuHodlrError` and also the built-in type a caller would expect, names the
argument, and says what was got and what was wanted.

Example:
    >>> try:
    ...     gh.compress(np.eye(8), rtol=-1.0)
    ... except gh.errors.ArgumentError as error:
    ...     print(isinstance(error, ValueError), error)
    True rtol must be >= 0 and finite, got -1.0
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class GpuHodlrError(Exception):
    """Base class of every exception this package raises on purpose."""


class ArgumentError(GpuHodlrError, ValueError):
    """An argument has a value that cannot be used."""


class ShapeError(GpuHodlrError, ValueError):
    """An array has the wrong shape."""


class DtypeError(GpuHodlrError, TypeError):
    """An array or argument has the wrong type."""


class DeviceError(GpuHodlrError, RuntimeError):
    """A device cannot be used, or data lies on another device than wanted."""


class UnsupportedLayerError(GpuHodlrError, TypeError):
    """A network layer whose Gauss-Newton matrix is not known."""


class MemoryEstimateError(GpuHodlrError, RuntimeError):
    """A job would need more memory than is free; raised before anything is allocated."""


class FileFormatError(GpuHodlrError, ValueError):
    """A file is not a compressed matrix or factor this version can read."""


class NotPositiveDefiniteError(GpuHodlrError, np.linalg.LinAlgError):
    """A matrix, plus damping, is not positive definite.

    Attributes:
        damping: a damping that was tried and does, a few per cent above one that does not; None
            where none was looked for, or none does.
        rtol: the compression tolerance that the wanted damping would need, or None when no
            tolerance would do (damping 0).
        rtol_is_guess: whether that was not tried; `compress(op, damping=...)` measures it.
        direction: (N,) a vector p that shows it, or None.
        curvature: its Rayleigh quotient p^T A p / p^T p, <= 0, or None.

    Example:
        >>> K = gh.compress(gh.DenseOperator(np.diag([1.0, -2.0]), definite=False))
        >>> try:
        ...     K.factorize(damping=1.0)
        ... except gh.errors.NotPositiveDefiniteError as error:
        ...     print(round(error.damping, 1))
        2.0
    """

    def __init__(
        self,
        message: str,
        damping: float | None = None,
        rtol: float | None = None,
        direction: object = None,
        curvature: float | None = None,
    ) -> None:
        super().__init__(message)
        self.damping, self.rtol = damping, rtol
        self.direction, self.curvature = direction, curvature

    @property
    def rtol_is_guess(self) -> bool:
        """A factor no longer has the matrix that would have to be compressed again."""
        return self.rtol is not None

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        said = (str(self), self.damping, self.rtol, self.direction, self.curvature)
        return type(self), said


class NoConvergenceError(GpuHodlrError, np.linalg.LinAlgError):
    """Not all eigenvalues that were wanted have converged.

    Attributes:
        eigenvalues: (j,) those that have, ascending.
        eigenvectors: (N, j) theirs.
        residuals: (k,) norm(A v - w v) over the largest |w| seen, of all that were wanted.

    Example:
        >>> A = np.diag(np.linspace(1.0, 2.0, 500) ** 5)
        >>> try:
        ...     gh.eigsh(A, 4, "SA", maxiter=30)
        ... except gh.errors.NoConvergenceError as error:
        ...     print(len(error.residuals), error.eigenvectors.shape[1] < 4)
        4 True
    """

    def __init__(
        self,
        message: str,
        eigenvalues: Any = None,
        eigenvectors: Any = None,
        residuals: Any = None,
    ) -> None:
        super().__init__(message)
        self.eigenvalues, self.eigenvectors = eigenvalues, eigenvectors
        self.residuals = residuals

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (str(self), self.eigenvalues, self.eigenvectors, self.residuals)


class DistributedError(GpuHodlrError, RuntimeError):
    """Another rank failed with an exception that could not be sent as it is."""


class InexactError(GpuHodlrError, NotImplementedError, AttributeError):
    """A form of a matrix has no exact way to what was asked for; `hasattr` says no as well."""


class RankCapWarning(UserWarning):
    """`max_rank` stopped the compression before `rtol` was reached."""


class AccuracyWarning(UserWarning):
    """The measured error of a result is larger than what was asked for."""


class GraphWarning(UserWarning):
    """A product or solve could not be captured into a CUDA graph; it is right, but slower."""


@contextmanager
def closeness_unsaid() -> Iterator[None]:
    """Where a matrix need not be close: no `RankCapWarning` and no `AccuracyWarning`."""
    with warnings.catch_warnings():
        for kind in (AccuracyWarning, RankCapWarning):
            warnings.simplefilter("ignore", kind)
        yield

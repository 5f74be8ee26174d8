"""What an iterative solve reached, and saying so where it is not enough."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed import Ownership
from gpu_hodlr.errors import AccuracyWarning
from gpu_hodlr.krylov import CGInfo

_ENOUGH = 10  # times rtol: what the residual may be after rounding


def relative_residuals(b: Array, product: Array, owners: Ownership) -> Array:
    """norm(b - A x) / norm(b) of every column, (k,), from this rank's rows of b and A x."""
    xp, size = namespace(b), sizes(b, owners)
    missing, norms = (
        xp.sqrt(owners.sum((part * part).sum(axis=0))) for part in ((b - product) / size, b / size)
    )
    return missing / xp.where(norms > 0, norms, 1)


def sizes(v: Array, owners: Ownership) -> Array:
    """(k,) the largest absolute value of every column, 1 of zero columns.

    Squares of very large or small numbers would leave the type's range.
    """
    xp = namespace(v)
    # A rank may have no rows.
    largest = owners.max(xp.abs(v).max(axis=0) if len(v) else xp.zeros(v.shape[1], v.dtype))
    return xp.where(largest > 0, largest, 1)


def without_curvature(x: Array, product: Array, owners: Ownership) -> Array:
    """Whether x^T A x <= 0 for each column of x that is not zero, (k,), from rows of x and A x."""
    size = sizes(x, owners)
    x, product = x / size, product / size
    curvature, norm = (owners.sum(batched.column_dots(x, y)) for y in (product, x))
    return (curvature <= 0) & (norm > 0)


def meets_no_direction(cg: Callable[[Array], tuple[Array, CGInfo]], b: Array) -> bool:
    """Whether CG meets no direction of negative curvature, from b and then from the solution.

    Preconditioned CG is Lanczos with a matrix whose condition is small: where that converges, no
    negative eigenvalue has escaped it. In the solution small eigenvalues of either sign weigh most.
    """
    for _ in range(2):
        b, info = cg(b)
        if info.direction is not None:
            return False
    return True


def warn_of_residual(
    residual: float, rtol: float, info: CGInfo, advice: str = "raise the damping or maxiter"
) -> None:
    """For the caller of a differentiable `solve`, which calls this.

    Warns:
        AccuracyWarning: the residual exceeds rtol by more than rounding.
    """
    if residual > _ENOUGH * rtol:
        warnings.warn(
            f"residual {residual:.2g} after {info.iterations} iterations exceeds rtol {rtol:.2g}; "
            f"{advice}",
            AccuracyWarning,
            stacklevel=4,  # past `solve`, and what makes it differentiable
        )

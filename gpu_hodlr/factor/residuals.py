"""What an iterative solve reached, and saying so where it is not enough."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed import Ownership
from gpu_hodlr.errors import AccuracyWarning
from gpu_hodlr.krylov import CGInfo

_ENOUGH = 10  # times rtol: what the residual may be after rounding


def relative_residuals(b: Array, product: Array, owners: Ownership) -> Array:
    """norm(b - A x) / norm(b) of every column, (k,), from this rank's rows of b and A x."""
    xp = namespace(b)
    # Squares of very large or small right-hand sides would leave the dtype's range.
    size = owners.max(xp.abs(b).max(axis=0))
    size = xp.where(size > 0, size, 1)
    missing, norms = (
        xp.sqrt(owners.sum((part * part).sum(axis=0))) for part in ((b - product) / size, b / size)
    )
    return missing / xp.where(norms > 0, norms, 1)


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

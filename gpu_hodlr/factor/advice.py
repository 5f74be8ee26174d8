"""What to do where a matrix plus damping is not positive definite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.krylov import Matrix, extreme_eigenvalues

_SURE = 3.0  # times a measured error
_TRIES = 16
_GROWTH = 1.05, 2.0  # of the damping advised: at the first failure, squared at others; most


def not_positive_definite(
    matrix: Matrix,
    damping: float,
    rtol: float,
    would_do: Callable[[float], bool] | None = None,
    missed: float | None = None,
) -> NotPositiveDefiniteError:
    """The error, with the smallest damping that does: by Lanczos, and by trial where there is one.

    Args:
        matrix: K~.
        damping: with which K~ + damping I is not positive definite.
        rtol: to which K was compressed.
        would_do: whether a damping does; None: the eigenvalue found is relied on.
        missed: norm(K - K~)_F, measured; None where it is not known. By Weyl's inequality K itself
            has an eigenvalue of at most that more than the one found.
    """
    smallest, largest = extreme_eigenvalues(matrix)
    rounding = matrix.shape[0] * np.finfo(matrix.dtype).eps * max(largest, -smallest)
    enough = max(-1.02 * smallest, 1.02 * damping, rounding) or 1.0  # any for a zero matrix
    growth, most = _GROWTH
    for _ in range(_TRIES):  # Ritz values lie inside the spectrum: verify
        if would_do is None or would_do(enough):
            break
        enough *= growth
        growth = min(growth * growth, most)
    wanted = None
    advice = "or no tolerance makes damping 0 safe for a matrix with eigenvalues near 0"
    if damping > 0:
        # The negative eigenvalues are the compression's error: it shrinks with rtol.
        wanted = 0.5 * rtol * damping / enough
        advice = f"or for damping {damping:.3g} compress with rtol about {wanted:.1e}"
    if missed is not None and smallest + damping + _SURE * missed < -rounding:
        wanted = None
        advice = (
            f"and no rtol: the compression's error is about {missed:.3g}, so that K plus"
            f" damping {damping:.3g} itself is not positive definite; "
            "if K is meant to be indefinite, declare definite = False"
        )
    return NotPositiveDefiniteError(
        f"the compressed matrix plus damping {damping:.3g} is not positive definite (smallest "
        f"eigenvalue about {smallest:.3g}); damping {enough:.3g} would do, {advice}",
        enough,
        wanted,
        curvature=smallest + damping,
    )


def of_every_row(error: NotPositiveDefiniteError, common: float) -> NotPositiveDefiniteError:
    """The error of a matrix that has the damping of every row in itself but for what is common.

    Args:
        error: of that matrix plus the common damping.
        common: that damping.

    Returns:
        Its `damping` is to be added to that of every row.
    """
    assert error.damping is not None
    if not common:
        more = error.damping
        said = f"with the damping of every row, {error}; what would do is added to all of them"
    else:
        more = error.damping - common
        said = (
            f"with the damping of every row, at least {common:.3g}: {error}; that is {more:.3g} "
            "added to all of them"
        )
    return NotPositiveDefiniteError(said, more, error.rtol)

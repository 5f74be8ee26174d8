"""What to do where a matrix plus damping is not positive definite."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.factor.accuracy import Accuracy
from gpu_hodlr.krylov import Matrix, extreme_eigenvalues

_SURE = 3.0  # times a measured error
_DIGITS = 3  # of the damping advised, rounded up: what a message says does as well
_MARGIN = 1.019  # of the first damping tried; rounded up whatever the last bits are
_CLOSE = 1.03  # between the largest damping known to fail and the one advised; rounding adds to it
_GROWTH = 1.1, 100.0  # of the damping tried: at the first failure, squared at others; most
_GUESS = 0.25  # of the damping wanted: the error that an advised rtol aims at


def not_positive_definite(
    matrix: Matrix,
    damping: float,
    accuracy: Accuracy,
    would_do: Callable[[float], bool],
    least: float | None = None,
    definite: bool = True,
) -> NotPositiveDefiniteError:
    """The error, with a damping that was tried and does, 5 % above one that does not.

    By Weyl's inequality K itself has an eigenvalue of at most norm(K - K~)_2 more than the one
    found of K~: where even that is negative no tolerance is advised. Else rtol is a guess, as K is
    not there to be compressed again: the error measured, scaled to a quarter of the damping.

    Args:
        matrix: K~.
        damping: with which K~ + damping I is not positive definite.
        accuracy: of K~.
        would_do: whether a damping does.
        least: smallest damping of a row, where the matrix has that of every row in itself.
        definite: whether K is known to be positive semi-definite, or was declared so.
    """
    smallest, largest = extreme_eigenvalues(matrix)
    eps = float(np.finfo(matrix.dtype).eps) * max(largest, -smallest)
    rounding = matrix.shape[0] * eps
    most = float(np.finfo(matrix.dtype).max)
    failed, enough = _bracket(max(damping, -smallest, 0.0), eps, accuracy.spectral, would_do, most)
    if failed > damping:  # a Ritz value lies inside the spectrum, and may tell less
        smallest = min(smallest, -failed)
    wanted = damping if least is None else least
    missed = accuracy.frobenius if accuracy.spectral is None else accuracy.spectral
    rtol, advice = _tolerance(accuracy, wanted, max(enough or failed, missed or 0.0))
    if rtol is not None and rtol < 10 * float(np.finfo(matrix.dtype).eps):
        rtol, advice = None, f"or for damping {wanted:.3g} compress in float64"
        if matrix.dtype == np.float64:
            advice = f"and no rtol: for damping {wanted:.3g} the rounding of float64 is too coarse"
    if missed is not None and smallest + damping + _SURE * missed < -rounding:
        rtol = None
        advice = (
            f"and no rtol: the compression's error is about {missed:.3g}, so that K plus"
            f" damping {damping:.3g} itself is not positive definite"
        )
        if definite:
            advice += "; if K is meant to be indefinite, declare definite = False"
    does = "no damping was found that does" if enough is None else f"damping {enough:.3g} would do"
    return NotPositiveDefiniteError(
        f"the compressed matrix plus damping {damping:.3g} is not positive definite (smallest "
        f"eigenvalue about {smallest:.3g}); {does}, {advice}",
        enough,
        rtol,
        curvature=smallest + damping,
    )


def too_small_for_float32(
    matrix: Matrix, damping: float, would_do: Callable[[float], bool]
) -> NotPositiveDefiniteError:
    """The error where there is a factor in float64, and none in float32.

    Args:
        matrix: K~.
        damping: that does not do.
        would_do: whether one does in float32.
    """
    smallest, largest = extreme_eigenvalues(matrix)
    rounding = float(np.finfo(np.float32).eps) * max(largest, -smallest)
    most = float(np.finfo(matrix.dtype).max)
    _, enough = _bracket(damping, rounding, None, would_do, most)
    does = "none was found that does" if enough is None else f"damping {enough:.3g} would do"
    return NotPositiveDefiniteError(
        f"damping {damping:.3g} is too small for a factor in float32, whose rounding is about "
        f"{rounding:.3g} of this matrix: {does}, or factorize in float64",
        enough,
    )


def _bracket(
    lowest: float,
    rounding: float,
    likely: float | None,
    would_do: Callable[[float], bool],
    most: float,
) -> tuple[float, float | None]:
    """A damping that does not do, and one not much larger that was tried and does.

    Args:
        lowest: no less does.
        rounding: smaller ones are not told apart.
        likely: one that does, unless K itself is indefinite: the compression's error.
        would_do: whether one does.
        most: the largest number there is; where none below does, there is none.
    """
    failed, enough = lowest, rounded_up(max(_MARGIN * lowest, rounding) or 1.0)
    if would_do(enough):
        return failed, enough
    growth, largest = _GROWTH
    failed, enough = enough, max(growth * enough, likely or 0.0)
    while not would_do(enough := rounded_up(enough)):
        failed = enough
        growth = min(growth * growth, largest)
        enough *= growth
        if not enough < most:
            return failed, None
    while enough > _CLOSE * failed:
        middle = rounded_up(math.sqrt(failed) * math.sqrt(enough))
        if would_do(middle):
            enough = middle
        else:
            failed = middle
    return failed, enough


def rounded_up(number: float) -> float:
    """A positive number rounded up to the digits that are shown of it."""
    shown = float(f"{number:.{_DIGITS}g}")
    if shown < number:
        shown = float(f"{number * (1 + 0.5 * 10.0 ** (1 - _DIGITS)):.{_DIGITS}g}")
    return shown


def _tolerance(accuracy: Accuracy, damping: float, missed: float) -> tuple[float | None, str]:
    """The rtol that should do, and how it is said.

    Args:
        accuracy: of the compressed matrix.
        damping: the one wanted.
        missed: norm(K - K~)_2, about, or what of it is seen.
    """
    if not damping > 0:
        return None, "or no tolerance makes damping 0 safe for a matrix with eigenvalues near 0"
    # The negative eigenvalues are the compression's error: it shrinks with rtol.
    reached = accuracy.rtol if not accuracy.error else min(accuracy.rtol, accuracy.error)
    rtol = reached * min(_GUESS * damping / missed, 0.5)
    return rtol, (
        f"or for damping {damping:.3g} compress with rtol about {rtol:.1e} (a guess; "
        f"compress(..., damping={damping:.3g}) measures what is needed)"
    )


def of_every_row(
    error: NotPositiveDefiniteError, common: float, least: float
) -> NotPositiveDefiniteError:
    """The error of a matrix that has the damping of every row in itself but for what is common.

    Args:
        error: of that matrix plus the common damping.
        common: that damping.
        least: the smallest of a row.

    Returns:
        Its `damping` is to be added to that of every row.
    """
    more = None if error.damping is None else error.damping - common
    said = f"with the damping of every row, at least {least:.3g}: {error}"
    if more is not None:
        said += f"; that is {more:.3g} added to all of them"
    return NotPositiveDefiniteError(said, more, error.rtol, error.direction, error.curvature)

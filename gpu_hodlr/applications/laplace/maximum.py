"""The prior that maximizes the log marginal likelihood."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize

from gpu_hodlr.applications.laplace.prior import Prior
from gpu_hodlr.checks import check_number
from gpu_hodlr.devices import HostArray
from gpu_hodlr.errors import AccuracyWarning, ArgumentError, DtypeError, NotPositiveDefiniteError

_FRAMES = 3  # from a warning to who calls `optimize_prior_precision`
_REACH = math.log(10.0)  # in log p: how far a run of L-BFGS may go
_SHORTER, _SHORTEST = 4.0, 0.05  # of that, where a precision is too small for the matrix

# Of a prior: the value, its derivative in log p, and the effective parameters of every group.
Evaluate = Callable[[Prior], tuple[float, HostArray, HostArray]]


def check_bounds(bounds: Any) -> None:
    """Refuse what is no pair of a smaller and a larger number > 0.

    Raises:
        DtypeError, ArgumentError: it is not.
    """
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise DtypeError(f"bounds must be a pair of numbers, got {bounds!r}")
    low, high = (check_number(x, "bounds", positive=True) for x in bounds)
    if not low < high:
        raise ArgumentError(f"bounds must be a smaller and a larger number, got {bounds!r}")


def maximized(
    evaluate: Evaluate,
    prior: Prior,
    bounds: tuple[float, float],
    rtol: float,
    maxiter: int,
    says: bool,
) -> Prior:
    """By L-BFGS in log p, from where the prior is.

    At a maximum p_g |theta_g|^2 = gamma_g, the effective parameters; the derivative is half of
    their difference, and the steps end where it is rtol gamma_g / 2 in every group. A run goes no
    further than a factor of ten, and the next goes on from there: a line search would try
    precisions for which the matrix has to be far closer than for the best, or cannot be. Where it
    is not positive definite, the next run goes less far.

    Args:
        evaluate: see `Evaluate`.
        prior: the first one.
        bounds: of every precision.
        rtol: see above.
        maxiter: steps, at most.
        says: whether this rank warns.

    Warns:
        AccuracyWarning: it ended at a bound, or without having converged.
    """
    low, high = np.log(bounds)
    # Of an array the precisions are factors of it; then the smallest and largest row count.
    if prior.weights is not None:
        low, high = low - np.log(prior.weights.min()), high - np.log(prior.weights.max())
        if not low < high:
            raise ArgumentError("bounds: prior_precision's entries are further apart than they are")
    seen: dict[bytes, tuple[float, HostArray, HostArray]] = {}

    def at(x: HostArray) -> tuple[float, HostArray, HostArray]:
        key = x.tobytes()
        if key not in seen:
            seen[key] = evaluate(prior.at(np.exp(x)))
        return seen[key]

    def off(x: HostArray) -> HostArray:
        """Derivatives over half of the effective parameters, 0 where a bound is in the way."""
        _, slopes, effective = at(x)
        free = ((x > low) | (slopes > 0)) & ((x < high) | (slopes < 0))
        half = np.maximum(0.5 * abs(effective), np.finfo(float).tiny)
        return np.where(free, abs(slopes) / half, 0.0)

    def downhill(x: HostArray) -> tuple[float, HostArray]:
        value, slopes, _ = at(x)
        return -value, -slopes

    def enough(x: HostArray) -> None:
        if (off(x) <= rtol).all():
            raise StopIteration

    best = np.clip(np.log(prior.precisions), low, high)
    reach, left, refused = _REACH, maxiter, False
    while left > 0 and reach > _SHORTEST and not (off(best) <= rtol).all():
        ends = np.maximum(best - reach, low), np.minimum(best + reach, high)
        try:
            found = minimize(
                downhill, best, jac=True, method="L-BFGS-B", bounds=np.transpose(ends),
                callback=enough, options={"maxiter": left, "ftol": 0.0, "gtol": 0.0},
            )  # fmt: skip
        except NotPositiveDefiniteError:
            best = np.frombuffer(max(seen, key=lambda x: seen[x][0]))
            reach, refused = reach / _SHORTER, True
            continue
        best, left = np.asarray(found.x, np.float64), left - max(found.nit, 1)
        if not any(((best == end) & (end > low) & (end < high)).any() for end in ends):
            break
    if says:
        _warn(best, off(best), prior, (low, high), rtol, refused)
    return prior.at(np.exp(best))


def _warn(
    x: HostArray, off: HostArray, prior: Prior, bounds: tuple[float, float], rtol: float,
    refused: bool,
) -> None:  # fmt: skip
    """Say what is no maximum within the bounds."""
    names = prior.names or ("prior_precision",)
    stuck = [name for name, p in zip(names, x, strict=True) if p in bounds]
    if stuck:
        warnings.warn(
            f"the precision of {', '.join(stuck)} ended at a bound: the marginal likelihood still "
            "grows there",
            AccuracyWarning,
            stacklevel=_FRAMES + 1,
        )
    if not (off <= rtol).all():
        worst = int(np.argmax(off))
        why = (
            "; with smaller precisions the compressed matrix is not positive definite: give "
            "dtype=torch.float64, or raise max_rank"
        )
        warnings.warn(
            f"the prior has not converged: the derivative of the marginal likelihood for "
            f"{names[worst]} is {off[worst]:.2g} of half its effective parameters, wanted {rtol:g}"
            f"{why if refused else ''}",
            AccuracyWarning,
            stacklevel=_FRAMES + 1,
        )

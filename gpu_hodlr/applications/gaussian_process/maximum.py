"""Hyper-parameters that maximize the log marginal likelihood, by L-BFGS in their logarithms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from gpu_hodlr.devices import HostArray
from gpu_hodlr.errors import NotPositiveDefiniteError

_FIRST = 1.0  # in a logarithm: a first step, at most
_LINE_SEARCH = 10  # evaluations

# Of theta: the value, its gradient, and what is worth keeping of the best.
Evaluate = Callable[[HostArray], tuple[float, HostArray, Any]]


@dataclass
class Maximum:
    """Where the steps ended.

    Attributes:
        theta: (p,).
        value: there.
        kept: what `Evaluate` gave with it.
        iterations: steps.
        evaluations: of the likelihood.
        curvature: (p, p) the inverse of minus the second derivatives, as the steps have seen it.
    """

    theta: HostArray
    value: float
    kept: Any
    iterations: int = 0
    evaluations: int = 1
    curvature: HostArray | None = None


def maximized(
    evaluate: Evaluate,
    theta: HostArray,
    limits: HostArray,
    tol: float,
    max_iter: int,
    curvature: HostArray | None = None,
) -> Maximum:
    """From one start. Where the matrix is not positive definite a step is taken back.

    Args:
        evaluate: see `Evaluate`.
        theta: (p,) the start.
        limits: (p, 2); with a curvature what is outside is taken back as well.
        tol: the steps end with one that gains less.
        max_iter: steps, at most.
        curvature: (p, p), see `Maximum`: that of fewer data, at whose maximum the start is.

    Raises:
        NotPositiveDefiniteError: it is not at the start.
    """
    value, slope, kept = evaluate(theta)
    best = Maximum(theta, value, kept)
    if not len(theta):
        return best
    frame = _frame(theta, slope, limits, curvature)
    unit = 1.0 / max(float(np.linalg.norm(frame.T @ slope)), np.finfo(np.float64).tiny)
    known = {np.zeros(len(theta)).tobytes(): (value, slope)}
    worst = value

    def downhill(x: HostArray) -> tuple[float, HostArray]:
        nonlocal best, worst
        if x.tobytes() not in known:
            at = theta + frame @ x
            # Worse than all, but finite, as a line search interpolates.
            found, gradient, kept = worst - (best.value - worst) - 1, np.zeros(len(at)), None
            if curvature is None or ((at >= limits[:, 0]) & (at <= limits[:, 1])).all():
                best.evaluations += 1
                with suppress(NotPositiveDefiniteError):
                    found, gradient, kept = evaluate(np.clip(at, *limits.T))
            worst = min(worst, found)
            known[x.tobytes()] = found, gradient
            if found > best.value:
                best.theta, best.value, best.kept = at, found, kept
        found, gradient = known[x.tobytes()]
        return -found * unit, -(frame.T @ gradient) * unit

    before = value

    def enough(intermediate_result: Any) -> None:
        nonlocal before
        reached = -intermediate_result.fun / unit
        gain, before = reached - before, reached
        if gain < tol:
            raise StopIteration

    bounds = None if curvature is not None else limits - theta[:, None]
    found = minimize(
        downhill, np.zeros(len(theta)), jac=True, method="L-BFGS-B", bounds=bounds, callback=enough,
        options={"maxiter": max_iter, "maxls": _LINE_SEARCH, "ftol": 0.0, "gtol": 0.0},
    )  # fmt: skip
    best.iterations = int(found.nit)
    best.curvature = unit * frame @ found.hess_inv.todense() @ frame.T
    return best


def _frame(
    theta: HostArray, slope: HostArray, limits: HostArray, curvature: HostArray | None
) -> HostArray:
    """(p, p) coordinates in which a first step, of length 1, is that of Newton; or the identity."""
    if curvature is None:
        return np.eye(len(theta))
    root = np.linalg.cholesky(curvature)
    step = root @ (root.T @ slope)
    return root * np.linalg.norm(root.T @ slope) * min(1.0, _FIRST / abs(step).max())

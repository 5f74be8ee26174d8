"""Hyper-parameters of the largest likelihood, by Newton steps in their logarithms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from gpu_hodlr.devices import HostArray
from gpu_hodlr.errors import NotPositiveDefiniteError

FIRST = 1.0  # in a logarithm: a first step, at most
_POOR, _GOOD = 0.25, 0.75  # of the gain that was predicted: steps become shorter, or longer
_FLAT = 1e-10  # of the largest curvature, and of 1: a smaller one is none


@dataclass(frozen=True, eq=False)
class Likelihood:
    """At one theta.

    Attributes:
        value: the likelihood's logarithm.
        slope: (p,) its gradient.
        information: (p, p) about minus the second derivatives, positive semi-definite.
        kept: what else is worth keeping of it.
    """

    value: float
    slope: HostArray
    information: HostArray
    kept: Any


@dataclass
class Maximum:
    """Where the steps ended.

    Attributes:
        theta: (p,).
        likelihood: there.
        iterations: steps that were tried.
        reach: how long the next would be, at most, in a logarithm.
    """

    theta: HostArray
    likelihood: Likelihood
    iterations: int = 0
    reach: float = FIRST


def maximized(
    evaluate: Callable[[HostArray], Likelihood],
    theta: HostArray,
    limits: HostArray,
    direct: HostArray,
    tol: float,
    max_iter: int,
    reach: float = FIRST,
) -> Maximum:
    """From one start, by Newton steps within a box, which grows and shrinks by how good they were.

    No step is tried that is predicted to gain less than `tol`, and so nothing is evaluated in vain
    at the end. Nocedal, Wright, Numerical Optimization (2006), algorithm 4.1; the information in
    place of second derivatives: Gilmour, Thompson, Cullis, Biometrics 51 (1995).

    Args:
        evaluate: the likelihood.
        theta: (p,) the start.
        limits: (p, 2) between which it stays.
        direct: (p,) bool, whether a step is one of exp(theta), in parts of it.
        tol: the least gain.
        max_iter: steps, at most.
        reach: of the first step, see `Maximum`.

    Raises:
        NotPositiveDefiniteError: the matrix is not at the start; a step to where it is not is taken
            back.
    """
    best = Maximum(theta, evaluate(theta), reach=reach)
    while len(theta) and best.iterations < max_iter:
        box = np.clip(limits - best.theta[:, None], -best.reach, best.reach)
        box[direct] = np.expm1(box[direct])
        step, predicted = _newton(best.likelihood, box)
        step[direct] = np.log1p(step[direct])
        if predicted <= tol:
            break
        best.iterations += 1
        length = float(abs(step).max())
        theta = np.clip(best.theta + step, *limits.T)
        try:
            there = evaluate(theta)
        except NotPositiveDefiniteError:
            best.reach = _POOR * length
            continue
        ratio = (there.value - best.likelihood.value) / predicted
        if ratio < _POOR:
            best.reach = _POOR * length
        elif ratio > _GOOD:
            best.reach = max(best.reach, 2 * length)
        if ratio > 0:
            best.theta, best.likelihood = theta, there
    return best


def _newton(at: Likelihood, box: HostArray) -> tuple[HostArray, float]:
    """The step of the largest gain g^T s - s^T B s / 2 in a box, and this gain."""
    values, vectors = np.linalg.eigh(at.information)
    roots = np.sqrt(np.maximum(values, _FLAT * max(values[-1], 1.0)))
    root, wanted = roots[:, None] * vectors.T, vectors.T @ at.slope / roots
    step, free = np.zeros(len(at.slope)), box[:, 1] > box[:, 0]
    if free.any():
        step[free] = lsq_linear(root[:, free], wanted, box[free].T, "bvls").x
    moved = root @ step
    return step, float(at.slope @ step - 0.5 * moved @ moved)

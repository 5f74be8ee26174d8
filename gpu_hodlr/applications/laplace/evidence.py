"""The log marginal likelihood of a Laplace approximation, and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr.applications.laplace.prior import Prior
from gpu_hodlr.devices import HostArray, to_host


def evidence(log_likelihood: float, theta: HostArray, prior: Prior, factor: Any) -> float:
    """Log p(data | theta) - theta^T P theta / 2 + log det(P) / 2 - log det(G + P) / 2.

    Args:
        log_likelihood: log p(data | theta).
        theta: (N,).
        prior: P.
        factor: of G + P.
    """
    fit = log_likelihood - 0.5 * float(prior.rows() @ theta**2)
    return float(fit + 0.5 * (prior.logdet() - factor.logdet()))


def slopes(theta: HostArray, prior: Prior, factor: Any) -> tuple[HostArray, HostArray]:
    """Its derivatives in log p, and the effective parameters, of every group.

    gamma_g = n_g - p_g tr_g (G + P)^-1, and the derivative is (gamma_g - p_g |theta_g|^2) / 2.
    """
    if len(prior.precisions) == 1 and prior.weights is None:
        traces = np.array([factor.logdet_gradient()])
    else:
        traces = prior.sums(to_host(factor.inverse_diagonal()).astype(np.float64))
    effective = prior.counts - prior.precisions * traces
    return 0.5 * (effective - prior.precisions * prior.sums(theta**2)), effective

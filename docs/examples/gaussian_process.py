"""Gaussian process regression by hand: evidence and predictions from a compressed kernel matrix.

Noisy heights of a hilly surface at N points: the log marginal likelihood of three length scales,
the posterior mean at held-out points, and both held against dense linear algebra.
"""

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist

import gpu_hodlr as gh

N, HELD_OUT, NOISE = 2000, 200, 0.1


def surface(x: np.ndarray) -> np.ndarray:
    """What is to be found again."""
    return np.sin(6 * x[:, 0]) * np.cos(4 * x[:, 1]) + 0.5 * np.sin(15 * x[:, 0] * x[:, 1])


def matern32(x: np.ndarray, y: np.ndarray, lengthscale: float) -> np.ndarray:
    """The kernel between two sets of points."""
    r = np.sqrt(3.0) * cdist(x, y) / lengthscale
    return (1 + r) * np.exp(-r)


rng = np.random.default_rng(0)
points, new = rng.random((N, 2)), rng.random((HELD_OUT, 2))
heights = surface(points) + NOISE * rng.standard_normal(N)


def log_marginal_likelihood(logdet: float, fit: float) -> float:
    """Of y^T (K + noise^2 I)^-1 y."""
    return -0.5 * (fit + logdet + N * np.log(2 * np.pi))


print("lengthscale  stored  log likelihood      dense  error of the mean")
found = {}
for lengthscale in (0.05, 0.3, 2.0):
    op = gh.KernelOperator(points, "matern32", lengthscale)
    # The error, about rtol times norm(K)_F, must be small against the noise's variance.
    K = gh.compress(op, rtol=1e-7, leaf_size=64)
    F = K.factorize(damping=NOISE**2)
    weights = F.solve(heights)
    evidence = log_marginal_likelihood(F.logdet(), heights @ weights)
    mean = matern32(new, points, lengthscale) @ weights

    exact = cho_factor(matern32(points, points, lengthscale) + NOISE**2 * np.eye(N), lower=True)
    exact_weights = cho_solve(exact, heights)
    logdet = 2 * np.log(np.diag(exact[0])).sum()
    exact_evidence = log_marginal_likelihood(logdet, heights @ exact_weights)
    exact_mean = matern32(new, points, lengthscale) @ exact_weights

    error = np.sqrt(np.mean((mean - surface(new)) ** 2))
    print(
        f"{lengthscale:11}  {K.storage_fraction:6.1%}  {evidence:14.2f}  {exact_evidence:9.2f}"
        f"  {error:17.4f}"
    )
    found[lengthscale] = evidence
    assert abs(evidence - exact_evidence) < 1.0
    assert np.abs(mean - exact_mean).max() < 0.1 * NOISE

best = max(found, key=found.__getitem__)
print(f"most likely length scale: {best}")
assert best == 0.3

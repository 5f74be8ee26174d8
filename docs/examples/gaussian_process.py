"""Gaussian process regression: evidence, its gradient and predictions from a compressed matrix.

Noisy heights of a hilly surface at N points: the log marginal likelihood of three length scales,
the posterior mean at held-out points, and both held against dense linear algebra.
"""

import numpy as np
from scipy.linalg import cho_factor, cho_solve

import gpu_hodlr as gh

N, HELD_OUT, NOISE = 2000, 200, 0.1


def surface(x: np.ndarray) -> np.ndarray:
    """What is to be found again."""
    return np.sin(6 * x[:, 0]) * np.cos(4 * x[:, 1]) + 0.5 * np.sin(15 * x[:, 0] * x[:, 1])


rng = np.random.default_rng(0)
points, new = rng.random((N, 2)), rng.random((HELD_OUT, 2))
heights = surface(points) + NOISE * rng.standard_normal(N)

print("lengthscale  stored  log likelihood      dense      its slope  error of the mean")
found = {}
for lengthscale in (0.05, 0.3, 2.0):
    op = gh.KernelOperator(points, "matern32", lengthscale)
    # The error, about rtol times norm(K)_F, must be small against the noise's variance.
    evidence = gh.log_marginal_likelihood(op, heights, NOISE**2, rtol=1e-7, leaf_size=64)
    mean = op.cross(new) @ evidence.weights

    exact = cho_factor(op.to_dense() + NOISE**2 * np.eye(N), lower=True)
    weights = cho_solve(exact, heights)
    logdet = 2 * np.log(np.diag(exact[0])).sum()
    exact_evidence = -0.5 * (heights @ weights + logdet + N * np.log(2 * np.pi))
    exact_mean = op.cross(new) @ weights

    slope, error = (of["lengthscale"] for of in (evidence.gradient, evidence.standard_error))
    rms = np.sqrt(np.mean((mean - surface(new)) ** 2))
    print(
        f"{lengthscale:11}  {evidence.matrix.storage_fraction:6.1%}  {evidence.value:14.2f}"
        f"  {exact_evidence:9.2f}  {slope:7.0f} +-{error:4.0f}  {rms:17.4f}"
    )
    found[lengthscale] = evidence.value
    assert abs(evidence.value - exact_evidence) < 1.0
    assert np.abs(mean - exact_mean).max() < 0.1 * NOISE

best = max(found, key=found.__getitem__)
print(f"most likely length scale: {best}")
assert best == 0.3

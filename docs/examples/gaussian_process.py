"""Gaussian process regression: hyper-parameters of the largest likelihood, predictions, draws.

Noisy heights of a hilly surface at N points. The process is an estimator of scikit-learn's
conventions; its likelihood and its predictions are held against dense linear algebra.
"""

import numpy as np
from scipy.linalg import cho_factor, cho_solve

import gpu_hodlr as gh

N, HELD_OUT, NOISE = 1200, 200, 0.1


def surface(x: np.ndarray) -> np.ndarray:
    """What is to be found again."""
    return np.sin(6 * x[:, 0]) * np.cos(4 * x[:, 1]) + 0.5 * np.sin(15 * x[:, 0] * x[:, 1])


rng = np.random.default_rng(0)
points, new = rng.random((N, 2)), rng.random((HELD_OUT, 2))
heights = surface(points) + NOISE * rng.standard_normal(N)

process = gh.GaussianProcess("matern52", compress_options={"leaf_size": 128})
process.fit(points, heights)
print(f"length scale {process.lengthscale_:.2f}, variance {process.variance_:.2f}")
print(f"noise {process.noise_**0.5:.3f}, drawn with {NOISE}")
assert abs(process.noise_**0.5 - NOISE) < 0.01

mean, std = process.predict(new, return_std=True)
off = (surface(new) - mean) / std
print(f"within two standard deviations: {np.mean(abs(off) < 2):.0%} of {HELD_OUT} held out")
assert np.mean(abs(off) < 2) > 0.9

draws = process.sample_y(new[:5], 500)  # functions of the posterior
print("deviation, of 500 draws:", std[:5].round(3), draws.std(axis=1).round(3))

# Dense linear algebra says the same.
op = process.kernel_
exact = cho_factor(op.to_dense() + process.noise_ * np.eye(N), lower=True)
weights, cross = cho_solve(exact, heights), op.cross(new).to_dense()
logdet = 2 * np.log(np.diag(exact[0])).sum()
evidence = -0.5 * (heights @ weights + logdet + N * np.log(2 * np.pi))
variance = process.variance_ - np.sum(cross * cho_solve(exact, cross.T).T, axis=1)
print(f"log likelihood {process.log_marginal_likelihood_value_:.3f}, dense {evidence:.3f}")
assert abs(process.log_marginal_likelihood_value_ - evidence) < 0.01
assert np.abs(mean - cross @ weights).max() < 0.01 * NOISE
assert np.abs(std / np.sqrt(variance) - 1).max() < 0.01

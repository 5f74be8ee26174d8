"""Samples, hyper-parameters and dense oracles of Gaussian processes."""

from typing import Any

import numpy as np

import gpu_hodlr as gh

N, M = 80, 7
RNG = np.random.default_rng(0)
X, NEW = RNG.random((N, 2)), RNG.random((M, 2))
Y = 3.0 + np.sin(5 * X[:, 0]) + X[:, 1] + 0.1 * RNG.standard_normal(N)
ROWS = 0.005 + 0.02 * RNG.random(N)
LENGTHS = np.array([0.4, 0.9])
TIGHT: dict[str, Any] = {
    "rtol": 1e-12, "num_probes": N, "compress_options": {"leaf_size": 20},
}  # fmt: skip
AT: dict[str, Any] = {"lengthscale": LENGTHS, "variance": 1.5, "noise": 0.01}


def fixed(**options: Any) -> gh.GaussianProcess:
    return gh.GaussianProcess(**{"optimizer": None, **AT, **TIGHT, **options})


def matern52(x: np.ndarray, y: np.ndarray, variance: float, lengthscale: Any) -> np.ndarray:
    r = np.sqrt(5) * np.linalg.norm((x[:, None] - y) / lengthscale, axis=2)
    return variance * (1 + r + r**2 / 3) * np.exp(-r)


def exact(y: np.ndarray, noise: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, covariance and likelihood of AT."""
    K = matern52(X, X, 1.5, LENGTHS) + np.diag(np.broadcast_to(noise, N))
    C = matern52(NEW, X, 1.5, LENGTHS)
    value = -0.5 * (y @ np.linalg.solve(K, y) + np.linalg.slogdet(K)[1] + N * np.log(2 * np.pi))
    rest = matern52(NEW, NEW, 1.5, LENGTHS) - C @ np.linalg.solve(K, C.T)
    return C @ np.linalg.solve(K, y), rest, float(value)

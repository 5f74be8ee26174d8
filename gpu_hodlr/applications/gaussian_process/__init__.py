"""Gaussian process regression as an estimator of scikit-learn's conventions."""

from gpu_hodlr.applications.gaussian_process.regression import GaussianProcess

__all__ = ["GaussianProcess"]

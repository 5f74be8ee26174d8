"""The Laplace approximation of a network's posterior: evidence, prior, samples, predictions."""

from gpu_hodlr.applications.laplace.posterior import Laplace
from gpu_hodlr.applications.laplace.prediction import LaplacePrediction

__all__ = ["Laplace", "LaplacePrediction"]

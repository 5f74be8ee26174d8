"""What is made of compressed matrices: evidence, one call to solve, a network's posterior."""

from gpu_hodlr.applications.laplace import Laplace, LaplacePrediction
from gpu_hodlr.applications.likelihood import LogMarginalLikelihood, log_marginal_likelihood
from gpu_hodlr.applications.linear_solve import SolveInfo, solve

__all__ = [
    "Laplace",
    "LaplacePrediction",
    "LogMarginalLikelihood",
    "SolveInfo",
    "log_marginal_likelihood",
    "solve",
]

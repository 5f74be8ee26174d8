"""What is made of compressed matrices: the evidence of a Gaussian process, one call to solve."""

from gpu_hodlr.applications.likelihood import LogMarginalLikelihood, log_marginal_likelihood
from gpu_hodlr.applications.linear_solve import SolveInfo, solve

__all__ = ["LogMarginalLikelihood", "SolveInfo", "log_marginal_likelihood", "solve"]

"""What is made of compressed matrices: the evidence of a Gaussian process."""

from gpu_hodlr.applications.likelihood import LogMarginalLikelihood, log_marginal_likelihood

__all__ = ["LogMarginalLikelihood", "log_marginal_likelihood"]

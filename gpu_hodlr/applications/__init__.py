"""What is made of compressed matrices: evidence, solutions, spectra, posteriors, pruning."""

from gpu_hodlr.applications.density import Spectrum
from gpu_hodlr.applications.influence import influence, influence_of
from gpu_hodlr.applications.laplace import Laplace, LaplacePrediction
from gpu_hodlr.applications.likelihood import LogMarginalLikelihood, log_marginal_likelihood
from gpu_hodlr.applications.linear_solve import SolveInfo, solve
from gpu_hodlr.applications.pruning import Pruning, prune
from gpu_hodlr.applications.spectrum import spectrum

__all__ = [
    "Laplace",
    "LaplacePrediction",
    "LogMarginalLikelihood",
    "Pruning",
    "SolveInfo",
    "Spectrum",
    "influence",
    "influence_of",
    "log_marginal_likelihood",
    "prune",
    "solve",
    "spectrum",
]

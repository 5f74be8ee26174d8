"""What is made of matrices: evidence, regression, solutions, posteriors, pruning, training."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from gpu_hodlr.applications.density import Spectrum
from gpu_hodlr.applications.gaussian_process import GaussianProcess
from gpu_hodlr.applications.influence import influence, influence_of
from gpu_hodlr.applications.laplace import Laplace, LaplacePrediction
from gpu_hodlr.applications.likelihood import LogMarginalLikelihood, log_marginal_likelihood
from gpu_hodlr.applications.linear_solve import SolveInfo, solve
from gpu_hodlr.applications.pruning import Pruning, prune
from gpu_hodlr.applications.spectrum import spectrum

if TYPE_CHECKING:
    from gpu_hodlr.applications.training.gauss_newton import GaussNewton

__all__ = [
    "GaussNewton",
    "GaussianProcess",
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


def _absent(error: ModuleNotFoundError) -> Callable[..., NoReturn]:
    """What stands in the place of a class whose library is missing: all names can be imported."""

    def absent(*arguments: object, **options: object) -> NoReturn:
        raise error

    return absent


if not TYPE_CHECKING:  # which would take any name of a module with this function

    def __getattr__(name: str) -> object:
        """An optimizer is a class of torch's, which is imported for those who ask for one alone."""
        if name == "GaussNewton":
            try:
                from gpu_hodlr.applications.training.gauss_newton import GaussNewton
            except ModuleNotFoundError as error:
                return _absent(error)
            return GaussNewton
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

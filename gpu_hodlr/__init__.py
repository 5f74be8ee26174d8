"""Hierarchical low-rank compression, products and factorization of huge SPD matrices.

The names below are the public interface; README.md and docs/ show them in use.
"""

from typing import TYPE_CHECKING

from gpu_hodlr import applications, errors, testing
from gpu_hodlr.applications import (
    GaussianProcess,
    Laplace,
    LaplacePrediction,
    LogMarginalLikelihood,
    Pruning,
    SolveInfo,
    Spectrum,
    influence,
    influence_of,
    log_marginal_likelihood,
    prune,
    solve,
    spectrum,
)
from gpu_hodlr.compressed import (
    CompressedMatrix,
    CompressionReport,
    FMMMatrix,
    HODLRMatrix,
    HSSMatrix,
    KFEMatrix,
    LowRankMatrix,
)
from gpu_hodlr.compression import compress, load
from gpu_hodlr.factor import HODLRCholesky, KFEFactor, ULVCholesky
from gpu_hodlr.krylov import CGInfo, cg, eigsh, minres
from gpu_hodlr.networks import FisherOperator, GGNOperator, HessianOperator
from gpu_hodlr.operators import (
    DenseOperator,
    Diagonal,
    FunctionOperator,
    KernelOperator,
    Operator,
    as_operator,
)
from gpu_hodlr.torch_memory import use_torch_allocator

if TYPE_CHECKING:
    from gpu_hodlr.applications import GaussNewton

__version__ = "0.1.0"
__all__ = [
    "CGInfo",
    "CompressedMatrix",
    "CompressionReport",
    "DenseOperator",
    "Diagonal",
    "FMMMatrix",
    "FisherOperator",
    "FunctionOperator",
    "GGNOperator",
    "GaussNewton",
    "GaussianProcess",
    "HODLRCholesky",
    "HODLRMatrix",
    "HSSMatrix",
    "HessianOperator",
    "KFEFactor",
    "KFEMatrix",
    "KernelOperator",
    "Laplace",
    "LaplacePrediction",
    "LogMarginalLikelihood",
    "LowRankMatrix",
    "Operator",
    "Pruning",
    "SolveInfo",
    "Spectrum",
    "ULVCholesky",
    "__version__",
    "as_operator",
    "cg",
    "compress",
    "eigsh",
    "errors",
    "influence",
    "influence_of",
    "load",
    "log_marginal_likelihood",
    "minres",
    "prune",
    "solve",
    "spectrum",
    "testing",
    "use_torch_allocator",
]


def __dir__() -> list[str]:
    """The public names alone, of which a shell makes its list."""
    return list(__all__)


if not TYPE_CHECKING:  # which would take any name of a module with this function

    def __getattr__(name: str) -> object:
        """`GaussNewton`, a class of torch's, which is imported where it is asked for."""
        if name == "GaussNewton":
            return applications.GaussNewton
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

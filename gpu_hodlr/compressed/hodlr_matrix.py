"""The HODLR matrix: low rank in every pair of siblings, each with its own bases."""

from __future__ import annotations

from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.factor import HODLRCholesky, RefinedHODLR


class HODLRMatrix(StructuredMatrix):
    """A symmetric matrix K~ in hierarchically off-diagonal low-rank form.

    Made by `gpu_hodlr.compress` with scheme "hodlr"; see `StructuredMatrix` for its attributes. A
    rank counts for a pair of siblings alone, not for all of a block row as in an HSS matrix.

    Example:
        >>> x = np.linspace(0, 1, 200)
        >>> K = gh.compress(gh.KernelOperator(x, "laplace", nugget=0.1), "hodlr", leaf_size=25)
        >>> K.ranks[0]  # of eight leaves: of exponentials siblings share one function
        (1, 1, 1, 1, 1, 1, 1, 1)
    """

    factors = (HODLRCholesky, RefinedHODLR)

"""The HODLR matrix: low rank in every pair of siblings, each with its own bases."""

from __future__ import annotations

from gpu_hodlr.compressed.base import CompressedMatrix
from gpu_hodlr.factor import HODLRCholesky
from gpu_hodlr.structures import HODLR


class HODLRMatrix(CompressedMatrix):
    """A symmetric matrix K~ in hierarchically off-diagonal low-rank form.

    Made by `gpu_hodlr.compress` with scheme "hodlr"; see `CompressedMatrix` for its attributes. A
    rank counts for a pair of siblings alone, not for all of a block row as in an HSS matrix.
    """

    factors = (HODLRCholesky,)

    def _factor(self, structure: HODLR, damping: float) -> HODLRCholesky:
        return HODLRCholesky(structure, damping)

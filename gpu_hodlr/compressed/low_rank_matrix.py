"""The global low-rank matrix."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr.compressed.report import CompressionReport
from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.factor import RefinedWoodbury, Woodbury
from gpu_hodlr.structures import LowRank
from gpu_hodlr.tree import ClusterTree


class LowRankMatrix(StructuredMatrix):
    """A symmetric matrix K~ = U diag(lambda) U^T of low rank, perhaps plus a diagonal.

    Made by `gpu_hodlr.compress` with scheme "lowrank"; see `StructuredMatrix` for its attributes.
    The tree is a single leaf. Eigenvalues are of both signs where the operator declared that they
    may be. With `tail="diagonal"` the diagonal of what was left out is kept. Its factor is the
    inverse by Sherman, Morrison and Woodbury: another damping costs nothing (with a diagonal, about
    as much as a product with r columns), and damping 0 needs a matrix of full rank.

    Example:
        >>> A = np.random.default_rng(0).standard_normal((100, 3))
        >>> K = gh.compress(A @ A.T, "lowrank", rtol=1e-8)
        >>> K.ranks
        ((3,),)
    """

    factors = (Woodbury, RefinedWoodbury)
    structure: LowRank

    def __init__(
        self,
        structure: LowRank,
        report: CompressionReport,
        dtype: DTypeLike | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(structure, report, dtype, scale)
        self.tree = ClusterTree(np.arange(structure.n)[None])  # whatever deals out the rows

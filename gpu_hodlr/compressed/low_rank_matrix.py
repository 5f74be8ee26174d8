"""The global low-rank matrix."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr.compressed.report import CompressionReport
from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.devices import Array, HostArray, check_memory, namespace, to_host
from gpu_hodlr.errors import InexactError
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

    @property
    def eigenpairs(self) -> tuple[HostArray, Array]:
        """The eigenvalues that are stored, all but zeros, and their eigenvectors.

        Collective: all ranks ask.

        Returns:
            (r,) eigenvalues of either sign, descending, a host array of float64, and (N, r)
            orthonormal eigenvectors in the matrix's dtype, an array of its library, on many ranks
            whole on every one: as `eigsh` has them.

        Raises:
            InexactError: a diagonal was added, or is stored with tail="diagonal": the eigenvectors
                are others then, and `eigsh` finds some.
            MemoryEstimateError: a copy of the eigenvectors does not fit.

        Example:
            >>> K = gh.compress(np.diag([1.0, 0.0, 3.0]), "lowrank", rtol=1e-8)
            >>> values, vectors = K.eigenpairs
            >>> values.round(6), vectors.shape
            (array([3., 1.]), (3, 2))
        """
        if self.structure.D is not None:
            raise InexactError(
                "the matrix has a diagonal beside U diag(lambda) U^T, and so other eigenpairs; "
                "gh.eigsh finds them by products"
            )
        owners, lower, what = self.owners, "max_rank", "a copy of the eigenvectors"
        with owners.comm.agreed():
            needed = 3 * self.shape[0] * self.structure.U.shape[1] * self.dtype.itemsize
            check_memory(needed, what, lower, self.device)
        form = self._exact().structure
        values = to_host(form.eigenvalues).astype(np.float64)
        order = np.argsort(-values, kind="stable")
        vectors = owners.whole(form.U)[:, namespace(form.U).asarray(order)]
        return values[order], vectors

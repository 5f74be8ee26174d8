"""The global low-rank matrix."""

from __future__ import annotations

from gpu_hodlr.factor import Woodbury
from gpu_hodlr.formats.base import CompressedMatrix
from gpu_hodlr.structures import LowRank


class LowRankMatrix(CompressedMatrix):
    """A symmetric matrix K~ = U diag(lambda) U^T of low rank.

    Made by `gpu_hodlr.compress` with scheme "lowrank"; see `CompressedMatrix` for its attributes.
    The tree is a single leaf.
    """

    structure: LowRank

    def factorize(self, damping: float = 0.0) -> Woodbury:
        """The inverse of K~ + damping I by Sherman, Morrison and Woodbury.

        Another damping costs nothing.

        Args:
            damping: added to the diagonal, >= 0; 0 only for a matrix of full rank.

        Raises:
            NotPositiveDefiniteError: K~ + damping I is not positive definite; it tells the damping
                that would do.
            ArgumentError: damping negative, NaN or infinite.
        """
        factor: Woodbury = self._factorize(damping)
        return factor

    def _factor(self, structure: LowRank, damping: float) -> Woodbury:
        return Woodbury(structure, damping)

"""The FMM matrix: nested low rank in the far field, dense blocks in the near field."""

from __future__ import annotations

from gpu_hodlr.factor import MultipoleSolver, ULVCholesky
from gpu_hodlr.formats.base import CompressedMatrix
from gpu_hodlr.structures import Multipole


class FMMMatrix(CompressedMatrix):
    """A symmetric matrix K~ in FMM form (strong admissibility).

    Made by `gpu_hodlr.compress` with scheme "fmm"; see `CompressedMatrix` for its attributes. Of
    every pair of symmetric blocks one is stored.
    """

    structure: Multipole

    @property
    def near_fraction(self) -> float:
        """Numbers of the near blocks of different leaves / N^2: what the budget was spent on."""
        return float(self.structure.near.size) / self.shape[0] ** 2

    def factorize(  # type: ignore[override]  # a solver where there is no factor
        self, damping: float = 0.0
    ) -> MultipoleSolver | ULVCholesky:
        """A solver of K~ + damping I: preconditioned CG, or with budget 0 the ULV-Cholesky factor.

        Without a near field the form is an HSS form, and its factor is exact. Else the factor of
        an HSS form of K~ preconditions CG: `solve` works to a stated rtol, and there is no
        log-determinant or square root.

        Args:
            damping: added to the diagonal, >= 0.

        Raises:
            NotPositiveDefiniteError: K~ + damping I is not positive definite; with a near field
                only `solve` can tell.
            ArgumentError: damping negative, NaN or infinite.
        """
        factor: MultipoleSolver | ULVCholesky = self._factorize(damping)
        return factor

    def _factor(self, structure: Multipole, damping: float) -> MultipoleSolver | ULVCholesky:
        telescope = structure.telescope()
        if telescope is not None:
            return ULVCholesky(telescope, damping)
        return MultipoleSolver(
            structure, damping, lambda: self._not_positive_definite(structure, damping)
        )

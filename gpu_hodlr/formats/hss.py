"""The HSS matrix: nested low rank in every off-diagonal block row."""

from __future__ import annotations

from gpu_hodlr.factor import ULVCholesky
from gpu_hodlr.formats.base import CompressedMatrix
from gpu_hodlr.structures import Telescope


class HSSMatrix(CompressedMatrix):
    """A symmetric matrix K~ in hierarchically semiseparable (telescoping) form.

    Made by `gpu_hodlr.compress`; see `CompressedMatrix` for its attributes.
    """

    def factorize(self, damping: float = 0.0) -> ULVCholesky:
        """ULV-Cholesky factorization of K~ + damping I, in the matrix's dtype.

        Another damping costs another factorization and no compression.

        Args:
            damping: added to the diagonal, >= 0.

        Raises:
            NotPositiveDefiniteError: K~ + damping I is not positive definite; it tells the damping
                that would do, or an rtol.
            ArgumentError: damping negative, NaN or infinite.
        """
        factor: ULVCholesky = self._factorize(damping)
        return factor

    def _factor(self, structure: Telescope, damping: float) -> ULVCholesky:
        return ULVCholesky(structure, damping)

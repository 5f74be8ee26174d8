"""The HSS matrix: nested low rank in every off-diagonal block row."""

from __future__ import annotations

from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.devices import check_memory
from gpu_hodlr.factor import RefinedULV, ULVCholesky
from gpu_hodlr.factor.ulv_leaves import UncoupledLeaves
from gpu_hodlr.structures import Telescope


class HSSMatrix(StructuredMatrix):
    """A symmetric matrix K~ in hierarchically semiseparable (telescoping) form.

    Made by `gpu_hodlr.compress`; see `StructuredMatrix` for its attributes.

    Example:
        >>> x = np.linspace(0, 1, 200)
        >>> K = gh.compress(gh.KernelOperator(x, "gaussian", nugget=0.1), "hss", leaf_size=25)
        >>> type(K).__name__, type(K.factorize()).__name__
        ('HSSMatrix', 'ULVCholesky')
    """

    factors = (ULVCholesky, RefinedULV)
    structure: Telescope
    _leaves: UncoupledLeaves | None = None  # of the structure, where several dampings share them

    def _prepare(self) -> None:
        """See `StructuredMatrix`."""
        if self.structure.levels:
            needed, lower = UncoupledLeaves.memory(self.structure), "leaf_size"
            check_memory(needed, "what the factors share", lower, self.device)
            self._leaves = UncoupledLeaves.of(self.structure)

    def _factor(self, structure: Telescope, damping: float) -> ULVCholesky:
        return ULVCholesky(
            structure, damping, self._leaves if structure is self.structure else None
        )

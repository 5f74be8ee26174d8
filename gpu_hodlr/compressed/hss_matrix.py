"""The HSS matrix: nested low rank in every off-diagonal block row."""

from __future__ import annotations

from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.factor import RefinedULV, ULVCholesky


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

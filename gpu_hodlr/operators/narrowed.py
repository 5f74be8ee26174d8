"""An operator whose products and entries are rounded to float32."""

from __future__ import annotations

from gpu_hodlr.batched.stored import FLOAT32
from gpu_hodlr.devices import Array
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.operators.operator import Operator
from gpu_hodlr.operators.wrapped import WrappedOperator


class NarrowedOperator(WrappedOperator):
    """K in float32; it is multiplied and read in its own type.

    Args:
        operator: K, in float64.
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator)
        self.dtype = FLOAT32

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array | None:
        """Those of K."""
        x = super().gram_vectors(num, seed, comm)
        return None if x is None else x.astype(self.dtype)

    def _matmat(self, v: Array) -> Array:
        return super()._matmat(v.astype(self._operator.dtype)).astype(self.dtype)

    def _matmat_by_blocks(self, v: Array, width: int) -> Array:
        wide = v.astype(self._operator.dtype)
        return super()._matmat_by_blocks(wide, width).astype(self.dtype)

    def _blocks(self, rows: Array, cols: Array) -> Array:
        return super()._blocks(rows, cols).astype(self.dtype)

    def _diagonal(self) -> Array:
        return super()._diagonal().astype(self.dtype)

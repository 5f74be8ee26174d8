"""An operator times a number."""

from __future__ import annotations

from gpu_hodlr.devices import Array
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.eigenbasis import Rotated
from gpu_hodlr.operators.dual import Dual, ScaledDual
from gpu_hodlr.operators.operator import Operator
from gpu_hodlr.operators.wrapped import WrappedOperator


class ScaledOperator(WrappedOperator):
    """factor * K; with a power of two every bit of K is kept.

    Args:
        operator: K.
        factor: > 0.
    """

    def __init__(self, operator: Operator, factor: float) -> None:
        super().__init__(operator)
        self._factor = self.dtype.type(factor)

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array | None:
        """A sketch X with E[X X^T] = factor * K, where K has one."""
        x = self._operator.gram_vectors(num, seed, comm)
        return None if x is None else x * self._factor**0.5

    def root(self) -> Array | None:
        """That of K, of the scaled matrix."""
        found = super().root()
        return None if found is None else found * self._factor**0.5

    def dual(self) -> Dual | None:
        """That of K, of the scaled matrix."""
        found = super().dual()
        return None if found is None else ScaledDual(found, float(self._factor))

    def eigenbasis(self) -> Rotated | None:
        """That of K, of the scaled matrix."""
        found = super().eigenbasis()
        return None if found is None else found.scaled(float(self._factor))

    def _matmat(self, v: Array) -> Array:
        return super()._matmat(v) * self._factor

    def _matmat_by_blocks(self, v: Array, width: int) -> Array:
        return super()._matmat_by_blocks(v, width) * self._factor

    def _blocks(self, rows: Array, cols: Array) -> Array:
        return super()._blocks(rows, cols) * self._factor

    def _diagonal(self) -> Array:
        return super()._diagonal() * self._factor

"""What operators made of another one share with it."""

from __future__ import annotations

import copy

from gpu_hodlr.devices import Array
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.eigenbasis import Rotated
from gpu_hodlr.operators.dual import Dual
from gpu_hodlr.operators.operator import Operator, Runs


class WrappedOperator(Operator):
    """K of another operator; a subclass says what differs.

    Args:
        operator: K.
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self._operator = operator
        self.has_products, self.has_entries = operator.has_products, operator.has_entries
        self.product_cost, self.entry_cost = operator.product_cost, operator.entry_cost
        self.least_columns = operator.least_columns
        self.points, self.definite = operator.points, operator.definite
        self.has_eigenbasis = operator.has_eigenbasis

    @property
    def has_diagonal(self) -> bool:
        """As of K."""
        return self._operator.has_diagonal

    @property
    def coordinates(self) -> Array | None:
        """Those of K."""
        return self._operator.coordinates

    @property
    def said(self) -> str:
        """That of K."""
        return f"{type(self).__name__} of {self._operator.said}"

    def runs(self) -> Runs:
        """Those of K."""
        return self._operator.runs()

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array | None:
        """Those of K."""
        return self._operator.gram_vectors(num, seed, comm)

    def root(self) -> Array | None:
        """That of K."""
        return self._operator.root()

    def dual(self) -> Dual | None:
        """That of K."""
        return self._operator.dual()

    def eigenbasis(self) -> Rotated | None:
        """That of K."""
        return self._operator.eigenbasis()

    def summand(self, index: int, count: int) -> Operator | None:
        """One of K's, wrapped alike."""
        part = self._operator.summand(index, count)
        return None if part is None else self._around(part)

    def _move_data(self, device: str) -> None:
        self._operator = self._operator.to(device)

    def _around(self, operator: Operator) -> WrappedOperator:
        """What this is of K, of another operator."""
        other = copy.copy(self)
        other._operator = operator
        other.has_products, other.has_entries = operator.has_products, operator.has_entries
        return other

    def _matmat(self, v: Array) -> Array:
        return self._operator.reader.matmat(v)

    def _matmat_by_blocks(self, v: Array, width: int) -> Array:
        return self._operator.reader.matmat_by_blocks(v, width)

    def _blocks(self, rows: Array, cols: Array) -> Array:
        return self._operator.reader.blocks(rows, cols)

    def _diagonal(self) -> Array:
        return self._operator.reader.diagonal()

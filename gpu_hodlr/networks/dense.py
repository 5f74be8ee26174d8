"""The matrix itself, accumulated over the data."""

from __future__ import annotations

import copy

from gpu_hodlr.arrays import tensor_of
from gpu_hodlr.devices import Array, check_memory, namespace_on
from gpu_hodlr.networks.access import Access
from gpu_hodlr.networks.functional import Functional
from gpu_hodlr.operators import DenseOperator, Runs


class Dense(Access):
    """K stored, N^2 numbers: for fewer parameters than there are outputs of all samples.

    Accumulated from the rows of the root, sum_k a_k a_k^T, or column by column by products with
    unit vectors, whichever costs less: a language model has many outputs a sample, and few
    operations an output.

    Args:
        functional: products of the same matrix.

    Raises:
        MemoryEstimateError: N^2 numbers do not fit.
    """

    name = "dense"
    has_entries = True

    def __init__(self, functional: Functional) -> None:
        super().__init__(functional.n, functional.dtype, functional.device)
        check_memory(
            2 * self.n**2 * self.dtype.itemsize, f"a dense {self.n} x {self.n} matrix",
            "the number of parameters (params=), or take entries='none'", self.device,
        )  # fmt: skip
        xp = namespace_on(self.device)
        K = xp.zeros((self.n, self.n), self.dtype)
        if row_operations(functional) < column_operations(functional):
            total = tensor_of(K)  # the same memory
            with functional.problem.network.plain():
                for rows in functional.root_rows():
                    total += rows.T @ rows
        else:
            for start, columns in functional.unit_products():
                K[:, start : start + columns.shape[1]] = columns
            K = (K + K.T) / 2
        self._dense = DenseOperator(K, definite=functional.problem.metric is not None)
        self._runs = functional.runs()
        self.product_cost, self.entry_cost = self._dense.product_cost, self._dense.entry_cost

    def on(self, device: str) -> Dense:
        """The same with K there."""
        moved = copy.copy(self)
        moved._dense, moved.device = self._dense.to(device), device  # type: ignore[assignment]
        return moved

    def runs(self) -> Runs:
        """Unit by unit."""
        return self._runs

    def matmat(self, v: Array) -> Array:
        """K v."""
        return self._dense.reader.matmat(v)

    def blocks(self, rows: Array, cols: Array) -> Array:
        """Read."""
        return self._dense.reader.blocks(rows, cols)

    def diagonal(self) -> Array:
        """Read."""
        return self._dense.reader.diagonal()


def column_operations(functional: Functional) -> float:
    """Of products with all unit vectors."""
    return functional.product_cost * functional.n


def row_operations(functional: Functional) -> float:
    """Of the rows of the root and the sum of their squares; infinite where there is no root."""
    if functional.problem.metric is None:
        return float("inf")
    n, problem = functional.n, functional.problem
    return problem.rows * (4.0 * problem.sample_flops + 2.0 * n * n)

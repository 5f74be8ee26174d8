"""The global low-rank form of a symmetric matrix: K = U diag(lambda) U^T, U^T U = I."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.structures.base import Map, Structure


@dataclass(frozen=True)
class LowRank(Structure):
    """A positive semidefinite matrix by its eigenvalues and eigenvectors.

    Attributes:
        U: (N, r) orthonormal columns.
        eigenvalues: (r,) largest first, none negative.
    """

    U: Array
    eigenvalues: Array

    @property
    def n(self) -> int:
        """N."""
        return int(self.U.shape[0])

    @property
    def leaves(self) -> Array:
        """A single leaf."""
        return namespace(self.U).arange(self.n)[None]

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """See `Structure`: one level, one node."""
        return ((int(self.U.shape[1]),),)

    def matmat(self, v: Array) -> Array:
        """U (lambda (U^T v))."""
        return self.apply(self.eigenvalues, v)

    def apply(self, values: Array, v: Array) -> Array:
        """U diag(values) U^T v: another function of the matrix in place of its eigenvalues."""
        # batched.matmul and not @, which CuPy cannot capture into a graph.
        U = self.U[None]
        coefficients = batched.matmul(U, v[None], transpose_a=True) * values[:, None]
        return batched.matmul(U, coefficients)[0]

    def diagonal(self) -> Array:
        """The diagonal, (N,)."""
        diagonal: Array = (self.U * self.U) @ self.eigenvalues
        return diagonal

    def arrays(self) -> list[Array]:
        """See `Structure`."""
        return [self.U, self.eigenvalues]

    def index_arrays(self) -> list[Any]:
        """See `Structure`."""
        return []

    def scaled(self, factor: float) -> Self:
        """See `Structure`."""
        number = np.dtype(self.dtype).type(factor)
        return replace(self, eigenvalues=self.eigenvalues * number)

    def _mapped(self, floats: Map, indices: Map) -> Self:
        return replace(self, U=floats(self.U), eigenvalues=floats(self.eigenvalues))

"""The matrix that is sparse in a network's Kronecker-factored eigenbasis."""

from __future__ import annotations

import copy
from typing import Any, Self

from gpu_hodlr.checks import check_count
from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.factor import KFEFactor
from gpu_hodlr.structures import RotatedSparse


class KFEMatrix(StructuredMatrix):
    """A symmetric matrix K~ = Q (D + S + S^T) Q^T, sparse in the Kronecker-factored eigenbasis.

    Made by `gpu_hodlr.compress` with scheme "kfe" of a network's matrix; see `StructuredMatrix` for
    its attributes. The tree is a single leaf.

    Example:
        >>> import torch
        >>> x = torch.linspace(0, 1, 40).reshape(10, 4)
        >>> layers = torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 8)
        >>> op = gh.GGNOperator(torch.nn.Sequential(*layers), "mse", x, torch.ones(10, 8))
        >>> K = gh.compress(op, "kfe", rtol=1e-3)
        >>> K.structure.basis.layers[-1].units  # of 8 outputs, 3 are coupled to the rest
        3
    """

    factors = (KFEFactor,)
    structure: RotatedSparse
    _frames = 4
    _pattern: tuple[int | None, int | None] = (None, None)

    def factorize(
        self,
        damping: Any = 0.0,
        shift: str | None = None,
        *,
        neighbours: int | None = None,
        head: int | None = None,
    ) -> KFEFactor:
        """A sparse approximate inverse, and solves, determinant and square root around it.

        Collective: all ranks call.

        Args:
            damping: see `CompressedMatrix`, as the next; a number: one of every row is refused.
            shift: see `CompressedMatrix`.
            neighbours: of a row of the inverse factor at most, see `KFEFactor`.
            head: rows of largest diagonal that condition on each other.

        Raises:
            NotPositiveDefiniteError: K~ + damping I is not positive definite.
            ArgumentError: damping negative, NaN or infinite; neighbours or head is negative.
            InexactError: a damping of every row, or a diagonal was added to K~.
        """
        self.owners.comm.same(neighbours=neighbours, head=head)
        for name, value in (("neighbours", neighbours), ("head", head)):
            if value is not None:
                check_count(value, name, least=0)
        chosen = copy.copy(self)
        chosen._pattern = neighbours, head
        factor: Any = StructuredMatrix.factorize(chosen, damping, shift)
        return factor

    def _exact(self) -> Self:
        exact = super()._exact()
        exact._pattern = self._pattern
        return exact

    def _factor(self, structure: RotatedSparse, damping: float) -> KFEFactor:
        return KFEFactor(structure, damping, *self._pattern)

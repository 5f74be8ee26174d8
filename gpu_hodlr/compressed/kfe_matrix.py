"""The matrix that is sparse in a network's Kronecker-factored eigenbasis."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.devices import Array
from gpu_hodlr.factor import KFEFactor
from gpu_hodlr.factor.vecchia_pattern import Pattern
from gpu_hodlr.structures import RotatedSparse

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDtype


class KFEMatrix(StructuredMatrix):
    """A symmetric matrix K~ = Q (D + S + S^T) Q^T, sparse in the Kronecker-factored eigenbasis.

    Made by `gpu_hodlr.compress` with scheme "kfe" of a network's matrix; see `StructuredMatrix` for
    its attributes. The tree is a single leaf.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.linspace(0, 1, 40).reshape(10, 4)
        >>> layers = torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 8)
        >>> op = gh.GGNOperator(torch.nn.Sequential(*layers), "mse", x, torch.ones(10, 8))
        >>> K = gh.compress(op, "kfe", rtol=1e-3)
        >>> K.structure.basis.layers[-1].units  # of 8 outputs, 3 are coupled to the rest
        3
    """

    factors = (KFEFactor,)
    structure: RotatedSparse
    _frames = 5
    _pattern: Pattern | None = None

    def factorize(
        self,
        damping: Any = 0.0,
        shift: str | None = None,
        dtype: AnyDtype | None = None,
        *,
        storage_fraction: float | None = None,
        neighbours: int | None = None,
        head: int | None = None,
    ) -> KFEFactor:
        """A sparse approximate inverse, and solves, determinant and square root around it.

        What the inverse N may store decides how many iterations a solve takes; within it, the head
        and the neighbours are chosen: the triangle of the head, rows of largest diagonal that
        condition on each other, gets nearly half of the entries, the strongest neighbours of all
        other rows the rest. Both end at some ten seconds of work on a core.

        Collective: all ranks call.

        Args:
            damping: see `CompressedMatrix`, as the next.
            shift: see `CompressedMatrix`.
            dtype: the matrix's, if any: iterations with K make up for what N lacks, and K is as
                large as N.
            storage_fraction: numbers that N may store, as a fraction of N^2 and counted as those
                of the matrix; of a low-rank part it then has what takes a quarter of them. None:
                what K~ stores, and all of the low-rank part.
            neighbours: of a row of N at most, instead of as many as fit.
            head: its rows, instead of as many as fit.

        Raises:
            NotPositiveDefiniteError: K~ + damping I is not positive definite.
            ArgumentError: damping or storage_fraction negative, NaN or infinite; neighbours or head
                is negative; another dtype.
        """
        chosen = self._chosen(storage_fraction, neighbours, head)
        factor: Any = StructuredMatrix.factorize(chosen, damping, shift, dtype)
        return factor

    def factorize_many(
        self,
        dampings: Iterable[Any],
        shift: str | None = None,
        dtype: AnyDtype | None = None,
        *,
        storage_fraction: float | None = None,
        neighbours: int | None = None,
        head: int | None = None,
    ) -> list[Any]:
        """See `CompressedMatrix`, and `factorize` for the rest.

        Collective: all ranks call.
        """
        chosen = self._chosen(storage_fraction, neighbours, head)
        return chosen._factorized_many(dampings, shift, dtype)

    def _chosen(
        self, storage_fraction: float | None, neighbours: int | None, head: int | None
    ) -> Self:
        """The same with the pattern of `factorize`.

        Raises:
            DtypeError, ArgumentError: see `factorize`.
        """
        self.owners.comm.same(storage_fraction=storage_fraction, neighbours=neighbours, head=head)
        for name, value in (("neighbours", neighbours), ("head", head)):
            if value is not None:
                check_count(value, name, least=0)
        if storage_fraction is not None:
            check_number(storage_fraction, "storage_fraction")
        numbers = self.num_stored
        if storage_fraction is not None:
            numbers = int(storage_fraction * self.shape[0] ** 2)
        chosen = copy.copy(self)
        chosen._pattern = Pattern(numbers, neighbours, head, whole=storage_fraction is None)
        return chosen

    def _exact(self) -> Self:
        return self._of_pattern(super()._exact())

    def _plus(self, rows: Array) -> Self:
        return self._of_pattern(super()._plus(rows))

    def _of_pattern(self, matrix: Self) -> Self:
        matrix._pattern = self._pattern
        return matrix

    def _factor(self, structure: RotatedSparse, damping: float) -> KFEFactor:
        return KFEFactor(structure, damping, self._pattern)

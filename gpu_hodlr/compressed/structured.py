"""Matrices of one structure: stacks of arrays, and the factor that belongs to them."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr.checks import check_number
from gpu_hodlr.compressed.matrix import CompressedMatrix
from gpu_hodlr.compressed.report import CompressionReport
from gpu_hodlr.devices import Array, check_memory, memory_errors
from gpu_hodlr.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from gpu_hodlr.factor import IndefiniteError, Solver, SymmetricFactor
from gpu_hodlr.factor.advice import not_positive_definite, of_every_row
from gpu_hodlr.files.storage import save_structure
from gpu_hodlr.structures import Structure
from gpu_hodlr.tree import ClusterTree


class StructuredMatrix(CompressedMatrix):
    """A compressed matrix that is kept in one structure.

    Args:
        structure: the stored arrays.
        report: what the compression did.
        dtype: of the matrix and its vectors; that of the arrays by default.

    Attributes:
        tree: the cluster tree.
        structure: the stored arrays.
        factors: the classes of what `factorize` gives.
    """

    factors: ClassVar[tuple[type[Solver], ...]] = ()

    def __init__(
        self, structure: Structure, report: CompressionReport, dtype: DTypeLike | None = None
    ) -> None:
        super().__init__(
            structure.n,
            np.dtype(structure.dtype if dtype is None else dtype),
            structure.device,
            report,
            structure.owners,
        )
        self.structure = structure
        self.tree = ClusterTree(structure.all_leaves)
        self._num_stored = structure.num_stored

    def _matmat(self, v: Array) -> Array:
        """See `CompressedMatrix`; computed in the type of the stored blocks."""
        stored = v.astype(self.structure.dtype, copy=False)
        return self.structure.matmat(stored).astype(self.dtype, copy=False)

    def _diagonal(self) -> Array:
        return self.structure.diagonal()

    @property
    def _stored_as(self) -> str:
        kept = self.structure.dtype
        return "" if kept == self.dtype else f" in {kept}"

    def _like(self, structure: Structure, **changed: Any) -> Self:
        """A matrix of this kind with another structure, and what changes in the report."""
        report = replace(self.report, **changed)
        return type(self)(structure, report, self.dtype)

    def _times(self, number: float) -> Self:
        norm = abs(number) * self.report.frobenius_norm
        return self._like(self.structure.scaled(number), frobenius_norm=norm)

    def _plus(self, rows: Array) -> Self:
        """K~ + diag(d), of this rank's rows of d."""
        owners, d = self.owners, rows.astype(np.float64)
        before = self.structure.diagonal().astype(np.float64)
        structure = self.structure.plus_diagonal(d)
        rounding = structure.diagonal().astype(np.float64) - before - d
        cross, square, lost = (
            sum(owners.comm.share(float(part))) for part in (before @ d, d @ d, rounding @ rounding)
        )
        norm = self.report.frobenius_norm
        new = math.sqrt(max(norm**2 + 2 * cross + square, 0.0))

        def changed(error: float | None) -> float | None:
            if error is None:
                return None
            missed = math.hypot(error * norm, math.sqrt(lost))
            return missed / new if new else missed

        error, bound = changed(self.report.error), changed(self.report.error_bound)
        return self._like(structure, frobenius_norm=new, error=error, error_bound=bound)

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """Numerical ranks of all nodes, one tuple a level, leaves first, the root left out."""
        return self.structure.ranks

    @property
    def num_stored(self) -> int:
        """Floating numbers stored, padding included; on many ranks by all together."""
        return self._num_stored

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays on this rank, index arrays included."""
        return int(
            sum(a.nbytes for a in (*self.structure.arrays(), *self.structure.index_arrays()))
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """See `CompressedMatrix`."""
        save_structure(path, self.structure, asdict(self.report), self.dtype)

    @abstractmethod
    def _factor(self, structure: Any, damping: float) -> Any:
        """The factor of K~ + damping I.

        Raises:
            IndefiniteError: it is not positive definite.
        """

    def factorize(self, damping: Any = 0.0) -> SymmetricFactor:
        """See `CompressedMatrix`, in the matrix's dtype."""
        factor: SymmetricFactor = self._factorize(damping)
        return factor

    def _factorize(self, damping: Any) -> Any:
        with self.owners.comm.agreed():
            if getattr(damping, "ndim", 0):
                return self._factorize_with_diagonal(damping)
            self.owners.comm.same(damping=damping)
            damping = check_number(damping, "damping")
            structure = self.structure.astype(self.dtype)
            found = self._factor_if_definite(structure, damping)
            if found is None:
                raise self._not_positive_definite(structure, damping)
            return found

    def _factor_if_definite(self, structure: Any, damping: float) -> Any:
        """The factor of K~ + damping I; None on all ranks where it is not positive definite."""
        comm = self.owners.comm
        lower = "max_rank, or use float32"
        memory = memory_errors("the factorization", lower, self.device)
        try:
            with comm.agreed(), memory, comm.phase("factor"):
                needed = self.factors[0].memory(structure)
                check_memory(needed, "the factorization", lower, self.device)
                return self._factor(structure, damping)
        except IndefiniteError:
            return None

    def _factorize_with_diagonal(self, damping: Any) -> Any:
        """See `factorize`: the diagonal becomes part of the matrix."""
        if damping.ndim != 1:
            raise ShapeError(f"damping must be a number or have shape ({self.shape[0]},)")
        rows = self._rows_of(damping, "damping")
        if not bool((rows >= 0).all()):
            raise ArgumentError("damping must be >= 0 everywhere")
        exact = type(self)(self.structure.astype(self.dtype), self.report, self.dtype)
        common = self._common_damping(rows)
        try:
            factor = exact._plus(rows - rows.dtype.type(common))._factorize(common)
        except NotPositiveDefiniteError as e:
            raise of_every_row(e, common) from None
        factor.damping, factor.row_damping = damping, rows.copy()  # the first is the user's
        return factor

    def _common_damping(self, rows: Array) -> float:
        """What of the damping of every row is added as a number; the rest goes into the matrix."""
        return 0.0

    def _would_do(self, structure: Any, damping: float) -> bool:
        """Whether there is a factor with this damping."""
        return self._factor_if_definite(structure, damping) is not None

    def _not_positive_definite(
        self, structure: Structure, damping: float
    ) -> NotPositiveDefiniteError:
        """Look for the smallest damping that does, by Lanczos and trial factorizations."""
        return not_positive_definite(
            self,
            damping,
            self.report.rtol,
            partial(self._would_do, structure),
            self.report.error * self.report.frobenius_norm,
        )

"""Matrices of one structure: stacks of arrays, and the factor that belongs to them."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr.arrays import power_of_two
from gpu_hodlr.checks import check_number
from gpu_hodlr.compressed.matrix import CompressedMatrix
from gpu_hodlr.compressed.report import CompressionReport
from gpu_hodlr.devices import Array, memory_errors, namespace
from gpu_hodlr.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from gpu_hodlr.factor import IndefiniteError, Solver, SymmetricFactor
from gpu_hodlr.factor.advice import not_positive_definite, of_every_row
from gpu_hodlr.files.storage import save_structure
from gpu_hodlr.files.writing import AnyPath
from gpu_hodlr.structures import Structure
from gpu_hodlr.tree import ClusterTree

_ROOM = 2.0**60  # of what is stored in float32, over entries of size one


class StructuredMatrix(CompressedMatrix):
    """A compressed matrix that is kept in one structure.

    Args:
        structure: the stored arrays.
        report: what the compression did.
        dtype: of the matrix and its vectors; that of the arrays by default.
        scale: a power of two: the matrix is the structure times it.

    Attributes:
        tree: the cluster tree.
        structure: the stored arrays.
        scale: 1, or where the arrays are narrower than the matrix, and so is their range, the power
            of two that they are to be multiplied by.
        factors: the classes of what `factorize` gives.
    """

    factors: ClassVar[tuple[type[Solver], ...]] = ()

    def __init__(
        self,
        structure: Structure,
        report: CompressionReport,
        dtype: DTypeLike | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(
            structure.n,
            np.dtype(structure.dtype if dtype is None else dtype),
            structure.device,
            report,
            structure.owners,
        )
        if scale != 1.0 and structure.dtype == self.dtype:
            structure, scale = structure.scaled(scale), 1.0
        self.structure, self.scale = structure, scale
        self.tree = ClusterTree(structure.all_leaves)
        self._num_stored = structure.num_stored

    def _matmat(self, v: Array) -> Array:
        """See `CompressedMatrix`; computed in the type of the stored blocks, and in its range."""
        if not self._narrow:
            return self.structure.matmat(v)
        xp = namespace(v)
        size = self.owners.max(xp.abs(v).max(axis=0)) if v.size else xp.ones(v.shape[1:], v.dtype)
        size = xp.where(size > 0, size, 1)
        product = self.structure.matmat((v / size).astype(self.structure.dtype))
        return product.astype(self.dtype) * size * self.dtype.type(self.scale)

    def _diagonal(self) -> Array:
        diagonal = self.structure.diagonal()
        if not self._narrow:
            return diagonal
        return diagonal.astype(self.dtype) * self.dtype.type(self.scale)

    @property
    def _narrow(self) -> bool:
        """Whether the stored blocks are narrower than the matrix."""
        return self.structure.dtype != self.dtype

    def _wide(self) -> Structure:
        """The structure in the matrix's dtype, with the scale in it."""
        wide = self.structure.astype(self.dtype)
        return wide if self.scale == 1.0 else wide.scaled(self.scale)

    @property
    def _stored_as(self) -> str:
        return f" in {self.structure.dtype}" if self._narrow else ""

    def _like(
        self, structure: Structure, scale: float, frobenius_norm: float, error: float
    ) -> Self:
        """A matrix of this kind with another structure, and what changes in the report."""
        report = replace(self.report, frobenius_norm=frobenius_norm, error=error)
        return type(self)(structure, report, self.dtype, scale)

    def _times(self, number: float) -> Self:
        norm = abs(number) * self.report.frobenius_norm
        scale = self.scale
        if self._narrow:
            mantissa, exponent = np.frexp(number)
            number, scale = 2 * float(mantissa), float(np.ldexp(scale, int(exponent) - 1))
        return self._like(self.structure.scaled(number), scale, norm, self.report.error)

    def _plus(self, rows: Array) -> Self:
        """K~ + diag(d), of this rank's rows of d."""
        share, norm, error = self.owners.comm.share, self.report.frobenius_norm, self.report.error
        largest = max(share(float(abs(rows).max()) if rows.size else 0.0))
        structure, scale = self.structure, self.scale
        if self._narrow and largest > _ROOM * scale:
            scale = power_of_two(largest)
            structure = structure.scaled(self.scale / scale)
        structure = structure.plus_diagonal(rows.astype(np.float64) / scale)
        # Squares of very large or small numbers would leave the range.
        size = power_of_two(max(largest, norm))
        d, before, after = (
            x.astype(np.float64) / size
            for x in (rows, self._diagonal(), structure.diagonal().astype(np.float64) * scale)
        )
        rounding = after - before - d
        cross, square, lost = (
            sum(share(float(part.sum()))) for part in (before * d, d * d, rounding * rounding)
        )
        norm /= size
        new = math.sqrt(max(norm**2 + 2 * cross + square, 0.0))
        missed = math.hypot(error * norm, math.sqrt(lost))
        return self._like(structure, scale, size * new, missed / new if new else size * missed)

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

    def save(self, path: AnyPath) -> None:
        """See `CompressedMatrix`."""
        save_structure(path, self.structure, asdict(self.report), self.dtype, self.scale)

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
            structure = self._wide()
            found = self._factor_if_definite(structure, damping)
            if found is None:
                raise self._not_positive_definite(structure, damping)
            return found

    def _factor_if_definite(self, structure: Any, damping: float) -> Any:
        """The factor of K~ + damping I; None on all ranks where it is not positive definite."""
        comm = self.owners.comm
        memory = memory_errors("the factorization", "max_rank, or use float32", self.device)
        try:
            with comm.agreed(), memory, comm.phase("factor"):
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
        exact = type(self)(self._wide(), self.report, self.dtype)
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

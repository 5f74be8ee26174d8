"""Matrices of one structure: stacks of arrays, and the factor that belongs to them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr.arrays import check_dtype, power_of_two
from gpu_hodlr.compressed.damped import Damped
from gpu_hodlr.compressed.matrix import CompressedMatrix, each_damping
from gpu_hodlr.compressed.report import CompressionReport
from gpu_hodlr.devices import Array, check_memory, memory_errors, namespace
from gpu_hodlr.errors import AccuracyWarning, ArgumentError
from gpu_hodlr.factor import RefinedFactor, Solver, SymmetricFactor
from gpu_hodlr.factor.accuracy import Accuracy
from gpu_hodlr.files.storage import save_structure
from gpu_hodlr.files.writing import AnyPath
from gpu_hodlr.structures import Structure
from gpu_hodlr.tree import ClusterTree

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDtype

_ROOM = 2.0**60  # of what is stored in float32, over entries of size one
_HARMLESS = 0.5  # of the smallest eigenvalue, that the compression's error may be without a word
_FRAMES_OF_MANY = 5  # from a warning to who calls `factorize_many`
_SAFE = 0.1  # of the damping: what the error should be


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
    _lowest: float | None = None  # the smallest eigenvalue, where several dampings share it
    _frames: ClassVar[int] = 4  # from a warning to who calls `factorize`

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
        self._narrow = structure.dtype != self.dtype
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

    def _exact(self) -> Self:
        """What is factorized: a matrix whose arrays are in its own dtype, the scale in them.

        Raises:
            MemoryEstimateError: a copy does not fit.
        """
        if self.structure.kept_in == self.dtype.name:
            return copy.copy(self)
        what, lower = f"a copy in {self.dtype.name}", "max_rank, or use float32"
        with memory_errors(what, lower, self.device):
            numbers = sum(a.size for a in self.structure.arrays())
            check_memory(numbers * self.dtype.itemsize, what, lower, self.device)
            structure = self.structure.astype(self.dtype)
        return type(self)(structure, self.report, self.dtype, self.scale)

    @property
    def _stored_as(self) -> str:
        kept_in = self.structure.kept_in
        return "" if kept_in == self.dtype.name else f" in {kept_in}"

    def _like(self, structure: Structure, scale: float, **changed: Any) -> Self:
        """A matrix of this kind with another structure, and what changes in the report."""
        report = replace(self.report, **changed)
        return type(self)(structure, report, self.dtype, scale)

    def _times(self, number: float) -> Self:
        size, report, scale = abs(number), self.report, self.scale
        spectral, nugget = report.spectral_error, report.nugget
        changed = {
            "frobenius_norm": size * report.frobenius_norm,
            "spectral_error": None if spectral is None else size * spectral,
            "nugget": None if nugget is None or number < 0 else number * nugget,
        }
        if self._narrow:
            mantissa, exponent = np.frexp(number)
            number, scale = 2 * float(mantissa), float(np.ldexp(scale, int(exponent) - 1))
        return self._like(self.structure.scaled(number), scale, **changed)

    def _plus(self, rows: Array) -> Self:
        """K~ + diag(d), of this rank's rows of d."""
        share, norm = self.owners.comm.share, self.report.frobenius_norm
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

        def changed(error: float | None) -> float | None:
            if error is None:
                return None
            missed = math.hypot(error * norm, math.sqrt(lost))
            return missed / new if new else size * missed

        return self._like(
            structure, scale, frobenius_norm=size * new,
            error=changed(self.report.error), error_bound=changed(self.report.error_bound),
            **self._spectral_with(size, d, rounding),
        )  # fmt: skip

    def _spectral_with(self, size: float, d: Array, rounding: Array) -> dict[str, float | None]:
        """What a diagonal size * d changes of the spectral error and the nugget in the report."""
        spectral, nugget, owners = self.report.spectral_error, self.report.nugget, self.owners
        ends = [abs(rounding).max(keepdims=True), -d.min(keepdims=True)]
        lost, least = (size * float(owners.max(x)[0]) for x in ends)
        nugget = None if nugget is None else nugget - least
        return {
            "spectral_error": None if spectral is None else spectral + lost,
            "nugget": nugget if nugget is not None and nugget >= 0 else None,
        }

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
        self._save(path, {})

    def _save(self, path: AnyPath, more: Mapping[str, Any]) -> None:
        """With what else is to be known of it."""
        report = asdict(self.report)
        save_structure(path, self.structure, report, self.dtype, self.scale, more)

    def _factor(self, structure: Any, damping: float) -> Any:
        """The factor of K~ + damping I.

        Raises:
            IndefiniteError: it is not positive definite.
        """
        return self.factors[0](structure, damping)

    def _refined(self, damping: float) -> RefinedFactor:
        """A factor of K~ + damping I in float32, refined.

        Raises:
            IndefiniteError: see `RefinedFactor`.
        """
        structure, norm = self.structure, self.report.frobenius_norm
        return self._refined_class(structure, damping, self.scale, norm, self._factor)

    @property
    def _refined_class(self) -> type[RefinedFactor]:
        return next(kind for kind in self.factors if issubclass(kind, RefinedFactor))

    @property
    def _factors_narrowly(self) -> bool:
        """Whether there is a factor in float32 that is refined."""
        return any(issubclass(kind, RefinedFactor) for kind in self.factors)

    def _narrower(self, dtype: AnyDtype | None) -> bool:
        """Whether a factor is wanted that is narrower than the matrix.

        Raises:
            DtypeError: it is neither float32 nor float64.
            ArgumentError: it is wider; there is none.
        """
        wanted = self.dtype if dtype is None else check_dtype(dtype, "dtype")
        if wanted.itemsize > self.dtype.itemsize:
            raise ArgumentError(f"dtype {wanted} is wider than the matrix's {self.dtype}")
        if wanted != self.dtype and not self._factors_narrowly:
            raise ArgumentError(
                f"dtype {wanted}: a factor of {type(self).__name__} solves by iterations in the "
                f"matrix's {self.dtype}; compress with dtype {wanted}, or in another form"
            )
        return wanted != self.dtype

    def factorize(
        self, damping: Any = 0.0, shift: str | None = None, dtype: AnyDtype | None = None
    ) -> SymmetricFactor:
        """See `CompressedMatrix`, in the matrix's dtype or a narrower one."""
        with self.owners.comm.agreed():
            narrow = self._checked(shift, dtype)
            damped = Damped.of(copy.copy(self), damping, narrow)
            return self._factorized(damped, shift, self._frames)

    def factorize_many(
        self,
        dampings: Iterable[Any],
        shift: str | None = None,
        dtype: AnyDtype | None = None,
    ) -> list[Any]:
        """See `CompressedMatrix`."""
        return self._factorized_many(dampings, shift, dtype)

    def _factorized_many(
        self, dampings: Iterable[Any], shift: str | None, dtype: AnyDtype | None
    ) -> list[SymmetricFactor]:
        """See `factorize_many`; in ascending order, as the smallest needs the most exact."""
        comm, lower = self.owners.comm, "the number of dampings"
        with comm.agreed():
            narrow = self._checked(shift, dtype)
            every = each_damping(dampings)
            comm.same(dampings=len(every))
            matrix, what = copy.copy(self) if narrow else self._exact(), f"{len(every)} factors"
            several = [Damped.of(matrix, damping, narrow) for damping in every]
            several = [replace(d, matrix=matrix) if d.rows is None else d for d in several]
            if len(several) > 1 and not narrow:
                matrix._prepare()
            factors: dict[int, SymmetricFactor] = {}
            for i in sorted(range(len(several)), key=lambda i: several[i].least):
                factors[i] = self._factorized(several[i], shift, _FRAMES_OF_MANY)
                if len(factors) == 1:  # by its size the others' is known
                    rest = (len(several) - 1) * factors[i].nbytes
                    check_memory(rest, what, lower, self.device)
            return [factors[i] for i in range(len(several))]

    def _prepare(self) -> None:
        """Make what the factors of several dampings share."""

    def _checked(self, shift: str | None, dtype: AnyDtype | None) -> bool:
        """Whether a factor is wanted that is narrower than the matrix.

        Raises:
            ArgumentError, DtypeError: see `factorize`.
        """
        self.owners.comm.same(shift=shift, dtype=dtype)
        if shift not in (None, "auto"):
            raise ArgumentError(f"shift must be None or 'auto', got {shift!r}")
        return self._narrower(dtype)

    def _factorized(self, damped: Damped, shift: str | None, frames: int) -> SymmetricFactor:
        """The factor; see `_check_accuracy` for the frames.

        Raises:
            NotPositiveDefiniteError: see `factorize`.
        """
        factor: SymmetricFactor = damped.factor()
        if factor is None or (shift and not factor.verified()):
            error = damped.error()
            if shift is None or error.damping is None:
                raise error
            factor = damped.at(error.damping).factor()
            factor.shifted = error.damping - damped.number
        else:
            self._check_accuracy(factor, damped, frames)
        return factor

    def _check_accuracy(self, factor: Solver, damped: Damped, frames: int) -> None:
        """Warn where the compression's error decides what the solutions are.

        The smallest eigenvalue of what is factorized is looked for only where that could be: a
        matrix with a small damping and no nugget may still be far from singular.

        Args:
            factor: of K~ plus damping.
            damped: what it is of.
            frames: from here to who called `factorize`, for the warning.

        Warns:
            AccuracyWarning: see `CompressedMatrix.factorize`.
        """
        missed, report, damping = self.report.spectral_error, self.report, damped.least
        # Of a K that may be indefinite no eigenvalue is known to be as large as the damping.
        enough = 0.0 if report.nugget is None else damping + report.nugget
        if missed is None or missed <= _HARMLESS * enough:
            return
        smallest = damped.smallest(factor)
        if missed <= _HARMLESS * smallest or self.owners.comm.rank:
            return
        wanted = max(enough, smallest)
        rtol, eps = report.error * _SAFE * wanted / missed, np.finfo(self.dtype).eps
        finer = f", or compress with damping={wanted:.3g}, which is rtol about {rtol:.1e}"
        known = "" if report.nugget is None else f"damping + nugget {enough:.3g} and of "
        safe = missed / _SAFE
        if report.nugget is None:
            safe += damping - smallest
        warnings.warn(
            f"the compression's error is {missed:.3g} in the spectral norm, more than half of "
            f"{known}the smallest eigenvalue, about {smallest:.3g}: "
            "solutions and log-determinants may be far from those of the matrix itself; raise the "
            f"damping to {safe:.2g}{finer if rtol > 10 * eps else ''}, or take the "
            "factor as a preconditioner",
            AccuracyWarning,
            stacklevel=frames,
        )

    def _accuracy(self) -> Accuracy:
        report = self.report
        return Accuracy(
            report.rtol, report.error, report.frobenius_norm, report.spectral_error,
            report.spectral_sampled,
        )  # fmt: skip

    def _common_damping(self, rows: Array) -> float:
        """What of the damping of every row is added as a number; the rest goes into the matrix."""
        return 0.0

"""A compressed matrix plus a damping, before it is factorized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from gpu_hodlr.checks import check_number
from gpu_hodlr.devices import Array, check_memory, memory_errors
from gpu_hodlr.errors import ArgumentError, NotPositiveDefiniteError, ShapeError
from gpu_hodlr.factor import IndefiniteError
from gpu_hodlr.factor.advice import not_positive_definite, of_every_row, too_small_for_float32

if TYPE_CHECKING:
    from gpu_hodlr.compressed.structured import StructuredMatrix
    from gpu_hodlr.factor import Solver

_LOWER = "max_rank, or use float32"  # where a factor takes too much memory


@dataclass(frozen=True, eq=False)
class Damped:
    """K~ + damping I, or K~ + diag(d).

    Attributes:
        matrix: K~, its arrays in its own dtype, or as they are stored where that will do.
        given: the damping as the user gave it.
        number: the damping, a number; 0 where there is one of every row.
        rows: this rank's rows of d; None where there is none.
        narrow: whether the factor is to be in float32, and refined.
    """

    matrix: StructuredMatrix
    given: Any
    number: float
    rows: Array | None = None
    narrow: bool = False

    @classmethod
    def of(cls, matrix: StructuredMatrix, damping: Any, narrow: bool = False) -> Self:
        """From what a user gives.

        Raises:
            ShapeError, ArgumentError: it cannot be a damping, or differs between the ranks.
        """
        every_row = bool(getattr(damping, "ndim", 0))
        matrix.owners.comm.same(damping="of every row" if every_row else damping)
        if not narrow or every_row:
            matrix = matrix._exact()
        if not every_row:
            return cls(matrix, damping, check_number(damping, "damping"), None, narrow)
        if damping.ndim != 1:
            raise ShapeError(f"damping must be a number or have shape ({matrix.shape[0]},)")
        rows = matrix._rows_of(damping, "damping")
        if not bool((rows >= 0).all()):
            raise ArgumentError("damping must be >= 0 everywhere")
        return cls(matrix, damping, 0.0, rows, narrow)

    @property
    def least(self) -> float:
        """The smallest damping of a row."""
        if self.rows is None:
            return self.number
        return float(-self.matrix.owners.max(-self.rows.min(keepdims=True))[0])

    def smallest(self, factor: Solver) -> float:
        """The smallest eigenvalue, of a factor; that of K~ is found once for all numbers."""
        if self.rows is not None:
            return 1.0 / factor.inverse_norm
        if self.matrix._lowest is None:
            self.matrix._lowest = 1.0 / factor.inverse_norm - self.number
        return self.matrix._lowest + self.number

    def factor(self) -> Any:
        """The factor; None on all ranks where it is not positive definite."""
        matrix, number = self.matrix, self.number
        if self.rows is not None:
            number = matrix._common_damping(self.rows)
            matrix = matrix._plus(self.rows - self.rows.dtype.type(number))
        comm = matrix.owners.comm
        memory = memory_errors("the factorization", _LOWER, matrix.device)
        try:
            with comm.agreed(), memory, comm.phase("factor"):
                kind = matrix._refined_class if self.narrow else matrix.factors[0]
                needed = kind.memory(matrix.structure)
                check_memory(needed, "the factorization", _LOWER, matrix.device)
                if self.narrow:
                    factor: Any = matrix._refined(number)
                else:
                    factor = matrix._factor(matrix.structure, number)
        except IndefiniteError:
            return None
        factor.accuracy = matrix._accuracy()
        if self.rows is not None:
            factor.damping, factor.row_damping = self.given, self.rows.copy()
        return factor

    def at(self, number: float) -> Self:
        """With another number; with that added to the damping of every row, where there is one.

        It is added as a user would who follows the advice: to the last bit.
        """
        if self.rows is None:
            return replace(self, number=number)
        return self.of(self.matrix, self.given + number, self.narrow)

    @property
    def _wide_does(self) -> bool:
        """Whether there is a factor in the matrix's own dtype."""
        wide = replace(self, matrix=self.matrix._exact(), narrow=False)
        factor = wide.factor()
        return factor is not None and bool(factor.verified())

    def _would_do(self, number: float) -> bool:
        factor = self.at(number).factor()
        return factor is not None and factor.verified()

    def error(self) -> NotPositiveDefiniteError:
        """That there is no factor, and at which number there is one."""
        matrix, least = self.matrix, self.least
        if self.rows is not None:
            matrix = matrix._plus(self.rows)
        if self.narrow and self._wide_does:
            error = too_small_for_float32(matrix, self.number, self._would_do)
        else:
            error = not_positive_definite(
                matrix, self.number, matrix._accuracy(), self._would_do, least,
                matrix.report.nugget is not None,
            )  # fmt: skip
        return error if self.rows is None else of_every_row(error, 0.0, least)

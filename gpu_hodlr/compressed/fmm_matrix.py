"""The FMM matrix: nested low rank in the far field, dense blocks in the near field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.compressed.weak_form import weak_form
from gpu_hodlr.devices import Array
from gpu_hodlr.factor import MultipoleSolver, RefinedULV, ULVCholesky
from gpu_hodlr.factor.multipole_solver import first_damping, preconditioner_of
from gpu_hodlr.krylov import extreme_eigenvalues
from gpu_hodlr.once import once
from gpu_hodlr.structures import Multipole, Telescope

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDtype

_PRECONDITIONER_RANK = 1024


class FMMMatrix(StructuredMatrix):
    """A symmetric matrix K~ in FMM form (strong admissibility).

    Made by `gpu_hodlr.compress` with scheme "fmm"; see `StructuredMatrix` for its attributes. Of
    every pair of symmetric blocks one is stored.

    Example:
        >>> points = np.random.default_rng(0).random((400, 2))
        >>> op = gh.KernelOperator(points, "laplace", 0.2, nugget=0.1)
        >>> K = gh.compress(op, "fmm", budget=0.1, leaf_size=25, rtol=1e-3)
        >>> bool(0 < K.near_fraction <= 0.1), type(K.factorize(0.1)).__name__
        (True, 'MultipoleSolver')
    """

    factors = (MultipoleSolver, ULVCholesky, RefinedULV)
    structure: Multipole
    _frames = 5
    _weak: tuple[float, Telescope] | None = None  # error and HSS form of the last preconditioner

    @property
    def near_fraction(self) -> float:
        """Numbers of the near blocks of different leaves / N^2: what the budget was spent on."""
        blocks = len(self.structure.near_pairs)
        return float(blocks * self.structure.D.shape[1] ** 2) / self.shape[0] ** 2

    def factorize(  # type: ignore[override]  # a solver where there is no factor
        self, damping: Any = 0.0, shift: str | None = None, dtype: AnyDtype | None = None
    ) -> MultipoleSolver | ULVCholesky | RefinedULV:
        """A solver of K~ + damping I: preconditioned CG, or with budget 0 the ULV-Cholesky factor.

        Collective: all ranks call.

        Without a near field the form is an HSS form, and its factor is exact. Else the factor of
        an HSS form of K~ preconditions CG: `solve` works to a stated rtol, and there is no
        log-determinant or square root.

        Args:
            damping: see `StructuredMatrix`, as the next.
            shift: whether a solve finds a damping too small is tried with a random right-hand side.
            dtype: float32 of a float64 matrix with budget 0 alone: CG is in the matrix's own type.

        Raises:
            NotPositiveDefiniteError: K~ + damping I is not positive definite; with a near field
                `solve` may be the first to find out.
            ArgumentError: damping negative, NaN or infinite; dtype float32 with a near field.
        """
        factor: Any = super().factorize(damping, shift, dtype)
        return factor

    @property
    def _factors_narrowly(self) -> bool:
        return self.structure.telescope() is not None

    def _refined(self, damping: float) -> RefinedULV:
        telescope = self.structure.telescope()
        assert telescope is not None
        return RefinedULV(telescope, damping, self.scale, self.report.frobenius_norm, ULVCholesky)

    def _factor(self, structure: Multipole, damping: float) -> MultipoleSolver | ULVCholesky:
        telescope = structure.telescope()
        if telescope is not None:
            return ULVCholesky(telescope, damping)
        first, error = first_damping(structure, damping, self._ends)
        weak = self._weak_form(structure, error)
        preconditioner = preconditioner_of(weak, first)
        return MultipoleSolver(structure, damping, preconditioner, self.report.rtol)

    @once
    def _ends(self) -> tuple[float, float]:
        """See `extreme_eigenvalues`, of the structure: no damping changes them."""
        return extreme_eigenvalues(self.structure)

    def _weak_form(self, structure: Multipole, error: float) -> Telescope:
        """The HSS form to this absolute error, or to the smaller one that the last was made for."""
        if self._weak is None or self._weak[0] > error or self._weak[1].dtype != structure.dtype:
            self._weak = error, weak_form(structure, error, _PRECONDITIONER_RANK)
        return self._weak[1]

    def _common_damping(self, rows: Array) -> float:
        """The smallest: as much error a preconditioner may have."""
        if self.structure.telescope() is not None:
            return 0.0
        return float(-self.owners.max(-rows.min(keepdims=True))[0])

"""Solves with an FMM form: conjugate gradients, preconditioned by a factor of its HSS form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.arrays import Vectors
from gpu_hodlr.autograd import symmetric
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.devices import Array, HostIndex, to_hosts
from gpu_hodlr.errors import InexactError, NotPositiveDefiniteError
from gpu_hodlr.factor.accuracy import Accuracy
from gpu_hodlr.factor.advice import not_positive_definite, of_every_row
from gpu_hodlr.factor.probing import Control, ProbedInverse
from gpu_hodlr.factor.residuals import (
    meets_no_direction,
    relative_residuals,
    warn_of_residual,
    without_curvature,
)
from gpu_hodlr.factor.solver import IndefiniteError, Solver
from gpu_hodlr.factor.ulv import ULVCholesky
from gpu_hodlr.krylov import CGInfo, conjugate_gradients, extreme_eigenvalues
from gpu_hodlr.structures import Multipole, Telescope
from gpu_hodlr.structures.stored import Part, Ranks, Stack, check_types

WEAK_ERROR = 1.0  # times the smallest eigenvalue: Frobenius error of a preconditioner's basis
_GROWTH = 1.5  # of the preconditioner's damping, where the one Lanczos finds does not do
_TRIES = 8
_ESTIMATE = 1e-3  # rtol of the solves that estimate the norm of the inverse
_MAXITER = 500
_RTOL = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-10}


_PREFIX = "preconditioner."  # of its arrays in a file
_ABSENT = {
    "logdet": "log-determinant",
    "sqrt_matmat": "square root",
    "sqrt_solve": "square root",
    "sample": "square root to sample with",
}


class MultipoleSolver(ProbedInverse, Solver):
    """(K + damping I)^-1 for an FMM form K.

    Conjugate gradients on the FMM form, preconditioned by the ULV-Cholesky factor of the HSS form
    on the same tree, which is compressed from the FMM form to about the smallest eigenvalue of
    K + damping I (no tighter: CG makes up for the rest). Where that is not positive definite, its
    damping is raised (`preconditioner_of`).

    It is no factor: it has no log-determinant, square root or samples, `hasattr` says so, and who
    asks for them gets an `InexactError`, which is an AttributeError and tells what to do.

    Args:
        form: K.
        damping: what is added to the diagonal, >= 0.
        preconditioner: the factor, or None.
        rtol: to which K was compressed, for advice; `accuracy` may say more.

    Attributes:
        shape: (N, N).
        dtype: float32 or float64.
        device: "cpu" or "cuda".
        damping: what is added to the diagonal.
        owners: which rank has what.
        preconditioner: the factor; its own damping may be larger. None where none was found.
        info: CGInfo of the last `solve`, None before.
        residual: largest norm(b - A x) / norm(b) of the last `solve`, computed from x; None before.

    Example:
        >>> points = np.random.default_rng(0).random((400, 2))
        >>> op = gh.KernelOperator(points, "laplace", 0.2, nugget=0.1)
        >>> F = gh.compress(op, "fmm", budget=0.1, leaf_size=25, rtol=1e-3).factorize(damping=0.1)
        >>> x = F.solve(np.ones(400))
        >>> F.info.converged, F.residual < 1e-8
        (True, True)
    """

    def __init__(
        self, form: Multipole, damping: float, preconditioner: ULVCholesky | None, rtol: float
    ) -> None:
        super().__init__(form, damping)
        self._set(form, damping, preconditioner, rtol)

    def _set(
        self, form: Multipole, added: float, preconditioner: ULVCholesky | None, rtol: float
    ) -> None:
        self.preconditioner = preconditioner
        self.info: CGInfo | None = None
        self.residual: float | None = None
        self._form, self._rtol = form, rtol
        self.accuracy = self.accuracy or Accuracy(rtol)
        self._added = added  # to the form; a damping of every row is part of it

    def __getattr__(self, name: str) -> NoReturn:
        """Called for what is not there.

        Raises:
            InexactError: a factor has it.
            AttributeError: nothing has it.
        """
        if name in _ABSENT:
            raise InexactError(
                f"an FMM form has no exact {_ABSENT[name]}: CG solves with it; compress with "
                "scheme 'hss' (or 'fmm' with budget 0) for a factor"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _damped_product(self, v: Array) -> Array:
        """(K + damping I) v for v (N, k)."""
        return self._replay(self._form.matmat, v) + v.dtype.type(self._added) * v

    def _cg(self, b: Array, rtol: float, maxiter: int = _MAXITER) -> tuple[Array, CGInfo]:
        """CG for this rank's rows of b (N, k)."""
        precondition = None if self.preconditioner is None else self.preconditioner.solve
        return conjugate_gradients(
            self._damped_product, b, precondition, rtol, maxiter, self.device, self.owners
        )

    def _inverse(self, b: Array) -> Array:
        x, info = self._cg(b, _ESTIMATE)
        if info.direction is not None:
            raise self._not_positive_definite()
        return x

    def _control(self) -> Control | None:
        """The preconditioner, whose inverse has a diagonal that is known."""
        found = self.preconditioner
        return None if found is None else Control(found._solve, found._inverse_diagonal())

    def verified(self) -> bool:
        """Whether `meets_no_direction` holds for a random right-hand side.

        There is no other proof without a factor of the FMM form.

        Collective: all ranks call.
        """
        normal = batched.normal_source((0, streams.VERIFY), self.device)
        b = self.owners.take(normal((self.shape[0], 1), self.dtype))
        return meets_no_direction(lambda b: self._cg(b, _RTOL[self.dtype]), b)

    def _not_positive_definite(self) -> NotPositiveDefiniteError:
        form, preconditioner, rtol = self._form, self.preconditioner, self._rtol

        def would_do(damping: float) -> bool:
            return MultipoleSolver(form, damping, preconditioner, rtol).verified()

        assert self.accuracy is not None
        error = not_positive_definite(form, self._added, self.accuracy, would_do)
        if self.row_damping is None:
            return error
        return of_every_row(error, self._added, self._added)

    @symmetric
    def solve(self, b: Vectors, rtol: float | None = None, maxiter: int = _MAXITER) -> Vectors:
        """(K + damping I)^-1 b for b (N,) or (N, k); the result is like b.

        Collective: all ranks call.

        Args:
            b: right-hand sides.
            rtol: norm(b - A x) <= rtol norm(b) for every column; 1e-10 by default, 1e-5 in float32.
            maxiter: most products with K.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.
            NotPositiveDefiniteError: K + damping I is not positive definite.

        Warns:
            AccuracyWarning: rtol was not reached.
        """
        owners = self.owners
        owners.comm.same(rtol=rtol, maxiter=maxiter)
        wanted = _RTOL[self.dtype] if rtol is None else check_number(rtol, "rtol")
        check_count(maxiter, "maxiter")
        columns, restore = owners.right_hand_side(b, self.shape[0], self.dtype, self.device, "b")
        x, self.info = self._cg(columns, wanted, maxiter)
        if self.info.direction is not None:
            raise self._not_positive_definite()
        product = self._damped_product(x)
        relative = relative_residuals(columns, product, owners)
        refused = without_curvature(x, product, owners).astype(relative.dtype)
        relative, refused = to_hosts(relative, refused)
        if refused.any():
            raise self._not_positive_definite()
        self.residual = float(relative.max(initial=0.0))
        warn_of_residual(self.residual, wanted, self.info)
        return restore(x)

    def _more_said(self) -> str:
        found = self.preconditioner
        said = "no preconditioner" if found is None else f"{found.damping:.3g} of preconditioner"
        return f", {said}"

    @property
    def nbytes(self) -> int:
        """Bytes of the preconditioner on this rank; of one that was loaded, of the form as well."""
        own = 0 if self.preconditioner is None else self.preconditioner.nbytes
        return own + (sum(a.nbytes for a in self._form.arrays()) if self._loaded else 0)

    @classmethod
    def memory(cls, structure: Any) -> int:
        """See `Solver`: a sketch of the structure, an HSS form made of it, and its factor."""
        if not len(structure.near_pairs):
            return ULVCholesky.memory(structure)
        leaves, rows = structure.D.shape[:2]
        return int(1200 * leaves * rows * structure.D.itemsize)

    # --- files ---------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """See `Stored`."""
        arrays = super().pack() | self._form.pack()
        if self.preconditioner is not None:
            packed = self.preconditioner.pack()
            arrays |= {_PREFIX + name: a for name, a in packed.items()}
        return arrays

    def about(self) -> dict[str, Any]:
        """See `Stored`."""
        inner = None if self.preconditioner is None else self.preconditioner.about()
        here = {"added": self._added, "rtol": self._rtol, "preconditioner": inner}
        return super().about() | self._form.about() | here

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`: those of the form, and of the preconditioner."""
        inner = ULVCholesky.stacks(leaves, levels, read)
        form = Multipole.stacks(leaves, levels, read)
        return form | {_PREFIX + name: stack for name, stack in inner.items()}

    @classmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        form, about = Multipole._unpack(part, ranks), part.about
        named = {str(i): a for i, a in enumerate(form.arrays())}
        check_types(named, form.dtype)
        self = cls._unpacked(part, form.n, form.dtype)
        preconditioner = None
        if about["preconditioner"] is not None:
            preconditioner = ULVCholesky._unpack(part.within(_PREFIX, about["preconditioner"]), [])
            if preconditioner.dtype != form.dtype:
                raise ValueError(f"a preconditioner of {preconditioner.dtype} for {form.dtype}")
        added, rtol = (check_number(about[name], name) for name in ("added", "rtol"))
        self._set(form.to(part.device), added, preconditioner, rtol)
        return self


def first_damping(
    form: Multipole, damping: float, ends: tuple[float, float]
) -> tuple[float, float]:
    """The damping to begin a preconditioner of K + damping I with, and the error it may have.

    The damping is that, or what rounding needs. A Ritz value, which the error is `WEAK_ERROR` times
    of, is above the smallest eigenvalue; norms of the error are below their Frobenius norms.

    Args:
        form: K.
        damping: >= 0.
        ends: of the spectrum of K, by Lanczos.

    Raises:
        IndefiniteError: Lanczos finds a negative eigenvalue of K + damping I.
    """
    smallest, largest = ends
    rounding = float(np.finfo(form.dtype).eps) * max(largest, -smallest)
    if smallest + damping < -form.n * rounding:  # Ritz values: inside the spectrum
        raise IndefiniteError
    first = damping or rounding or 1.0
    return first, WEAK_ERROR * (first + max(smallest, 0.0))


def preconditioner_of(weak: Telescope, damping: float) -> ULVCholesky | None:
    """The factor of an HSS form plus the smallest damping tried that does; None where none does.

    Args:
        weak: the HSS form, to the error of `first_damping`.
        damping: the first that is tried, > 0.
    """
    for attempt in range(_TRIES):
        try:
            with weak.owners.comm.agreed():
                return ULVCholesky(weak, damping)
        except IndefiniteError:
            if attempt == 0:
                damping = max(damping, -extreme_eigenvalues(weak)[0])
            damping *= _GROWTH
    return None

"""Solves with an FMM form: conjugate gradients, preconditioned by a factor of its HSS form."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched.replay import Replay
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.devices import Array, namespace, to_hosts
from gpu_hodlr.errors import AccuracyWarning, InexactError
from gpu_hodlr.factor.base import IndefiniteError, Solver
from gpu_hodlr.factor.ulv import ULVCholesky
from gpu_hodlr.krylov import CGInfo, conjugate_gradients, extreme_eigenvalues
from gpu_hodlr.structures import Multipole, Telescope

_TOLERANCE = 0.5  # times the damping: error of the preconditioner's bases
_GROWTH = 1.5  # of the preconditioner's damping, where the one Lanczos finds does not do
_TRIES = 8
_RTOL = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-10}


class MultipoleSolver(Solver):
    """(K + damping I)^-1 for an FMM form K.

    Conjugate gradients on the FMM form, preconditioned by the ULV-Cholesky factor of the HSS form
    on the same tree, which is compressed from the FMM form to about the damping (no tighter: CG
    makes up for the rest). Where that is not positive definite, its damping is raised.

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
        self,
        form: Multipole,
        damping: float,
        telescope: Callable[[float], Telescope],
        indefinite: Callable[[], Exception],
    ) -> None:
        """Compress and factorize the preconditioner.

        Args:
            form: the matrix.
            damping: >= 0.
            telescope: makes its HSS form to an absolute error.
            indefinite: makes the exception that `solve` raises where CG proves that K + damping I
                is not positive definite.

        Raises:
            IndefiniteError: Lanczos finds a negative eigenvalue of K + damping I.
        """
        self.shape = (form.n, form.n)
        self.dtype: np.dtype[Any] = form.D.dtype
        self.device = form.device
        self.damping = damping
        self._added = damping  # to the form: a damping of every row is part of it
        self.owners = form.owners
        self.info: CGInfo | None = None
        self.residual: float | None = None
        self._form = form
        self._indefinite = indefinite
        self._product = Replay(self.owners.alone)
        self.preconditioner = self._factorize(telescope)

    def _factorize(self, telescope: Callable[[float], Telescope]) -> ULVCholesky | None:
        smallest, largest = extreme_eigenvalues(self._form)
        rounding = np.finfo(self.dtype).eps * max(largest, -smallest)
        if smallest + self.damping < -self.shape[0] * rounding:  # Ritz values: inside the spectrum
            raise IndefiniteError
        damping = self.damping or rounding or 1.0
        weak = telescope(_TOLERANCE * damping)
        for attempt in range(_TRIES):
            try:
                return ULVCholesky(weak, damping)
            except IndefiniteError:
                if attempt == 0:
                    damping = max(damping, -extreme_eigenvalues(weak)[0])
                damping *= _GROWTH
        return None

    def _damped_product(self, v: Array) -> Array:
        """(K + damping I) v for v (N, k)."""
        return self._product(self._form.matmat, v) + v.dtype.type(self._added) * v

    def solve(self, b: Any, rtol: float | None = None, maxiter: int = 500) -> Any:
        """(K + damping I)^-1 b for b (N,) or (N, k); the result is like b.

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
        wanted = _RTOL[self.dtype] if rtol is None else check_number(rtol, "rtol")
        check_count(maxiter, "maxiter")
        owners = self.owners
        columns, restore = owners.columns(b, self.shape[0], self.dtype, self.device, "b")
        owners.comm.same(rtol=wanted, maxiter=maxiter)
        x, self.info = conjugate_gradients(
            self._damped_product, columns,
            None if self.preconditioner is None else self.preconditioner.solve,
            wanted, maxiter, self.device, owners,
        )  # fmt: skip
        if self.info.direction is not None:
            raise self._indefinite()
        xp, product = namespace(columns), self._damped_product(x)
        missing, norms = (
            xp.sqrt(owners.sum((part * part).sum(axis=0))) for part in (columns - product, columns)
        )
        energy, sizes = (owners.sum(batched.column_dots(x, y)) for y in (product, x))
        relative, energy, sizes = to_hosts(missing / xp.where(norms > 0, norms, 1), energy, sizes)
        if ((energy <= 0) & (sizes > 0)).any():
            raise self._indefinite()
        self.residual = float(relative.max(initial=0.0))
        if self.residual > 10 * wanted:
            warnings.warn(
                f"residual {self.residual:.2g} after {self.info.iterations} iterations exceeds "
                f"rtol {wanted:.2g}; raise the damping or maxiter",
                AccuracyWarning,
                stacklevel=2,
            )
        return restore(x)

    def _inexact(self, what: str) -> NoReturn:
        raise InexactError(
            f"an FMM form has no exact {what}: CG solves with it; compress with scheme 'hss' "
            "(or 'fmm' with budget 0) for a factor"
        )

    def logdet(self) -> NoReturn:
        """Not known for an FMM form.

        Raises:
            InexactError: always.
        """
        self._inexact("log-determinant")

    def sqrt_matmat(self, z: Any, *, transpose: bool = False) -> NoReturn:
        """Not known for an FMM form.

        Raises:
            InexactError: always.
        """
        self._inexact("square root")

    def sqrt_solve(self, z: Any, *, transpose: bool = False) -> NoReturn:
        """Not known for an FMM form.

        Raises:
            InexactError: always.
        """
        self._inexact("square root")

    def sample(self, num: int, seed: int = 0, *, inverse: bool = False) -> NoReturn:
        """Not known for an FMM form.

        Raises:
            InexactError: always.
        """
        self._inexact("square root to sample with")

    @property
    def nbytes(self) -> int:
        """Bytes of the preconditioner."""
        return 0 if self.preconditioner is None else self.preconditioner.nbytes

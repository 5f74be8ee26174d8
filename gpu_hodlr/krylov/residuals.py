"""Minimal residuals, for symmetric matrices that may be indefinite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace, steps_between_reads, to_hosts
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.krylov.problem import CGInfo, solved

_WORTH = 0.5  # of the residual, that another run from where the last one ended must leave at most
_ROUNDING = 10.0  # times that of the type
# Of a b outside A's range norm(A r) / norm(r) falls to about the root of the rounding and then
# rises again, while x grows without end. Times that root, over norm(A): where it has fallen.
_FALLEN = 10.0


def minres(
    A: Any,
    b: Any,
    *,
    damping: float = 0.0,
    M: Any = None,
    x0: Any = None,
    rtol: float = 1e-8,
    maxiter: int = 200,
    callback: Callable[[Any], Any] | None = None,
    comm: Any = None,
) -> tuple[Any, CGInfo]:
    """Solve (A + damping I) x = b for a symmetric A, definite or not, all columns at once.

    Collective: all ranks call.

    Paige and Saunders, SIAM J. Numer. Anal. 12 (1975): of the k-th Krylov space the x whose
    residual is least, in the norm of M. The residual is carried along (Choi, Paige, Saunders, SIAM
    J. Sci. Comput. 33 (2011), section 2) and formed anew by a product where the run is over: if
    that is larger, it goes on from there. Of a singular A and a b outside its range x is a
    least-squares solution, and `converged` False. A positive definite A is for `cg`, which needs
    half the vectors.

    Args:
        A: an operator, a compressed matrix, or what `as_operator` takes; see `cg`, as all others.
        b: (N,) or (N, k).
        damping: added to A's diagonal, >= 0.
        M: preconditioner, which must be positive definite, such as a factor of A at a damping that
            makes it so (`factorize(damping, shift="auto")`).
        x0: where to start, like b; zero by default.
        rtol: stop when norm(b - A x) <= rtol norm(b) for every column.
        maxiter: most products with A, those that form a residual anew not counted.
        callback: called with x after every iteration.
        comm: an mpi4py communicator, for an operator that all its ranks have.

    Returns:
        x like b, and the run's CGInfo (check `converged`).

    Raises:
        NotPositiveDefiniteError: M is not positive definite.
        ArgumentError, DtypeError, ShapeError, DeviceError: see `cg`.

    Example:
        >>> d = np.r_[-np.arange(1.0, 6.0), np.arange(1.0, 6.0)]
        >>> x, info = gh.minres(np.diag(d), np.ones(10))
        >>> info.converged, bool(np.allclose(x, 1 / d))
        (True, True)
    """
    options = {"damping": damping, "M": M, "rtol": rtol, "maxiter": maxiter, "comm": comm}
    return solved("minres", minimal_residuals, A, b, x0, callback, options)


def minimal_residuals(
    multiply: Callable[[Array], Array],
    b: Array,
    precondition: Callable[[Array], Array] | None,
    rtol: float,
    maxiter: int,
    device: str,
    owners: Ownership = ALONE,
    x0: Array | None = None,
    callback: Callable[[Array], Any] | None = None,
) -> tuple[Array, CGInfo]:
    """`minres` with arguments that are known to be right; see `conjugate_gradients` for them."""
    xp = namespace(b)
    if b.shape[1] == 0:
        return xp.zeros_like(b), CGInfo(True, 0, (0.0,))
    # Columns of size one: squares of very large or small ones would leave the dtype's range.
    size = owners.max(xp.abs(b).max(axis=0))
    size = xp.where(size > 0, size, 1)
    b = b / size
    run = _Run(multiply, precondition, owners, device, rtol, b)
    x = xp.zeros_like(b) if x0 is None else x0 / size
    r = b if x0 is None else b - multiply(x)
    seen = None if callback is None else lambda x: callback(x * size)
    column = run.relative(r)
    residuals = [float(column.max())]
    while rtol < residuals[-1] and len(residuals) <= maxiter:
        started = residuals[-1]
        y, told = run.steps(x, r, maxiter + 1 - len(residuals), seen)
        s = b - multiply(y)
        # What rounding made worse, as of a matrix that is singular to rounding, is not taken.
        better = run.relative(s) <= column
        x, r = xp.where(better, y, x), xp.where(better, s, r)
        column = run.relative(r)
        residuals += [*told[:-1], float(column.max())]
        if not residuals[-1] < _WORTH * started:
            break
    return x * size, CGInfo(residuals[-1] <= rtol, len(residuals) - 1, tuple(residuals))


@dataclass
class _Run:
    """Runs from given residuals.

    Attributes:
        multiply: v (rows, k) -> A v.
        precondition: r (rows, k) -> M r; None for r.
        owners: which rank has which rows.
        device: where they are.
        rtol: relative residual of every column.
        b: (rows, k) what residuals are relative to.
        norm: (k,) the largest entry seen of the tridiagonal matrices of all runs.
    """

    multiply: Callable[[Array], Array]
    precondition: Callable[[Array], Array] | None
    owners: Ownership
    device: str
    rtol: float
    b: Array

    def __post_init__(self) -> None:
        xp = namespace(self.b)
        scale = xp.sqrt(self.dot(self.b, self.b))
        self._scale = xp.where(scale > 0, scale, 1)
        self.norm = xp.zeros_like(scale)
        self._rounding = self.b.dtype.type(_ROUNDING * np.finfo(self.b.dtype).eps)
        self._fallen = self.b.dtype.type(_FALLEN * np.finfo(self.b.dtype).eps ** 0.5)

    def dot(self, u: Array, v: Array) -> Array:
        """(k,) of the columns."""
        return self.owners.sum(batched.column_dots(u, v))

    def relative(self, r: Array) -> Array:
        """(k,) norm(r) / norm(b), float64, to be compared with rtol as the host does."""
        return (namespace(r).sqrt(self.dot(r, r)) / self._scale).astype(np.float64)

    def _length(self, r: Array, y: Array) -> tuple[Array, Array]:
        """(k,) the norm of r in that of M, y = M r, and whether that is none."""
        xp, squares = namespace(r), self.dot(r, y)
        if self.precondition is None:
            return xp.sqrt(squares), squares < 0
        allowed = self._rounding * xp.sqrt(self.dot(r, r) * self.dot(y, y))
        return xp.sqrt(xp.where(squares > 0, squares, 0)), squares < -allowed

    def _times_M(self, r: Array) -> Array:  # noqa: N802  the matrix's name
        return r if self.precondition is None else self.precondition(r)

    def steps(
        self, x: Array, r: Array, most: int, callback: Callable[[Array], Any] | None
    ) -> tuple[Array, list[float]]:
        """At most so many steps from x with the residual r.

        A column that has converged, or whose least-squares solution is reached, stays as it is.

        Returns:
            x, and the largest relative residual after every step.

        Raises:
            NotPositiveDefiniteError: r^T M r < 0 for a residual r.
        """
        xp = namespace(r)

        def quotient(u: Array, v: Array) -> Array:
            return xp.where(v > 0, u / xp.where(v > 0, v, 1), 0)

        column, x = self.relative(r), x.copy()
        # Lanczos: z its vectors before normalization, y = M z, beta their norms.
        z, z_before, y = r, xp.zeros_like(r), self._times_M(r)
        beta, unfit = self._length(z, y)
        beta_before = xp.ones_like(beta)
        # The QR factorization of its tridiagonal matrix by reflections (c, s).
        c, s, delta_bar, epsilon = -xp.ones_like(beta), *(xp.zeros_like(beta) for _ in range(3))
        phi_bar, stuck = beta, beta == 0
        w, w_before = xp.zeros_like(r), xp.zeros_like(r)
        told: list[float] = []
        while len(told) < most:
            seen, over, wrong = [], [], []
            for _ in range(min(steps_between_reads(self.device, len(told)), most - len(told))):
                v = quotient(y, beta)
                p = self.multiply(v) - quotient(beta, beta_before) * z_before
                alpha = self.dot(v, p)
                z, z_before = p - quotient(alpha, beta) * z, z
                y = self._times_M(z)
                beta_before, (beta, none) = beta, self._length(z, y)
                self.norm = xp.maximum(self.norm, xp.maximum(abs(alpha), beta))
                delta = c * delta_bar + s * alpha
                gamma_bar = s * delta_bar - c * alpha
                epsilon_before, epsilon, delta_bar = epsilon, s * beta, -c * beta
                # norm(A r) / norm(r): where it has fallen so far, no step makes r smaller.
                gradient = xp.sqrt(gamma_bar * gamma_bar + delta_bar * delta_bar)
                going = (column > self.rtol) & ~stuck
                stuck = stuck | (gradient <= self._fallen * self.norm)
                unfit = unfit | (none & going)
                going = going & ~stuck
                gamma = xp.sqrt(gamma_bar * gamma_bar + beta * beta)
                c, s = quotient(gamma_bar, gamma), quotient(beta, gamma)
                step = v - epsilon_before * w_before - delta * w
                w, w_before = xp.where(going, quotient(step, gamma), 0), w
                x += xp.where(going, c * phi_bar, 0) * w
                phi_bar = s * phi_bar
                r = xp.where(going, s * s * r - quotient(phi_bar * c, beta) * z, r)
                column = self.relative(r)
                seen.append(column.max())
                over.append((~((column > self.rtol) & ~stuck)).all().astype(np.float64))
                wrong.append(unfit.any().astype(np.float64))
                if callback is not None:
                    callback(x)
            read = [float(value) for value in to_hosts(*seen, *over, *wrong)]
            count = len(seen)
            flags = read[count : 2 * count]
            end = flags.index(1.0) + 1 if 1.0 in flags else count
            told += read[:end]
            if any(read[2 * count :][:end]):
                raise NotPositiveDefiniteError(
                    "M is not positive definite: r^T M r < 0 for a residual r; minres needs one "
                    "that is, such as a factor with shift='auto'"
                )
            if end < count or flags[-1]:
                break
        return x, told

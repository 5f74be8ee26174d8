"""Conjugate gradients and Lanczos on anything that multiplies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.devices import Array, namespace, namespace_on, steps_between_reads, to_hosts
from gpu_hodlr.distributed import ALONE, Ownership, communicator
from gpu_hodlr.errors import DtypeError, ShapeError
from gpu_hodlr.operators import Operator, SharedOperator


class Matrix(Protocol):
    """A symmetric matrix with products."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its products."""

    @property
    def device(self) -> str:
        """Where it is: "cpu" or "cuda"."""

    def matmat(self, v: Any) -> Any:
        """The product with (N, k)."""


class Preconditioner(Protocol):
    """An approximate inverse."""

    def solve(self, b: Any) -> Any:
        """The approximate inverse applied to (N, k)."""


@dataclass(frozen=True)
class CGInfo:
    """How a conjugate gradient run ended.

    Attributes:
        converged: whether every column reached rtol.
        iterations: products made.
        residuals: largest relative residual norm(b - A x) / norm(b) of the columns, by
            iteration (recurrence), the first before any.
    """

    converged: bool
    iterations: int
    residuals: tuple[float, ...]


def cg(
    A: Matrix,
    b: Any,
    damping: float = 0.0,
    M: Preconditioner | None = None,
    rtol: float = 1e-8,
    maxiter: int = 200,
    comm: Any = None,
) -> tuple[Any, CGInfo]:
    """Solve (A + damping I) x = b by preconditioned conjugate gradients, all columns at once.

    Hestenes and Stiefel (1952); Saad, Iterative Methods for Sparse Linear Systems (2003), 9.2. The
    columns of b run independently and share the products.

    Args:
        A: an operator or a compressed matrix.
        b: (N,) or (N, k); of a matrix spread over ranks, this rank's rows of it will do.
        damping: added to A's diagonal, >= 0.
        M: preconditioner with `solve`, such as a factor of a compressed A at this damping.
        rtol: stop when norm(b - A x) <= rtol norm(b) for every column.
        maxiter: most products with A.
        comm: an mpi4py communicator, for an operator that all its ranks have: they form its
            products together, a network's by its samples. b and x are whole on every rank.

    Returns:
        x like b, and the run's CGInfo (check `converged`).

    Raises:
        ArgumentError: damping or rtol negative, maxiter < 1, NaN or infinity in b, or arguments
            that differ between ranks.
        DtypeError: A has no products, M no solve.
        ShapeError, DeviceError: b does not fit A, or M does not.
    """
    if not hasattr(A, "matmat"):
        raise DtypeError(f"A must be an operator or compressed matrix, got {type(A).__name__}")
    if M is not None and not hasattr(M, "solve"):
        raise DtypeError(f"M must have a solve method, got {type(M).__name__}")
    if M is not None and getattr(M, "shape", A.shape) != A.shape:
        raise ShapeError(f"M must have shape {A.shape}, got {getattr(M, 'shape', None)}")
    owners = getattr(A, "owners", ALONE)
    ranks = owners.comm
    if comm is not None:
        if not isinstance(A, Operator):
            raise DtypeError(f"comm is for an operator, got A of type {type(A).__name__}")
        ranks = communicator(comm, A.device)
        ranks.same(b=b)
        A = SharedOperator(A, ranks)
    ranks.same(damping=damping, rtol=rtol, maxiter=maxiter)
    check_number(damping, "damping")
    rtol = check_number(rtol, "rtol")
    check_count(maxiter, "maxiter")
    columns, restore = owners.columns(b, A.shape[0], A.dtype, A.device, "b")

    def multiply(v: Array) -> Array:
        return A.matmat(v) + v.dtype.type(damping) * v

    x, info = conjugate_gradients(multiply, columns, M, rtol, maxiter, A.device, owners)
    return restore(x), info


def conjugate_gradients(
    multiply: Callable[[Array], Array],
    b: Array,
    M: Preconditioner | None,
    rtol: float,
    maxiter: int,
    device: str,
    owners: Ownership = ALONE,
    indefinite: Callable[[], Exception] | None = None,
) -> tuple[Array, CGInfo]:
    """`cg` with arguments that are known to be right.

    The host reads residuals every few iterations (`steps_between_reads`). Where all columns have
    converged x and r stay as they are, so that iterations made beyond change nothing.

    Args:
        multiply: v (rows, k) -> A v.
        b: (rows, k), this rank's rows.
        M: see `cg`, as rtol and maxiter.
        rtol: relative residual of every column.
        maxiter: most products.
        device: where b is.
        owners: which rank has which rows.
        indefinite: makes the exception to be raised where p^T A p <= 0 for a direction p; without
            it such a column stays as it is.

    Returns:
        x (rows, k) and the run's CGInfo.
    """
    xp = namespace(b)

    def dot(u: Array, v: Array) -> Array:
        return owners.sum(batched.column_dots(u, v))

    def quotient(u: Array, v: Array) -> Array:
        return xp.where(v > 0, u / xp.where(v > 0, v, 1), 0)

    def largest(r: Array) -> Array:  # float64, to be compared with rtol as the host does
        return (xp.sqrt(dot(r, r)) / scale).max().astype(np.float64)

    if b.shape[1] == 0:
        return xp.zeros_like(b), CGInfo(True, 0, (0.0,))
    # Columns of size one: squares of very large or small ones would leave the dtype's range.
    size = owners.max(xp.abs(b).max(axis=0))
    size = xp.where(size > 0, size, 1)
    r = b / size
    x = xp.zeros_like(r)
    scale = xp.sqrt(dot(r, r))
    scale = xp.where(scale > 0, scale, 1)
    z = r if M is None else M.solve(r)
    p = z.copy()
    rz = dot(r, z)
    residual = largest(r)
    residuals = [float(residual)]
    while residuals[-1] > rtol and len(residuals) <= maxiter:
        done = len(residuals) - 1
        seen, bent = [], []
        for _ in range(min(steps_between_reads(device, done), maxiter - done)):
            Ap = multiply(p)
            curvature = dot(p, Ap)
            if indefinite is not None:
                bent.append(((curvature <= 0) & (dot(p, p) > 0)).any().astype(np.float64))
            alpha = xp.where(residual > rtol, quotient(rz, curvature), 0)
            x += alpha * p
            r -= alpha * Ap
            residual = largest(r)
            seen.append(residual)
            z = r if M is None else M.solve(r)
            rz, before = dot(r, z), rz
            p = z + quotient(rz, before) * p
        read = [float(value) for value in to_hosts(*seen, *bent)]
        new = read[: len(seen)]
        new = new[: 1 + next((j for j, value in enumerate(new) if not value > rtol), len(new))]
        if indefinite is not None and any(read[len(seen) :][: len(new)]):
            raise indefinite()
        residuals += new
    info = CGInfo(residuals[-1] <= rtol, len(residuals) - 1, tuple(residuals))
    return x * size, info


def extreme_eigenvalues(A: Matrix, steps: int = 60, seed: int = 0) -> tuple[float, float]:
    """Smallest and largest Ritz value of a symmetric matrix.

    Lanczos with full reorthogonalization (Parlett, The Symmetric Eigenvalue Problem (1998),
    chapter 13) from a seeded random vector; both lie inside the spectrum.
    """
    n = A.shape[0]
    owners = getattr(A, "owners", ALONE)
    xp = namespace_on(A.device)
    start = batched.normal_source((seed,), A.device)((n, 1), A.dtype)

    def norm(x: Array) -> Array:
        return owners.sum(x @ x) ** 0.5

    q = start[:, 0] if owners.alone else owners.rows.take(start[:, 0])
    basis = xp.empty((min(steps, n), len(q)), A.dtype)
    alpha: list[float] = []
    beta: list[float] = []
    unread: list[Array] = []
    q = q / norm(q)
    for j in range(len(basis)):
        basis[j] = q
        w = A.matmat(q[:, None])[:, 0]
        unread.append(owners.sum(q @ w))
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            w = w - owners.sum(basis[: j + 1] @ w) @ basis[: j + 1]
        length = norm(w)
        unread.append(length)
        if len(unread) == 2 * steps_between_reads(A.device, len(alpha)) or j + 1 == len(basis):
            read = [float(value) for value in to_hosts(*unread)]
            alpha += read[0::2]
            beta += read[1::2]
            unread = []
            k = _invariant(alpha, beta, 10 * float(np.finfo(A.dtype).eps))
            if k is not None:
                alpha = alpha[:k]
                break
        q = w / xp.where(length > 0, length, 1)
    k = len(alpha)
    tridiagonal = np.diag(alpha) + np.diag(beta[: k - 1], 1) + np.diag(beta[: k - 1], -1)
    ritz = np.linalg.eigvalsh(tridiagonal)
    return float(ritz[0]), float(ritz[-1])


def _invariant(alpha: list[float], beta: list[float], rounding: float) -> int | None:
    """Vectors that span an invariant subspace to rounding: what comes after them means nothing."""
    largest = 0.0
    for k, (a, b) in enumerate(zip(alpha, beta, strict=True), 1):
        largest = max(largest, abs(a))
        if b <= rounding * largest:
            return k
    return None

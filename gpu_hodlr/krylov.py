"""Conjugate gradients and Lanczos on anything that multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.devices import Array, namespace, namespace_on
from gpu_hodlr.distributed import ALONE, communicator
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

    Example:
        >>> x, info = gh.cg(gh.DenseOperator(np.diag([1.0, 2.0])), np.ones(2))
        >>> info.converged, info.iterations, len(info.residuals)
        (True, 2, 3)
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

    Example:
        >>> d = np.arange(1.0, 101.0)
        >>> op = gh.DenseOperator(np.diag(d))
        >>> x, info = gh.cg(op, np.ones(100), damping=1.0)
        >>> info.converged, bool(np.allclose(x, 1 / (d + 1)))
        (True, True)
        >>> F = gh.compress(op).factorize(damping=1.0)
        >>> gh.cg(op, np.ones(100), damping=1.0, M=F)[1].iterations < info.iterations
        True
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
    check_number(rtol, "rtol")
    check_count(maxiter, "maxiter")
    r, restore = owners.columns(b, A.shape[0], A.dtype, A.device, "b")
    xp = namespace(r)

    def dot(u: Array, v: Array) -> Array:
        return owners.sum(xp.einsum("ij,ij->j", u, v))

    def quotient(u: Array, v: Array) -> Array:
        return xp.where(v > 0, u / xp.where(v > 0, v, 1), 0)

    # Columns of size one: squares of very large or small ones would leave the dtype's range.
    if r.shape[1] == 0:
        return restore(xp.zeros_like(r)), CGInfo(True, 0, (0.0,))
    size = owners.max(xp.abs(r).max(axis=0))
    size = xp.where(size > 0, size, 1)
    r = r / size
    x = xp.zeros_like(r)
    scale = xp.sqrt(dot(r, r))
    scale = xp.where(scale > 0, scale, 1)
    z = r if M is None else M.solve(r)
    p = z.copy()
    rz = dot(r, z)
    residuals = [float((xp.sqrt(dot(r, r)) / scale).max())]
    while residuals[-1] > rtol and len(residuals) <= maxiter:
        Ap = A.matmat(p) + p.dtype.type(damping) * p
        alpha = quotient(rz, dot(p, Ap))
        x += alpha * p
        r -= alpha * Ap
        residuals.append(float((xp.sqrt(dot(r, r)) / scale).max()))
        z = r if M is None else M.solve(r)
        rz, before = dot(r, z), rz
        p = z + quotient(rz, before) * p
    info = CGInfo(residuals[-1] <= rtol, len(residuals) - 1, tuple(residuals))
    return restore(x * size), info


def extreme_eigenvalues(A: Matrix, steps: int = 60, seed: int = 0) -> tuple[float, float]:
    """Smallest and largest Ritz value of a symmetric matrix.

    Lanczos with full reorthogonalization (Parlett, The Symmetric Eigenvalue Problem (1998),
    chapter 13) from a seeded random vector; both lie inside the spectrum.
    """
    n = A.shape[0]
    owners = getattr(A, "owners", ALONE)
    xp = namespace_on(A.device)
    start = batched.normal_source((seed,), A.device)((n, 1), A.dtype)

    def norm(x: Array) -> float:
        return float(owners.sum(x @ x) ** 0.5)

    q = start[:, 0] if owners.alone else owners.rows.take(start[:, 0])
    basis = xp.empty((min(steps, n), len(q)), A.dtype)
    alpha, beta = [], []
    q = q / norm(q)
    for j in range(len(basis)):
        basis[j] = q
        w = A.matmat(q[:, None])[:, 0]
        alpha.append(float(owners.sum(q @ w)))
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            w = w - owners.sum(basis[: j + 1] @ w) @ basis[: j + 1]
        beta.append(norm(w))
        if beta[-1] <= 10 * np.finfo(A.dtype).eps * max(map(abs, alpha)):
            break
        q = w / beta[-1]
    k = len(alpha)
    tridiagonal = np.diag(alpha) + np.diag(beta[: k - 1], 1) + np.diag(beta[: k - 1], -1)
    ritz = np.linalg.eigvalsh(tridiagonal)
    return float(ritz[0]), float(ritz[-1])

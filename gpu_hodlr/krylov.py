"""Conjugate gradients and Lanczos on anything that multiplies."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import as_array
from gpu_hodlr.autograd import linear
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.devices import (
    Array,
    is_array,
    namespace,
    namespace_on,
    steps_between_reads,
    to_hosts,
)
from gpu_hodlr.distributed import ALONE, Communicator, Ownership, communicator
from gpu_hodlr.errors import AccuracyWarning, DtypeError, NotPositiveDefiniteError, ShapeError
from gpu_hodlr.operators import Operator, SharedOperator, as_operator


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


_APPLIED = (
    "precondition",
    "solve",
    "matmat",
    "__matmul__",
)  # how a preconditioner is, the first it has


@dataclass(frozen=True)
class CGInfo:
    """How a conjugate gradient run ended.

    Attributes:
        converged: whether every column reached rtol.
        iterations: products that x was made of.
        residuals: largest relative residual norm(b - A x) / norm(b) of the columns, by
            iteration (recurrence), the first before any.
        direction: (N,) p with p^T (A + damping I) p <= 0, at which an indefinite matrix stopped
            the run; None where none was met.
        curvature: its Rayleigh quotient p^T (A + damping I) p / p^T p; None where none was met.

    Example:
        >>> x, info = gh.cg(gh.DenseOperator(np.diag([1.0, 2.0])), np.ones(2))
        >>> info.converged, info.iterations, len(info.residuals)
        (True, 2, 3)
    """

    converged: bool
    iterations: int
    residuals: tuple[float, ...]
    direction: Any = field(default=None, compare=False)
    curvature: float | None = None


def cg(
    A: Any,
    b: Any,
    *positional: Any,
    damping: float = 0.0,
    M: Any = None,
    x0: Any = None,
    rtol: float = 1e-8,
    maxiter: int = 200,
    callback: Callable[[Any], Any] | None = None,
    comm: Any = None,
) -> tuple[Any, CGInfo]:
    """Solve (A + damping I) x = b by preconditioned conjugate gradients, all columns at once.

    Collective: all ranks call.

    Hestenes and Stiefel (1952); Saad, Iterative Methods for Sparse Linear Systems (2003), 9.2. The
    columns of b run independently and share the products.

    Args:
        A: an operator, a compressed matrix, or what `as_operator` takes.
        b: (N,) or (N, k); of a matrix spread over ranks, this rank's rows of it will do. A torch
            tensor may require grad: the gradient is one more run, from zero.
        positional: damping, M, rtol, maxiter and comm in this order, as they were once given; with
            a DeprecationWarning.
        damping: added to A's diagonal, >= 0.
        M: preconditioner, an approximate inverse of A + damping I. What has a method
            `precondition` or `solve`, such as a factor of a compressed A at this damping, does
            that; anything else multiplies, as SciPy means it: a LinearOperator, an array, an
            operator, a compressed matrix.
        x0: where to start, like b; zero by default. No gradient goes to it.
        rtol: stop when norm(b - A x) <= rtol norm(b) for every column.
        maxiter: most products with A, the one with x0 not counted. On a GPU a few more than
            `iterations` may be made, as it is not waited for after each; they change nothing.
        callback: called with x after every iteration, on a GPU also after those that change
            nothing any more.
        comm: an mpi4py communicator, for an operator that all its ranks have: they form its
            products together, a network's by its samples. b and x are whole on every rank.

    Returns:
        x like b, and the run's CGInfo (check `converged`).

    Raises:
        NotPositiveDefiniteError: p^T (A + damping I) p <= 0 for a direction p of the run, which it
            carries with its curvature. An A that declares `definite = False` ends the run instead,
            with both in the CGInfo.
        ArgumentError: damping or rtol negative, maxiter < 1, NaN or infinity in b, or arguments
            that differ between ranks.
        DtypeError: A or M does not multiply, or callback cannot be called.
        ShapeError, DeviceError: b does not fit A, or M or x0 does not.

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
    if positional:
        warnings.warn(
            "cg: damping, M, rtol, maxiter and comm are to be given by name",
            DeprecationWarning,
            stacklevel=2,
        )
        given = dict(zip(("damping", "M", "rtol", "maxiter", "comm"), positional, strict=False))
        return cg(A, b, **{"damping": damping, "M": M, "x0": x0, "rtol": rtol, "maxiter": maxiter,
                           "callback": callback, "comm": comm, **given})  # fmt: skip
    infos: list[CGInfo] = []
    options = {"damping": damping, "M": M, "rtol": rtol, "maxiter": maxiter, "comm": comm}

    def solve(b: Any) -> Any:
        x, info = _solved(A, b, x0=x0, callback=callback, **options)
        infos.append(info)
        return x

    def again(b: Any) -> Any:  # of a gradient
        x, info = cg(A, b, **options)
        infos.append(info)
        if not info.converged:
            warnings.warn(
                f"cg: the residual of a gradient is {info.residuals[-1]:.2g} after "
                f"{info.iterations} iterations, rtol {rtol:.2g}; raise maxiter",
                AccuracyWarning,
                stacklevel=2,
            )
        return x

    x = linear(b, solve, again, again)
    return x, infos[0]


def _solved(
    A: Any,
    b: Any,
    damping: float,
    M: Any,
    x0: Any,
    rtol: float,
    maxiter: int,
    callback: Callable[[Any], Any] | None,
    comm: Any,
) -> tuple[Any, CGInfo]:
    """See `cg`, of plain arrays and tensors."""
    owners = getattr(A, "owners", ALONE)
    ranks = owners.comm if comm is None else communicator(comm, getattr(A, "device", "cpu"))
    with ranks.agreed():
        if not hasattr(A, "matmat") or not hasattr(A, "device"):
            A = as_operator(A)
        precondition = _precondition(M, A.shape)
        if callback is not None and not callable(callback):
            raise DtypeError(f"callback must be callable, got {type(callback).__name__}")
        definite = bool(getattr(A, "definite", True))
        if comm is not None:
            if not isinstance(A, Operator):
                raise DtypeError(f"comm is for an operator, got A of type {type(A).__name__}")
            ranks.same(b=b)
            A = SharedOperator(A, ranks)
        ranks.same(damping=damping, rtol=rtol, maxiter=maxiter)
        check_number(damping, "damping")
        rtol = check_number(rtol, "rtol")
        check_count(maxiter, "maxiter")
        columns, restore = owners.right_hand_side(b, A.shape[0], A.dtype, A.device, "b")
        start = None
        if x0 is not None:
            start = owners.right_hand_side(x0, A.shape[0], A.dtype, A.device, "x0")[0]
            if start.shape != columns.shape:
                raise ShapeError(
                    f"x0 must be like b, {columns.shape[1]} columns, got {start.shape[1]}"
                )
    apply = A.matmat if comm is None else _on_all(ranks, A.matmat)
    if precondition is not None and not hasattr(M, "owners"):
        precondition = _on_all(ranks, precondition)

    def multiply(v: Array) -> Array:
        return apply(v) + v.dtype.type(damping) * v

    x, info = conjugate_gradients(
        multiply, columns, precondition, rtol, maxiter, A.device, owners, start,
        None if callback is None else _on_all(ranks, lambda x: callback(restore(x))),
    )  # fmt: skip
    if info.direction is not None and definite:
        raise NotPositiveDefiniteError(
            f"the matrix plus damping {damping:.3g} is not positive definite: p^T A p / p^T p = "
            f"{info.curvature:.3g} for the direction p of this error, met after "
            f"{info.iterations} iterations; an operator that declares definite = False ends the "
            "run there",
            direction=info.direction,
            curvature=info.curvature,
        )
    return restore(x), info


def _on_all(ranks: Communicator, function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A user's function, called by all ranks: where it fails on one, it fails on all."""

    def run(x: Array) -> Any:
        with ranks.agreed():
            return function(x)

    return run


def _precondition(M: Any, shape: tuple[int, int]) -> Callable[[Array], Array] | None:
    """How M is applied.

    Raises:
        DtypeError: it neither solves nor multiplies; later, it does not give a floating array.
        ShapeError: it has another shape; later, its result has.
    """
    if M is None:
        return None
    if tuple(getattr(M, "shape", shape)) != tuple(shape):
        raise ShapeError(f"M must have shape {shape}, got {tuple(M.shape)}")
    if is_array(M):
        M = as_array(M, "M")
    names = [name for name in _APPLIED if hasattr(M, name)]
    if not names:
        raise DtypeError(f"M must have a method solve or matmat, or @, got {type(M).__name__}")
    apply = getattr(M, names[0])

    def checked(r: Array) -> Array:
        z = as_array(apply(r), "the result of M")
        if z.shape != r.shape:
            raise ShapeError(f"the result of M must have shape {r.shape}, got {z.shape}")
        return z.astype(r.dtype, copy=False)

    return checked


def conjugate_gradients(
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
    """`cg` with arguments that are known to be right.

    The host reads residuals every few iterations (`steps_between_reads`). Where a column has
    converged its x and r stay as they are: iterations made beyond change nothing, and cannot lose
    again, to rounding, what was reached. Where
    p^T A p <= 0 for the direction p of a column that has not converged, that column and its p stay
    as they are, and the run ends. It also ends where a residual has grown by 1 / eps, more than
    that of any matrix that is not singular to rounding (by the root of the condition number): the
    iterates would grow until they overflow.

    Args:
        multiply: v (rows, k) -> A v.
        b: (rows, k), this rank's rows.
        precondition: r (rows, k) -> M r.
        rtol: relative residual of every column.
        maxiter: most products.
        device: where b is.
        owners: which rank has which rows.
        x0: (rows, k) where to start.
        callback: called with x (rows, k).

    Returns:
        x (rows, k) and the run's CGInfo.
    """
    xp = namespace(b)

    def dot(u: Array, v: Array) -> Array:
        return owners.sum(batched.column_dots(u, v))

    def quotient(u: Array, v: Array) -> Array:
        return xp.where(v > 0, u / xp.where(v > 0, v, 1), 0)

    def relative(rr: Array) -> Array:  # float64, to be compared with rtol as the host does
        return (xp.sqrt(rr) / scale).astype(np.float64)

    if b.shape[1] == 0:
        return xp.zeros_like(b), CGInfo(True, 0, (0.0,))
    # Columns of size one: squares of very large or small ones would leave the dtype's range.
    size = owners.max(xp.abs(b).max(axis=0))
    size = xp.where(size > 0, size, 1)
    r = b / size
    x = xp.zeros_like(r)
    rr = dot(r, r)
    scale = xp.sqrt(rr)
    scale = xp.where(scale > 0, scale, 1)
    if x0 is not None:
        x = x0 / size
        r = r - multiply(x)
        rr = dot(r, r)
    z = r if precondition is None else precondition(r)
    p = z.copy()
    rz = rr if precondition is None else dot(r, z)
    column = relative(rr)
    residual = column.max()
    residuals = [float(residual)]
    bent = xp.zeros(b.shape[1], bool)  # columns that met p^T A p <= 0
    stopped = False
    eps = float(np.finfo(b.dtype).eps)
    told = max(rtol, eps)  # below it the direction is rounding
    most = max(residuals[0], 1.0) / eps
    while rtol < residuals[-1] <= most and len(residuals) <= maxiter and not stopped:
        done = len(residuals) - 1
        seen, met = [], []
        for _ in range(min(steps_between_reads(device, done), maxiter - done)):
            Ap = multiply(p)
            curvature = dot(p, Ap)
            bent = bent | ((curvature <= 0) & (column > told))
            met.append(bent.any().astype(np.float64))
            # 0 for a column that is bent: its p, and so its curvature, stay as they are.
            going = (column > rtol) & (residual <= most)
            alpha = xp.where(going, quotient(rz, curvature), 0)
            x += alpha * p
            r -= alpha * Ap
            rr = dot(r, r)
            column = relative(rr)
            residual = column.max()
            seen.append(residual)
            z = r if precondition is None else precondition(r)
            rz, before = rr if precondition is None else dot(r, z), rz
            p = xp.where(bent, p, z + quotient(rz, before) * p)
            if callback is not None:
                callback(x * size)
        read = [float(value) for value in to_hosts(*seen, *met)]
        new, flags = read[: len(seen)], read[len(seen) :]
        end = next((j for j, value in enumerate(new) if not rtol < value <= most), len(new))
        stopped = any(flags[: end + 1])
        residuals += new[: flags.index(1.0)] if stopped else new[: end + 1]
    direction, met_at = None, None
    if stopped:
        p = p[:, int(bent.argmax())][:, None]
        met_at = float((dot(p, multiply(p)) / dot(p, p))[0])
        direction = owners.whole(p)[:, 0]
    return x * size, CGInfo(
        residuals[-1] <= rtol, len(residuals) - 1, tuple(residuals), direction, met_at
    )


def extreme_eigenvalues(A: Matrix, steps: int = 60, seed: int = 0) -> tuple[float, float]:
    """Smallest and largest Ritz value of a symmetric matrix.

    Lanczos with full reorthogonalization (Parlett, The Symmetric Eigenvalue Problem (1998),
    chapter 13) from a seeded random vector; both lie inside the spectrum. Infinite where a product
    leaves the range of numbers.
    """
    n = A.shape[0]
    owners = getattr(A, "owners", ALONE)
    xp = namespace_on(A.device)
    start = batched.normal_source((seed,), A.device)((n, 1), A.dtype)

    def norm(x: Array) -> Array:
        return owners.sum(x @ x) ** 0.5

    q = owners.take(start[:, 0])
    basis = xp.empty((min(steps, n), len(q)), A.dtype)
    alpha: list[float] = []
    beta: list[float] = []
    unread: list[Array] = []
    with batched.one_blas_thread():
        q = q / norm(q)
    for j in range(len(basis)):
        basis[j] = q
        w = A.matmat(q[:, None])[:, 0]
        if j == 0:  # of A over this size: squares of very large or small entries leave the range
            size = owners.max(abs(w).max(keepdims=True))[0]
            size = xp.where(size > 0, size, 1)
        w = w / size
        with batched.one_blas_thread():
            unread.append(owners.sum(q @ w))
            for _ in range(2):  # twice is enough (Kahan, Parlett)
                w = w - owners.sum(basis[: j + 1] @ w) @ basis[: j + 1]
            length = norm(w)
        unread.append(length)
        if len(unread) == 2 * steps_between_reads(A.device, len(alpha)) or j + 1 == len(basis):
            read = [float(value) for value in to_hosts(*unread, size)]
            scale = read.pop()
            alpha += read[0::2]
            beta += read[1::2]
            unread = []
            k = _invariant(alpha, beta, 10 * float(np.finfo(A.dtype).eps))
            if k is not None:
                alpha = alpha[:k]
                break
        q = w / xp.where(length > 0, length, 1)
    k = len(alpha)
    if not np.isfinite([scale, *alpha, *beta[: k - 1]]).all():
        return -np.inf, np.inf
    tridiagonal = np.diag(alpha) + np.diag(beta[: k - 1], 1) + np.diag(beta[: k - 1], -1)
    ritz = np.linalg.eigvalsh(tridiagonal)
    return float(ritz[0]) * scale, float(ritz[-1]) * scale


def _invariant(alpha: list[float], beta: list[float], rounding: float) -> int | None:
    """Vectors that span an invariant subspace to rounding: what comes after them means nothing."""
    largest = 0.0
    for k, (a, b) in enumerate(zip(alpha, beta, strict=True), 1):
        largest = max(largest, abs(a))
        if b <= rounding * largest:
            return k
    return None

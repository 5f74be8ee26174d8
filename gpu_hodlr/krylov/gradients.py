"""Conjugate gradients on anything that multiplies."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace, steps_between_reads, to_hosts
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.krylov.problem import CGInfo, solved


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
    options = {"damping": damping, "M": M, "rtol": rtol, "maxiter": maxiter, "comm": comm}
    return solved("cg", conjugate_gradients, A, b, x0, callback, options)


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

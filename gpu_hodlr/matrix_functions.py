"""Functions of a symmetric matrix times vectors, by Lanczos."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg

from gpu_hodlr import batched
from gpu_hodlr.devices import (
    Array,
    HostArray,
    device_of,
    namespace,
    steps_between_reads,
    to_hosts,
)
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.errors import AccuracyWarning, NotPositiveDefiniteError


def lanczos(
    multiply: Callable[[Array], Array],
    z: Array,
    done: Callable[[HostArray, HostArray], bool],
    steps: int,
    *,
    owners: Ownership = ALONE,
    orthogonal: bool = False,
    size: float = 0.0,
) -> tuple[list[Array], HostArray, HostArray, HostArray]:
    """Lanczos from every column of z, independently.

    A column whose vectors span an invariant subspace stays as it is: from there on its alpha is 1
    and its beta 0, which is another matrix's affair.

    Args:
        multiply: v (n, k) -> A v.
        z: (n, k).
        done: of alpha (j, k) and beta (j, k): whether to stop; asked at ever larger distances.
        steps: at most.
        owners: which rank has which rows of z.
        orthogonal: make every vector orthogonal to all before it once more, after the recurrence
            has made it so to the last two (Parlett, The Symmetric Eigenvalue Problem (1998),
            chapter 13): else rounding finds converged eigenvalues again and again.
        size: of A, whose rounding is to count, where z has no part in its largest eigenvalues.

    Returns:
        The vectors (n, k) of each step, alpha (steps, k), beta (steps, k), norms (k,) of z.
    """
    xp, eps = namespace(z), float(np.finfo(z.dtype).eps)
    norms = xp.sqrt(owners.sum(batched.column_dots(z, z).astype(np.float64)))
    q, before = z / xp.where(norms > 0, norms, 1).astype(z.dtype), xp.zeros_like(z)
    vectors: list[Array] = []
    alpha: list[HostArray] = []
    beta: list[HostArray] = []
    length = xp.zeros(z.shape[1], z.dtype)
    alive, largest = norms > 0, xp.full(z.shape[1], size)
    unread: list[Array] = []
    asked, steps = 1, steps if len(z) else 0
    every = xp.empty((z.shape[1], steps, len(z)), z.dtype) if orthogonal else None
    for j in range(steps):
        if every is not None:
            every[:, j] = q.T
        vectors.append(q if every is None else every[:, j].T)
        w = multiply(q) - length * before
        a = owners.sum(batched.column_dots(q, w))
        w = w - a * q
        if every is not None:
            w = _outside(every[:, : j + 1], w, owners)
        length = xp.sqrt(owners.sum(batched.column_dots(w, w)))
        own, following = a.astype(np.float64), length.astype(np.float64)
        unread.append(xp.where(alive, own, 1.0))
        largest = xp.maximum(largest, xp.maximum(abs(own), following))
        alive = alive & (following > 10 * eps * largest)
        unread.append(xp.where(alive, following, 0.0))
        length = xp.where(alive, length, 0)
        before, q = q, xp.where(length > 0, w / xp.where(length > 0, length, 1), 0)
        if j + 1 < min(steps, len(alpha) + steps_between_reads(device_of(z), len(alpha))):
            continue
        read, unread = to_hosts(*unread), []
        for own, following in zip(read[::2], read[1::2], strict=True):
            alpha.append(own)
            beta.append(following)
            if not following.any():  # steps beyond are none
                return vectors[: len(alpha)], np.array(alpha), np.array(beta), to_hosts(norms)[0]
        if len(alpha) >= asked:  # at every step it would cost more than the products
            if done(np.array(alpha), np.array(beta)):
                break
            asked = len(alpha) + 1 + len(alpha) // 8
    return vectors, np.array(alpha), np.array(beta), to_hosts(norms)[0]


def _outside(vectors: Array, w: Array, owners: Ownership) -> Array:
    """W (n, k) without what each column has along its own orthonormal vectors (k, j, n)."""
    xp = namespace(w)
    with batched.one_blas_thread():
        along = owners.sum(vectors @ w.T[:, :, None])
        return xp.ascontiguousarray(w - (along.swapaxes(1, 2) @ vectors)[:, 0].T)


def quadrature(alpha: HostArray, beta: HostArray) -> tuple[HostArray, HostArray, HostArray]:
    """Gauss's rule of every column's tridiagonal T: e_1^T f(T) e_1 = sum_i weights_i f(nodes_i).

    The nodes are the Ritz values of the column's Krylov space, the weights sum to one; Golub and
    Meurant, Matrices, Moments and Quadrature with Applications (2010), chapter 6. What follows on
    an invariant subspace has no weight, and a node of it.

    Args:
        alpha: (steps, k).
        beta: (steps, k), the last row that of the vector that would come next.

    Returns:
        Nodes, weights and norm(A y - node y) for the Ritz vectors y, (steps, k) each.
    """
    nodes, weights, residuals = np.zeros((3, *alpha.shape))
    for column, (diagonal, off) in enumerate(zip(alpha.T, beta.T, strict=True)):
        ends = np.flatnonzero(off == 0)
        size = int(ends[0]) + 1 if ends.size else len(off)
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal[:size], off[: size - 1])
        nodes[:, column] = values[0]
        nodes[:size, column], weights[:size, column] = values, vectors[0] ** 2
        last = abs(off[size - 1] * vectors[-1])
        residuals[:, column] = last[0]
        residuals[:size, column] = last
    return nodes, weights, residuals


def radau_quadrature(alpha: HostArray, beta: HostArray, end: float) -> tuple[HostArray, HostArray]:
    """Radau's rule, with a node at `end`, below all eigenvalues of A; see `quadrature`.

    Of f(x) = x / (x + d), as of every function whose even derivatives are negative and odd ones
    positive, it gives too little and Gauss's too much (Golub and Meurant, 6.4).

    Returns:
        Nodes and weights, (steps + 1, k) each.
    """
    nodes, _, residuals = quadrature(alpha, beta)
    last = end + (residuals**2 / (nodes - end)).sum(axis=0)
    return quadrature(np.vstack([alpha, last]), np.vstack([beta, np.zeros_like(last)]))[:2]


def function_of_tridiagonals(
    alpha: HostArray, beta: HostArray, function: Callable[[Any], Any]
) -> HostArray:
    """f(T) e_1 for every column's tridiagonal T: (steps, k) from alpha and beta (steps, k)."""
    result: HostArray = np.empty(alpha.shape)
    for column, (diagonal, off) in enumerate(zip(alpha.T, beta[:-1].T, strict=True)):
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off)
        result[:, column] = vectors @ (function(values) * vectors[0])
    return result


def inverse_square_root(
    multiply: Callable[[Array], Array], z: Array, rtol: float, steps: int = 300
) -> Array:
    """A^-1/2 z for positive definite A and z (n, k), by Lanczos.

    Until what the last step adds is below rtol in every column; best where A is well conditioned.
    Higham, Functions of Matrices (2008), section 13.2.

    Raises:
        NotPositiveDefiniteError: a Ritz value is not positive.

    Warns:
        AccuracyWarning: that many steps do not do.
    """

    def added(y: HostArray, beta: HostArray) -> float:
        norms = np.linalg.norm(y, axis=0)
        last = np.where(beta[-1] > 0, abs(y[-1]), 0)  # else all of the Krylov space is there
        return float((last / np.where(norms > 0, norms, 1)).max(initial=0.0))

    def done(alpha: HostArray, beta: HostArray) -> bool:
        return added(function_of_tridiagonals(alpha, beta, _inverse_root), beta) <= rtol

    vectors, alpha, beta, norms = lanczos(multiply, z, done, steps)
    y = function_of_tridiagonals(alpha, beta, _inverse_root)
    if len(alpha) and (left := added(y, beta)) > rtol:
        warnings.warn(
            f"after {len(alpha)} Lanczos steps the square root still changes by {left:.2g}, more "
            f"than {rtol:.2g}; raise the damping",
            AccuracyWarning,
            stacklevel=2,
        )
    xp = namespace(z)
    weights = xp.asarray(y * norms, z.dtype)
    result = xp.zeros_like(z)
    for vector, weight in zip(vectors, weights, strict=True):
        result += weight * vector
    return result


def _inverse_root(values: HostArray) -> HostArray:
    if not (values > 0).all():
        raise NotPositiveDefiniteError(
            "a Ritz value is not positive", curvature=float(values.min())
        )
    result: HostArray = values**-0.5
    return result

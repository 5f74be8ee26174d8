"""Functions of a symmetric matrix times vectors, by Lanczos."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostArray, namespace, to_hosts
from gpu_hodlr.errors import AccuracyWarning, NotPositiveDefiniteError


def lanczos(
    multiply: Callable[[Array], Array],
    z: Array,
    done: Callable[[HostArray, HostArray], bool],
    steps: int,
) -> tuple[list[Array], HostArray, HostArray, HostArray]:
    """Lanczos from every column of z, independently; no reorthogonalization.

    A column whose vectors span an invariant subspace stays as it is: from there on its alpha is 1
    and its beta 0, which is another matrix's affair.

    Args:
        multiply: v (n, k) -> A v.
        z: (n, k).
        done: of alpha (j, k) and beta (j, k): whether to stop; asked at ever larger distances.
        steps: at most.

    Returns:
        The vectors (n, k) of each step, alpha (steps, k), beta (steps, k), norms (k,) of z.
    """
    xp, eps = namespace(z), float(np.finfo(z.dtype).eps)
    norms = xp.sqrt(batched.column_dots(z, z).astype(np.float64))
    q, before = z / xp.where(norms > 0, norms, 1).astype(z.dtype), xp.zeros_like(z)
    vectors: list[Array] = []
    alpha: list[HostArray] = []
    beta: list[HostArray] = []
    length = xp.zeros(z.shape[1], z.dtype)
    [alive] = to_hosts(norms > 0)
    asked = 1
    for _ in range(steps if len(z) else 0):
        vectors.append(q)
        w = multiply(q) - length * before
        a = batched.column_dots(q, w)
        w = w - a * q
        length = xp.sqrt(batched.column_dots(w, w))
        own, following = (x.astype(np.float64) for x in to_hosts(a, length))
        alpha.append(np.where(alive, own, 1.0))
        alive &= following > 10 * eps * np.abs(alpha).max(axis=0)
        beta.append(np.where(alive, following, 0.0))
        if not alive.any():
            break
        if len(alpha) >= asked:  # at every step it would cost more than the products
            if done(np.array(alpha), np.array(beta)):
                break
            asked += 1 + len(alpha) // 8
        length = xp.where(xp.asarray(alive), length, 0)
        before, q = q, xp.where(length > 0, w / xp.where(length > 0, length, 1), 0)
    return vectors, np.array(alpha), np.array(beta), to_hosts(norms)[0]


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

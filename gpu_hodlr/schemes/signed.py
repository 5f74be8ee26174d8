"""The eigenvalues largest in absolute value, of both signs, of a matrix that may be indefinite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched.tall import inner_of_one, orthonormal
from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.structures import LowRank

_ROUNDS = 5  # of orthogonalization: each takes what stands out of the rounding of a Gram matrix
_CLEAR = 10.0  # times the root of the rounding: what stands out
_NOISE = 10.0  # times the rounding: what is none of K's
_DROPPED = 1e-4  # of the tolerance, in directions left out of a basis; ranks agree to less
_NOTHING = 0.01  # of the tolerance, in eigenvalues that are not worth their vectors


@batched.one_blas_thread()
def range_basis(
    x: Array, tolerance: float, owners: Ownership = ALONE, known: Array | None = None
) -> Array:
    """Orthonormal columns (rows, r) that span X (rows, s) to a tolerance, orthogonal to known ones.

    From Gram matrices, whose eigenvalues tell apart what is larger than the root of the rounding:
    what is left of X is taken up in the next round, until it is rounding or tolerable.

    Args:
        x: this rank's rows.
        tolerance: Frobenius error allowed in what X is of, one column standing for all of them.
        owners: which rank has which rows.
        known: (rows, k) orthonormal.
    """
    xp, eps = namespace(x), float(np.finfo(x.dtype).eps)
    Q = x[:, :0] if known is None else known
    first = Q.shape[1]
    floor = _DROPPED * tolerance
    for turn in range(_ROUNDS):
        x = _without(_without(x, Q, owners), Q, owners)
        squares, vectors = owners.comm.bcast(xp.linalg.eigh(owners.sum(inner_of_one(x, x))), 0)
        largest = max(float(squares[-1]), 0.0) if len(squares) else 0.0
        if turn == 0:
            floor = max(floor, _NOISE * eps * largest**0.5)
        if largest <= floor**2:
            break
        least = max((_CLEAR**2) * eps * largest, floor**2)
        kept = int((squares > least).sum())
        part = x @ (vectors[:, -kept:] / xp.sqrt(squares[-kept:]))
        part = _without(part, Q, owners)
        new, _, _ = orthonormal(xp.ascontiguousarray(part)[None], len(part), owners.sum)
        Q = xp.concatenate([Q, new[0]], axis=1)
    return Q[:, first:]


def _without(x: Array, Q: Array, owners: Ownership) -> Array:
    """X - Q Q^T X."""
    return x - Q @ owners.sum(inner_of_one(Q, x)) if Q.shape[1] else x


@batched.one_blas_thread()
def range_error(y: Array, Q: Array, owners: Ownership = ALONE) -> float:
    """norm((I - Q Q^T) K)_F^2 estimated from y = K omega (rows, k), omega Gaussian."""
    missed = _without(y, Q, owners).astype(np.float64)
    return sum(owners.comm.share(float((missed * missed).sum()))) / y.shape[1]


def signed(
    multiply: Callable[[Array], Array], Q: Array, tolerance: float, owners: Ownership = ALONE
) -> LowRank:
    """K but for what it does outside the range of Q: K - P K P with P = I - Q Q^T.

    With Y = K Q, T = Q^T Y and Y - Q T = W R this is [Q W] [[T, R^T], [R, 0]] [Q W]^T, whose
    eigenvalues and vectors are those of a small matrix (Halko, Martinsson, Tropp, SIAM Rev. 53
    (2011), section 5; that Q^T K is used as a whole, and not T alone, is worth a power iteration).

    Args:
        multiply: (rows, r) -> K times it.
        Q: (rows, r) orthonormal, for a range that K's products with random vectors span.
        tolerance: Frobenius error wanted; eigenvalues that are nothing to it are left out.
        owners: which rank has which rows.
    """
    if not Q.shape[1]:
        return LowRank(Q, Q[0, :0] if len(Q) else Q.reshape(-1), owners=owners)
    y, xp = multiply(Q), namespace(Q)
    W = range_basis(y, tolerance, owners, Q)
    with batched.one_blas_thread():
        T, R = (owners.sum(inner_of_one(basis, y)) for basis in (Q, W))
    r, k = Q.shape[1], Q.shape[1] + W.shape[1]
    core = xp.zeros((k, k), Q.dtype)
    core[:r, :r], core[r:, :r], core[:r, r:] = (T + T.T) / 2, R, R.T
    return of_core(core, xp.concatenate([Q, W], axis=1), tolerance, owners)


@batched.one_blas_thread()
def of_core(core: Array, basis: Array, tolerance: float, owners: Ownership = ALONE) -> LowRank:
    """B C B^T for a small symmetric C and orthonormal B (rows, k), largest eigenvalues first."""
    xp = namespace(core)
    # Of equal eigenvalues every rank must have the same vectors.
    values, vectors = owners.comm.bcast(xp.linalg.eigh(core), 0)
    order = xp.argsort(-abs(values))
    values, vectors = values[order], vectors[:, order]
    squares = xp.cumsum((values.astype(np.float64) ** 2)[::-1])[::-1]
    kept = int((squares > (_NOTHING * tolerance) ** 2).sum())
    U = xp.ascontiguousarray(basis @ xp.ascontiguousarray(vectors[:, :kept]))
    return LowRank(U, values[:kept], owners=owners)

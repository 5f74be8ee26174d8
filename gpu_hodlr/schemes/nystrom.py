"""The shifted randomized Nystrom approximation of a positive semi-definite matrix."""

from __future__ import annotations

import math

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched.tall import inner_of_one
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.structures import LowRank


@batched.one_blas_thread()
def nystrom(omega: Array, y: Array, negligible: float, owners: Ownership = ALONE) -> LowRank:
    """The shifted Nystrom approximation of K from Y = K Omega, both (N, s), s <= N.

    On many ranks both are this rank's rows; the Gram matrices are summed over the ranks.

    With Omega = Q R: nu = eps norm(Y R^-1)_F, Y_nu = (Y + nu Omega) R^-1, Q^T Y_nu = C C^T, and
    B = Y_nu C^-T: its squared singular values less nu are the eigenvalues, never negative, its
    left singular vectors the eigenvectors. All in products of tall matrices: R and the singular
    values come from Gram matrices, which costs eigenvalues no more than nu does; a Cholesky
    factorization of their own Gram matrix makes the vectors orthonormal again.

    Raises:
        NotPositiveDefiniteError: K has an eigenvalue below -negligible, which this cannot keep.
    """
    xp = namespace(y)
    R = _cholesky(owners.sum(inner_of_one(omega, omega)))  # of well-conditioned random columns
    core = _solve_left(R, _solve_left(R, owners.sum(inner_of_one(omega, y))).T)
    core = (core + core.T) / 2
    eps = y.dtype.type(np.finfo(y.dtype).eps)
    norms = owners.comm.share(float(xp.linalg.norm(_solve_left(R, y.T))))
    shift = eps * y.dtype.type(math.hypot(*norms))
    C, info = batched.cholesky(_shifted(core, shift))
    if to_host(info).any():  # K itself is not positive semidefinite
        values, vectors = xp.linalg.eigh(core)
        if -float(values[0]) > max(negligible, 10 * float(shift)):
            flipped = batched.solve_triangular(
                R[None], xp.ascontiguousarray(vectors[None, :, :1]), transpose=True
            )
            raise _not_positive_definite(float(values[0]), owners.whole(omega @ flipped[0])[:, 0])
        shift = 2 * shift + 1.1 * xp.maximum(-values[0], 0)
        C, info = batched.cholesky(_shifted(core, shift))
    if to_host(info).any():  # a zero matrix has no shift
        return LowRank(omega[:, :0], core[0, :0], owners=owners)
    B = _solve_left(C[0], _solve_left(R, (y + shift * omega).T)).T
    U, squares = _left_vectors(B, owners.sum(inner_of_one(B, B)), shift, owners)
    return LowRank(U, squares - shift, owners=owners)


@batched.one_blas_thread()
def of_root(B: Array, owners: Ownership = ALONE) -> LowRank:
    """K = B B^T by eigenvalues, for B (N, k) of few columns: from B^T B, with no random choice.

    On many ranks B is this rank's rows.
    """
    gram = owners.sum(inner_of_one(B, B))
    xp = namespace(B)
    rounding = B.dtype.type(np.finfo(B.dtype).eps) * xp.linalg.norm(gram)
    U, squares = _left_vectors(B, gram, rounding, owners)
    return LowRank(U, squares, owners=owners)


def _left_vectors(B: Array, gram: Array, rounding: Array, owners: Ownership) -> tuple[Array, Array]:
    """Left singular vectors of B (N, k), k <= N, and squared singular values, of B^T B (k, k)."""
    xp = namespace(B)
    # Of equal eigenvalues every rank must have the same vectors.
    squares, vectors = owners.comm.bcast(xp.linalg.eigh(gram), 0)
    kept = int((squares > 2 * rounding).sum())  # the others are rounding, as are their vectors
    squares, vectors = squares[::-1][:kept], vectors[:, ::-1][:, :kept]
    U = B @ (vectors / xp.sqrt(squares))
    if kept:
        U = _solve_left(_cholesky(owners.sum(inner_of_one(U, U))), U.T).T
    return xp.ascontiguousarray(U), squares


def _not_positive_definite(curvature: float, direction: Array) -> NotPositiveDefiniteError:
    return NotPositiveDefiniteError(
        f"K is not positive semi-definite: p^T K p / p^T p = {curvature:.3g} for the direction p "
        "of this error; more rank would not help: declare definite = False, and scheme 'lowrank' "
        "keeps eigenvalues of both signs",
        direction=direction,
        curvature=curvature,
    )


def _shifted(core: Array, shift: Array) -> Array:
    return (core + shift * namespace(core).eye(len(core), dtype=core.dtype))[None]


def _cholesky(gram: Array) -> Array:
    return batched.cholesky(gram[None])[0][0]


def _solve_left(lower: Array, b: Array) -> Array:
    """L^-1 b."""
    xp = namespace(b)
    return batched.solve_triangular(lower[None], xp.ascontiguousarray(b)[None])[0]

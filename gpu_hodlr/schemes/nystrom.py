"""The randomized Nystrom approximation of a positive semi-definite matrix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched.tall import inner_in_double, inner_of_one, multiplied
from gpu_hodlr.devices import Array, HostArray, namespace, to_host
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.structures import LowRank

_CLEAR = 1e-6  # of the largest eigenvalue: a smaller tolerance is not seen in squares
_SEEN = 1e-9  # of it: smaller ones are not


class Grams:
    """Omega^T Omega, Omega^T Y and Y^T Y of Y = K Omega, K symmetric, of columns that grow.

    Float64, summed over the ranks. New columns are multiplied by all, old ones never again.

    Args:
        owners: which rank has which rows.

    Attributes:
        omega, cross, y: (s, s) each.
    """

    def __init__(self, owners: Ownership = ALONE) -> None:
        self._owners = owners
        nothing: Array = np.zeros((0, 0))
        self.omega = self.cross = self.y = nothing

    @batched.one_blas_thread()
    def update(self, omega: Array, y: Array) -> None:
        """Take in what columns there are now, (rows, s) each."""
        known = len(self.y)
        if omega.shape[1] == known:
            return
        new_omega, new_y = omega[:, known:], y[:, known:]
        self.omega = self._bordered(self.omega, inner_in_double(new_omega, omega))
        self.cross = self._bordered(self.cross, inner_in_double(new_omega, y))
        self.y = self._bordered(self.y, inner_in_double(new_y, y))

    def _bordered(self, known: Array, below: Array) -> Array:
        """The symmetric matrix of what is known of it and of its other rows."""
        below, old = self._owners.sum(below), len(known)
        whole = namespace(below).empty((below.shape[1],) * 2, below.dtype)
        if old:
            whole[:old, :old] = known
        whole[old:], whole[:old, old:] = below, below[:, :old].T
        return whole


class Nystrom:
    """Nystrom's approximation B B^T of K from Y = K Omega, both (N, s), s <= N.

    With Omega^T Omega = R R^T and the eigenvalues D and vectors Q of R^-1 Omega^T Y R^-T:
    B = Y R^-T Q D^-1/2. Where D is rounding it is left out, as in the pseudo-inverse that keeps
    this stable (Nakatsukasa, arXiv 2009.11392). The squared singular values of B are the
    eigenvalues, its left singular vectors the eigenvectors.

    All but the vectors that are kept at last comes from the Gram matrices of Omega and Y. In
    float64 their rounding shows in eigenvalues below 1e-8 of the largest alone: where such are
    wanted, all of B is made, and its own Gram matrix tells.

    Args:
        omega, y: this rank's rows; they may have more columns than `used`.
        grams: of all of these columns.
        used: how many columns, the first, are used.
        tolerance: Frobenius error wanted; K may have an eigenvalue below its negative.
        owners: which rank has which rows.

    Attributes:
        eigenvalues: (k,) descending; a host array.

    Raises:
        NotPositiveDefiniteError: K has an eigenvalue below -tolerance, which this cannot keep.
    """

    eigenvalues: HostArray

    @batched.one_blas_thread()
    def __init__(
        self,
        omega: Array,
        y: Array,
        grams: Grams,
        used: int,
        tolerance: float,
        owners: Ownership = ALONE,
    ) -> None:
        self._omega, self._y, self._grams = omega, y, grams
        self._used, self._owners = slice(None, used), owners
        s = self._used
        R = _cholesky(grams.omega[s, s])  # of well-conditioned random columns
        values, vectors = namespace(y).linalg.eigh(_both_sides(R, grams.cross[s, s]))
        squares = float(_both_sides(R, grams.y[s, s]).diagonal().sum())
        self._rounding = float(np.finfo(y.dtype).eps) * max(squares, 0.0) ** 0.5
        if -float(values[0]) > max(tolerance, 10 * self._rounding):
            raise self._not_positive_definite(R, float(values[0]), vectors[:, :1])
        largest = max(float(values[-1]), 0.0)
        every = tolerance < _CLEAR * largest
        kept = values > max(self._rounding, 0.0 if every else _SEEN * largest)
        back = batched.solve_triangular(R[None], vectors[:, kept][None], transpose=True)[0]
        self._W = owners.comm.bcast(back / values[kept] ** 0.5, 0)  # B = Y W
        self._every = self._decomposed(self._W) if every else None
        if self._every is None:
            self._rotate()
        else:
            self.eigenvalues = to_host(self._every.eigenvalues).astype(np.float64)

    def _rotate(self) -> None:
        """Let the columns of B = Y W be orthogonal, the largest first."""
        s = self._used
        if not self._W.shape[1]:
            self.eigenvalues = np.zeros(0)
            return
        squares, V = namespace(self._W).linalg.eigh(self._W.T @ self._grams.y[s, s] @ self._W)
        # Of equal eigenvalues every rank must have the same vectors.
        squares, V = self._owners.comm.bcast((squares[::-1], V[:, ::-1]), 0)
        kept = int((squares > self._rounding).sum())
        self._W = self._W @ V[:, :kept]
        self.eigenvalues = to_host(squares[:kept])

    def _not_positive_definite(
        self, R: Array, curvature: float, vector: Array
    ) -> NotPositiveDefiniteError:
        flipped = batched.solve_triangular(R[None], vector[None].copy(), transpose=True)[0]
        direction = self._omega[:, self._used] @ flipped.astype(self._omega.dtype)
        return NotPositiveDefiniteError(
            f"K is not positive semi-definite: p^T K p / p^T p = {curvature:.3g} for the direction "
            "p of this error; more rank would not help: declare definite = False, and scheme "
            "'lowrank' keeps eigenvalues of both signs",
            direction=self._owners.whole(direction)[:, 0],
            curvature=curvature,
        )

    @batched.one_blas_thread()
    def products(self, columns: slice) -> Array:
        """The approximation times columns of Omega, (rows, k)."""
        xp = namespace(self._y)
        out = xp.zeros((len(self._y), columns.stop - columns.start), self._y.dtype)
        if not self._W.shape[1]:
            return out
        return self._combined(self._W @ (self._W.T @ self._grams.cross[columns, self._used].T), out)

    def form(self, rank: int) -> LowRank:
        """The approximation by its largest eigenvalues."""
        if self._every is not None:
            return leading(self._every, rank)
        return self._decomposed(self._W[:, :rank])

    @batched.one_blas_thread()
    def _decomposed(self, W: Array) -> LowRank:
        """Y W (Y W)^T."""
        B = namespace(W).empty((len(self._y), W.shape[1]), self._y.dtype)
        if W.shape[1]:
            self._combined(W, B)
        return eigenvectors(B, self._rounding, self._owners)

    def _combined(self, m: Array, out: Array) -> Array:
        """Y M."""
        m = namespace(m).ascontiguousarray(m, dtype=self._y.dtype)
        return multiplied(lambda part: self._y[part, self._used], m, out)


def nystrom(omega: Array, y: Array, tolerance: float, owners: Ownership = ALONE) -> Nystrom:
    """That of all columns."""
    grams = Grams(owners)
    grams.update(omega, y)
    return Nystrom(omega, y, grams, omega.shape[1], tolerance, owners)


@batched.one_blas_thread()
def eigenvectors(B: Array, rounding: float, owners: Ownership = ALONE) -> LowRank:
    """B B^T by its eigenvalues, for B (rows, k) whose columns are not far from orthogonal.

    On many ranks B is this rank's rows. It is overwritten: the eigenvectors stand in its memory.

    B = Q S with S of the Gram matrix of B, its columns scaled to norm one: eigenvalues and vectors
    are those of S S^T.

    Args:
        B: (rows, k).
        rounding: eigenvalues that are not above it are left out.
        owners: which rank has which rows.
    """
    xp, eps = namespace(B), float(np.finfo(B.dtype).eps)
    if not B.shape[1]:
        return LowRank(B, xp.zeros(0, B.dtype), owners=owners)
    gram = owners.sum(inner_of_one(B, B)).astype(np.float64)
    squares = gram.diagonal()
    scale = xp.where(squares > 0, 1 / xp.sqrt(xp.where(squares > 0, squares, 1)), 0)
    values, vectors = xp.linalg.eigh(scale[:, None] * gram * scale)
    apart = values > len(gram) * eps
    P = scale[:, None] * vectors[:, apart] / xp.sqrt(values[apart])  # B P is orthonormal
    S = P.T @ gram
    squares, Z = xp.linalg.eigh(S @ S.T)
    squares, W = owners.comm.bcast((squares[::-1], P @ Z[:, ::-1]), 0)
    kept = int((squares > rounding).sum())
    W = xp.ascontiguousarray(W[:, :kept], dtype=B.dtype)
    U = multiplied(lambda part: B[part], W, B[:, :kept]) if kept else B[:, :0]
    return LowRank(xp.ascontiguousarray(U), squares[:kept].astype(B.dtype), owners=owners)


def leading(form: LowRank, rank: int) -> LowRank:
    """So many eigenvectors of a form."""
    if rank >= len(form.eigenvalues):
        return form
    U = namespace(form.U).ascontiguousarray(form.U[:, :rank])
    return replace(form, U=U, eigenvalues=form.eigenvalues[:rank])


def _both_sides(R: Array, a: Array) -> Array:
    """R^-1 A R^-T for symmetric A."""
    found = _solve_left(R, _solve_left(R, a).T)
    return (found + found.T) / 2


def _cholesky(gram: Array) -> Array:
    return batched.cholesky(namespace(gram).ascontiguousarray(gram)[None])[0][0]


def _solve_left(lower: Array, b: Array) -> Array:
    """L^-1 b."""
    xp = namespace(b)
    return batched.solve_triangular(lower[None], xp.ascontiguousarray(b)[None])[0]

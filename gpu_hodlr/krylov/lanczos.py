"""Lanczos with full orthogonalization: an orthonormal basis of a Krylov space, and A in it."""

from __future__ import annotations

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostArray, namespace_on, reads_wait, to_hosts
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.krylov.problem import Matrix

_ROUNDING = 10.0  # times that of the type: a vector of this length, over A's size, is none


class KrylovBasis:
    """Orthonormal q_0, q_1, ... and T = Q^T A Q, from a seeded random vector.

    Every q is orthogonalized twice against all before it (Parlett, The Symmetric Eigenvalue Problem
    (1998), chapter 13; "twice is enough": Kahan, Parlett). T is kept as it comes out of that, as a
    whole, so that it is right after a restart as well.

    Args:
        A: the matrix; of one spread over ranks each has its rows of the vectors.
        most: vectors at most.
        seed: of random vectors.
        comm: the ranks that have the same vectors, where A has no owners of its rows.

    Attributes:
        size: vectors there are.
        scale: what T is to be multiplied by: the largest entry of the first product.
        beta: norm of what A q_last has outside the space, over `scale`.
        invariant: whether that is rounding.
        finite: whether no product has left the range of numbers.
        products: made so far.
    """

    def __init__(
        self, A: Matrix, most: int, seed: int = 0, comm: Communicator = ALONE.comm
    ) -> None:
        self._A, self._owners = A, getattr(A, "owners", ALONE)
        self._comm = comm if self._owners.alone else self._owners.comm
        self._normal = batched.normal_source((seed,), A.device)
        self._xp = namespace_on(A.device)
        rows = self._owners.num_rows(A.shape[0])
        self._q = self._xp.empty((most, rows), A.dtype)
        self._T = np.zeros((most, most))
        self._scale: Array | None = None
        self.scale = 1.0
        self.size = self.products = 0
        self.finite = True
        self._eps = float(np.finfo(A.dtype).eps)
        self.begin()

    def begin(self) -> None:
        """Go on from a random vector that is orthogonal to the space."""
        drawn = self._normal((self._A.shape[0], 1), self._A.dtype)
        q = self._owners.take(drawn[:, 0])
        with batched.one_blas_thread():
            q = q / self._norm(q)
            _, q, length = self._orthogonal(q, self.size)
        self._next = q / length
        self.beta, self.invariant = 0.0, False

    def extend(self, size: int) -> None:
        """Add vectors until there are so many, or they span an invariant subspace.

        Where reading waits, T is read once, at the end: vectors past an invariant subspace, which
        are directions of the rounding, are cut off again.
        """
        unread: list[tuple[Array, Array]] = []
        while self.size < size:
            self._q[self.size] = q = self._next
            w = self._A.matmat(q[:, None])[:, 0]
            self.products += 1
            if self._scale is None:  # squares of very large or small entries leave the range
                largest = self._owners.max(abs(w).max(keepdims=True))[0]
                self._scale = self._xp.where(largest > 0, largest, 1)
            self.size += 1
            with batched.one_blas_thread():
                column, w, length = self._orthogonal(w / self._scale, self.size)
            self._next = w / self._xp.where(length > 0, length, 1)
            unread.append((column, length))
            if self.size == size or not reads_wait(self._A.device):
                self._read(unread)
                unread = []
                if self.invariant or not self.finite:
                    return

    def _read(self, unread: list[tuple[Array, Array]]) -> None:
        """Take columns of T and the norms that come with them; cut off what means nothing."""
        assert self._scale is not None
        first = self.size - len(unread)
        columns, lengths = zip(*unread, strict=True)
        *read, size = to_hosts(*columns, *lengths, self._scale)
        self.scale = float(size)
        for j, (column, length) in enumerate(
            zip(read[: len(unread)], read[len(unread) :], strict=True), first
        ):
            if not np.isfinite([*column, length, self.scale]).all():
                self.size, self.finite = j, False
                return
            self._T[: j + 1, j] = column
            self.beta = float(length)
            largest = abs(self._T[: j + 1, : j + 1].diagonal()).max()
            if self.beta <= _ROUNDING * self._eps * largest:
                self.size, self.beta, self.invariant = j + 1, 0.0, True
                return

    def ritz(self) -> tuple[HostArray, HostArray]:
        """Eigenvalues of T, ascending, over `scale`, and its eigenvectors."""
        T = self._T[: self.size, : self.size]
        found: tuple[HostArray, HostArray] = self._comm.bcast(np.linalg.eigh(T, UPLO="U"), 0)
        return found

    def vectors(self, coefficients: HostArray) -> Array:
        """(k, rows) the rows of C^T Q^T for C (size, k)."""
        C = self._xp.asarray(np.ascontiguousarray(coefficients.T), self._q.dtype)
        with batched.one_blas_thread():
            return C @ self._q[: self.size]

    def restart(self, values: HostArray, coefficients: HostArray) -> None:
        """Keep some Ritz vectors alone; what comes next is what it was."""
        kept = self.vectors(coefficients)
        self.size = len(kept)
        self._q[: self.size] = kept
        self._T[:] = 0
        self._T[: self.size, : self.size] = np.diag(values)

    def _orthogonal(self, w: Array, count: int) -> tuple[Array, Array, Array]:
        """Coefficients in the first vectors, what is left, and its norm."""
        total, q = self._xp.zeros(count, w.dtype), self._q[:count]
        for _ in range(2):
            part = self._owners.sum(q @ w)
            w = w - part @ q
            total = total + part
        return total, w, self._norm(w)

    def _norm(self, x: Array) -> Array:
        norm: Array = self._owners.sum(x @ x) ** 0.5
        return norm


def extreme_eigenvalues(A: Matrix, steps: int = 60, seed: int = 0) -> tuple[float, float]:
    """Smallest and largest Ritz value of a symmetric matrix, by Lanczos without restarts.

    Both lie inside the spectrum; they are infinite where a product leaves the range of numbers.
    """
    basis = KrylovBasis(A, min(steps, A.shape[0]), seed)
    basis.extend(min(steps, A.shape[0]))
    if not basis.finite:
        return -np.inf, np.inf
    values, _ = basis.ritz()
    return float(values[0]) * basis.scale, float(values[-1]) * basis.scale

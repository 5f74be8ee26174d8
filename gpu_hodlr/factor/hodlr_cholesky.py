"""Symmetric factorization of a matrix in HODLR form."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_hodlr import batched
from gpu_hodlr.batched.tall import inner, orthonormal
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.factor.base import (
    IndefiniteError,
    SymmetricFactor,
    cholesky,
    damped,
    log_determinant,
)
from gpu_hodlr.profiling import nvtx_range
from gpu_hodlr.structures import HODLR
from gpu_hodlr.structures.hodlr import columns_of


@dataclass(frozen=True)
class _Step:
    """One level: for every pair of siblings W = [[Z, Q P^T], [0, I]], Z = I + Q (Y - I) Q^T.

    Attributes:
        Q: (pairs, rows, r) orthonormal columns.
        P: (pairs, rows, r).
        Y: (pairs, r, r) lower Cholesky factor of I - P^T P.
    """

    Q: Array
    P: Array
    Y: Array


class HODLRCholesky(SymmetricFactor):
    """K + damping I = W W^T for a HODLR K: W = C W_depth ... W_1.

    C holds the Cholesky factors of the leaves' blocks. With C^-1 applied to all bases, and then
    W_depth^-1 .. to those of the levels above, what is left of a level is I + [[0, L R^T],
    [R L^T, 0]] for every pair of siblings (the symmetric factorization of Ambikasaran, O'Neil,
    Singh, arXiv 1405.0223, level by level: Chen, Martinsson, SC22). With L = Q S^T and P = R S
    that is W_l W_l^T, W_l = [[Z, Q P^T], [0, I]], Z Z^T = I - Q P^T P Q^T.

    Stability: norm(P) = norm(L R^T) < 1 for a positive definite matrix, so that forming I - P^T P
    loses nothing that is not lost in the matrix itself; Gram matrices of L and R themselves would
    square their condition numbers. L is the side that is made orthonormal, because it is so, or
    zero, before C^-1 is applied: then its Gram matrix is about as well conditioned as
    K_aa + damping I, and CholeskyQR is safe. The backward error is rounding times the square root
    of the condition number at most, that of C^-1. See `SymmetricFactor` for its attributes.

    Raises:
        IndefiniteError: K + damping I is not positive definite.
    """

    def __init__(self, form: HODLR, damping: float) -> None:
        super().__init__(form, damping)
        self._leaves = form.leaves
        leaves, m = form.leaves.shape
        self._C = cholesky(damped(form.D, form.leaves, damping))
        self._steps: list[_Step] = []  # leaf level first
        R = form.U.shape[1]
        U = batched.solve_triangular(self._C, form.U.reshape(leaves, m, R))
        columns = columns_of(form.widths)
        for i in range(len(columns) - 1, -1, -1):
            pairs = 1 << i
            with nvtx_range(f"factor level of {2 * pairs} nodes"):
                bases = U.reshape(pairs, leaves * m // pairs, R)
                step = _factorize(bases[:, :, columns[i]], m)
                self._steps.append(step)
                # Bases of the levels above stand in the columns before.
                self._sqrt_solve_step(step, bases[:, :, : columns[i].start])

    def _sqrt_solve_step(self, step: _Step, x: Array) -> None:
        """In place x <- W_l^-1 x for x (pairs, 2 rows, k)."""
        top, bottom = _halves(x)
        w = inner(step.Q, top, self._C.shape[1])
        t = batched.solve_triangular(step.Y, w - inner(step.P, bottom, self._C.shape[1]))
        batched.matmul(step.Q, t - w, add_to=top)

    def _transposed_sqrt_solve_step(self, step: _Step, x: Array) -> None:
        """In place x <- W_l^-T x."""
        top, bottom = _halves(x)
        w = inner(step.Q, top, self._C.shape[1])
        t = batched.solve_triangular(step.Y, w, transpose=True)
        batched.matmul(step.Q, t - w, add_to=top)
        batched.matmul(step.P, t, subtract_from=bottom)

    def _product_step(self, step: _Step, x: Array) -> None:
        """In place x <- W_l x."""
        top, bottom = _halves(x)
        w = inner(step.Q, top, self._C.shape[1])
        t = batched.matmul(step.Y, w, add_to=inner(step.P, bottom, self._C.shape[1]))
        batched.matmul(step.Q, t - w, add_to=top)

    def _transposed_product_step(self, step: _Step, x: Array) -> None:
        """In place x <- W_l^T x."""
        top, bottom = _halves(x)
        w = inner(step.Q, top, self._C.shape[1])
        t = batched.matmul(step.Y, w, transpose_a=True)
        batched.matmul(step.Q, t - w, add_to=top)
        batched.matmul(step.P, w, add_to=bottom)

    def _gather(self, x: Array) -> Array:
        return batched.gather_rows(x, self._leaves)

    def _scatter(self, x: Array) -> Array:
        return batched.scatter_rows(x, self._leaves, self.shape[0])

    def _forward(self, x: Array) -> Array:
        """W^-1 x in tree order."""
        x = batched.solve_triangular(self._C, x)
        for step in self._steps:
            self._sqrt_solve_step(step, _by_pairs(x, step))
        return x

    def _backward(self, x: Array) -> Array:
        """W^-T x in tree order; x is overwritten."""
        for step in self._steps[::-1]:
            self._transposed_sqrt_solve_step(step, _by_pairs(x, step))
        return batched.solve_triangular(self._C, x, transpose=True)

    def _solve(self, b: Array) -> Array:
        return self._scatter(self._backward(self._forward(self._gather(b))))

    def _sqrt_solve(self, z: Array) -> Array:
        return self._scatter(self._forward(self._gather(z)))

    def _transposed_sqrt_solve(self, z: Array) -> Array:
        return self._scatter(self._backward(self._gather(z)))

    def _product(self, z: Array) -> Array:
        x = self._gather(z)
        for step in self._steps[::-1]:
            self._product_step(step, _by_pairs(x, step))
        return self._scatter(batched.matmul(self._C, x))

    def _transposed_product(self, z: Array) -> Array:
        x = batched.matmul(self._C, self._gather(z), transpose_a=True)
        for step in self._steps:
            self._transposed_product_step(step, _by_pairs(x, step))
        return self._scatter(x)

    def logdet(self) -> float:
        """Log of the determinant of K + damping I: det W_l = det Y for every pair."""
        return log_determinant([self._C, *(step.Y for step in self._steps)])

    @property
    def nbytes(self) -> int:
        """Bytes of the stored factor."""
        steps = sum(s.Q.nbytes + s.P.nbytes + s.Y.nbytes for s in self._steps)
        return int(steps + self._C.nbytes)


def _factorize(bases: Array, chunk: int) -> _Step:
    """The step of a level, of its bases (pairs, 2 rows, r): L above R."""
    L, R = _halves(bases)
    Q, S, info = orthonormal(L, chunk)
    if to_host(info).any():  # L was orthonormal: it is K_aa that is singular to rounding
        raise IndefiniteError
    P = batched.matmul(R, S)
    Y = -inner(P, P, chunk)
    place = namespace(Y).arange(Y.shape[1])
    Y[:, place, place] += Y.dtype.type(1)
    return _Step(Q, P, cholesky(Y))


def _by_pairs(x: Array, step: _Step) -> Array:
    """X (leaves, m, k) by pairs of siblings, (pairs, 2 rows, k), a view."""
    pairs, rows, _ = step.Q.shape
    return x.reshape(pairs, 2 * rows, x.shape[2])


def _halves(x: Array) -> tuple[Array, Array]:
    """The rows of the even and the odd nodes, views."""
    rows = x.shape[1] // 2
    return x[:, :rows], x[:, rows:]

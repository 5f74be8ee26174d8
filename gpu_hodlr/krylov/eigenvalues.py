"""Eigenvalues and eigenvectors at the ends of a spectrum."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.devices import (
    Array,
    HostArray,
    HostIndex,
    check_memory,
    memory_errors,
    namespace,
    to_host,
)
from gpu_hodlr.distributed import Communicator, Ownership
from gpu_hodlr.errors import ArgumentError, NoConvergenceError
from gpu_hodlr.krylov.lanczos import KrylovBasis
from gpu_hodlr.krylov.problem import Matrix, matrix_on, on_all

ENDS = ("LM", "LA", "SA", "BE")
_MORE = 20  # vectors beyond two for each eigenvalue
_AIM = 0.5  # of the tolerance: what the recurrence is to show
_LEAST = 100.0  # times the rounding of the type: no tolerance is below


def eigsh(
    A: Any,
    k: int = 6,
    which: str = "LM",
    *,
    rtol: float = 1e-8,
    maxiter: int = 1000,
    seed: int = 0,
    comm: Any = None,
) -> tuple[Array, Array]:
    """Eigenvalues at the ends of the spectrum of a symmetric matrix, and their eigenvectors.

    Collective: all ranks call.

    Lanczos with thick restarts (Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000)): of 2 k + 20
    vectors the best Ritz vectors are kept, and the space grown again. One random vector cannot see
    an eigenvalue twice: when all have converged, the space is grown once more from another one that
    is orthogonal to them, until that changes nothing. The vectors stay on the device, spread over
    the ranks as A's rows are; the same seed gives the same bits.

    SciPy's and CuPy's `eigsh` take the same matrices; the first has its vectors on the CPU, the
    second no "BE", and neither spreads them over ranks.

    Args:
        A: an operator, a compressed matrix, or what `as_operator` takes, definite or not. Of a
            factor it is the inverse that is multiplied by: 1 / its largest eigenvalues are the
            smallest of K + damping I.
        k: how many, up to N.
        which: "LM" the largest in absolute value, "LA" the largest, "SA" the smallest, "BE" half of
            them from each end, one more from the upper where k is odd.
        rtol: norm(A v - w v) <= rtol max |w| for each, w ranging over all of A's eigenvalues that
            are seen; checked by a product. Not below 100 roundings of the type.
        maxiter: most products until all have converged; those that check are not counted.
        seed: of the random vectors.
        comm: an mpi4py communicator, for an operator that all its ranks have; the vectors are then
            whole on every rank.

    Returns:
        (k,) eigenvalues, ascending, a host array of float64, and (N, k) orthonormal eigenvectors in
        A's dtype, an array of its library.

    Raises:
        NoConvergenceError: not all have converged; it carries those that have.
        ArgumentError, DtypeError: k is not in 1 .. N, which another word, rtol or maxiter cannot
            be used, or differ between ranks; A does not multiply.
        MemoryEstimateError: the vectors do not fit.

    Example:
        >>> w, v = gh.eigsh(np.diag(np.arange(-50.0, 51.0)), 3, "BE")
        >>> w.round(6)
        array([-50.,  49.,  50.])
        >>> v.shape, bool(abs(v[0, 0]) > 0.999)
        ((101, 3), True)
    """
    matrix, owners, ranks = matrix_on(A, comm)
    n = matrix.shape[0]
    with ranks.agreed():
        ranks.same(k=k, which=which, rtol=rtol, maxiter=maxiter, seed=seed)
        if which not in ENDS:
            raise ArgumentError(f"which must be one of {', '.join(ENDS)}, got {which!r}")
        if check_count(k, "k") > n:
            raise ArgumentError(f"k must be in 1 .. {n}, the order of A, got {k}")
        rtol = check_number(rtol, "rtol")
        check_count(maxiter, "maxiter")
        check_count(seed, "seed", least=0)
        most = min(n, 2 * k + _MORE)
        # The basis, what a restart keeps of it, and the eigenvectors, their products, the result.
        numbers = owners.num_rows(n) * (most + (most + k) // 2 + 4 * k)
        check_memory(numbers * matrix.dtype.itemsize, f"{most} vectors", "k", matrix.device)
    if comm is not None:
        matrix = _Shared(matrix, ranks)
    with memory_errors(f"{most} vectors", "k", matrix.device):
        return _Search(matrix, owners, ranks, int(k), which, rtol, maxiter, most, seed).run()


class _Shared:
    """An operator whose products fail on all ranks where they fail on one."""

    def __init__(self, operator: Matrix, ranks: Communicator) -> None:
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.matmat = on_all(ranks, operator.matmat)


class _Search:
    """See `eigsh`."""

    def __init__(
        self, A: Matrix, owners: Ownership, ranks: Communicator, k: int, which: str, rtol: float,
        maxiter: int, most: int, seed: int,
    ) -> None:  # fmt: skip
        self._A, self._owners, self._k, self._which = A, owners, k, which
        self._rtol = max(rtol, _LEAST * float(np.finfo(A.dtype).eps))
        self._maxiter, self._most = maxiter, most
        self._basis = KrylovBasis(A, most, seed, ranks)

    def run(self) -> tuple[Array, Array]:
        """See `eigsh`."""
        basis, k = self._basis, self._k
        known: HostArray | None = None  # values that had converged before the last random vector
        while True:
            basis.extend(self._most)
            if not basis.finite:
                raise ArgumentError("a product of A has NaN or infinity")
            values, S = basis.ritz()
            tolerance = _AIM * self._rtol * abs(values).max()
            wanted = self._ends(values, k)
            residuals = basis.beta * abs(S[-1])
            done = len(wanted) == k and bool((residuals[wanted] <= tolerance).all())
            checked = known is not None and done and self._same(known, values[wanted], tolerance)
            checked = checked or basis.size == self._A.shape[0]
            over = basis.products >= self._maxiter and (not done or known is not None)
            if checked or over:
                return self._result(values[wanted], S[:, wanted], checked)
            if done or basis.invariant:
                known = values[wanted] if done else None
                kept = wanted if done else np.arange(basis.size)
                basis.restart(values[kept], S[:, kept])
                basis.begin()
                continue
            kept = self._ends(values, (basis.size + k) // 2)
            basis.restart(values[kept], S[:, kept])

    def _ends(self, values: HostArray, count: int) -> HostIndex:
        """Which of ascending values are wanted, so many of them at most; ascending."""
        n = len(values)
        count = min(count, n)
        if self._which == "LM":
            return np.sort(np.argsort(-abs(values), kind="stable")[:count])
        below = {"LA": 0, "SA": count, "BE": count // 2}[self._which]
        return np.r_[0:below, n - (count - below) : n]

    def _same(self, before: HostArray, after: HostArray, tolerance: float) -> bool:
        if self._which == "LM":  # of two opposite ones either is right
            before, after = np.sort(abs(before)), np.sort(abs(after))
        return bool((abs(before - after) <= 2 * tolerance).all())

    def _result(
        self, values: HostArray, coefficients: HostArray, checked: bool
    ) -> tuple[Array, Array]:
        """The eigenpairs, each checked by a product; whether another start has found no others.

        Raises:
            NoConvergenceError: some miss the tolerance.
        """
        basis, owners = self._basis, self._owners
        norm = abs(basis.ritz()[0]).max() or 1.0
        vectors = basis.vectors(coefficients).T
        xp = namespace(vectors)
        missed = self._A.matmat(xp.ascontiguousarray(vectors)) / vectors.dtype.type(basis.scale)
        missed -= vectors * xp.asarray(values, vectors.dtype)
        squares = owners.sum((missed * missed).sum(axis=0))
        residuals = np.sqrt(to_host(squares).astype(np.float64)) / norm
        whole = owners.whole(xp.ascontiguousarray(vectors))
        good = residuals <= self._rtol
        if checked and good.all():
            return values * basis.scale, whole
        raise NoConvergenceError(
            f"{int(good.sum())} of {self._k} eigenvalues ({self._which}) have converged to rtol "
            f"{self._rtol:.2g} after {basis.products} products, residuals up to "
            f"{residuals.max():.2g}; raise maxiter or rtol",
            values[good] * basis.scale,
            whole[:, xp.asarray(np.nonzero(good)[0])],
            residuals,
        )

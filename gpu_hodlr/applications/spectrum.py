"""The spectrum of a matrix that only multiplies, by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.applications.density import Rule, Spectrum
from gpu_hodlr.arrays import power_of_two
from gpu_hodlr.checks import check_count
from gpu_hodlr.compressed import CompressedMatrix
from gpu_hodlr.devices import Array, HostArray, check_memory, memory_errors, namespace, to_host
from gpu_hodlr.distributed import Communicator, Ownership
from gpu_hodlr.errors import ArgumentError, NoConvergenceError
from gpu_hodlr.krylov import Matrix, eigsh, matrix_on, on_all
from gpu_hodlr.matrix_functions import lanczos, quadrature, radau_quadrature

_RTOL = 1e-6  # of the eigenvalues that are computed one by one,
_LEAST = 100.0  # but of this many roundings, see `eigsh`
_PATIENCE = 4  # products for the outliers, over steps
_ASYMMETRY = 1e-3  # of norm(K)_F, that products of a symmetric matrix do not reach
_SHORTER = 4  # a rule that another is compared with lacks one step in so many
_ROUNDING = 10.0  # times that of the type: a smaller negative value is none


@overload
def spectrum(
    op: list[Any] | tuple[Any, ...] | Iterator[Any],
    *,
    num_probes: int = ...,
    steps: int = ...,
    num_outliers: int = ...,
    seed: int = ...,
    comm: Any = ...,
) -> tuple[Spectrum, ...]: ...


@overload
def spectrum(
    op: Any,
    *,
    num_probes: int = ...,
    steps: int = ...,
    num_outliers: int = ...,
    seed: int = ...,
    comm: Any = ...,
) -> Spectrum: ...


def spectrum(
    op: Any,
    *,
    num_probes: int = 10,
    steps: int = 80,
    num_outliers: int = 10,
    seed: int = 0,
    comm: Any = None,
) -> Spectrum | tuple[Spectrum, ...]:
    """The spectrum of a symmetric matrix from products alone: density, ends, trace, norm.

    Collective: all ranks call.

    Stochastic Lanczos quadrature: sum_i f(lambda_i) = N E[u^T f(K) u] for u uniform on the sphere,
    and u^T f(K) u = sum_j w_j f(theta_j) with the Ritz values theta of u's Krylov space (Lin, Saad,
    Yang, SIAM Review 58 (2016); Ghorbani, Krishnan, Xiao, ICML 2019), fully orthogonalized, all
    probes together. The eigenvalues of the largest absolute values, the outliers of a network's
    matrix, are computed one by one before (`eigsh`), and the probes made orthogonal to their
    vectors, as Hutch++ does (Meyer et al., SOSA 2021): what is estimated is the rest. Those that
    are not found within 4 `steps` products are left to the probes.

    Args:
        op: an operator, definite or not, a compressed matrix, or what `as_operator` takes; or a
            list, tuple or iterator of these, such as one a training checkpoint.
        num_probes: vectors u, at least 2.
        steps: of Lanczos with all of them.
        num_outliers: eigenvalues that are computed one by one.
        seed: of the random vectors.
        comm: an mpi4py communicator, for an operator that all its ranks have.

    Returns:
        A `Spectrum`, the same on all ranks; of a list a tuple of them.

    Raises:
        ArgumentError, DtypeError: op does not multiply, is not symmetric, or gives NaN or infinity;
            an option cannot be used, or differs between ranks.
        MemoryEstimateError: steps * num_probes vectors do not fit.

    Example:
        >>> x = np.linspace(0, 1, 400)
        >>> found = gh.spectrum(gh.KernelOperator(x, "matern32", 0.2), steps=40)
        >>> bool(abs(found.trace - 400) < 1e-9), found.trace_error
        (True, 0.0)
        >>> dimension, error = found.effective_dimension(0.1)  # that of the dense matrix is 20.67
        >>> bool(abs(dimension - 20.67) < 3 * error), bool(error < 1)
        (True, True)
    """
    options = {"num_probes": num_probes, "steps": steps, "num_outliers": num_outliers, "seed": seed}
    if isinstance(op, list | tuple | Iterator):
        every: list[Any] = [spectrum(one, **options, comm=comm) for one in op]
        return tuple(every)
    matrix, owners, ranks = matrix_on(op, comm)
    n = matrix.shape[0]
    with ranks.agreed():
        ranks.same(**options)
        check_count(num_probes, "num_probes", least=2)
        check_count(steps, "steps")
        check_count(num_outliers, "num_outliers", least=0)
        check_count(seed, "seed", least=0)
        what, lower = f"{steps} steps with {num_probes} probes", "steps or num_probes"
        vectors = num_probes * (min(steps, n) + 8) + min(num_outliers, n)
        numbers = owners.num_rows(n) * vectors
        check_memory(numbers * matrix.dtype.itemsize, what, lower, matrix.device)
    with memory_errors(what, lower, matrix.device):
        return _Run(op, matrix, owners, ranks, comm, seed).found(num_probes, steps, num_outliers)


class _Run:
    """One `spectrum`."""

    def __init__(
        self, given: Any, matrix: Matrix, owners: Ownership, ranks: Communicator, comm: Any,
        seed: int,
    ) -> None:  # fmt: skip
        self._given, self._matrix, self._comm, self._seed = given, matrix, comm, seed
        self._owners, self._ranks = owners, ranks
        self._multiply = matrix.matmat if comm is None else on_all(ranks, matrix.matmat)

    def found(self, num_probes: int, steps: int, num_outliers: int) -> Spectrum:
        """See `spectrum`."""
        owners, n, dtype = self._owners, self._matrix.shape[0], self._matrix.dtype
        normal = batched.normal_source((self._seed, streams.DENSITY), self._matrix.device)
        z = owners.take(normal((n, num_probes), dtype))
        scale = self._scale(z)
        eigenvalues, vectors = self._outliers(min(num_outliers, n), _PATIENCE * steps)
        V = None if vectors is None else owners.take(vectors)

        def rest(v: Array) -> Array:
            """Without what lies along the vectors of the outliers."""
            if V is None:
                return v
            with batched.one_blas_thread():
                return v - V @ owners.sum(V.T @ v)

        size = float(abs(eigenvalues).max(initial=0.0)) / scale
        steps = min(steps, n - len(eigenvalues))
        alpha = beta = np.zeros((0, num_probes))
        if steps:
            _, alpha, beta, _ = lanczos(
                lambda v: rest(self._multiply(v) / dtype.type(scale)), rest(z),
                lambda alpha, beta: False, steps, owners=owners, orthogonal=True, size=size,
            )  # fmt: skip
        if not np.isfinite(alpha).all():
            raise ArgumentError("a product of op has NaN or infinity")
        eps = float(np.finfo(dtype).eps)
        *rules, residuals, end = self._ranks.bcast(_rules(alpha, beta, eps, size), 0)
        gauss, radau, shorter = ((nodes * scale, weights) for nodes, weights in rules)
        # Vectors of outliers that are not exact mix a little of them into what is left.
        bound = max(_RTOL if len(eigenvalues) else 0.0, _LEAST * eps)
        bound *= max(size, float(abs(rules[0][0]).max(initial=0.0)))
        return Spectrum(
            n, eigenvalues, gauss, radau, shorter, residuals * scale, bound * scale, end * scale,
            self._trace(),
        )  # fmt: skip

    def _scale(self, z: Array) -> float:
        """A power of two near the entries of products, which would leave the range of numbers.

        Raises:
            ArgumentError: products are no numbers, or not those of a symmetric matrix.
        """
        owners, xp = self._owners, namespace(z)
        product = self._multiply(z)
        largest = float(owners.max(xp.max(abs(product), keepdims=True).ravel())[0])
        if not np.isfinite(largest):
            raise ArgumentError("a product of op has NaN or infinity")
        scale = power_of_two(largest, z.dtype)
        product = product / z.dtype.type(scale)
        with batched.one_blas_thread():
            gram = to_host(owners.sum(z.T @ product)).astype(np.float64)
        norms = np.sqrt(to_host(owners.sum(batched.column_dots(product, product))))
        if abs(gram - gram.T).max() > _ASYMMETRY * norms.max():
            raise ArgumentError(
                "op must be symmetric, but u^T K v and v^T K u of random vectors differ by "
                f"{abs(gram - gram.T).max() / norms.max():.2g} of its norm"
            )
        return scale

    def _outliers(self, count: int, maxiter: int) -> tuple[HostArray, Array | None]:
        """Eigenvalues of the largest absolute values, those that are found in time."""
        if not count:
            return np.zeros(0), None
        try:
            values, vectors = eigsh(
                self._given, count, "LM", rtol=_RTOL, maxiter=maxiter, seed=self._seed,
                comm=self._comm,
            )  # fmt: skip
        except NoConvergenceError as some:
            return some.eigenvalues, some.eigenvectors
        return to_host(values), vectors

    def _trace(self) -> float | None:
        """Exactly, where the matrix gives its diagonal for less than N products."""
        matrix: Any = self._matrix
        if isinstance(matrix, CompressedMatrix):
            return matrix.trace()
        with self._ranks.agreed():
            if not getattr(matrix, "has_diagonal", False):
                return None
            return float(matrix.diagonal().sum(dtype=np.float64))


def _rules(
    alpha: HostArray, beta: HostArray, eps: float, size: float
) -> tuple[Rule, Rule, Rule, HostArray, float]:
    """Gauss's rule, Radau's, Gauss's of fewer steps; residuals of the first, end of the second.

    Of no step, as nothing is left, rules without nodes.
    """
    if not len(alpha):
        none = np.zeros((0, alpha.shape[1]))
        return (none, none), (none, none), (none, none), none, 0.0
    nodes, weights, residuals = quadrature(alpha, beta)
    rounding = eps * max(size, float(abs(nodes).max())) or float(np.finfo(np.float64).tiny)
    low = float(nodes.min())
    end = 0.0 if low >= -_ROUNDING * rounding else float((nodes - residuals).min())
    end = min(end, low - rounding)
    fewer = len(alpha) - len(alpha) // _SHORTER if beta[-1].any() else len(alpha)
    shorter = quadrature(alpha[:fewer], beta[:fewer])[:2]
    return (nodes, weights), radau_quadrature(alpha, beta, end), shorter, residuals, end

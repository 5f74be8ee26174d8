"""The log marginal likelihood of a Gaussian process, and its gradient."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.arrays import as_columns
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.compressed import CompressedMatrix, CompressionReport
from gpu_hodlr.compressed.damped import Damped
from gpu_hodlr.compression import compress
from gpu_hodlr.compression.options import CAP
from gpu_hodlr.compression.tolerance import SHARE, Tolerance
from gpu_hodlr.devices import (
    AnyArray,
    Array,
    HostArray,
    device_kind,
    namespace,
    to_host,
)
from gpu_hodlr.distributed import Communicator, communicator
from gpu_hodlr.errors import ArgumentError, ShapeError
from gpu_hodlr.factor import Solver
from gpu_hodlr.factor.inverse import ExactInverse
from gpu_hodlr.factor.probing import trace_probes
from gpu_hodlr.operators import (
    KernelOperator,
    Operator,
    as_operator,
    device_of_matrix,
    lengthscale_forms,
)

_RTOL = 1e-6  # of a compression made here
_ATTEMPTS = 3  # of them
_CONTROLLED = 8  # probes, of which it is told what they miss of a trace that is known
_ALIKE = 1e-6  # what misses of several traces may differ by and be the same but for rounding
_ROWS = 256  # of K, by whose entries in as many columns a first rtol is found
_MOST_RANK = 2048  # by default, and an eighth of N


@dataclass(frozen=True, eq=False)
class LogMarginalLikelihood:
    """What `log_marginal_likelihood` found.

    Attributes:
        value: log p(y).
        gradient: of the value in the logarithm of "lengthscale" (a number, or (d,)), "variance",
            "nugget" (a common factor of it, where there is one) and "noise" (the damping, or a
            common factor of it): of an operator without these, "noise" alone.
        standard_error: of each of them, from the traces; 0 where they are exact, as all are but the
            length scales with the forms "hss", "hodlr" and "lowrank".
        weights: (K + damping I)^-1 y, of the library of y: `op.cross(new) @ weights` is the
            posterior mean.
        factor: of K + damping I.
        matrix: K compressed; None where a factor was given.
        moved: (N, p) dA a of the parameters of `gradient`, a the weights, for `information`.

    Example:
        >>> K = gh.compress(np.diag([1.0, 3.0]))
        >>> found = gh.log_marginal_likelihood(K, np.zeros(2), damping=1.0)
        >>> bool(np.isclose(found.value, -0.5 * np.log(2.0 * 4.0) - np.log(2 * np.pi)))
        True
        >>> round(found.gradient["noise"], 6), found.standard_error["noise"]  # -1/2 (1/2 + 1/4)
        (-0.375, 0.0)
    """

    value: float
    gradient: Mapping[str, float | HostArray]
    standard_error: Mapping[str, float | HostArray]
    weights: Any
    factor: Any
    matrix: CompressedMatrix | None
    moved: Mapping[str, Array]

    def information(self, *names: str) -> HostArray:
        """(p, p) what the data say of these logarithms, the inverse of their covariance.

        The average information 1/2 a^T dA_i A^-1 dA_j a: about minus the second derivatives of the
        value, the mean of these and of what they are on average where they are linear in A
        (Gilmour, Thompson, Cullis, Biometrics 51 (1995)). A solve each.

        Collective: all ranks call.

        Args:
            *names: of `gradient`.

        Raises:
            ArgumentError: there is no such gradient.

        Example:
            >>> K = gh.compress(np.diag([1.0, 3.0]))
            >>> found = gh.log_marginal_likelihood(K, np.array([1.0, 2.0]), damping=1.0)
            >>> found.information("noise")  # 1/2 (1 / 2^3 + 4 / 4^3)
            array([[0.09375]])
        """
        for name in names or (None,):
            if name not in self.moved:
                known = ", ".join(self.moved) or "a gradient"
                raise ArgumentError(f"names must be of {known}, got {name!r}")
        found = [self.moved[name] for name in names]
        columns = namespace(found[0]).concatenate(found, axis=1)
        solved = self.factor.solve(columns)
        products = to_host(batched.matmul(columns[None], solved[None], transpose_a=True)[0])
        return (products + products.T).astype(np.float64) / 4

    @property
    def report(self) -> CompressionReport | None:
        """Of the compression; None where a factor was given."""
        return None if self.matrix is None else self.matrix.report


def log_marginal_likelihood(
    op: object,
    y: AnyArray,
    damping: float | AnyArray | None = None,
    *,
    gradient: bool = True,
    num_probes: int = 32,
    seed: int = 0,
    **options: Any,
) -> LogMarginalLikelihood:
    """The log density of y under N(0, A), A = K + damping I, and its gradient.

    log p(y) = -1/2 y^T A^-1 y - 1/2 log det A - N/2 log(2 pi), and its derivative
    1/2 a^T dA a - 1/2 tr(A^-1 dA), a = A^-1 y; Rasmussen and Williams, Gaussian Processes for
    Machine Learning (2006), equations 2.30 and 5.9. The traces of noise, nugget and variance are
    exact, by `F.inverse_diagonal`; that of a length scale is the mean of w^T dA w, w = W^-T z,
    A = W W^T, over probes z of random signs (Hutchinson, Communications in Statistics 18 (1989)),
    corrected by what they miss of the traces that are known. Its standard error is sqrt(I / probes)
    at most, I = 1/2 tr (A^-1 dA)^2 the information; z^T A^-1 dA z would have a larger one. The
    probes are the same for all length scales, and in every call with the same seed. Only the
    length scales need products with dA: exact ones, O(N^2) entries that are formed and
    dropped, once for all probes and length scales, shared out over the ranks.

    K is compressed with `rtol`, and again, more closely, where the spectral error of that is more
    than a tenth of the smallest noise (and nugget) of a row.

    Collective: all ranks call.

    Args:
        op: a KernelOperator, with all derivatives; or K compressed, its factor, or what `compress`
            takes, with that in the noise alone.
        y: (N,), on every rank the same.
        damping: the noise's variance, or that of every row, (N,), see `CompressedMatrix.factorize`;
            of a factor its own.
        gradient: whether it is wanted; the value alone costs one solve.
        num_probes: vectors z, at least 2; with N of them the traces are exact.
        seed: of the probes.
        **options: of `compress`; rtol is 1e-6 by default, max_rank N / 8, but 256 to 2,048.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: y is not (N,), finite, on the device of
            the matrix; a bad argument.
        NotPositiveDefiniteError: A is not positive definite.
        InexactError: scheme "fmm" has no log-determinant.

    Example:
        >>> x = np.linspace(0, 1, 200)
        >>> op = gh.KernelOperator(x, "matern32", 0.3)
        >>> found = gh.log_marginal_likelihood(op, np.sin(6 * x), damping=0.01, leaf_size=32)
        >>> round(found.value, 2), sorted(found.gradient)
        (233.38, ['lengthscale', 'noise', 'variance'])
        >>> new = np.array([0.25, 0.5])
        >>> bool(np.allclose(op.cross(new) @ found.weights, np.sin(6 * new), atol=0.01))
        True
    """
    ranks = _ranks(op, options)
    with ranks.agreed():
        check_count(num_probes, "num_probes", least=2)
        check_count(seed, "seed", least=0)
        ranks.same(num_probes=num_probes, seed=seed, gradient=bool(gradient))
        operator, matrix, factor = _factorized(op, damping, {"seed": seed, **options}, ranks)
        return _evaluated(operator, matrix, factor, y, num_probes if gradient else 0, seed)


def _evaluated(
    operator: KernelOperator | None,
    matrix: CompressedMatrix | None,
    factor: Any,
    y: AnyArray,
    num_probes: int,
    seed: int,
) -> LogMarginalLikelihood:
    """See `log_marginal_likelihood`; without probes there is no gradient."""
    n = factor.shape[0]
    columns, restore = as_columns(y, n, factor.dtype, factor.device, "y")
    if y.ndim != 1:
        raise ShapeError(f"y must have shape ({n},), got {tuple(y.shape)}")
    factor.owners.comm.same(y=y)
    weights = factor.solve(columns)
    value = -0.5 * (_dot(columns, weights)[0] + factor.logdet() + n * np.log(2 * np.pi))
    slopes: Mapping[str, float | HostArray] = {}
    errors: Mapping[str, float | HostArray] = {}
    moved: Mapping[str, Array] = {}
    if num_probes:
        traces = _exact_traces(operator, factor)
        u, energies = weights, _dot(columns, weights)
        if operator is not None or not traces:
            z = trace_probes(n, num_probes, (seed, streams.TRACE), factor.dtype, factor.device)
            w = factor.sqrt_solve(z, transpose=True)
            u = namespace(z).concatenate([weights, w], axis=1)
            energies = np.concatenate([energies, _dot(z, z)])
        found, moved = _forms(operator, factor, columns, u, energies)
        slopes, errors = _estimates(found, traces, num_probes >= n)
    return LogMarginalLikelihood(
        float(value), slopes, errors, restore(weights), factor, matrix, moved
    )  # fmt: skip


def _ranks(op: object, options: Mapping[str, Any]) -> Communicator:
    """The ranks of a matrix or factor, or those that are to have one."""
    if isinstance(op, CompressedMatrix | Solver):
        return op.owners.comm
    device = options.get("device")
    here = device_of_matrix(op) if device is None else device_kind(device)
    return communicator(options.get("comm"), here)


def _factorized(
    op: object, damping: Any, options: dict[str, Any], ranks: Communicator
) -> tuple[KernelOperator | None, CompressedMatrix | None, Any]:
    """The operator, where its derivatives are known, K compressed, and the factor of A.

    Raises:
        ArgumentError: options or a damping that a matrix or factor already has.
    """
    given = ", ".join(name for name in options if name != "seed")
    if given and isinstance(op, CompressedMatrix | Solver):
        raise ArgumentError(f"{given}: options of compress, but op is {op!r}")
    if isinstance(op, Solver):
        if damping is not None:
            raise ArgumentError(f"damping must be None: op is a factor, of damping {op.damping}")
        return None, None, op
    if damping is None:
        raise ArgumentError("damping must be given: the variance of the noise, got None")
    if isinstance(op, CompressedMatrix):
        return None, op, op.factorize(damping)
    operator = as_operator(op)
    options = {**usual_options(operator.shape[0]), **options, "comm": ranks}
    K = _compressed(operator, damping, options)
    moved = operator.to(K.device)
    kernel = moved if isinstance(moved, KernelOperator) else None
    return kernel, K, K.factorize(damping)


def _compressed(operator: Operator, damping: Any, options: dict[str, Any]) -> Any:
    """K with a spectral error of a tenth of the least noise, where the rank's cap allows that.

    The error is taken as it is reported, of many points from some columns of it.
    """
    if operator.has_entries and not getattr(damping, "ndim", 0):
        least = check_number(damping, "damping") or None
        norm = _frobenius_norm(operator, options["seed"])
        options["rtol"] = Tolerance.asked(options["rtol"], None, least, norm).rtol
    for _ in range(_ATTEMPTS):
        K: Any = compress(operator, **options)
        report = K.report
        least = Damped.of(copy.copy(K), damping).least + (report.nugget or 0.0)
        tolerance = Tolerance(report.rtol, SHARE * least)
        if not least or report.rank_cap_hit or tolerance.keeps(report.spectral_error):
            break
        closer = tolerance.tighter(report.rtol, report.spectral_error)
        options = {**options, "rtol": closer, "atol": None}
    return K


def _frobenius_norm(operator: Operator, seed: int) -> float:
    """About norm(K)_F, from a few entries."""
    n = operator.shape[0]
    rng = np.random.default_rng((seed, streams.CONSISTENCY))
    some = rng.permutation(n)[:_ROWS]
    squares = to_host(operator.entries(some, some)).astype(np.float64) ** 2
    diagonal, m = np.trace(squares), len(some)
    return float(np.sqrt(n / m * (diagonal + (n - 1) / (m - 1) * (squares.sum() - diagonal))))


def usual_options(n: int) -> dict[str, Any]:
    """Of `compress`, where a Gaussian process gives none: noise asks for more than products do."""
    return {"rtol": _RTOL, "max_rank": min(max(n // 8, CAP), _MOST_RANK)}


def _exact_traces(operator: KernelOperator | None, factor: Any) -> dict[str, float]:
    """tr(A^-1 dA) of what is on A's diagonal, and of the rest together, where they can be had."""
    if not isinstance(factor, ExactInverse):
        return {}
    inverse = factor.inverse_diagonal()[:, None]
    ones = namespace(inverse).ones_like(inverse)
    traces = {"noise": float(_dot(_times(_damping(factor), inverse), ones)[0])}
    if operator is not None:
        traces["nugget"] = float(_dot(_times(operator.nugget, inverse), ones)[0])
        traces["variance"] = factor.shape[0] - sum(traces.values())
    return traces


def _damping(factor: Any) -> Any:
    """A number, or (N,)."""
    rows = factor.row_damping
    return factor.damping if rows is None else factor.owners.whole(rows)


def _forms(
    operator: KernelOperator | None, factor: Solver, y: Array, u: Array, energies: HostArray
) -> tuple[dict[str, HostArray], dict[str, Array]]:
    """u^T dA u of the columns, (p, columns), for the logarithm of every parameter; dA a, (N, p).

    Args:
        operator: K.
        factor: of A.
        y: (N, 1).
        u: (N, 1 + probes) a = A^-1 y, then W^-T z of the probes, A = W W^T.
        energies: (1 + probes,) u^T A u.
    """
    a, d = u[:, :1], _damping(factor)
    noise, of_noise = _of_rows(u, d), _times(d, a)
    found, moved = {"noise": noise[None]}, {"noise": of_noise}
    if operator is None:
        return found, moved
    nugget, of_nugget = _of_rows(u, operator.nugget), _times(operator.nugget, a)
    if nugget.any():
        found["nugget"], moved["nugget"] = nugget[None], of_nugget
    # In the variance's logarithm: A without what is on its diagonal alone.
    found["variance"] = (energies - noise - nugget)[None]
    moved["variance"] = y - of_noise - of_nugget
    found["lengthscale"], products = lengthscale_forms(operator, u, factor.owners.comm)
    moved["lengthscale"] = products.astype(a.dtype)
    return found, moved


def _of_rows(u: Array, d: Any) -> HostArray:
    """u^T diag(d) u of the columns, for a number d or (N,)."""
    if getattr(d, "ndim", 0):
        return _dot(_times(d, u), u)
    return float(d) * _dot(u, u)


def _times(d: Any, v: Array) -> Array:
    """Diag(d) v, for a number d or (N,)."""
    return v * d[:, None] if getattr(d, "ndim", 0) else v * v.dtype.type(d)


def _dot(left: Array, right: Array) -> HostArray:
    """Dot products of the columns, float64."""
    return to_host((left.astype(np.float64) * right.astype(np.float64)).sum(axis=0))


def _estimates(
    forms: Mapping[str, HostArray], traces: Mapping[str, float], exact: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """1/2 a^T dA a - 1/2 tr(A^-1 dA) and their standard errors; numbers of one parameter.

    What the probes miss of a trace that is known they miss, in proportion, of the others: that of
    a length scale and of the variance are much alike where the data hardly tell the two apart, and
    there an error of one of them alone would lead far away. (Control variates: Owen, Monte Carlo
    theory, methods and examples (2013), section 8.9.)

    Args:
        forms: (p, 1 + probes) a^T dA a, then w^T dA w, whose mean the trace is.
        traces: those that are known.
        exact: whether all are, of so many probes.
    """
    slopes: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    known = np.array(
        [forms[name][0, 1:] - trace for name, trace in traces.items() if name in forms]
    )
    for name, values in forms.items():
        if name in traces:
            slopes[name], errors[name] = 0.5 * (float(values[0, 0]) - traces[name]), 0.0
            continue
        mean, error = _mean(values[:, 1:], known)
        slope = 0.5 * (values[:, 0] - mean)
        error = np.zeros_like(slope) if exact else 0.5 * error
        one = len(slope) == 1
        slopes[name], errors[name] = (float(slope[0]), float(error[0])) if one else (slope, error)
    return slopes, errors


def _mean(samples: HostArray, controls: HostArray) -> tuple[HostArray, HostArray]:
    """(p,) means and their standard errors of (p, k) samples; controls (q, k) have mean 0."""
    k = samples.shape[1]
    mean, unknown = samples.mean(axis=1), 1
    rest = samples - mean[:, None]
    if k >= _CONTROLLED and len(controls):
        missed = controls.mean(axis=1)
        apart = controls - missed[:, None]
        norms = np.linalg.norm(apart, axis=1) + np.finfo(np.float64).tiny
        apart, missed = apart / norms[:, None], missed / norms
        shares, _, rank, _ = np.linalg.lstsq(apart.T, rest.T, rcond=_ALIKE)
        mean, rest = mean - missed @ shares, rest - shares.T @ apart
        unknown += int(rank)
    return mean, np.sqrt((rest**2).sum(axis=1) / (k - unknown) / k)

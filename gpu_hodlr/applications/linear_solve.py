"""One call that solves with the exact matrix, by what is cheapest."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.compressed import CompressedMatrix
from gpu_hodlr.compression import compress
from gpu_hodlr.devices import synchronize
from gpu_hodlr.distributed import Communicator, communicator
from gpu_hodlr.errors import GpuHodlrError, closeness_unsaid
from gpu_hodlr.factor import Solver
from gpu_hodlr.krylov import CGInfo, cg
from gpu_hodlr.operators import Operator, SharedOperator, as_operator, device_of_matrix

_TRIAL = 25  # iterations of plain CG by which its convergence is judged
_COLUMNS = 40  # of a product that is timed
_COMPRESSION = 400  # columns whose product takes about what a compression takes
_MARGIN = 3  # times the iterations predicted, at most


@dataclass(frozen=True, eq=False)
class SolveInfo:
    """How `solve` went about it.

    Attributes:
        converged: whether every column reached rtol. An operator that declares definite = False
            may end at a direction of negative curvature instead.
        iterations: products with the exact matrix, of all runs together.
        residual: largest norm(b - A x) / norm(b) of the last run (recurrence).
        preconditioner: the factor of the compressed matrix; None where plain CG was cheaper.
        matrix: the compressed matrix; None likewise.
        seconds: wall seconds by phase: "plain", "product", "compress", "factorize",
            "preconditioned".
        reason: what was done and why, a sentence.

    Example:
        >>> x, info = gh.solve(np.diag([1.0, 2.0]), np.ones(2), damping=1.0)
        >>> x.round(6), info.converged, info.preconditioner
        (array([0.5     , 0.333333]), True, None)
    """

    converged: bool
    iterations: int
    residual: float
    preconditioner: Solver | None
    matrix: CompressedMatrix | None
    seconds: dict[str, float]
    reason: str


def solve(
    op: object,
    b: Any,
    damping: float,
    *,
    rtol: float = 1e-8,
    time_budget: float | None = None,
    maxiter: int = 10_000,
    seed: int = 0,
    comm: Any = None,
    **options: Any,
) -> tuple[Any, SolveInfo]:
    """Solve (K + damping I) x = b with the exact K: plain CG, or with a factor as preconditioner.

    A few iterations of plain CG tell how fast it converges, and a timed product what that would
    take. Where a compression, which takes about as long as products with 400 columns, is cheaper,
    K is compressed to what this damping needs (`compress(op, "auto", damping=damping)`) and
    factorized, at a larger damping where this one does not do (`shift="auto"`); the factor
    preconditions CG on K.

    Collective: all ranks call.

    Args:
        op: an operator, or what `as_operator` takes.
        b: (N,) or (N, k), whole on every rank.
        damping: added to the diagonal, >= 0.
        rtol: norm(b - A x) <= rtol norm(b) for every column.
        time_budget: seconds after which no iteration and no phase is begun, and no compression is
            that would take longer than what is left of them; None for none. What was reached is
            returned.
        maxiter: most products with K in all.
        seed: of every random choice.
        comm: an mpi4py communicator; see `cg`.
        **options: of `compress`: scheme, max_rank, ...

    Returns:
        x like b, and a `SolveInfo` (check `converged`).

    Raises:
        NotPositiveDefiniteError: K + damping I is not positive definite.
        ShapeError, DtypeError, DeviceError, ArgumentError: see `cg` and `compress`.

    Example:
        >>> points = np.random.default_rng(0).random((500, 2))
        >>> op = gh.KernelOperator(points, "gaussian", 0.5)
        >>> b = np.sin(3 * points[:, 0])
        >>> x, info = gh.solve(op, b, damping=1e-4)
        >>> info.converged, bool(np.linalg.norm(op @ x + 1e-4 * x - b) <= 1e-7 * np.linalg.norm(b))
        (True, True)
    """
    ranks = communicator(comm, device_of_matrix(op))
    with ranks.agreed():
        operator = as_operator(op)
        ranks.same(damping=damping, rtol=rtol, time_budget=time_budget, maxiter=maxiter, seed=seed)
        check_number(damping, "damping")
        check_number(rtol, "rtol")
        check_count(maxiter, "maxiter")
        if time_budget is not None:
            check_number(time_budget, "time_budget")
    return _Run(operator, b, damping, rtol, time_budget, maxiter, seed, comm, ranks).solve(options)


class _Run:
    """One `solve`: what has been reached, and at what cost."""

    def __init__(
        self, operator: Operator, b: Any, damping: float, rtol: float, budget: float | None,
        maxiter: int, seed: int, comm: Any, ranks: Communicator,
    ) -> None:  # fmt: skip
        self._operator, self._b, self._damping, self._rtol = operator, b, damping, rtol
        self._budget, self._left, self._seed = budget, maxiter, seed
        self._comm, self._ranks = comm, ranks
        self._x: Any = None
        self._iterations, self._residual, self._converged = 0, math.inf, False
        self._bent = False  # a direction of negative curvature was met
        self._late = False  # the time budget ended a run
        self._seconds: dict[str, float] = {}

    def solve(self, options: dict[str, Any]) -> tuple[Any, SolveInfo]:
        """See `solve`."""
        last = self._iterate("plain", None, min(_TRIAL, self._left))
        if self._ended():
            if self._bent:
                return self._result("plain CG, up to a direction of negative curvature")
            return self._result(
                "plain CG: the time is over" if self._late
                else "plain CG: few iterations did, or were allowed"
            )  # fmt: skip
        ahead = min(_iterations_ahead(last.residuals, self._rtol), float(self._left))
        spent = max(self._ranks.share(self._seconds["plain"]))
        plain = ahead * spent / max(self._iterations, 1)
        estimate = f"about {plain:.2g} s more of plain CG"
        others = self._compression_seconds()
        estimate += f", {others:.2g} s of compression"
        if others >= self._time_left():
            self._iterate("plain", None, float(self._left))
            return self._result(f"plain CG, as the time is short: {estimate}")
        if plain <= others:
            self._iterate("plain", None, min(_MARGIN * ahead, float(self._left)))
            if self._ended():
                return self._result(f"plain CG: {estimate}")
        matrix, factor, said = self._factor(options)
        if self._time_left() > 0:
            self._iterate("preconditioned", factor, float(self._left))
        return self._result(f"{said}: {estimate}", matrix, factor)

    def _ended(self) -> bool:
        return self._converged or self._bent or self._left <= 0 or self._time_left() <= 0

    def _time_left(self) -> float:
        """Of the budget; the same on every rank."""
        if self._budget is None:
            return math.inf
        return self._budget - max(self._ranks.share(sum(self._seconds.values())))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self._operator.device)
            spent = time.perf_counter() - begin
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent

    def _iterate(self, phase: str, M: Solver | None, most: float) -> CGInfo:
        """CG from where it stands, while there is time."""
        options = {"damping": self._damping, "rtol": self._rtol, "comm": self._comm}
        watch = None if self._budget is None else _Watch(self._time_left(), self._ranks)
        with self._timed(phase):
            try:
                x, info = cg(
                    self._operator, self._b, M=M, x0=self._x, maxiter=max(1, int(most)),
                    callback=watch, **options,
                )  # fmt: skip
            except _TimeIsOverError as end:
                self._late = True
                x, done = end.reached
                _, last = cg(self._operator, self._b, x0=x, maxiter=1, **options)
                first = last.residuals[0]
                info = replace(
                    last, converged=first <= self._rtol, iterations=done, residuals=(first,)
                )
        self._x = x
        self._converged, self._residual = info.converged, info.residuals[-1]
        self._iterations += info.iterations
        self._left -= info.iterations
        self._bent = info.direction is not None
        return info

    def _compression_seconds(self) -> float:
        """What a compression would take, from a product with some columns."""
        n = self._operator.shape[0]
        columns = min(_COLUMNS, n)
        with self._ranks.agreed():  # a user's functions are called
            normal = batched.normal_source((self._seed,), self._operator.device)
            v = normal((n, columns), self._operator.dtype)
            shared = SharedOperator(self._operator, self._ranks)
            with self._timed("product"):
                shared.reader.matmat(v)
        return max(self._ranks.share(self._seconds["product"])) * _COMPRESSION / columns

    def _factor(
        self, options: dict[str, Any]
    ) -> tuple[CompressedMatrix | None, Solver | None, str]:
        """The compressed matrix, its factor, and what was done; none where that fails."""
        options = {"scheme": "auto", "damping": self._damping or None, **options}
        try:
            with closeness_unsaid():  # a preconditioner need not be exact
                with self._timed("compress"):
                    matrix = compress(self._operator, seed=self._seed, comm=self._comm, **options)
                if self._time_left() <= 0:
                    return matrix, None, "plain CG, as the compression took all the time"
                with self._timed("factorize"):
                    factor = matrix.factorize(self._damping, shift="auto")
        except GpuHodlrError as error:
            return None, None, f"plain CG, as a factor could not be had ({error})"
        at = f" at damping {factor.damping:.3g}" if factor.shifted else ""
        return matrix, factor, f"CG with the factor of a {type(matrix).__name__}{at}"

    def _result(
        self, reason: str, matrix: CompressedMatrix | None = None, factor: Solver | None = None
    ) -> tuple[Any, SolveInfo]:
        return self._x, SolveInfo(
            self._converged, self._iterations, self._residual, factor, matrix,
            dict(self._seconds), reason,
        )  # fmt: skip


class _TimeIsOverError(Exception):
    """Ends a run of CG; `reached` is x, and how many iterations were made."""

    def __init__(self, x: Any, iterations: int) -> None:
        super().__init__()
        self.reached = x, iterations


class _Watch:
    """A callback of CG that ends it.

    Args:
        seconds: when.
        ranks: that agree on it.
    """

    def __init__(self, seconds: float, ranks: Communicator) -> None:
        self._end, self._ranks = time.perf_counter() + seconds, ranks
        self._iterations = 0

    def __call__(self, x: Any) -> None:
        """Called after every iteration.

        Raises:
            _TimeIsOverError: on all ranks at once.
        """
        self._iterations += 1
        if max(self._ranks.share(time.perf_counter() - self._end)) >= 0:
            raise _TimeIsOverError(x, self._iterations)


def _iterations_ahead(residuals: tuple[float, ...], rtol: float) -> float:
    """How many more plain CG needs, if it goes on as in its second half."""
    second = np.log(np.maximum(residuals[len(residuals) // 2 :], np.finfo(np.float64).tiny))
    fall = (second[0] - second[-1]) / max(len(second) - 1, 1)
    ahead = math.log(residuals[-1] / rtol)
    return math.inf if fall <= 0 else ahead / fall

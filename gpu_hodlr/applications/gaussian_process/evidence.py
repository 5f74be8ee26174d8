"""The likelihood of data as a function of the hyper-parameters, and its maximum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_hodlr import streams
from gpu_hodlr.applications.gaussian_process.hyperparameters import Hyperparameters
from gpu_hodlr.applications.gaussian_process.maximum import FIRST, Likelihood, Maximum, maximized
from gpu_hodlr.applications.likelihood import LogMarginalLikelihood, log_marginal_likelihood
from gpu_hodlr.devices import Array, HostArray, namespace
from gpu_hodlr.errors import NotPositiveDefiniteError, closeness_unsaid
from gpu_hodlr.operators import KernelOperator

_EXACT, _PROBES = 1000, 16  # samples up to which gradients are exact; probes beyond
_GROWTH, _NEARLY = 4, 1.5  # points of a stage over those of the last; what needs no stage before


@dataclass(frozen=True, eq=False)
class Evidence:
    """log p(y) of a kernel.

    Attributes:
        kernel: see `KernelOperator`.
        kernel_options: likewise.
        num_probes: see `gh.log_marginal_likelihood`, as the next; None: see `GaussianProcess`.
        seed: of every random choice.
        options: of `compress`.
    """

    kernel: Any
    kernel_options: Mapping[str, Any]
    num_probes: int | None
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def operator(self, points: Array, at: Hyperparameters) -> KernelOperator:
        """The kernel matrix of points, without noise."""
        return KernelOperator(
            points, self.kernel, at.lengthscale, variance=at.variance, **self.kernel_options
        )  # fmt: skip

    def of(
        self, points: Array, y: Array, at: Hyperparameters, *, gradient: bool
    ) -> LogMarginalLikelihood:
        """See `gh.log_marginal_likelihood`."""
        op: Any = self.operator(points, at)
        damping: Any = at.damping
        if at.rows is not None:
            damping = namespace(points).asarray(damping)
        num = self.num_probes or (len(y) if len(y) <= _EXACT else _PROBES)
        return log_marginal_likelihood(
            op, y, damping, gradient=gradient, num_probes=num, seed=self.seed, **self.options
        )  # fmt: skip

    def maximum(
        self,
        points: Array,
        y: Array,
        start: Hyperparameters,
        *,
        restarts: int,
        subset: int | None,
        tol: float,
        max_iter: int,
    ) -> Maximum:
        """The best of several starts, on some of the points first; `kept` is what was found there.

        Args:
            points: (N, d).
            y: (N,).
            start: the first start, and all that is fixed.
            restarts: more of them, drawn within the bounds.
            subset: points that are enough to come near; None: there is one stage, of all.
            tol: see `maximized`, as the next.
            max_iter: of one start.
        """
        order = np.random.default_rng((self.seed, streams.SUBSET)).permutation(len(points))
        sizes = _stages(len(points), subset if len(start.theta) else None)
        found = None
        for size in sizes:
            index = np.sort(order[:size])
            some = slice(None) if size == len(points) else namespace(points).asarray(index)
            data = points[some], y[some], start.of_rows(index)
            if found is None:
                found = self._best(*data, start.theta, FIRST, restarts, tol, max_iter)
                continue
            last, reach = found, max(FIRST, found.reach)
            found = self._best(*data, last.theta, reach, 0, tol, max_iter)
            found.iterations += last.iterations
        assert found is not None
        return found

    def _best(
        self,
        points: Array,
        y: Array,
        start: Hyperparameters,
        theta: HostArray,
        reach: float,
        restarts: int,
        tol: float,
        max_iter: int,
    ) -> Maximum:
        """Of all starts.

        Raises:
            NotPositiveDefiniteError: the matrix is not at the first start.
        """
        limits = start.limits
        free = bool(len(theta))

        def evaluate(theta: HostArray) -> Likelihood:
            at = start.at(theta)
            found = self.of(points, y, at, gradient=free)
            information = found.information(*at.free) if free else np.zeros((0, 0))
            return Likelihood(found.value, at.gradient(found), information, found)

        with closeness_unsaid():  # of matrices on the way; that of the end is looked at
            best = maximized(evaluate, theta, limits, start.direct, tol, max_iter, reach)
            rng = np.random.default_rng((self.seed, streams.RESTARTS))
            for _ in range(restarts if free else 0):
                other = rng.uniform(limits[:, 0], limits[:, 1])
                try:
                    found = maximized(evaluate, other, limits, start.direct, tol, max_iter)
                except NotPositiveDefiniteError:
                    continue
                if found.likelihood.value > best.likelihood.value:
                    best = found
        return best


def _stages(n: int, first: int | None) -> list[int]:
    """Numbers of points that hyper-parameters are fitted on, one after the other; at last n."""
    sizes = []
    while first is not None and n > _NEARLY * first:
        sizes.append(first)
        first *= _GROWTH
    return [*sizes, n]

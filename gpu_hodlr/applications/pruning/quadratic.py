"""The loss round the weights, to second order: what a weight's removal costs, and what mends it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from gpu_hodlr.compressed import CompressedMatrix
from gpu_hodlr.compression import compress
from gpu_hodlr.devices import (
    Array,
    HostArray,
    HostIndex,
    check_memory,
    memory_errors,
    move,
    namespace_on,
    to_host,
)
from gpu_hodlr.distributed import Communicator
from gpu_hodlr.errors import AccuracyWarning, closeness_unsaid
from gpu_hodlr.krylov import CGInfo, conjugate_gradients, on_all
from gpu_hodlr.operators import Operator, SharedOperator

_COMPRESSION_RTOL, _MOST_RANK = 2e-2, 512  # by default
_RTOL = {4: 1e-4, 8: 1e-8}  # of the update, by the bytes of a number
_MOST = 2000  # iterations
_UNIT_RTOL, _UNIT_STEPS = 1e-3, 20  # of the costs of units, which an order is all that is made of
_DAMPING = 0.03  # of the mean of G's diagonal
_UNITS_BYTES = 1 << 28  # of the vectors of units that are solved for together
_COPIES = 8  # of them, in a run of CG


class Quadratic:
    """delta^T H delta / 2, H = G + damping I, over the weights that are kept.

    H_KK, of the weights K that are kept, is solved with by conjugate gradients on the exact G. The
    preconditioner is the factor of the compressed matrix plus a damping of every row, which is a
    barrier t on the rows that are pruned: with t -> infinity the kept block of its inverse is
    H_KK^-1, and at any t the condition number is at most 1 + norm(G)_2 / t, but for the error of
    the compression.

    Args:
        op: G, exact.
        options: of `compress`, scheme among them.
        damping: None for 3 % of the mean of G's diagonal.
        ranks: that call.
        comm: theirs, as the user gave it.

    Attributes:
        damping: of H.
    """

    def __init__(
        self, op: Operator, options: Mapping[str, Any], damping: float | None,
        ranks: Communicator, comm: Any,
    ) -> None:  # fmt: skip
        self._matrix: CompressedMatrix = compress(op, comm=comm, **_with_defaults(op, options))
        self._ranks, self._device = ranks, self._matrix.device
        self._op = SharedOperator(op.to(self._device), ranks)
        self._dtype = self._matrix.dtype
        if damping is None:
            mean = float(to_host(self._matrix.diagonal()).mean())
            damping = _DAMPING * mean or 1.0  # a loss that no weight changes has no scale
        self.damping = damping

    def product(self, v: HostArray) -> HostArray:
        """G v, exact."""
        return self._host(self._multiply(self._column(v)))

    def costs(self, theta: HostArray, kept: HostArray) -> HostArray:
        """(N,) theta_i^2 / (2 (H_KK^-1)_ii): what the removal of each weight alone costs."""
        inverse = to_host(self._factor(kept).inverse_diagonal()).astype(np.float64)
        return 0.5 * theta**2 / np.maximum(inverse, np.finfo(np.float64).tiny)

    def unit_costs(
        self, theta: HostArray, units: HostIndex, count: int, kept: HostArray
    ) -> HostArray:
        """theta_S^T ((H_KK^-1)_SS)^-1 theta_S / 2 for the weights S of every unit, or a bit more.

        It is theta_S^T (H_SS - H_SR H_RR^-1 H_RS) theta_S / 2 with the rest R of what is kept: by
        some iterations of CG for H_RR of all units at once, each in a column of its own, of which
        every one gives a bound from above, the cost with the update it has come to.

        Args:
            theta: (N,).
            units: (N,) the unit of every weight, -1 for none.
            count: of units.
            kept: (N,) bool.
        """
        n, size = len(theta), self._dtype.itemsize
        together = max(1, min(count, _UNITS_BYTES // (_COPIES * n * size)))
        what, lower = "the costs of units", "the number of parameters"
        with self._ranks.agreed():
            check_memory(_COPIES * n * together * size, what, lower, self._device)
        factor, found = self._factor(kept), []
        with memory_errors(what, lower, self._device):
            for start in range(0, count, together):
                inside = units[:, None] == np.arange(start, min(start + together, count))
                found.append(self._costs_of(theta, inside, kept[:, None] & ~inside, factor))
        return np.concatenate(found)

    def _costs_of(
        self, theta: HostArray, inside: HostArray, rest: HostArray, factor: Any
    ) -> HostArray:
        """Of some units: what is in each, and what is not, (N, units) bool."""
        xp, dtype = namespace_on(self._device), self._dtype.type
        columns = xp.asarray(inside).astype(dtype) * self._column(theta)
        others = xp.asarray(rest).astype(dtype)
        Hv = self._damped(columns)
        x = self._solved(others, others * Hv, factor, _UNIT_RTOL, _UNIT_STEPS)[0]
        alone, mended = ((a * Hv).sum(axis=0, dtype=np.float64) for a in (columns, x))
        return 0.5 * to_host(alone - mended)

    def update(self, slope: HostArray, kept: HostArray) -> HostArray:
        """(N,) -H_KK^-1 slope_K, 0 elsewhere: the step of the kept weights from a slope (N,).

        Warns:
            AccuracyWarning: it has not converged.
        """
        xp, dtype, rtol = namespace_on(self._device), self._dtype.type, _RTOL[self._dtype.itemsize]
        inside = xp.asarray(kept[:, None]).astype(dtype)
        b = -inside * self._column(slope)
        x, info = self._solved(inside, b, self._factor(kept), rtol, _MOST)
        if not info.converged and not self._ranks.rank:
            warnings.warn(
                f"the residual of the weights' update is {info.residuals[-1]:.2g} after "
                f"{info.iterations} iterations, wanted {rtol:g}: raise damping, or lower rtol",
                AccuracyWarning,
                stacklevel=4,
            )
        return self._host(x)

    def _solved(
        self, inside: Array, b: Array, factor: Any, rtol: float, most: int
    ) -> tuple[Array, CGInfo]:
        """CG for the blocks of H in (N, k) or (N, 1) places, with whole vectors on every rank."""
        apply = getattr(factor, "precondition", factor.solve)

        def multiply(v: Array) -> Array:
            return inside * self._damped(inside * v)

        def precondition(r: Array) -> Array:
            return inside * apply(inside * r)

        return conjugate_gradients(multiply, b, precondition, rtol, most, self._device)

    def _factor(self, kept: HostArray) -> Any:
        """Of K~ + damping I, with a barrier on what is pruned."""
        key = kept.tobytes()
        if key != self._factored[0]:
            rows = self._damping_rows(kept)
            with closeness_unsaid():  # what it leaves out the exact products see
                self._factored[:] = key, self._matrix.factorize(rows, shift="auto")
        return self._factored[1]

    @cached_property
    def _factored(self) -> list[Any]:
        return [None, None]

    def _damping_rows(self, kept: HostArray) -> Any:
        if kept.all():
            return self.damping
        # Its square root of rounding and what it lets through are about balanced.
        size = max(self._matrix.report.frobenius_norm, self.damping)
        barrier = size / float(np.finfo(self._dtype).eps) ** 0.25
        return move(np.where(kept, self.damping, barrier).astype(self._dtype), self._device)

    def _damped(self, v: Array) -> Array:
        """H v."""
        return self._multiply(v) + self._dtype.type(self.damping) * v

    def _multiply(self, v: Array) -> Array:
        return on_all(self._ranks, self._op.reader.matmat)(v)

    def _column(self, v: HostArray) -> Array:
        return move(np.ascontiguousarray(v[:, None].astype(self._dtype)), self._device)

    def _host(self, x: Array) -> HostArray:
        return to_host(x)[:, 0].astype(np.float64)


def _with_defaults(op: Operator, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is taken where the user gives nothing.

    A score needs few digits, and the update has the exact matrix: low rank with the diagonal of
    what it leaves out is definite at every damping, whatever its error.
    """
    found = dict(options)
    found.setdefault("rtol", _COMPRESSION_RTOL)
    found.setdefault("max_rank", _MOST_RANK)
    if found["scheme"] == "lowrank" and op.has_diagonal:
        found.setdefault("tail", "diagonal")
    return found

"""Diagonal and trace of an inverse that is known by solves alone, with their standard errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.checks import check_count
from gpu_hodlr.devices import Array, check_memory, memory_errors, namespace, namespace_on, to_host
from gpu_hodlr.factor.inverse import InverseParts

_PROBES = 32
_COPIES = 11  # of the probes, while they are solved for by preconditioned CG


def signs(
    seed: tuple[int, ...], shape: tuple[int, int], dtype: np.dtype[Any], device: str
) -> Array:
    """(n, k) of 1 and -1, each with probability 1/2; drawn as `batched.normal_source` does."""
    normal = batched.normal_source(seed, device)(shape, dtype)
    one = normal.dtype.type(1)
    return namespace(normal).where(normal < 0, -one, one)


def trace_probes(
    n: int, count: int, seed: tuple[int, ...], dtype: np.dtype[Any], device: str
) -> Array:
    """Z (n, count) with E z z^T = I: random signs, or of n at least all sqrt(n) e_i, exactly so."""
    if count < n:
        return signs(seed, (n, count), dtype, device)
    return namespace_on(device).eye(n, dtype=dtype) * dtype.type(np.sqrt(n))


@dataclass(frozen=True)
class Control:
    """P near the inverse, with a diagonal that is known: what is estimated is that of the rest.

    Attributes:
        apply: v (rows, k) -> P v, of this rank's rows.
        diagonal: (rows,) of P.
    """

    apply: Callable[[Array], Array]
    diagonal: Array


@dataclass(frozen=True)
class _Estimate:
    """Means over the probes, and their standard errors."""

    diagonal: Array  # (rows,) float64, as the next
    errors: Array
    trace: float
    trace_error: float


class ProbedInverse(InverseParts):
    """The diagonal of the inverse by solves for random signs.

    With P near the inverse A^-1, and z random signs, diag(A^-1) = diag(P) + E z * (A^-1 z - P z),
    row by row (Bekas, Kokiopoulou, Saad, Appl. Numer. Math. 57 (2007), for P = 0). A row's variance
    is the sum of squares of what A^-1 - P has off the diagonal in it.
    """

    def _control(self) -> Control | None:
        """P; None for 0."""
        return None

    def inverse_diagonal(self, probes: int = _PROBES, seed: int = 0) -> Array:
        """The diagonal of (K + damping I)^-1, (N,), estimated; see `InverseParts`.

        `inverse_diagonal_error` is its standard error.

        Collective: all ranks call.

        Args:
            probes: vectors solved for; N of them or more give the diagonal as exactly as `solve`.
            seed: of their signs.

        Raises:
            ArgumentError, DtypeError: probes is not an integer >= 2, seed not one >= 0.
            MemoryEstimateError: the probes do not fit.
            NotPositiveDefiniteError: see `solve`.
        """
        found, owners = self._probed(probes, seed), self.owners
        self.inverse_diagonal_error = owners.whole(found.errors.astype(self.dtype))
        return owners.whole(found.diagonal.astype(self.dtype))

    def logdet_gradient(self, probes: int = _PROBES, seed: int = 0) -> float:
        """The trace of (K + damping I)^-1, estimated; see `InverseParts`.

        Collective: all ranks call.

        Args:
            probes: see `inverse_diagonal`, as the next.
            seed: of their signs: the same ones give the same error at another damping.

        Raises:
            ArgumentError, DtypeError: see `inverse_diagonal`, as the others.
        """
        found = self._probed(probes, seed)
        self.logdet_gradient_error = found.trace_error
        return found.trace

    def _probed(self, probes: int, seed: int) -> _Estimate:
        owners, n, what = self.owners, self.shape[0], "the inverse's diagonal"
        with memory_errors(what, "probes", self.device), owners.comm.phase(what):
            with owners.comm.agreed():
                owners.comm.same(probes=probes, seed=seed)
                count = min(check_count(probes, "probes", least=2), n)
                check_count(seed, "seed", least=0)
                check_memory(_COPIES * n * count * self.dtype.itemsize, what, "probes", self.device)
            drawn = (seed, streams.DIAGONAL)
            z = owners.take(trace_probes(n, count, drawn, self.dtype, self.device))
            return self._means(z, self._control())

    def _means(self, z: Array, control: Control | None) -> _Estimate:
        """Of z * (A^-1 z - P z), of this rank's rows of probes."""
        xp, owners, count = namespace(z), self.owners, z.shape[1]
        rest = self.solve(z)
        if control is not None:
            rest = rest - control.apply(z)
        products = z.astype(np.float64) * rest
        diagonal, errors = products.mean(axis=1), xp.zeros(len(z))
        traces = to_host(owners.sum(products.sum(axis=0)))
        trace, trace_error = float(traces.mean()), 0.0
        if count < self.shape[0]:  # else nothing is left to chance
            missed = products - diagonal[:, None]
            errors = xp.sqrt((missed * missed).sum(axis=1) / (count * (count - 1)))
            trace_error = float(traces.std(ddof=1)) / count**0.5
        if control is not None:
            known = control.diagonal.astype(np.float64)
            diagonal = diagonal + known
            trace += float(owners.whole(known).sum())
        return _Estimate(diagonal, errors, trace, trace_error)

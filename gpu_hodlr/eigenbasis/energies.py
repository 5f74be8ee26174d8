"""How much of a rotated matrix lies in entries below a threshold, estimated from sampled rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_hodlr import streams
from gpu_hodlr.batched.histogram import weighted_histogram
from gpu_hodlr.devices import Array, HostArray, HostIndex, namespace, to_host
from gpu_hodlr.distributed import ALONE, Communicator, shares
from gpu_hodlr.eigenbasis.rotated import Rotated

_ROWS = 400  # with 200 the error reached was up to 13 % off, with 400 up to 9 % (measured)
_TOGETHER = 16  # rows: whatever the ranks, the same sums
_UNIFORM = 0.3  # share of the rows drawn evenly; the others by the root of the diagonal
_BINS, _DECADES = 2048, 32.0  # of |K'_ij| below the largest entry there can be


@dataclass(frozen=True)
class Energies:
    """Histogram of the entries of K' off its diagonal, of the whole symmetric matrix.

    Attributes:
        edges: (bins,) the largest |K'_ij| of each bin, falling.
        counts: (bins,) entries.
        squares: (bins,) their squares, summed.
    """

    edges: HostArray
    counts: HostArray
    squares: HostArray

    def threshold(self, tolerance: float) -> float:
        """The largest tau for which the entries up to it weigh no more than tolerance^2."""
        below = np.cumsum(self.squares[::-1])[::-1]
        fits = np.nonzero(below <= tolerance**2)[0]
        return float(self.edges[fits[0]]) if fits.size else 0.0

    def above(self, tau: float) -> float:
        """How many pairs i > j have entries above tau."""
        return float(self.counts[self.edges > tau].sum()) / 2


def energies(matrix: Rotated, seed: int, comm: Communicator = ALONE.comm) -> Energies:
    """Of a few rows of K', drawn by the root of its diagonal and evenly, and weighted.

    The ranks share the rows. Where there are few, all are read.
    """
    s = np.sqrt(to_host(matrix.d).astype(np.float64))
    top = float(s.max(initial=0.0)) ** 2 or 1.0
    edges = top * 10.0 ** -(np.arange(_BINS) * (_DECADES / _BINS))
    total = np.zeros((2, _BINS))
    if matrix.size:
        rows, weights = _drawn(s, seed)
        count = len(rows)
        groups = range(0, count, _TOGETHER)
        own = shares(len(groups), comm.size)[comm.rank]
        found = [
            _histogram(matrix, rows[g : g + _TOGETHER], weights[g : g + _TOGETHER], edges)
            for g in groups[own]
        ]
        for part in comm.share(_read(found)):
            for one in part:  # in the order of the groups
                total += one
    return Energies(edges, total[0], total[1])


def _drawn(s: HostArray, seed: int) -> tuple[HostIndex, HostArray]:
    """Rows, and how many each stands for, s being the root of the diagonal."""
    if len(s) <= _ROWS:
        return np.arange(len(s)), np.ones(len(s))
    p = np.full(len(s), 1.0 / len(s))
    if s.any():
        p = _UNIFORM * p + (1 - _UNIFORM) * s / s.sum()
    rows = np.random.default_rng((seed, streams.ENERGIES)).choice(len(s), _ROWS, p=p)
    return rows, 1.0 / (_ROWS * p[rows])


def _read(found: list[Array]) -> list[HostArray]:
    """The histograms of all groups on the host, which waits for them once."""
    return list(to_host(namespace(found[0]).stack(found))) if found else []


def _histogram(matrix: Rotated, rows: HostIndex, weights: HostArray, edges: HostArray) -> Array:
    """(2, bins): entries of these rows and their squares by magnitude, each row weighted."""
    xp = namespace(matrix.d)
    values = abs(matrix.rows(rows).astype(np.float64))
    values[xp.arange(len(rows)), xp.asarray(rows)] = 0
    decades = -xp.log10(xp.maximum(values / edges[0], 10.0**-_DECADES))
    bins = xp.clip((decades * (_BINS / _DECADES)).astype(np.int64), 0, _BINS - 1)
    return weighted_histogram(bins, values, *map(xp.asarray, (edges, weights)))

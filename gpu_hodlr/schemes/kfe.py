"""Building the form that is sparse in the Kronecker-factored eigenbasis of a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr import batched, progress
from gpu_hodlr.compressed import KFEMatrix
from gpu_hodlr.devices import Array, HostArray, HostIndex, check_memory, namespace, to_hosts
from gpu_hodlr.distributed import OrderedSum
from gpu_hodlr.eigenbasis import Rotated, Strip
from gpu_hodlr.errors import MemoryEstimateError
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes.job import Job
from gpu_hodlr.schemes.prediction import BlockSampler
from gpu_hodlr.schemes.scheme import Scheme, Sizes
from gpu_hodlr.structures import RotatedSparse
from gpu_hodlr.structures.dealt_rows import cuts_by_work, gathered, number_of_parts

_SHORT = 1 << 16  # columns that 16 bits are enough for
_COPIES = 6  # of numbers that are compared: what is made of them takes as much
_BEHIND = np.iinfo(np.int32).max  # all rows
_Triple = tuple[Array, Array, Array]
_ROUNDING = 10  # times float32's, of the trace: what the tolerance must exceed for float32 panels


class EigenbasisBuild:
    """K' = Q^T K Q by its diagonal, a low-rank part, and every other entry above a threshold.

    Q is the Kronecker-factored eigenbasis of the layers, in which K' is nearly diagonal (George et
    al., NeurIPS 2018, keep the diagonal alone). The threshold is the largest whose dropped entries,
    by a histogram of sampled rows, weigh no more than the tolerance. |K'_ij| <= s_i s_j, s the
    roots of the diagonal, rules most entries out before they are computed. The low-rank part, of
    `max_rank` at most, is taken of the rank that stores least, by the histograms of what each
    rank leaves: see `RotatedRanks`.

    Attributes:
        neighbour_recall: None.
        num_samples: 0, no columns.
    """

    neighbour_recall = None
    num_samples = 0

    def __init__(self, job: Job) -> None:
        self._job = job

    def run(self, tolerance: float, first: bool) -> tuple[RotatedSparse, tuple[int, ...]]:
        """See `Build`."""
        job, owners = self._job, self._job.owners
        rest = job.rotated.least(tolerance)
        matrix, tau = rest.matrix, rest.energies.threshold(tolerance)
        expected = int(rest.energies.above(tau))
        check_memory(
            2 * expected * (job.operator.dtype.itemsize + 4), "the entries off the diagonal",
            "the accuracy: raise rtol; or use float32", job.operator.device,
        )  # fmt: skip
        with phase("entries"):
            work = np.cumsum(matrix.work(tau))
            parts = number_of_parts(expected, len(work))
            lengths, columns, values = self._entries(_panels(matrix, tolerance), tau, work, parts)
        progress.tick()
        xp, dtype = namespace(matrix.d), job.operator.dtype
        starts = xp.concatenate([xp.zeros(1, np.int64), xp.cumsum(lengths)])
        P, C = matrix.P, matrix.C
        if P is None or C is None:
            P, C = xp.zeros((matrix.size, 0), dtype), xp.zeros(0, dtype)
        structure = RotatedSparse(
            matrix.basis, matrix.d.astype(dtype), starts, columns, values,
            _rows(matrix, cuts_by_work(work, parts)), P, C, owners=owners,
        )  # fmt: skip
        return structure, ()

    def _entries(self, matrix: Rotated, tau: float, work: HostArray, parts: int) -> _Triple:
        """Lengths of this rank's rows, columns and values; of all rows where there is one part."""
        comm = self._job.owners.comm
        if parts > 1:
            cuts = cuts_by_work(work, parts)
            own = OrderedSum(comm, parts, matrix.size).own
            return self._collect(matrix, range(cuts[own.start], cuts[own.stop]), tau)
        cuts = cuts_by_work(work, comm.size)
        units = range(*cuts[comm.rank : comm.rank + 2])
        return gathered(comm, *self._collect(matrix, units, tau))

    def _collect(self, panels: Rotated, units: range, tau: float) -> _Triple:
        """The rows of some units: how many entries each has below the diagonal, and these."""
        like = panels.d[:0].astype(self._job.operator.dtype)
        index = np.uint16 if panels.size <= _SHORT else np.int32
        room = batched.columns_at_once(like, _COPIES * panels.dtype.itemsize)
        batch, found = _Batch(panels.row_of(units.start), room, tau, index, like), []
        for rows, strips in panels.block_rows(units, tau):
            batch.add(rows, strips)
            if batch.full:
                found.append(batch.sorted())
        found.append(batch.sorted())  # the rest
        counts = to_hosts(*(lengths.sum() for lengths, _, _ in found))
        return _joined([
            (lengths, columns[: int(count)], values[: int(count)])
            for (lengths, columns, values), count in zip(found, counts, strict=True)
        ])  # fmt: skip


def _panels(matrix: Rotated, tolerance: float) -> Rotated:
    """The matrix, in float32 where that cannot be seen: entries are off by eps s_i s_j, or less."""
    rounding = float(np.finfo(np.float32).eps) * float(matrix.d.sum())
    return matrix.astype(np.float32) if tolerance > _ROUNDING * rounding else matrix


class _Batch:
    """Entries below the diagonal that exceed tau, of the rows of consecutive units.

    Strips wait until there are as many as can be looked at together: a device is asked, and
    waited for, once for all of them; on the CPU each is looked at while it is in the cache.

    Args:
        start: the first row.
        room: numbers that are looked at together.
        tau: threshold.
        index: type of the columns.
        like: an array of the library, of the type of the values.
    """

    def __init__(self, start: int, room: int, tau: float, index: DTypeLike, like: Array) -> None:
        self._tau, self._index, self._like = tau, index, like
        self._room = room
        self._start = self._stop = start
        self._waiting: list[Strip] = []
        self._numbers = 0  # in these
        self._chosen: list[_Triple] = []
        self.full = False

    def add(self, rows: slice, strips: Iterator[Strip]) -> None:
        """Those of the next unit; the batch is full where another one may find no room."""
        taken = 0
        for strip in strips:
            self._waiting.append(strip)
            self._numbers += strip.entries.size
            taken += strip.entries.size
            if self._numbers >= self._room:
                self._choose()
        self._stop = rows.stop
        self.full = bool(self._chosen) or self._numbers + taken > self._room

    def sorted(self) -> _Triple:
        """How many every row has, columns and values, row by row; the next rows follow.

        Behind them may be others, which are not below the diagonal.
        """
        self._choose()
        like, xp = self._like, namespace(self._like)
        rows = xp.arange(self._start, self._stop + 1, dtype=np.int32)
        none = rows[:0], rows[:0].astype(self._index), like
        row, column, value = _joined(self._chosen or [none])
        order = xp.argsort(row, kind="stable")
        starts = xp.searchsorted(row[order], rows).astype(np.int64)
        self._start, self._chosen, self.full = self._stop, [], False
        return starts[1:] - starts[:-1], column[order], value[order].astype(like.dtype)

    def _choose(self) -> None:
        if self._waiting:
            self._chosen.append(_chosen(self._waiting, self._tau, self._index))
        self._waiting, self._numbers = [], 0


def _joined(parts: Sequence[_Triple]) -> _Triple:
    """One after the other."""
    concatenate = namespace(parts[0][0]).concatenate
    first, second, third = (concatenate(list(each)) for each in zip(*parts, strict=True))
    return first, second, third


def _chosen(strips: list[Strip], tau: float, index: DTypeLike) -> _Triple:
    """Rows, columns and values of the entries that exceed tau; behind all rows what is not below.

    That is little, and to leave it out here would be another wait.
    """
    xp, several = namespace(strips[0].entries), len(strips) > 1
    parts = [strip.entries.ravel() for strip in strips]
    entries = xp.concatenate(parts) if several else parts[0]
    place = xp.nonzero(abs(entries) > tau)[0]  # a device is waited for here alone
    ends = np.cumsum([part.size for part in parts])
    about = xp.asarray(np.stack([ends - [part.size for part in parts], *_about(strips)]))
    of = xp.searchsorted(xp.asarray(ends), place, side="right") if several else 0
    begin, row, column, stride, height, width = (about[i][of] for i in range(len(about)))
    line, j = _divided(place - begin, width)
    unit, i = _divided(line, height)
    row, column = row + i, column + unit * stride + j
    if any(strip.crosses for strip in strips):
        row = xp.where(column < row, row, _BEHIND)
    return row.astype(np.int32), column.astype(index), entries[place]


def _about(strips: list[Strip]) -> HostIndex:
    """(5, strips): first row and column, from unit to unit, rows and columns."""
    about = [(s.row, s.column, s.stride, *s.entries.shape[1:]) for s in strips]
    return np.array(about, np.int64).T


def _divided(numbers: Array, by: Array) -> tuple[Array, Array]:
    """Quotients and remainders."""
    quotient = numbers // by
    return quotient, numbers - quotient * by


def _rows(matrix: Rotated, units: list[int]) -> HostIndex:
    """The first rows of units."""
    return np.array([matrix.row_of(unit) for unit in units], np.int64)


def _predict(sampler: BlockSampler, tolerance: float) -> float | None:
    """Of what would be built; the low-rank part is formed for it where it may store less.

    None where the matrix in the eigenbasis does not fit.
    """
    job = sampler.job
    try:
        rest = job.rotated.least(tolerance)
    except MemoryEstimateError:
        return None
    basis = sum(a.size for a in rest.matrix.basis.arrays())
    return (rest.numbers(tolerance) + 1.5 * rest.matrix.size + basis) / job.tree.n**2


def _memory(sizes: Sizes) -> float:
    """The probe, and vectors in the basis; Q, K' and its entries are checked when known."""
    return 60.0


SCHEME = Scheme(
    "kfe", RotatedSparse, KFEMatrix, EigenbasisBuild, _predict, _memory,
    aim=0.95,  # of what is dropped, estimated from sampled rows
    accepted=1.0, promised=1.0,  # what is dropped is chosen number by number: no slack is needed
    whole=True, needs_eigenbasis=True,
)  # fmt: skip

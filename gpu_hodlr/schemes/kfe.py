"""Building the form that is sparse in the Kronecker-factored eigenbasis of a network."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr import progress
from gpu_hodlr.compressed import KFEMatrix
from gpu_hodlr.devices import Array, HostArray, HostIndex, check_memory, namespace
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

    def _entries(
        self, matrix: Rotated, tau: float, work: HostArray, parts: int
    ) -> tuple[Array, Array, Array]:
        """Lengths of this rank's rows, columns and values; of all rows where there is one part."""
        comm = self._job.owners.comm
        if parts > 1:
            cuts = cuts_by_work(work, parts)
            own = OrderedSum(comm, parts, matrix.size).own
            return self._collect(matrix, range(cuts[own.start], cuts[own.stop]), tau)
        cuts = cuts_by_work(work, comm.size)
        units = range(*cuts[comm.rank : comm.rank + 2])
        return gathered(comm, *self._collect(matrix, units, tau))

    def _collect(self, panels: Rotated, units: range, tau: float) -> tuple[Array, Array, Array]:
        """The rows of some units: how many entries each has below the diagonal, and these."""
        dtype, xp = self._job.operator.dtype, namespace(panels.d)
        index = np.uint16 if panels.size <= _SHORT else np.int32
        found = [
            _above(rows, strips, tau, dtype, index, panels.d)
            for rows, strips in panels.block_rows(units, tau)
        ]
        if not found:
            return xp.zeros(0, np.int64), xp.zeros(0, index), xp.zeros(0, dtype)
        lengths, columns, values = (
            xp.concatenate(list(parts)) for parts in zip(*found, strict=True)
        )
        return lengths, columns, values


def _panels(matrix: Rotated, tolerance: float) -> Rotated:
    """The matrix, in float32 where that cannot be seen: entries are off by eps s_i s_j, or less."""
    rounding = float(np.finfo(np.float32).eps) * float(matrix.d.sum())
    return matrix.astype(np.float32) if tolerance > _ROUNDING * rounding else matrix


def _above(
    rows: slice,
    strips: Iterator[Strip],
    tau: float,
    dtype: DTypeLike,
    index: DTypeLike,
    like: Array,
) -> tuple[Array, Array, Array]:
    """Of the rows of one unit: how many entries exceed tau, their columns and their values."""
    xp, count = namespace(like), rows.stop - rows.start
    pieces = [_kept(strip, tau, index) for strip in strips]
    if not pieces:
        return xp.zeros(count, np.int64), xp.zeros(0, index), xp.zeros(0, dtype)
    row, column, value = (xp.concatenate(list(parts)) for parts in zip(*pieces, strict=True))
    row -= rows.start
    order = xp.argsort(row, kind="stable")
    lengths = xp.bincount(row, minlength=count).astype(np.int64)
    return lengths, column[order], value[order].astype(dtype)


def _kept(strip: Strip, tau: float, index: DTypeLike) -> tuple[Array, Array, Array]:
    """Rows, columns and values of the entries below the diagonal that exceed tau."""
    xp, entries = namespace(strip.entries), strip.entries
    units, height, width = entries.shape
    chosen = abs(entries) > tau
    if strip.column + units * strip.stride > strip.row:  # the diagonal may lie in it
        first = strip.column - strip.row + strip.stride * xp.arange(units)
        chosen &= first[:, None, None] + xp.arange(width) < xp.arange(height)[:, None]
    unit, i, j = xp.nonzero(chosen)  # a device is waited for here alone
    row, column = strip.row + i, strip.column + unit * strip.stride + j
    return row.astype(np.int32), column.astype(index), entries[unit, i, j]


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

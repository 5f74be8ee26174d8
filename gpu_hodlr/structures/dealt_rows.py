"""A sparse matrix whose rows are dealt out to the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Self

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostArray, HostIndex, namespace, to_host
from gpu_hodlr.distributed import Communicator, OrderedSum
from gpu_hodlr.distributed.ownership import shares

A_PART = 1 << 20  # entries: fewer are not worth being dealt out to ranks
_MOST_PARTS = 64


@dataclass(frozen=True, repr=False)
class DealtRows:
    """S (M, M), its rows in parts that do not depend on the number of ranks.

    Every rank has consecutive parts; where there is one part every rank has it. Products are whole
    on every rank, of the same bits on any number of ranks.

    Attributes:
        starts: (rows + 1,) where each of this rank's rows starts in the next two.
        columns: (entries,) uint16 or int32.
        values: (entries,).
        cuts: (parts + 1,) the first row of every part, and M; a host array.
        comm: the ranks.
    """

    starts: Array
    columns: Array
    values: Array
    cuts: HostIndex
    comm: Communicator

    @classmethod
    def part_of(
        cls, lengths: Array, columns: Array, values: Array, cuts: HostIndex, comm: Communicator
    ) -> Self:
        """What this rank has of all rows, whose lengths and entries are given."""
        rows = own_rows(cuts, comm)
        xp = namespace(lengths)
        starts = xp.concatenate([xp.zeros(1, np.int64), xp.cumsum(lengths).astype(np.int64)])
        here = slice(int(starts[rows.start]), int(starts[rows.stop]))
        starts = starts[rows.start : rows.stop + 1] - here.start
        return cls(starts, columns[here], values[here], cuts, comm)

    @property
    def size(self) -> int:
        """M."""
        return int(self.cuts[-1])

    @property
    def whole(self) -> bool:
        """Whether every rank has all of S."""
        return len(self.cuts) == 2

    @property
    def rows(self) -> slice:
        """This rank's."""
        return own_rows(self.cuts, self.comm)

    def entries(self) -> int:
        """Of S, on all ranks."""
        own = int(self.values.size)
        return own if self.whole else int(sum(self.comm.share(own)))

    def matmul(self, c: Array) -> Array:
        """S c for c (M, k)."""
        if self.whole:
            return self._parts[0][1].matmul(c)
        first, counts = self.rows.start, [rows.stop - rows.start for rows in self._every_rows]
        own = namespace(c).empty((counts[self.comm.rank], c.shape[1]), c.dtype)
        for rows, part in self._parts:
            own[rows.start - first : rows.stop - first] = part.matmul(c)
        return self.comm.allgather(own, counts)

    def transposed_matmul(self, c: Array) -> Array:
        """S^T c for c (M, k)."""
        return self._summed((part.transposed_matmul(c[rows]) for rows, part in self._parts), c)

    def symmetric_matmul(self, c: Array) -> Array:
        """(S + S^T) c for c (M, k)."""

        def term(rows: slice, part: batched.SparseRows) -> Array:
            product = part.transposed_matmul(c[rows])
            product[rows] += part.matmul(c)
            return product

        return self._summed((term(*each) for each in self._parts), c)

    def gathered(self) -> tuple[Array, Array, Array]:
        """All of S on every rank: lengths of the rows, columns and values."""
        lengths = namespace(self.values).ascontiguousarray(self.starts[1:] - self.starts[:-1])
        if self.whole:
            return lengths, self.columns, self.values
        return gathered(self.comm, lengths, self.columns, self.values)

    def _summed(self, terms: Iterator[Array], like: Array) -> Array:
        return next(terms) if self.whole else self._sum(terms, like)

    @cached_property
    def _sum(self) -> OrderedSum:
        return OrderedSum(self.comm, len(self.cuts) - 1, self.size)

    @cached_property
    def _every_rows(self) -> list[slice]:
        """Of every rank."""
        parts = shares(len(self.cuts) - 1, self.comm.size)
        return [slice(int(self.cuts[p.start]), int(self.cuts[p.stop])) for p in parts]

    @cached_property
    def _parts(self) -> list[tuple[slice, batched.SparseRows]]:
        """Which rows, and these, of every part of this rank."""
        cuts, parts = self.cuts[_own(self.cuts, self.comm)].tolist(), []
        edges = to_host(self.starts)[np.array(cuts) - cuts[0]].tolist()
        for cut, here in zip(pairwise(cuts), pairwise(edges), strict=True):
            starts = self.starts[cut[0] - cuts[0] : cut[1] - cuts[0] + 1] - here[0]
            some = slice(*here)
            parts.append((slice(*cut), batched.sparse_rows(
                starts, self.columns[some], self.values[some], self.size
            )))  # fmt: skip
        return parts


def _own(cuts: HostIndex, comm: Communicator) -> slice:
    """Where the parts of this rank begin in `cuts`, and the last ends."""
    if len(cuts) == 2:
        return slice(0, 2)
    own = shares(len(cuts) - 1, comm.size)[comm.rank]
    return slice(own.start, own.stop + 1)


def check_rows(
    lengths: HostIndex, columns: HostIndex, values: HostArray, cuts: HostIndex, M: int
) -> None:
    """Refuse arrays of a file that are not the rows of a sparse matrix (M, M).

    Raises:
        ValueError: why.
    """
    if any(a.ndim != 1 or a.dtype.kind not in "iu" for a in (lengths, columns, cuts)):
        raise ValueError("the indices of the rows are no lists of integers")
    if len(cuts) < 2 or cuts[0] or cuts[-1] != M or (cuts[1:] < cuts[:-1]).any():
        raise ValueError("the parts of the rows are none")
    shortest, longest = lengths.min(initial=0), lengths.max(initial=0)
    if len(lengths) != M or shortest < 0 or longest > len(values) or lengths.sum() != len(values):
        raise ValueError(f"the rows' lengths do not fit {M} coordinates and the entries")
    if columns.shape != values.shape or columns.min(initial=0) < 0 or (columns >= M).any():
        raise ValueError("an entry of the rows is outside, or has no column")


def own_rows(cuts: HostIndex, comm: Communicator) -> slice:
    """The rows of this rank."""
    own = cuts[_own(cuts, comm)]
    return slice(int(own[0]), int(own[-1]))


def number_of_parts(entries: int, most: int) -> int:
    """Into how many parts rows with so many entries are cut, `most` at most."""
    return max(1, min(_MOST_PARTS, entries // A_PART, most))


def cuts_by_work(work: HostArray, parts: int) -> list[int]:
    """Where consecutive parts with about equal shares of the work begin, and the last ends.

    Args:
        work: of each thing and all before it.
        parts: how many.
    """
    if not len(work):
        return [0] * (parts + 1)
    edges = np.searchsorted(work, work[-1] * np.arange(1, parts) / parts, side="right")
    return [0, *edges.tolist(), len(work)]


def gathered(
    comm: Communicator, lengths: Array, columns: Array, values: Array
) -> tuple[Array, Array, Array]:
    """Sparse rows of all ranks, one rank's after the other's: their lengths, and the entries."""
    counts = comm.share((len(lengths), int(values.size)))
    rows, entries = ([c[i] for c in counts] for i in (0, 1))
    return (
        comm.allgather(lengths, rows),
        comm.allgather(columns, entries),
        comm.allgather(values, entries),
    )

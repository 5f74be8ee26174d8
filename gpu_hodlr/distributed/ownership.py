"""Which rank holds which nodes of the tree."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from gpu_hodlr.arrays import as_columns
from gpu_hodlr.devices import Array
from gpu_hodlr.distributed.base import Communicator
from gpu_hodlr.distributed.one_rank import OneRank
from gpu_hodlr.distributed.rows import Rows
from gpu_hodlr.errors import ArgumentError

_MOST_UNEVEN = 1.25  # nodes of the busiest rank over the mean


class Ownership:
    """A perfect binary tree spread over ranks.

    Rank p holds a run of consecutive nodes of level `cut` (root = 0) and all that is below them;
    what is above is repeated on every rank. A level below the cut is a stack of the rank's own
    nodes; where the level of the cut is left upwards, the ranks gather what they have of it, once.

    Args:
        comm: the ranks.
        leaves: (2^depth, m) of the whole tree, padded with -1; a host array.

    Attributes:
        comm: the ranks.
        leaves: of the whole tree.
        depth: levels below the root.
        cut: the level whose nodes are dealt out; 0 for one rank.
        n: N.

    Raises:
        ArgumentError: there are more ranks than leaves, or a rank has no rows.
    """

    def __init__(self, comm: Communicator, leaves: Any) -> None:
        self.comm, self.leaves = comm, leaves
        self.depth = (len(leaves) - 1).bit_length()
        self.cut = cut_level(self.depth, comm.size)
        self._offsets = np.arange(comm.size + 1) * (1 << self.cut) // comm.size
        if not self.alone and not all(map(len, self.rows.of)):
            raise ArgumentError(f"a rank of {comm.size} would have no rows of {self.n}")

    @cached_property
    def n(self) -> int:
        """N."""
        return int(np.count_nonzero(self.leaves >= 0))

    @property
    def alone(self) -> bool:
        """Whether there is one rank, which has it all."""
        return self.comm.size == 1

    # --- nodes ---------------------------------------------------------------------------------

    def counts(self, level: int) -> list[int]:
        """Nodes of every rank on a level from the cut down."""
        return [int(c) << (level - self.cut) for c in np.diff(self._offsets)]

    def mine(self, level: int, rank: int | None = None) -> slice:
        """The nodes of a level that this or another rank works on; above the cut all."""
        if level < self.cut:
            return slice(0, 1 << level)
        rank = self.comm.rank if rank is None else rank
        first, last = self._offsets[rank : rank + 2]
        return slice(int(first) << (level - self.cut), int(last) << (level - self.cut))

    def gather(self, x: Array, level: int) -> Array:
        """All nodes of the cut's level from the ranks' own, (nodes, ...); elsewhere x as it is."""
        if level != self.cut or self.alone:
            return x
        return self.comm.allgather(x, self.counts(level))

    def gather_all(self, x: Array, level: int) -> Array:
        """All nodes of any level from what this rank works on, (nodes, ...)."""
        if level < self.cut or self.alone:
            return x
        return self.comm.allgather(x, self.counts(level))

    def own(self, x: Array, level: int) -> Array:
        """This rank's nodes of all of the cut's level; elsewhere x as it is."""
        return x[self.mine(level)] if level == self.cut and not self.alone else x

    def sum(self, x: Array) -> Array:
        """The sum over the ranks."""
        return x if self.alone else self.comm.allreduce(x)

    def max(self, x: Array) -> Array:
        """The largest over the ranks, entry by entry."""
        if self.alone:
            return x
        return self.comm.allgather(x[None], [1] * self.comm.size).max(axis=0)

    # --- rows ----------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> Rows:
        """Which rows of vectors every rank has: those of its leaves, ascending."""
        if self.alone:
            return Rows(self.comm, [np.arange(self.n)])
        ends = [int(o) << (self.depth - self.cut) for o in self._offsets]
        blocks = [self.leaves[a:b] for a, b in pairwise(ends)]
        return Rows(self.comm, [np.sort(block[block >= 0]) for block in blocks])

    def columns(
        self, x: Any, n: int, dtype: np.dtype[Any], device: str, name: str
    ) -> tuple[Array, Callable[[Array], Any]]:
        """This rank's rows of a right-hand side (n, k), and the way back; see `Rows.columns`."""
        if self.alone:
            return as_columns(x, n, dtype, device, name)
        return self.rows.columns(x, dtype, device, name)

    def whole(self, x: Array) -> Array:
        """(N, ...) on every rank from the ranks' rows of it."""
        return x if self.alone else self.rows.whole(x)

    def row_counts(self, here: int) -> list[int]:
        """Rows of every rank, `here` those of this one."""
        return [here] if self.alone else [len(rows) for rows in self.rows.of]

    def local(self, leaves: Any) -> Any:
        """Leaves of this rank with places in its rows for indices."""
        if self.alone:
            return leaves
        return np.where(leaves >= 0, np.searchsorted(self.rows.mine, leaves), -1)


def shares(total: int, ranks: int) -> list[slice]:
    """Consecutive parts of `total` things for every rank, that differ by one at most."""
    edges = [p * total // ranks for p in range(ranks + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def cut_level(depth: int, ranks: int) -> int:
    """The highest level that gives every rank a node and no rank much more than its share.

    Raises:
        ArgumentError: there are more ranks than leaves.
    """
    if ranks > 1 << depth:
        raise ArgumentError(
            f"a tree of {1 << depth} leaves cannot be spread over {ranks} ranks; lower leaf_size"
        )
    least = (ranks - 1).bit_length()
    for level in range(least, depth):
        nodes = 1 << level
        if -(-nodes // ranks) * ranks <= _MOST_UNEVEN * nodes:
            return level
    return depth


ALONE = Ownership(OneRank(), np.empty((1, 0), np.int64))

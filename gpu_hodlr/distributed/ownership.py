"""Which rank holds which nodes of the tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from gpu_hodlr.arrays import as_columns
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed.deal import Deal
from gpu_hodlr.distributed.messages import Communicator
from gpu_hodlr.distributed.one_rank import OneRank
from gpu_hodlr.distributed.rows import Rows
from gpu_hodlr.distributed.transfers import Transfers, each_rank
from gpu_hodlr.errors import ArgumentError


class Ownership:
    """A perfect binary tree spread over ranks.

    Nodes are dealt out as `Deal` says. From the cut upwards a rank lacks at most two siblings of
    the nodes it works on; `complete` brings them.

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
        self._deal = Deal(self.depth, comm.size)
        self.cut = self._deal.cut
        self._siblings: dict[int, Transfers] = {}
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

    @property
    def capturable(self) -> bool:
        """Whether work can be captured into a CUDA graph: messages cannot."""
        return self.alone

    @property
    def repeated_levels(self) -> range:
        """The levels, from the root down, whose nodes several ranks work on."""
        return range(self.cut)

    def respread(self, leaves: HostIndex) -> Ownership:
        """The same of a tree with the same nodes and other leaves, those of all ranks."""
        return self if self.alone else Ownership(self.comm, leaves)

    def part(self, held: Callable[[], Any]) -> Any:
        """What a rank holds of the rows of all; None, for all of them, where there is one rank."""
        return None if self.alone else held()

    @property
    def said(self) -> str:
        """For a repr: which rank this is; nothing where there is one."""
        return "" if self.alone else f", rank {self.comm.rank} of {self.comm.size}"

    # --- nodes ---------------------------------------------------------------------------------

    def mine(self, level: int, rank: int | None = None) -> slice:
        """The nodes of a level that this or another rank works on; see `Deal`."""
        return self._deal.mine(level, self.comm.rank if rank is None else rank)

    def family(self, level: int) -> slice:
        """`mine` and the siblings of these, of a level >= 1."""
        return self._deal.family(level, self.comm.rank)

    def counted(self, level: int, rank: int | None = None) -> slice:
        """Of `mine`, those that no rank before works on; see `Deal`."""
        return self._deal.counted(level, self.comm.rank if rank is None else rank)

    def holders(self, level: int, nodes: HostIndex) -> tuple[Any, Any]:
        """The first rank that works on each of the nodes, and the last one + 1."""
        return self._deal.holders(level, nodes)

    def complete(self, level: int, *arrays: Array) -> list[Array]:
        """`family` of arrays of which every rank has `mine`, (nodes, ...), of a level >= 1.

        Below the cut, and so of one rank, that is the same; from it upwards siblings come, of all
        arrays in one message.
        """
        if level > self.cut:
            return list(arrays)
        if level not in self._siblings:
            nodes = np.arange(1 << level)
            transfers = self.transfers(level, nodes, *self.holders(level - 1, nodes >> 1))
            transfers.arrange(nodes[self.mine(level)], nodes[self.family(level)])
            self._siblings[level] = transfers
        return self._siblings[level].extend(*arrays)

    def has_siblings(self, level: int) -> bool:
        """Whether siblings of a level are on the same rank, all of them."""
        return level > self.cut

    def own(self, x: Array, level: int) -> Array:
        """`mine` of an array that has `family`, a view, of a level >= 1."""
        if level > self.cut:
            return x
        mine, first = self.mine(level), self.family(level).start
        return x[mine.start - first : mine.stop - first]

    def of_family(self, x: Array, level: int) -> Array:
        """`family` of an array that has it first, and more nodes perhaps, a view."""
        family = self.family(level)
        return x[: family.stop - family.start]

    def once(self, x: Array, level: int) -> Array:
        """`counted` of an array that has `mine`, a view."""
        first = self.mine(level).start
        counted = self.counted(level)
        return x[counted.start - first : counted.stop - first]

    def transfers(
        self, level: int, needed: HostIndex, first: HostIndex, last: HostIndex
    ) -> Transfers:
        """How nodes come to the ranks that need them and do not work on them.

        Args:
            level: of the nodes.
            needed: (t,) nodes.
            first: (t,) the first rank that needs each.
            last: (t,) the last one + 1.
        """
        each, needer = each_rank(first, last)
        holder, end = (ranks[each] for ranks in self.holders(level, needed))
        lacks = (needer < holder) | (needer >= end)
        provider = holder + needer % (end - holder)  # those that have a node take turns
        start = self.mine(level).start
        return Transfers(
            self.comm, needer[lacks], needed[each][lacks], provider[lacks], lambda t: t - start
        )

    def gather(self, x: Array, level: int) -> Array:
        """All nodes of a level, (2^level, ...), from every rank's `mine`."""
        if self.alone:
            return x
        counted = [self.counted(level, rank) for rank in range(self.comm.size)]
        once = namespace(x).ascontiguousarray(self.once(x, level))
        return self.comm.allgather(once, [nodes.stop - nodes.start for nodes in counted])

    def sum_of_nodes(self, x: Any, level: int) -> Any:
        """The sum over all nodes of a level, of which x (nodes, ...) has `mine`; host arrays.

        Siblings are added first, then their parents: the same bits on any number of ranks.
        """
        while level > self.cut:
            x, level = x[0::2] + x[1::2], level - 1
        x = self.gather(x, level)
        while len(x) > 1:
            x = x[0::2] + x[1::2]
        return x[0]

    def sum(self, x: Array) -> Array:
        """The sum over the ranks."""
        return x if self.alone else self.comm.allreduce(x)

    def sum_shared(self, x: Array, level: int) -> Array:
        """`mine` of a level from x (nodes, ...) of it, summed over the ranks that work on each."""
        if level >= self.cut:
            return x
        every = namespace(x).zeros((1 << level, *x.shape[1:]), x.dtype)
        every[self.mine(level)] = x
        return self.sum(every)[self.mine(level)]

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
        blocks = [self.leaves[self.mine(self.depth, p)] for p in range(self.comm.size)]
        return Rows(self.comm, [np.sort(block[block >= 0]) for block in blocks])

    def right_hand_side(
        self,
        x: Any,
        n: int,
        dtype: np.dtype[Any],
        device: str,
        name: str,
        sides: Callable[[], tuple[Rows, Rows]] | None = None,
    ) -> tuple[Array, Callable[[Array], Any]]:
        """This rank's rows of a right-hand side (n, k), and the way back; see `Rows`.

        Args:
            x: the right-hand side.
            n: its rows.
            dtype: see `Rows.right_hand_side`, as the next two.
            device: of the matrix.
            name: what error messages call x.
            sides: gives which rows every rank has of x and of the result; these by default.
        """
        if self.alone:
            return as_columns(x, n, dtype, device, name)
        given, result = (self.rows, self.rows) if sides is None else sides()
        return given.right_hand_side(x, dtype, device, name, result)

    def take(self, x: Array) -> Array:
        """This rank's rows of x (N, ...)."""
        return x if self.alone else self.rows.take(x)

    def num_rows(self, n: int) -> int:
        """How many of N rows this rank has."""
        return n if self.alone else len(self.rows.mine)

    def total(self, num_rows: int) -> int:
        """N, of which this rank has so many rows."""
        return num_rows if self.alone else self.n

    def places(self, index: Any) -> Any:
        """Where indices stand among this rank's rows, -1 for those of others; host arrays."""
        if self.alone:
            return index
        mine = self.rows.mine
        place = np.minimum(np.searchsorted(mine, index), len(mine) - 1)
        return np.where(mine[place] == index, place, -1)

    def whole(self, x: Array) -> Array:
        """(N, ...) on every rank from the ranks' rows of it."""
        return x if self.alone else self.rows.whole(x)

    def to_columns(self, x: Array, part: slice) -> Array:
        """All rows of a slice of the columns, from the ranks' rows of x; one rank wants them all.

        See `Rows.to_columns`.
        """
        return x if self.alone else self.rows.to_columns(x, part)

    def from_columns(
        self, arrays: Sequence[Array], columns: Sequence[int], into: Sequence[Array]
    ) -> None:
        """This rank's rows of arrays of which every rank has some columns; see `Rows`."""
        if not self.alone:
            self.rows.from_columns(arrays, columns, into)
            return
        for x, to in zip(arrays, into, strict=True):
            to[:] = x

    def num_leaves(self, own: int) -> int:
        """Leaves of the tree, of which this rank has so many."""
        return own if self.alone else len(self.leaves)

    def by_rows(self, x: Array, columns: Sequence[int]) -> Array:
        """This rank's rows, all columns, of x, of which every rank has some columns (N, ...)."""
        if self.alone:
            return x
        y = namespace(x).empty((len(self.rows.mine), sum(columns)), x.dtype)
        self.rows.from_columns((x,), columns, (y,))
        return y

    def all_leaves(self, leaves: Array) -> Any:
        """Those of the whole tree in the user's indices, of which this rank has `leaves`."""
        return to_host(leaves) if self.alone else self.leaves

    def between_ranks(self, first: int, beside: Array, sizes: HostIndex) -> Array:
        """Of pairs of positions in tree order those in two nodes of the level that is dealt out.

        Args:
            first: the first of this rank's positions.
            beside: (rows, q) those that each of this rank's is paired with, -1 for none.
            sizes: (leaves,) rows of every leaf.

        Returns:
            (pairs, 2) those of all ranks.
        """
        xp = namespace(beside)
        if self.alone:  # one node: nothing need be looked at
            return xp.empty((0, 2), np.int64)
        ends = xp.asarray(np.concatenate([[0], np.cumsum(sizes)])[:: len(sizes) >> self.cut])
        itself = xp.arange(first, first + len(beside))[:, None]
        node, other = (xp.searchsorted(ends, x, side="right") for x in (itself, beside))
        row, slot = xp.nonzero((beside >= 0) & (node != other))
        crossing = xp.stack([row + first, beside[row, slot]], axis=1)
        return self.comm.allgather(crossing, self.comm.share(len(crossing)))

    def local(self, leaves: Any) -> Any:
        """Leaves of this rank with places in its rows for indices."""
        if self.alone:
            return leaves
        return np.where(leaves >= 0, np.searchsorted(self.rows.mine, leaves), -1)


def shares(total: int, ranks: int) -> list[slice]:
    """Consecutive parts of `total` things for every rank, that differ by one at most."""
    edges = [p * total // ranks for p in range(ranks + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


ALONE = Ownership(OneRank(), np.empty((1, 0), np.int64))

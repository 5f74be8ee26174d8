"""Which of P ranks works on which nodes of a tree: arithmetic alone, nothing is sent."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr.devices import HostIndex
from gpu_hodlr.errors import ArgumentError

_MOST_UNEVEN = 1.25  # nodes of the busiest rank over the mean


class Deal:
    """The nodes of a perfect binary tree, dealt out to ranks.

    Rank p has a run of consecutive nodes of level `cut` (root = 0) and all that is below them. It
    works on these, and on every node above that has one of them below it: its ways to the root. A
    node above the cut is worked on by all ranks below it, with the same numbers.

    Args:
        depth: levels below the root.
        ranks: P.

    Attributes:
        ranks: P.
        cut: the highest level that gives every rank a node, and none much more than its share; 0
            for one rank.

    Raises:
        ArgumentError: there are more ranks than leaves.
    """

    def __init__(self, depth: int, ranks: int) -> None:
        if ranks > 1 << depth:
            raise ArgumentError(
                f"a tree of {1 << depth} leaves cannot be spread over {ranks} ranks; "
                "lower leaf_size"
            )
        self.ranks, self.cut = ranks, depth
        for level in range((ranks - 1).bit_length(), depth):
            nodes = 1 << level
            if -(-nodes // ranks) * ranks <= _MOST_UNEVEN * nodes:
                self.cut = level
                break
        self._offsets = [rank * (1 << self.cut) // ranks for rank in range(ranks + 1)]

    def mine(self, level: int, rank: int) -> slice:
        """The nodes of a level that a rank works on."""
        first, last = self._offsets[rank : rank + 2]
        if level >= self.cut:
            return slice(first << (level - self.cut), last << (level - self.cut))
        up = self.cut - level
        return slice(first >> up, ((last - 1) >> up) + 1)

    def family(self, level: int, rank: int) -> slice:
        """`mine` and the siblings of these, of a level >= 1: the children of those above."""
        if level > self.cut:
            return self.mine(level, rank)
        parents = self.mine(level - 1, rank)
        return slice(2 * parents.start, 2 * parents.stop)

    def counted(self, level: int, rank: int) -> slice:
        """Of `mine`, those that no rank before works on: of all ranks together, each node once."""
        nodes = self.mine(level, rank)
        if level >= self.cut:
            return nodes
        first = -(-self._offsets[rank] >> (self.cut - level))
        return slice(min(first, nodes.stop), nodes.stop)

    def holders(self, level: int, nodes: HostIndex) -> tuple[Any, Any]:
        """The first rank that works on each of the nodes, and the last one + 1."""
        up = self.cut - level
        first, last = (nodes << up, ((nodes + 1) << up) - 1) if up > 0 else (nodes >> -up,) * 2
        owner, end = (np.searchsorted(self._offsets, t, side="right") for t in (first, last))
        return owner - 1, end

    def lacking(self, level: int) -> int:
        """Siblings of a level >= 1 that all ranks together get from others."""
        return sum(
            _count(self.family(level, rank)) - _count(self.mine(level, rank))
            for rank in range(self.ranks)
        )


def _count(nodes: slice) -> int:
    return int(nodes.stop - nodes.start)

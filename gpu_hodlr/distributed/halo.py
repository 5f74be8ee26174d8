"""Pairs of nodes across ranks: who keeps which, and what the partners' owners send."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed.ownership import Ownership


class Halo:
    """The pairs of a level's nodes that concern this rank: one of the two is its own.

    A pair of nodes of two ranks is kept by both. From the cut up every rank works on all nodes,
    and all pairs concern it.

    Args:
        owners: which rank has what.
        pairs: (p, 2) nodes of the level, of all ranks; a host array.
        level: of the nodes.

    Attributes:
        every_pair: the pairs of all ranks.
    """

    def __init__(self, owners: Ownership, pairs: Any, level: int) -> None:
        self._owners, self.every_pair = owners, pairs
        self._trivial = owners.alone or level <= owners.cut
        self._level = level

    @cached_property
    def chosen(self) -> Any:
        """(q,) which of the pairs concern this rank; a host array."""
        if self._trivial:
            return np.arange(len(self.every_pair))
        return np.nonzero(self._of(self._owners.comm.rank).any(axis=1))[0]

    @cached_property
    def pairs(self) -> Any:
        """(q, 2) those pairs, as places in what `extend` gives; a host array."""
        chosen = self.every_pair[self.chosen]
        if self._trivial:
            return chosen
        mine = self._owners.mine(self._level)
        own = (chosen >= mine.start) & (chosen < mine.stop)
        beyond = mine.stop - mine.start + np.searchsorted(self._partners, chosen)
        return np.where(own, chosen - mine.start, beyond)

    def extend(self, x: Array) -> Array:
        """This rank's nodes (nodes, ...), and after them their partners on other ranks."""
        if self._trivial:
            return x
        xp, comm = namespace(x), self._owners.comm
        parts = [xp.ascontiguousarray(x[xp.asarray(nodes)]) for nodes in self._sent]
        return xp.concatenate([x, *comm.exchange(parts, self._counts)])

    def _of(self, rank: int) -> Any:
        """(p, 2) which sides of the pairs are a rank's."""
        nodes = self._owners.mine(self._level, rank)
        return (self.every_pair >= nodes.start) & (self.every_pair < nodes.stop)

    @cached_property
    def _partners(self) -> Any:
        """The nodes of other ranks that are paired with this one's, ascending."""
        chosen = self.every_pair[self.chosen]
        return np.unique(chosen[~self._of(self._owners.comm.rank)[self.chosen]])

    @cached_property
    def _counts(self) -> list[int]:
        """How many partners every rank has."""
        edges = [self._owners.mine(self._level, p) for p in range(self._owners.comm.size)]
        return [
            int(np.searchsorted(self._partners, e.stop) - np.searchsorted(self._partners, e.start))
            for e in edges
        ]

    @cached_property
    def _sent(self) -> list[Any]:
        """For every rank this rank's nodes that it needs, ascending, as places in its stack."""
        here, first = self._owners.comm.rank, self._owners.mine(self._level).start
        mine, sent = self._of(here), []
        for rank in range(self._owners.comm.size):
            beside = mine & self._of(rank)[:, ::-1]  # my side of the pairs with that rank
            needed = self.every_pair[beside] if rank != here else np.empty(0, np.int64)
            sent.append(np.unique(needed) - first)
        return sent

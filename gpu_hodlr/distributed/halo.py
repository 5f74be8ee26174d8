"""Pairs of nodes across ranks: who keeps which, and what the partners' owners send."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from gpu_hodlr.devices import Array, HostArray, HostIndex
from gpu_hodlr.distributed.ownership import Ownership
from gpu_hodlr.distributed.transfers import Transfers, joined


class Halo:
    """The pairs of a level's nodes that concern this rank: one of the two is of its base.

    The base are the nodes it works on, with their siblings or without. A pair between the bases of
    several ranks is kept by all of them.

    Args:
        owners: which rank has what.
        pairs: (p, 2) nodes of the level, of all ranks; a host array.
        level: of the nodes, at least 1 if there are pairs.
        siblings: whether the base is `Ownership.family`, else it is `Ownership.mine`.

    Attributes:
        every_pair: the pairs of all ranks.
        base: the base, a slice of the level's nodes.
    """

    def __init__(
        self, owners: Ownership, pairs: HostIndex, level: int, siblings: bool = True
    ) -> None:
        self._owners, self.every_pair, self._level = owners, pairs, level
        self._siblings = siblings and 0 < level <= owners.cut
        self.base = owners.family(level) if self._siblings else owners.mine(level)

    @property
    def count(self) -> int:
        """Nodes of the base."""
        return int(self.base.stop - self.base.start)

    @cached_property
    def chosen(self) -> HostIndex:
        """(q,) which of the pairs concern this rank; a host array."""
        return np.nonzero(self._in_base(self.every_pair).any(axis=1))[0]

    @cached_property
    def pairs(self) -> HostIndex:
        """(q, 2) those pairs, as places in what `extend` gives; a host array."""
        chosen = self.every_pair[self.chosen]
        beyond = self.count + np.searchsorted(self._partners, chosen)
        return np.where(self._in_base(chosen), chosen - self.base.start, beyond)

    def extend(self, *arrays: Array) -> list[Array]:
        """Of arrays of the nodes this rank works on, (nodes, ...): the base, then its partners.

        All arrays come as one message.
        """
        if self._owners.alone:
            return list(arrays)
        return self._transfers.extend(*arrays)

    def _in_base(self, nodes: HostIndex) -> HostArray:
        return (nodes >= self.base.start) & (nodes < self.base.stop)

    @cached_property
    def _partners(self) -> HostIndex:
        """The nodes that are paired with the base's and not of it, ascending."""
        chosen = self.every_pair[self.chosen]
        return np.unique(chosen[~self._in_base(chosen)])

    @cached_property
    def _transfers(self) -> Transfers:
        """What brings siblings and partners."""
        owners, level = self._owners, self._level
        needing, needed = np.concatenate([self.every_pair, self.every_pair[:, ::-1]]).T
        if self._siblings:
            every = np.arange(1 << level)
            needing, needed = (np.concatenate([nodes, every]) for nodes in (needing, needed))
            ranks = owners.holders(level - 1, needing >> 1)
        else:
            ranks = owners.holders(level, needing)
        transfers = owners.transfers(level, needed, *ranks)
        mine = np.arange(*owners.mine(level).indices(1 << level))
        base = np.arange(self.base.start, self.base.stop)
        transfers.arrange(mine, joined(base, self._partners))
        return transfers

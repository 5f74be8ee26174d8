"""How a structure is taken apart into named host arrays, and put together with every array checked.

A structure says which of its arrays are stacks over the nodes of the tree (`Stack`): of these a
rank saves those of its own nodes, and reads what it works on (`Part`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_hodlr.arrays import FLOATS
from gpu_hodlr.devices import HostArray, HostIndex
from gpu_hodlr.distributed import Halo, Ownership

Ranks = list[tuple[int, ...]]


class Source(Protocol):
    """Where arrays are read from by name."""

    def __contains__(self, name: str) -> bool:
        """Whether there is such an array."""

    def length(self, name: str) -> int:
        """Rows of an array."""

    def read(self, name: str, rows: slice | HostIndex | None = None) -> HostArray:
        """An array, or the rows (a slice, or ascending indices) of its first axis."""


@dataclass(frozen=True)
class Stack:
    """What the first axis of an array goes over: the nodes of a level, or pairs of them.

    Attributes:
        level: of the nodes.
        each: rows of a node.
        pairs: (p, 2) nodes of the level, sorted, the smaller first; None for the nodes themselves.
        siblings: see `Halo`, of pairs.
    """

    level: int
    each: int = 1
    pairs: HostIndex | None = None
    siblings: bool = True

    def held(self, owners: Ownership) -> slice | HostIndex:
        """The rows that a rank has: of the nodes it works on, or of the pairs in its `Halo`."""
        if self.pairs is not None:
            return Halo(owners, self.pairs, self.level, self.siblings).chosen
        nodes = owners.mine(self.level)
        return slice(nodes.start * self.each, nodes.stop * self.each)

    def saved(self, owners: Ownership) -> slice | NDArray[np.bool_]:
        """Of the rows that a rank has, those that it saves; a pair is saved where its first is."""
        counted = owners.counted(self.level)
        if self.pairs is None:
            first = owners.mine(self.level).start
            return slice((counted.start - first) * self.each, (counted.stop - first) * self.each)
        nodes = self.pairs[self.held(owners), 0]
        return (nodes >= counted.start) & (nodes < counted.stop)

    def count(self, owners: Ownership) -> int:
        """Rows that a rank has."""
        every = self.each << self.level if self.pairs is None else len(self.pairs)
        return len(np.arange(every)[self.held(owners)])


class Part:
    """What a rank gets of saved arrays.

    Args:
        source: of all arrays.
        stacks: see `Structure.stacks`.
        leaves: of the whole tree; None where nothing needs them.
        owners: who gets what.
    """

    def __init__(
        self,
        source: Source,
        stacks: Mapping[str, Stack],
        leaves: HostIndex | None,
        owners: Ownership,
    ) -> None:
        self._source, self.stacks, self._leaves, self.owners = source, stacks, leaves, owners
        self.depth = 0 if leaves is None else len(leaves).bit_length() - 1

    @property
    def leaves(self) -> HostIndex:
        """Of the whole tree."""
        assert self._leaves is not None
        return self._leaves

    def __getitem__(self, name: str) -> HostArray:
        stack = self.stacks.get(name)
        if stack is None or self.owners.alone:
            return self._source.read(name)
        return self._source.read(name, stack.held(self.owners))

    def has(self, name: str) -> bool:
        """Whether there is such an array."""
        return name in self._source

    def get(self, name: str) -> HostArray | None:
        """None where there is no such array."""
        return self[name] if self.has(name) else None

    def own_rows(self, name: str) -> HostArray:
        """This rank's rows, ascending, of an array whose rows are those of vectors.

        Raises:
            ValueError: what the file says of their order is no order.
        """
        source, owners = self._source, self.owners
        order = source.read("rows") if "rows" in source else np.arange(source.length(name))
        if not np.array_equal(np.sort(order), np.arange(source.length(name))):
            raise ValueError(f"the rows of {name} are not in an order")
        wanted = np.arange(len(order)) if owners.alone else owners.rows.mine
        place = np.nonzero(np.isin(order, wanted))[0]
        return source.read(name, place)[np.argsort(order[place])]

    def count(self, name: str) -> int:
        """Rows that a stack has here."""
        return self.stacks[name].count(self.owners)

    def own_leaves(self) -> HostIndex:
        """The leaves of a structure of this rank."""
        return self.owners.local(self.leaves[self.owners.mine(self.depth)])


def check_leaves(leaves: HostIndex) -> None:
    """Refuse leaves that are not those of a tree.

    Raises:
        ValueError: they are not.
    """
    nodes, _ = leaves.shape
    if nodes & (nodes - 1):
        raise ValueError(f"{nodes} leaves are not those of a binary tree")
    real = np.sort(leaves[leaves >= 0])
    if not np.array_equal(real, np.arange(real.size)) or leaves.min() < -1:
        raise ValueError("the leaves are not a permutation")


def diagonal_blocks(part: Part) -> HostArray:
    """D.

    Raises:
        ValueError: they do not fit the leaves.
    """
    D, m = part["D"], part.leaves.shape[1]
    if D.shape != (part.count("D"), m, m) or D.dtype not in FLOATS:
        raise ValueError(f"the diagonal blocks have shape {D.shape} and type {D.dtype}")
    return D

"""How what is stored is taken apart into named host arrays, and put together, each one checked.

A structure or a factor (`Stored`) says which of its arrays are stacks over the nodes of the tree
(`Stack`): of these a rank saves those of its own nodes, and reads what it works on (`Part`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gpu_hodlr.arrays import FLOATS
from gpu_hodlr.batched.stored import FLOAT32, all_finite, kind_of
from gpu_hodlr.devices import Array, HostArray, HostIndex, move, to_host
from gpu_hodlr.distributed import Halo, Ownership

Ranks = list[tuple[int, ...]]


class Source(Protocol):
    """Where arrays are read from by name."""

    def __contains__(self, name: str) -> bool:
        """Whether there is such an array."""

    def length(self, name: str) -> int:
        """Rows of an array."""

    def read(self, name: str, rows: slice | HostIndex | None = None) -> HostArray:
        """An array, or the rows (a slice, or ascending indices) of its first axis; finite."""


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
        stacks: see `Stored.stacks`.
        leaves: of the whole tree.
        owners: who gets what.
        about: see `Stored.about`.
        device: where arrays are wanted that have been checked, see `placed`.
    """

    def __init__(
        self,
        source: Source,
        stacks: Mapping[str, Stack],
        leaves: HostIndex | None,
        owners: Ownership,
        about: Mapping[str, Any],
        device: str = "cpu",
    ) -> None:
        self._source, self.stacks, self._leaves, self.owners = source, stacks, leaves, owners
        self.about, self.device = about, device
        self.depth = 0 if leaves is None else len(leaves).bit_length() - 1

    @property
    def leaves(self) -> HostIndex:
        """Of the whole tree."""
        assert self._leaves is not None
        return self._leaves

    def __getitem__(self, name: str) -> HostArray:
        stack = self.stacks.get(name)
        rows = None if stack is None else self.owners.part(lambda: stack.held(self.owners))
        return self._source.read(name, rows)

    def has(self, name: str) -> bool:
        """Whether there is such an array."""
        return name in self._source

    def get(self, name: str) -> HostArray | None:
        """None where there is no such array."""
        return self[name] if self.has(name) else None

    def whole(self, name: str) -> Any:
        """All of a stack, of all ranks."""
        return self._source.read(name)

    def within(self, prefix: str, about: Mapping[str, Any]) -> Part:
        """What was packed under a prefix, on the same tree; the order within a leaf may differ.

        Raises:
            KeyError, ValueError: it is on another tree.
        """
        stacks = {
            name.removeprefix(prefix): stack
            for name, stack in self.stacks.items()
            if name.startswith(prefix)
        }
        source, owners = _Prefixed(self._source, prefix), self.owners
        if not stacks and "leaves" not in source:  # what goes by rows has no tree
            return Part(source, stacks, self._leaves, owners, about, self.device)
        leaves = source.read("leaves")
        if not np.array_equal(np.sort(leaves, axis=1), np.sort(self.leaves, axis=1)):
            raise ValueError(f"the leaves of {prefix} are those of another tree")
        return Part(source, stacks, leaves, owners.respread(leaves), about, self.device)

    def placed(self, x: Array) -> Array:
        """An array where it is wanted."""
        return move(x, self.device)

    def own_rows(self, name: str) -> HostArray:
        """This rank's rows, ascending, of an array whose rows are those of vectors.

        Raises:
            ValueError: what the file says of their order is no order.
        """
        source, owners = self._source, self.owners
        order = source.read("rows") if "rows" in source else np.arange(source.length(name))
        if not np.array_equal(np.sort(order), np.arange(source.length(name))):
            raise ValueError(f"the rows of {name} are not in an order")
        wanted = owners.take(np.arange(len(order)))
        place = np.nonzero(np.isin(order, to_host(wanted)))[0]
        return source.read(name, place)[np.argsort(order[place])]

    def count(self, name: str) -> int:
        """Rows that a stack has here."""
        return self.stacks[name].count(self.owners)

    def own_leaves(self) -> HostIndex:
        """The leaves of a structure of this rank."""
        return self.owners.local(self.leaves[self.owners.mine(self.depth)])


class _Prefixed:
    """A source whose names have a prefix in another, but for the order of all vectors' rows."""

    def __init__(self, source: Source, prefix: str) -> None:
        self._source, self._prefix = source, prefix

    def __contains__(self, name: str) -> bool:
        return self._there(name) in self._source

    def length(self, name: str) -> int:
        """See `Source`."""
        return self._source.length(self._there(name))

    def read(self, name: str, rows: slice | HostIndex | None = None) -> HostArray:
        """See `Source`."""
        return self._source.read(self._there(name), rows)

    def _there(self, name: str) -> str:
        return name if name == "rows" else self._prefix + name


class Stored(ABC):
    """What can be taken apart into named arrays: a structure, or a factor.

    Attributes:
        owners: which rank has what.
        BY_ROWS: names of packed arrays whose rows are those of vectors, of this rank.
    """

    owners: Ownership
    BY_ROWS: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def pack(self) -> dict[str, Any]:
        """The arrays by name, on the host, as this rank has them; `leaves` are of all ranks."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What is to be known beside the arrays, for JSON; "ranks" are a list for every level."""

    @classmethod
    @abstractmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """The stacks among the packed arrays; every rank has all of the others.

        Args:
            leaves: of the whole tree; they are no stack: every rank needs those of all.
            levels: how many "ranks" tell of.
            read: gives a packed array that is no stack.
        """

    @classmethod
    @abstractmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        """What packed arrays are of.

        Raises:
            KeyError, ValueError: arrays are missing or do not fit together.
        """

    def parted(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `pack` gives in two: what every rank has all of, and what this one saves of it."""
        arrays, owners = self.pack(), self.owners
        stacks = self.stacks(owners.leaves, len(self.about()["ranks"]), arrays.__getitem__)
        own = {
            name: arrays[name][stack.saved(owners)]
            for name, stack in stacks.items()
            if name in arrays
        }
        by_rows = {name: arrays[name] for name in self.BY_ROWS if name in arrays}
        if by_rows:  # rank by rank
            arrays["rows"] = np.concatenate(owners.rows.of)
        own |= by_rows
        return {name: a for name, a in arrays.items() if name not in own}, own

    @classmethod
    def read_leaves(cls, source: Source, ranks: int) -> HostIndex | None:
        """The leaves of what is saved, by which it is spread; None where nothing needs them.

        Raises:
            KeyError, ValueError: they are missing, or not those of a tree.
        """
        leaves = source.read("leaves")
        check_leaves(leaves)
        return leaves

    @classmethod
    def unpack(
        cls,
        source: Source,
        about: Mapping[str, Any],
        leaves: HostIndex | None,
        owners: Ownership,
        device: str = "cpu",
    ) -> Self:
        """What `pack` took apart, or this rank's part of it.

        Args:
            source: of its arrays.
            about: see `about`.
            leaves: see `read_leaves`.
            owners: who gets what.
            device: where a factor is wanted; a structure is on the host.

        Raises:
            KeyError, ValueError: arrays are missing or do not fit together.
        """
        ranks = unpacked_ranks(about)
        stacks = {} if leaves is None else cls.stacks(leaves, len(ranks), source.read)
        return cls._unpack(Part(source, stacks, leaves, owners, about, device), ranks)


def unpacked_ranks(about: Mapping[str, Any]) -> Ranks:
    """The "ranks" of `Stored.about`, as a file has them.

    Raises:
        KeyError, ValueError, OverflowError: they are none.
    """
    return [tuple(_rank(r) for r in level) for level in about["ranks"]]


def _rank(said: Any) -> int:
    """A rank as a file has it; three ranks once wrote the uppermost as floats.

    Raises:
        ValueError, OverflowError: it is none.
    """
    number = isinstance(said, (int, float)) and not isinstance(said, bool)
    if not number or said < 0 or said != int(said):
        raise ValueError(f"{said!r} is no rank of a block")
    return int(said)


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


def check_types(arrays: Mapping[str, Any], dtype: np.dtype[Any]) -> None:
    """Refuse arrays that are not of a type.

    Raises:
        ValueError: which and why.
    """
    for name, a in arrays.items():
        if dtype not in FLOATS or a.dtype != dtype:
            raise ValueError(f"{name} has type {a.dtype}, wanted is {dtype}")


def check_far(arrays: Mapping[str, Any], dtype: np.dtype[Any]) -> None:
    """Refuse blocks of the far field that are neither of a type nor, for float32, packed.

    Raises:
        ValueError: which and why.
    """
    for name, a in arrays.items():
        kind = kind_of(a.dtype)
        if a.dtype != dtype and (kind is None or dtype != FLOAT32):
            raise ValueError(f"{name} has another type than the diagonal blocks, {a.dtype}")
        if kind is not None and not all_finite(a):
            raise ValueError(f"{name} has numbers in {kind} that are NaN or infinite")


def check_cholesky(L: Any, name: str) -> None:
    """Refuse what is no stack of Cholesky factors: lower triangular, the diagonal positive.

    Raises:
        ValueError: it is none.
    """
    if L.ndim != 3 or L.shape[1] != L.shape[2]:
        raise ValueError(f"{name} has shape {L.shape}, it is no stack of Cholesky factors")
    above = np.triu(np.ones(L.shape[1:], bool), 1)
    if L[:, above].any() or not (L.diagonal(axis1=1, axis2=2) > 0).all():
        raise ValueError(f"{name} is not lower triangular with a positive diagonal")

"""What every structure has: a product, a diagonal, its arrays, and copies of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr.devices import Array, HostIndex, device_of, move, namespace, to_host
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.structures.stored import Part, Ranks, Source, Stack, check_leaves

Map = Callable[[Array], Array]


def add_to_diagonals(D: Array, leaves: Array, d: Array) -> Array:
    """A copy of the diagonal blocks D (leaves, m, m) plus those of diag(d); padding stays zero."""
    xp = namespace(D)
    D = D.copy()
    place = xp.arange(D.shape[1])
    D[:, place, place] += xp.where(leaves >= 0, d[leaves], 0).astype(D.dtype)
    return D


class Structure(ABC):
    """A symmetric matrix (N, N), rows and columns in the user's order.

    Attributes:
        leaves: (2^depth, m) the user's indices of each leaf of the tree, padding (-1) last; on
            the device of the arrays. Spread over ranks: this rank's leaves, and places in its rows
            for indices.
        owners: which rank has what; one rank has it all.
    """

    leaves: Array
    owners: Ownership = ALONE

    @property
    @abstractmethod
    def n(self) -> int:
        """N."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""
        return self.n, self.n

    @property
    @abstractmethod
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """Numerical ranks, one tuple a level, leaves first."""

    @abstractmethod
    def matmat(self, v: Array) -> Array:
        """The product with v (N, k), or on many ranks with this rank's rows of it."""

    @abstractmethod
    def diagonal(self) -> Array:
        """The diagonal, (N,), or this rank's rows of it."""

    @abstractmethod
    def arrays(self) -> list[Array]:
        """Every stored floating array."""

    @property
    def num_stored(self) -> int:
        """Numbers stored on all ranks, what is repeated counted once."""
        return int(sum(a.size for a in self.arrays()))

    @abstractmethod
    def index_arrays(self) -> list[Any]:
        """Every stored array of indices."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """The structure of factor * K; of a low-rank form factor > 0."""

    @abstractmethod
    def plus_diagonal(self, d: Array) -> Self:
        """The structure of K + diag(d), d (N,), or this rank's rows of it."""

    @abstractmethod
    def _mapped(self, floats: Map, indices: Map) -> Self:
        """The same structure of mapped arrays."""

    # --- files ---------------------------------------------------------------------------------

    @abstractmethod
    def pack(self) -> dict[str, Any]:
        """The arrays by name, on the host, as this rank has them; `leaves` are of all ranks."""

    @classmethod
    @abstractmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """The stacks among the packed arrays; every rank has all of the others.

        Args:
            leaves: of the whole tree; they are no stack: every rank needs those of all.
            levels: how many the structure has.
            read: gives a packed array that is no stack.
        """

    @classmethod
    @abstractmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        """The structure of packed arrays.

        Raises:
            KeyError, ValueError: arrays are missing or do not fit together.
        """

    def parted(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `pack` gives in two: what every rank has all of, and what this one saves of it."""
        arrays, owners = self.pack(), self.owners
        stacks = self.stacks(owners.leaves, len(self.ranks), arrays.__getitem__)
        own = {
            name: arrays[name][stack.saved(owners)]
            for name, stack in stacks.items()
            if name in arrays
        }
        return {name: a for name, a in arrays.items() if name not in own}, own

    @classmethod
    def read_leaves(cls, source: Source, ranks: int) -> HostIndex | None:
        """The leaves of a saved structure, by which it is spread; None where nothing needs them.

        Raises:
            KeyError, ValueError: they are missing, or not those of a tree.
        """
        leaves = source.read("leaves")
        check_leaves(leaves)
        return leaves

    @classmethod
    def unpack(
        cls, source: Source, ranks: list[list[int]], leaves: HostIndex | None, owners: Ownership
    ) -> Self:
        """The structure that `pack` took apart, or this rank's part of it.

        Args:
            source: of its arrays.
            ranks: of the structure.
            leaves: see `read_leaves`.
            owners: who gets what.

        Raises:
            KeyError, ValueError: arrays are missing or do not fit together.
        """
        stacks = {} if leaves is None else cls.stacks(leaves, len(ranks), source.read)
        return cls._unpack(Part(source, stacks, leaves, owners), [tuple(r) for r in ranks])

    @property
    def all_leaves(self) -> HostIndex:
        """The leaves of the whole tree, of all ranks, in the user's indices; a host array."""
        return to_host(self.leaves) if self.owners.alone else self.owners.leaves

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored blocks."""
        dtype: np.dtype[Any] = self.arrays()[0].dtype
        return dtype

    @property
    def device(self) -> str:
        """Where the arrays are."""
        return device_of(self.arrays()[0])

    def astype(self, dtype: DTypeLike) -> Self:
        """The same structure in another precision."""
        if self.dtype == dtype:
            return self
        return self._mapped(lambda a: a.astype(dtype), lambda a: a)

    def to(self, device: str) -> Self:
        """The same structure on another device."""
        return self._mapped(lambda a: move(a, device), lambda a: move(a, device))

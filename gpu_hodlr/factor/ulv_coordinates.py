"""The coordinates z of W z in the ULV-Cholesky factor K + damping I = W W^T."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed import Rows
from gpu_hodlr.structures import Telescope


class ULVCoordinates:
    """Which coordinate belongs to which eliminated row.

    They are numbered level by level, leaves first and the root last. On many ranks each has those
    of the nodes it owns, and of the rest, which all ranks work with, as many as make them as many
    as its rows.

    Args:
        telescope: the form that is factorized.
    """

    def __init__(self, telescope: Telescope) -> None:
        self._owners, self._num_rows = telescope.owners, telescope.num_rows
        self._depth = telescope.depth
        xp = namespace(telescope.D)
        counts = telescope.real_rows()
        places = telescope.leaves.shape[1]
        self._slots: list[Any] = []  # of all ranks, by level; padding -1
        first = 0
        for level, real in zip(telescope.levels, counts[:-1], strict=True):
            eliminated = np.arange(level.rank, places) < real[:, None]
            slots, first = _numbered(eliminated, first)
            self._slots.append(slots)
            places = 2 * level.rank
        self._slots.append(_numbered(_root_mask(telescope, counts), first)[0])
        owned = self._of_owners(self._owners.comm.rank)
        self._num_owned = len(owned)
        self._first_repeated = sum(len(self._of_owners(p)) for p in range(self._owners.comm.size))
        self._local: list[Array] = []
        for i, slots in enumerate(self._slots):
            if self._repeated(i):
                local = np.where(slots >= 0, slots - self._first_repeated, -1)
            else:
                mine = slots[self._owners.mine(self._depth - i)]
                local = np.where(mine >= 0, np.searchsorted(owned, mine), -1)
            self._local.append(xp.asarray(local))

    def _repeated(self, index: int) -> bool:
        """Whether all ranks work with a level; the last is the root."""
        return index == len(self._slots) - 1 or self._depth - index < self._owners.cut

    def _of_owners(self, rank: int) -> Any:
        """The coordinates of the nodes that a rank owns, ascending."""
        parts = [
            slots[self._owners.mine(self._depth - i, rank)].ravel()
            for i, slots in enumerate(self._slots)
            if not self._repeated(i)
        ]
        own = np.concatenate([np.empty(0, np.int64), *parts])
        return own[own >= 0]

    @cached_property
    def rows(self) -> Rows:
        """Which coordinates every rank has."""
        of, first = [], self._first_repeated
        for rank, rows in enumerate(self._owners.row_counts(self._num_rows)):
            own = self._of_owners(rank)
            share = rows - len(own)
            of.append(np.concatenate([own, np.arange(first, first + share)]))
            first += share
        return Rows(self._owners.comm, of)

    @cached_property
    def _shares(self) -> list[int]:
        """How many of the repeated coordinates every rank has."""
        return [int((of >= self._first_repeated).sum()) for of in self.rows.of]

    def split(self, z: Array) -> tuple[list[Array], Array]:
        """By level, and of the root, from this rank's coordinates (rows, k)."""
        repeated = self._owners.comm.allgather(z[self._num_owned :], self._shares)
        parts = [
            batched.gather_rows(repeated if self._repeated(i) else z, slots)
            for i, slots in enumerate(self._local)
        ]
        return parts[:-1], parts[-1]

    def join(self, parts: list[Array], root: Array) -> Array:
        """The reverse of `split`."""
        shares, rank = self._shares, self._owners.comm.rank
        z = namespace(root).zeros((self._num_rows, root.shape[2]), root.dtype)
        repeated = namespace(root).zeros((sum(shares), root.shape[2]), root.dtype)
        for i, (part, slots) in enumerate(zip([*parts, root], self._local, strict=True)):
            if self._repeated(i):
                repeated += batched.scatter_rows(part, slots, len(repeated))
            else:
                z += batched.scatter_rows(part, slots, len(z))
        first = sum(shares[:rank])
        z[self._num_owned :] = repeated[first : first + shares[rank]]
        return z


def _root_mask(telescope: Telescope, counts: list[Any]) -> Any:
    """(1, rows) which rows of the root are not padding."""
    if not telescope.levels:
        return np.arange(telescope.leaves.shape[1]) < counts[0][:, None]
    rank = telescope.levels[-1].rank
    real = np.minimum(counts[-2], rank)
    return (np.arange(rank) < real[:, None]).reshape(1, 2 * rank)


def _numbered(mask: Any, first: int) -> tuple[Any, int]:
    """Number the True places from `first` on; -1 elsewhere."""
    count = int(mask.sum())
    slots = np.full(mask.shape, -1)
    slots[mask] = np.arange(first, first + count)
    return slots, first + count

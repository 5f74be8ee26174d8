"""The coordinates z of W z in the ULV-Cholesky factor K + damping I = W W^T."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostArray, HostIndex, namespace_on
from gpu_hodlr.distributed import Ownership, Rows, Transfers, each_rank, joined
from gpu_hodlr.structures.telescope import real_rows


class ULVCoordinates:
    """Which coordinate belongs to which eliminated row.

    They are numbered level by level, leaves first and the root last. On many ranks each has those
    of the nodes it works on, of a node above the cut the first of the ranks that do.

    Args:
        leaves: (2^depth, m) of the whole tree, padding -1; a host array.
        widths: of each level, leaf level first, the rows of a skeleton.
        owners: which rank has what.
        device: where the coordinates are.
    """

    def __init__(self, leaves: Any, widths: Sequence[int], owners: Ownership, device: str) -> None:
        self._owners, self._depth, self._device = owners, len(widths), device
        counts = real_rows(leaves, widths)
        places = leaves.shape[1]
        self._slots: list[Any] = []  # of all ranks, by level; padding -1
        first = 0
        for width, real in zip(widths, counts[:-1], strict=True):
            eliminated = np.arange(width, places) < real[:, None]
            slots, first = _numbered(eliminated, first)
            self._slots.append(slots)
            places = 2 * width
        self._slots.append(_numbered(_root_mask(leaves, widths, counts), first)[0])

    @cached_property
    def rows(self) -> Rows:
        """Which coordinates every rank has."""
        return Rows(self._owners.comm, [self._of(p) for p in range(self._owners.comm.size)])

    def _of(self, rank: int) -> HostIndex:
        """The coordinates that a rank has, ascending."""
        parts = [
            slots[self._owners.counted(self._depth - i, rank)].ravel()
            for i, slots in enumerate(self._slots)
        ]
        every = np.concatenate(parts)
        return every[every >= 0]

    def _local(self, have: Any) -> list[Array]:
        """By level the slots of this rank's nodes, as places among coordinates; -1 for others."""
        have = np.append(have, -2)  # a rank may have none
        order = np.argsort(have)
        local = []
        for i, slots in enumerate(self._slots):
            mine = slots[self._owners.mine(self._depth - i)]
            place = order[np.minimum(np.searchsorted(have[order], mine), len(have) - 1)]
            local.append(
                namespace_on(self._device).asarray(np.where(have[place] == mine, place, -1))
            )
        return local

    @cached_property
    def _shared(self) -> Transfers | None:
        """What brings the coordinates of nodes that several ranks work on, if there are any."""
        owners = self._owners
        if not owners.repeated_levels:
            return None
        items, holders, ends = [], [], []
        for level in owners.repeated_levels:
            slots = self._slots[self._depth - level]
            nodes = np.arange(1 << level)[:, None] + np.zeros_like(slots)
            real = slots >= 0
            items.append(slots[real])
            holder, end = owners.holders(level, nodes[real])
            holders.append(holder)
            ends.append(end)
        item, holder, end = (np.concatenate(a) for a in (items, holders, ends))
        each, needer = each_rank(holder + 1, end)
        return Transfers(
            owners.comm, needer, item[each], holder[each],
            lambda items: np.searchsorted(self.rows.mine, items),
        )  # fmt: skip

    @cached_property
    def _from_all(self) -> list[Array]:
        """See `_local`, among this rank's coordinates and those that are brought."""
        mine = self.rows.mine
        shared = self._shared
        return self._local(mine if shared is None else joined(mine, shared.received))

    @cached_property
    def _to_own(self) -> list[Array]:
        """See `_local`, among this rank's coordinates."""
        return self._local(self.rows.mine)

    def split(self, z: Array) -> tuple[list[Array], Array]:
        """By level, and of the root, from this rank's coordinates (rows, k)."""
        if self._shared is not None:
            z = joined(z, *self._shared(z))
        parts = [batched.gather_rows(z, slots) for slots in self._from_all]
        return parts[:-1], parts[-1]

    def join(self, parts: list[Array], root: Array) -> Array:
        """The reverse of `split`."""
        rows = len(self.rows.mine)
        z = namespace_on(self._device).zeros((rows, root.shape[2]), root.dtype)
        for part, slots in zip([*parts, root], self._to_own, strict=True):
            z += batched.scatter_rows(part, slots, rows)
        return z


def _root_mask(leaves: Any, widths: Sequence[int], counts: list[Any]) -> HostArray:
    """(1, rows) which rows of the root are not padding."""
    if not widths:
        return np.arange(leaves.shape[1]) < counts[0][:, None]
    real = np.minimum(counts[-2], widths[-1])
    return (np.arange(widths[-1]) < real[:, None]).reshape(1, 2 * widths[-1])


def _numbered(mask: HostArray, first: int) -> tuple[Any, int]:
    """Number the True places from `first` on; -1 elsewhere."""
    count = int(mask.sum())
    slots = np.full(mask.shape, -1)
    slots[mask] = np.arange(first, first + count)
    return slots, first + count

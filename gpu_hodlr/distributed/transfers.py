"""Rows of arrays that some ranks have and others need."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from gpu_hodlr.devices import Array, HostIndex, namespace
from gpu_hodlr.distributed.messages import Communicator


class Transfers:
    """Who sends which items to whom; several arrays with a row an item go as one message.

    Args:
        comm: the ranks.
        needer: (t,) the rank that needs an item; host arrays, as the rest. Transfers that do not
            concern this rank may be left out, and repeated ones are made once.
        item: (t,) which item, a number >= 0.
        provider: (t,) the rank that sends it.
        place: the places of items in this rank's arrays.

    Attributes:
        received: the items that come, as they lie in what a call returns.
        order: in which `extend` gives own rows and received ones; None: one below the other.
    """

    order: HostIndex | None = None

    def __init__(
        self,
        comm: Communicator,
        needer: HostIndex,
        item: HostIndex,
        provider: HostIndex,
        place: Callable[[Any], Any],
    ) -> None:
        self._comm = comm
        self._on_device: dict[str, Array] = {}
        sent, received = (
            _by_rank(comm.size, other[here == comm.rank], item[here == comm.rank])
            for here, other in ((provider, needer), (needer, provider))
        )
        self._places = place(np.concatenate(sent))
        self._counts = [len(items) for items in sent], [len(items) for items in received]
        self.received = np.concatenate(received)

    def __call__(self, *arrays: Array) -> list[Array]:
        """What the others have of each array for the received items, (items, ...)."""
        if len(arrays) == 1:
            return [self._comm.exchange(self._taken(arrays[0], "_places"), *self._counts)]
        # The first device array decides where the message lies.
        xp = next((namespace(a) for a in arrays if namespace(a) is not np), np)
        rows = [_bytes(xp.asarray(self._taken(a, "_places"))) for a in arrays]
        moved = self._comm.exchange(xp.concatenate(rows, axis=1), *self._counts)
        ends = accumulate(_row_bytes(a) for a in arrays)
        return [
            _from_bytes(moved[:, end - _row_bytes(a) : end], a)
            for a, end in zip(arrays, ends, strict=True)
        ]

    def arrange(self, own: Any, wanted: Any) -> None:
        """Let `extend` give the wanted items, in this order, of this rank's own and the received.

        Args:
            own: the items of this rank's arrays, row by row; host arrays, as the next.
            wanted: items.
        """
        have = np.concatenate([own, self.received])
        if not np.array_equal(have, wanted):
            place = np.argsort(have)
            self.order = place[np.searchsorted(have[place], wanted)]

    def extend(self, *arrays: Array) -> list[Array]:
        """Of each array its own rows and those of the received items, in `order`."""
        both = [joined(x, more) for x, more in zip(arrays, self(*arrays), strict=True)]
        return both if self.order is None else [self._taken(x, "order") for x in both]

    def _taken(self, x: Array, name: str) -> Array:
        """Rows of x; which, is copied to a device once."""
        xp, index = namespace(x), getattr(self, name)
        if xp is not np:
            if name not in self._on_device:
                self._on_device[name] = xp.asarray(index)
            index = self._on_device[name]
        return x[index]


def joined(x: Array, more: Array) -> Array:
    """One below the other."""
    return namespace(x).concatenate([x, more])


def each_rank(first: HostIndex, last: HostIndex) -> tuple[Any, Any]:
    """For ranges of ranks, every rank of each: which range (t,), and the rank (t,).

    Args:
        first: (ranges,) the first rank of each.
        last: (ranges,) the last one + 1.
    """
    which = np.repeat(np.arange(len(first)), last - first)
    starts = np.cumsum(last - first) - (last - first)
    return which, first[which] + np.arange(len(which)) - starts[which]


def _by_rank(ranks: int, rank: HostIndex, item: HostIndex) -> list[Any]:
    """For every rank its items, ascending, each once."""
    pairs = np.unique(np.stack([rank, item], axis=1), axis=0)
    edges = np.searchsorted(pairs[:, 0], np.arange(ranks + 1))
    return [pairs[a:b, 1] for a, b in pairwise(edges)]


def _row_bytes(a: Array) -> int:
    return int(np.prod(a.shape[1:])) * int(a.dtype.itemsize)


def _bytes(a: Array) -> Array:
    """(rows, bytes) of an array."""
    flat = a.reshape(len(a), int(np.prod(a.shape[1:])))
    return namespace(a).ascontiguousarray(flat).view(np.uint8)


def _from_bytes(rows: Array, like: Array) -> Array:
    """The reverse of `_bytes`, in the library of another array."""
    xp = namespace(rows)
    whole = xp.ascontiguousarray(rows).view(like.dtype).reshape(len(rows), *like.shape[1:])
    return whole if namespace(like) is xp else whole.get()

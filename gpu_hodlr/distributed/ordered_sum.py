"""A sum of terms that ranks have, in one order whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed.messages import Communicator
from gpu_hodlr.distributed.ownership import shares
from gpu_hodlr.distributed.rows import Rows


class OrderedSum:
    """Sums of `count` arrays (n, k), of which every rank has some, consecutive ones.

    They are added one after the other: the same bits on any number of ranks. Every rank adds up
    some of the rows, whose parts the others send, and all get the whole.

    Args:
        comm: the ranks.
        count: terms of all ranks.
        n: rows of every term.
    """

    def __init__(self, comm: Communicator, count: int, n: int) -> None:
        self._comm, self._count, self._n = comm, count, n

    @property
    def own(self) -> slice:
        """The terms of this rank."""
        return shares(self._count, self._comm.size)[self._comm.rank]

    @cached_property
    def _rows(self) -> Rows:
        every = np.arange(self._n)
        return Rows(self._comm, [every[part] for part in shares(self._n, self._comm.size)])

    def __call__(self, terms: Iterator[Array], like: Array) -> Array:
        """The sum, on every rank.

        Args:
            terms: this rank's, (n, k) each; as many as `own` says.
            like: (n, k), of the type of the terms.
        """
        xp = namespace(like)
        if self._comm.size == 1:
            total = xp.zeros_like(like)
            for term in terms:
                total += term
            return total
        k, counts = like.shape[1], [s.stop - s.start for s in shares(self._count, self._comm.size)]
        own = xp.empty((self._n, counts[self._comm.rank] * k), like.dtype)
        for index, term in enumerate(terms):
            own[:, index * k : (index + 1) * k] = term
        here = xp.empty((len(self._rows.mine), self._count * k), like.dtype)
        self._rows.from_columns((own,), [c * k for c in counts], (here,))
        total = xp.zeros((len(here), k), like.dtype)
        for index in range(self._count):
            total += here[:, index * k : (index + 1) * k]
        return self._rows.whole(total)

"""One rank alone: nothing is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gpu_hodlr.devices import Array
from gpu_hodlr.distributed.base import Communicator


class OneRank(Communicator):
    """A group of one; see `Communicator`."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def allgather(self, x: Array, counts: Sequence[int]) -> Array:
        """See `Communicator`."""
        return x

    def allreduce(self, x: Array) -> Array:
        """See `Communicator`."""
        return x

    def bcast(self, x: Any, root: int = 0) -> Any:
        """See `Communicator`."""
        return x

    def share(self, x: Any) -> list[Any]:
        """See `Communicator`."""
        return [x]

    def alike(self, number: int) -> bool:
        """See `Communicator`."""
        return True

    def exchange(self, x: Array, sent: Sequence[int], received: Sequence[int]) -> Array:
        """See `Communicator`."""
        return x

    def barrier(self) -> None:
        """See `Communicator`."""

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """See `Communicator`."""
        yield

    def same(self, **values: Any) -> None:
        """See `Communicator`."""

"""One rank alone: nothing is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gpu_hodlr.devices import Array
from gpu_hodlr.distributed.messages import Communicator


class OneRank(Communicator):
    """A group of one; see `Communicator`."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    @contextmanager
    def _message(self, sent: int = 0) -> Iterator[None]:
        """There is none: nothing is counted."""
        yield

    def _allgather(self, x: Array, counts: Sequence[int]) -> Array:
        return x

    def _allreduce(self, x: Array) -> Array:
        return x

    def _bcast(self, x: Any, root: int) -> Any:
        return x

    def _share(self, x: Any) -> list[Any]:
        return [x]

    def _exchange(self, x: Array, sent: Sequence[int], received: Sequence[int]) -> Array:
        return x

    def _least(self, numbers: tuple[int, ...]) -> list[int]:
        return list(numbers)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """See `Communicator`."""
        yield

    def same(self, **values: object) -> None:
        """See `Communicator`."""

"""What a group of ranks can do: the few collective operations everything else is made of."""

from __future__ import annotations

import pickle
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpu_hodlr.devices import Array, is_array, to_host
from gpu_hodlr.errors import ArgumentError, DistributedError


class Communicator(ABC):
    """A group of ranks. All of them make the same calls in the same order.

    Arrays are NumPy or CuPy; what comes back is of the same library, contiguous.

    Attributes:
        rank: this one's number.
        size: how many there are.
        sent: bytes this rank has sent to others, by phase.
        messages: collective calls, by phase.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.sent: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self._phase = "other"

    @abstractmethod
    def allgather(self, x: Array, counts: Sequence[int]) -> Array:
        """The ranks' x one after the other along the first axis.

        Args:
            x: (counts[rank], ...), all else alike on every rank.
            counts: rows of every rank.
        """

    @abstractmethod
    def allreduce(self, x: Array) -> Array:
        """The sum over the ranks, the same bits on every one."""

    @abstractmethod
    def bcast(self, x: Any, root: int = 0) -> Any:
        """The small host object that one rank has."""

    @abstractmethod
    def share(self, x: Any) -> list[Any]:
        """The small host objects of all ranks."""

    @abstractmethod
    def alike(self, number: int) -> bool:
        """Whether all ranks give the same number; the cheapest question there is."""

    @abstractmethod
    def exchange(self, x: Array, sent: Sequence[int], received: Sequence[int]) -> Array:
        """What every rank has for this one, (sum of received, ...), in the order of the ranks.

        Args:
            x: (sum of sent, ...): the rows for rank 0, then those for rank 1 and so on; all but
                the rows alike on every rank.
            sent: rows that go to every rank.
            received: rows that come from every rank.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all ranks."""

    def __reduce__(self) -> Any:
        """Refuse to be pickled or copied: messages between ranks cannot be.

        Raises:
            DistributedError: there are several ranks.
        """
        if self.size > 1:
            raise DistributedError(
                "what is spread over ranks cannot be pickled or copied: save it, each rank its part"
            )
        return object.__reduce__(self)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is sent inside is counted under this name."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def _count_exchange(self, x: Array, sent: Sequence[int]) -> None:
        row = int(np.prod(x.shape[1:])) * int(x.dtype.itemsize)
        self._count((sum(sent) - sent[self.rank]) * row)

    def _count(self, sent: int) -> None:
        self.messages[self._phase] += 1
        self.sent[self._phase] += sent

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A section that sends nothing and may fail on some ranks: then it fails on all.

        Raises:
            Exception: this rank's own, else that of the first rank that failed (DistributedError
                where it cannot be sent).
        """
        own: Exception | None = None
        try:
            yield
        except Exception as e:
            own = e
        failures = self.share(None if own is None else _sendable(own, self.rank))
        if own is not None:
            raise own
        for rank, failure in enumerate(failures):
            if failure is not None:
                error: Exception = pickle.loads(failure)
                error.add_note(f"on rank {rank} of {self.size}")
                raise error

    def same(self, **values: Any) -> None:
        """Refuse values that differ between the ranks; arrays are compared by a checksum.

        Raises:
            ArgumentError: on every rank; it says which value, and what two ranks have.
        """
        every = self.share({name: _said(value) for name, value in values.items()})
        for name in values:
            for rank, other in enumerate(every):
                if other[name] != every[0][name]:
                    raise ArgumentError(
                        f"{name} differs between ranks: {every[0][name]} on rank 0, "
                        f"{other[name]} on rank {rank}"
                    )


def _sendable(error: Exception, rank: int) -> bytes:
    """The exception pickled, or one that says the same."""
    try:
        text = pickle.dumps(error)
        pickle.loads(text)  # an exception with arguments of its own may not come back
    except Exception:
        said = DistributedError(f"rank {rank}: {type(error).__name__}: {error}")
        text = pickle.dumps(said)
    return text


def _said(value: Any) -> str:
    if is_array(value):
        host = np.ascontiguousarray(to_host(value))
        return f"{host.dtype} array {host.shape}, checksum {zlib.crc32(host.tobytes()):08x}"
    return repr(value)

"""What a group of ranks can do: the few collective operations everything else is made of."""

from __future__ import annotations

import pickle
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from gpu_hodlr.devices import Array, is_array, to_host
from gpu_hodlr.errors import ArgumentError, DistributedError


class Communicator(ABC):
    """A group of ranks. All of them make the same calls in the same order.

    Arrays are NumPy or CuPy; what comes back is of the same library, contiguous. A subclass writes
    how a message is sent (`_allgather` ... `_least`); when it may be, is settled here.

    Inside `agreed` every message is preceded by a vote, the least of three numbers over the ranks:
    a rank that has failed votes at the end of the section, the others before their next message,
    wherever that is, and so all learn of it and leave the section together.

    Attributes:
        rank: this one's number.
        size: how many there are.
        sent: bytes this rank has sent to others, by phase.
        messages: collective calls, by phase; votes and `alike` are not counted.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.sent: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self._phase = "other"
        self._sections = 0  # of `agreed`, one in another, that this rank is in
        self._failure: tuple[int, Exception] | None = None  # until that section is left

    def allgather(self, x: Array, counts: Sequence[int]) -> Array:
        """The ranks' x one after the other along the first axis.

        Args:
            x: (counts[rank], ...), all else alike on every rank.
            counts: rows of every rank.
        """
        with self._message(x.nbytes * (self.size - 1)):
            return self._allgather(x, counts)

    def allreduce(self, x: Array) -> Array:
        """The sum over the ranks, the same bits on every one."""
        with self._message(x.nbytes * (self.size - 1 if self.rank == 0 else 1)):
            return self._allreduce(x)

    def bcast(self, x: Any, root: int = 0) -> Any:
        """The small host object that one rank has."""
        with self._message():
            return self._bcast(x, root)

    def share(self, x: Any) -> list[Any]:
        """The small host objects of all ranks."""
        with self._message():
            return self._share(x)

    def exchange(self, x: Array, sent: Sequence[int], received: Sequence[int]) -> Array:
        """What every rank has for this one, (sum of received, ...), in the order of the ranks.

        Args:
            x: (sum of sent, ...): the rows for rank 0, then those for rank 1 and so on; all but
                the rows alike on every rank.
            sent: rows that go to every rank.
            received: rows that come from every rank.
        """
        row = int(np.prod(x.shape[1:])) * int(x.dtype.itemsize)
        with self._message((sum(sent) - sent[self.rank]) * row):
            return self._exchange(x, sent, received)

    def alike(self, number: int, own: Exception | None = None) -> bool:
        """Whether all ranks give the same number: a vote, the cheapest question there is.

        Args:
            number: this rank's.
            own: in a section, how this rank has failed, if it has.

        Raises:
            Exception: see `agreed`; a rank has failed since all entered the section.
        """
        if self._failure is not None:  # somebody caught it
            raise self._failure[1]
        with self._waiting():
            least = self._least((number, -number, int(own is None)))
            if least[2]:
                return least[0] == -least[1]
            failures = self._share(None if own is None else (self._sections, *_sendable(own)))
        found = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
        if own is None:
            rank, (_, pickled, said) = found[0]
            own = _received(pickled, said, rank)
            own.add_note(f"on rank {rank} of {self.size}")
        self._failure = min(section for _, (section, *_) in found), own
        raise own

    @abstractmethod
    def _allgather(self, x: Array, counts: Sequence[int]) -> Array:
        """See `allgather`, as the next."""

    @abstractmethod
    def _allreduce(self, x: Array) -> Array: ...

    @abstractmethod
    def _bcast(self, x: Any, root: int) -> Any: ...

    @abstractmethod
    def _share(self, x: Any) -> list[Any]: ...

    @abstractmethod
    def _exchange(self, x: Array, sent: Sequence[int], received: Sequence[int]) -> Array: ...

    @abstractmethod
    def _least(self, numbers: tuple[int, ...]) -> list[int]:
        """The least over the ranks of each of a few 64-bit integers."""

    def _waiting(self) -> AbstractContextManager[Any]:
        """Round every wait for other ranks."""
        return nullcontext()

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

    @contextmanager
    def _message(self, sent: int = 0) -> Iterator[None]:
        """Round a message of so many bytes: in a section all must have come to it."""
        if self._sections:
            self.alike(0)
        self.messages[self._phase] += 1
        self.sent[self._phase] += sent
        with self._waiting():
            yield

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A section that may fail on some ranks, messages included: then it fails on all.

        Sections may lie in one another; all ranks enter and leave the same ones.

        Raises:
            Exception: this rank's own, else that of the first rank that failed (DistributedError
                where it cannot be sent).
        """
        self._sections += 1
        own: Exception | None = None
        try:
            try:
                yield
            except Exception as e:
                own = e
            if self._failure is None:
                self.alike(0, own)
            else:  # all know
                raise self._failure[1] if own is None else own
        finally:
            self._sections -= 1
            if self._failure is not None and self._sections < self._failure[0]:
                self._failure = None

    def same(self, **values: object) -> None:
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


def _sendable(error: Exception) -> tuple[bytes, str]:
    """The exception pickled, if it can be, and in words."""
    try:
        pickled = pickle.dumps(error)
    except Exception:
        pickled = b""
    return pickled, f"{type(error).__name__}: {error}"


def _received(pickled: bytes, said: str, rank: int) -> Exception:
    """The exception of another rank, or one that says the same."""
    try:
        error = pickle.loads(pickled)
    except Exception:  # with arguments of its own, or of a class that is not known here
        error = None
    return error if isinstance(error, Exception) else DistributedError(f"rank {rank}: {said}")


def _said(value: object) -> str:
    if is_array(value):
        host = np.ascontiguousarray(to_host(value))
        return f"{host.dtype} array {host.shape}, checksum {zlib.crc32(host.tobytes()):08x}"
    return repr(value)

"""Ranks that are threads of this process, for what needs no MPI."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_hodlr.devices import namespace
from gpu_hodlr.distributed import Communicator


class ThreadRank(Communicator):
    """One of several; see `gpu_hodlr.distributed.Communicator`."""

    def __init__(self, rank: int, box: list[Any], meeting: threading.Barrier) -> None:
        super().__init__(rank, len(box))
        self._box, self._meeting = box, meeting

    def share(self, x: Any) -> list[Any]:
        self._box[self.rank] = x
        self._meeting.wait()
        got = list(self._box)
        self._meeting.wait()
        return got

    def alike(self, number: int) -> bool:
        return len(set(self.share(number))) == 1

    def bcast(self, x: Any, root: int = 0) -> Any:
        return self.share(x)[root]

    def allgather(self, x: Any, counts: Sequence[int]) -> Any:
        self._count(x.nbytes * (self.size - 1))
        assert len(x) == counts[self.rank]
        return namespace(x).concatenate(self.share(x))

    def allreduce(self, x: Any) -> Any:
        self._count(x.nbytes * (self.size - 1 if self.rank == 0 else 1))
        return sum(self.share(x))

    def exchange(self, x: Any, sent: Sequence[int], received: Sequence[int]) -> Any:
        self._count_exchange(x, sent)
        assert len(x) == sum(sent)
        ends = np.cumsum(sent)
        parts = [x[end - count : end] for end, count in zip(ends, sent, strict=True)]
        got = [theirs[self.rank] for theirs in self.share(parts)]
        assert [len(part) for part in got] == list(received)
        return namespace(x).concatenate(got)

    def barrier(self) -> None:
        self._meeting.wait()


def on_threads(size: int, function: Callable[[Any], Any]) -> list[Any]:
    """What `function` returns or raises on every rank; it is given the rank's communicator.

    A rank that ends by anything but an Exception is dead to the others, as if killed.
    """
    meeting = threading.Barrier(size, timeout=60)
    box: list[Any] = [None] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadRank(rank, box, meeting))
        except Exception as e:
            results[rank] = e
        except BaseException as e:
            results[rank] = e
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results

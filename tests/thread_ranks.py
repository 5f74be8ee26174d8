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

    def _share(self, x: Any) -> list[Any]:
        self._box[self.rank] = x
        self._meeting.wait()
        got = list(self._box)
        self._meeting.wait()
        return got

    def _least(self, numbers: tuple[int, ...]) -> list[int]:
        return [min(each) for each in zip(*self._share(numbers), strict=True)]

    def _bcast(self, x: Any, root: int) -> Any:
        return self._share(x)[root]

    def _allgather(self, x: Any, counts: Sequence[int]) -> Any:
        assert len(x) == counts[self.rank]
        return namespace(x).concatenate(self._share(x))

    def _allreduce(self, x: Any) -> Any:
        return sum(self._share(x))

    def _exchange(self, x: Any, sent: Sequence[int], received: Sequence[int]) -> Any:
        assert len(x) == sum(sent)
        ends = np.cumsum(sent)
        parts = [x[end - count : end] for end, count in zip(ends, sent, strict=True)]
        got = [theirs[self.rank] for theirs in self._share(parts)]
        assert [len(part) for part in got] == list(received)
        return namespace(x).concatenate(got)


def on_threads(size: int, function: Callable[[Any], Any], timeout: float = 60) -> list[Any]:
    """What `function` returns or raises on every rank; it is given the rank's communicator.

    A rank that ends by anything but an Exception is dead to the others, as if killed. One that
    waits longer for the others raises BrokenBarrierError.
    """
    meeting = threading.Barrier(size, timeout=timeout)
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

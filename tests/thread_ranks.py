"""Ranks that are threads of this process, for what needs no MPI."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gpu_hodlr.devices import namespace


class ThreadRank:
    """One of several; see `gpu_hodlr.distributed.Communicator`."""

    def __init__(self, rank: int, box: list[Any], meeting: threading.Barrier) -> None:
        self.rank, self.size = rank, len(box)
        self._box, self._meeting = box, meeting

    def share(self, x: Any) -> list[Any]:
        self._box[self.rank] = x
        self._meeting.wait()
        got = list(self._box)
        self._meeting.wait()
        return got

    def bcast(self, x: Any, root: int = 0) -> Any:
        return self.share(x)[root]

    def allgather(self, x: Any, counts: list[int]) -> Any:
        return namespace(x).concatenate(self.share(x))

    def exchange(self, parts: list[Any], counts: list[int]) -> list[Any]:
        return [theirs[self.rank] for theirs in self.share(parts)]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        mine = None
        try:
            yield
        except Exception as e:
            mine = e
        for error in self.share(mine):
            if error is not None:
                raise error

    def same(self, **values: Any) -> None:
        pass

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield


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

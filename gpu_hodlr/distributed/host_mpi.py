"""Ranks of mpi4py that pass host memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np

from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed.messages import Communicator
from gpu_hodlr.distributed.watchdog import Watchdog, patience


class HostMPI(Communicator):
    """Ranks whose MPI reads and writes host memory; CuPy arrays are staged through pinned memory.

    See `Communicator`.

    Args:
        comm: an mpi4py intracommunicator of our own: messages must not mix with others'.
    """

    def __init__(self, comm: Any) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())
        self._comm = comm
        self._watched = watched()

    def _waiting(self) -> AbstractContextManager[Any]:
        return self._watched

    def _send_buffer(self, x: Array) -> Array:
        """The contents of x where MPI can read them."""
        if namespace(x) is np:
            return np.ascontiguousarray(x)
        import cupyx

        staged = cupyx.empty_pinned(x.shape, x.dtype)
        namespace(x).ascontiguousarray(x).get(out=staged)  # waits for the stream
        return staged

    def _receive_buffer(self, shape: tuple[int, ...], like: Array) -> Array:
        """Memory that MPI can write, for an array like another."""
        if namespace(like) is np:
            return np.empty(shape, like.dtype)
        import cupyx

        return cupyx.empty_pinned(shape, like.dtype)

    def _received(self, buffer: Array, like: Array) -> Array:
        """The array of the wanted library from `_receive_buffer`'s memory."""
        return buffer if namespace(like) is np else namespace(like).asarray(buffer)

    def _allgather(self, x: Array, counts: Sequence[int]) -> Array:
        row = int(np.prod(x.shape[1:]))
        sent = self._send_buffer(x)
        got = self._receive_buffer((sum(counts), *x.shape[1:]), x)
        sizes = [count * row for count in counts]
        self._comm.Allgatherv(sent, [got, sizes, _offsets(sizes), _type_of(x)])
        return self._received(got, x)

    def _allreduce(self, x: Array) -> Array:
        # Reduce, then Bcast: MPI promises the same bits everywhere for no other sum.
        sent = self._send_buffer(x)
        got = self._receive_buffer(x.shape, x)
        self._comm.Reduce(sent, got)
        self._comm.Bcast(got)
        return self._received(got, x)

    def _bcast(self, x: Any, root: int) -> Any:
        return self._comm.bcast(x, root)

    def _share(self, x: Any) -> list[Any]:
        every: list[Any] = self._comm.allgather(x)
        return every

    def _least(self, numbers: tuple[int, ...]) -> list[int]:
        from mpi4py import MPI

        least = np.empty(len(numbers), np.int64)
        self._comm.Allreduce(np.array(numbers, np.int64), least, MPI.MIN)
        found: list[int] = least.tolist()
        return found

    def _exchange(self, x: Array, sent: Sequence[int], received: Sequence[int]) -> Array:
        row, kind = int(np.prod(x.shape[1:])), _type_of(x)
        buffer = self._send_buffer(x)
        got = self._receive_buffer((sum(received), *x.shape[1:]), x)
        out, back = ([count * row for count in counts] for counts in (sent, received))
        self._comm.Alltoallv([buffer, out, _offsets(out), kind], [got, back, _offsets(back), kind])
        return self._received(got, x)


@cache
def watched() -> AbstractContextManager[Any]:
    """Round every wait for other ranks; one for the process.

    Raises:
        ArgumentError: see `watchdog.patience`.
    """
    seconds = patience()
    if seconds is None:
        return nullcontext()
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    who = f"rank {world.Get_rank()} of {world.Get_size()}"
    return Watchdog(seconds, who, lambda: world.Abort(1))


def _offsets(sizes: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(sizes[:-1]).tolist()] if len(sizes) else []


def _type_of(x: Array) -> Any:
    """The MPI type of an array's entries."""
    from mpi4py.util import dtlib

    return dtlib.from_numpy_dtype(x.dtype)

"""Ranks of an mpi4py whose MPI passes GPU memory, and of NCCL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np

from gpu_hodlr.devices import Array, cuda_library, namespace
from gpu_hodlr.distributed.host_mpi import HostMPI
from gpu_hodlr.distributed.watchdog import Watchdog


class DeviceMPI(HostMPI):
    """Ranks whose MPI reads and writes GPU memory (it is CUDA-aware); see `Communicator`."""

    def _send_buffer(self, x: Array) -> Array:
        xp = namespace(x)
        buffer = xp.ascontiguousarray(x)
        if xp is not np:
            xp.cuda.get_current_stream().synchronize()  # MPI knows nothing of streams
        return buffer

    def _receive_buffer(self, shape: tuple[int, ...], like: Array) -> Array:
        xp = namespace(like)
        buffer = xp.empty(shape, like.dtype)
        if xp is not np:  # the pool's memory may still be read by work before
            xp.cuda.get_current_stream().synchronize()
        return buffer

    def _received(self, buffer: Array, like: Array) -> Array:
        return buffer


class NcclCollectives(HostMPI):
    """Ranks with a GPU each: NCCL passes and sums GPU memory; see `Communicator`.

    It gathers equal parts alone: where the ranks' counts differ, the parts are padded. An exchange
    is a group of sends and receives (NCCL 2.7 and newer). A message is put on the stream, where the
    GPU waits for the others; GPU_HODLR_TIMEOUT counts from when all before it is done.

    Args:
        comm: an mpi4py communicator of our own.
        nccl: CuPy's `NcclCommunicator` of the same ranks.
    """

    def __init__(self, comm: Any, nccl: Any) -> None:
        super().__init__(comm)
        self._nccl = nccl

    @contextmanager
    def _on_stream(self, xp: Any) -> Iterator[int]:
        """Round a message that is put on the current stream, whose pointer is given."""
        stream = xp.cuda.get_current_stream()
        if not isinstance(self._watched, Watchdog):
            yield stream.ptr
            return
        begun, ended = (xp.cuda.Event(disable_timing=True) for _ in range(2))
        begun.record(stream)
        yield stream.ptr
        ended.record(stream)
        self._watched.follow(begun, ended, self._state)

    def _state(self) -> str:
        """What NCCL says of itself."""
        try:
            self._nccl.check_async_error()
        except Exception as error:
            return f"where NCCL has failed: {error}"
        return "in NCCL, which has met no error"

    def _allgather(self, x: Array, counts: Sequence[int]) -> Array:
        xp = namespace(x)
        if xp is np:
            return super()._allgather(x, counts)
        sent = xp.zeros((max(counts), *x.shape[1:]), x.dtype)
        sent[: len(x)] = x
        got = xp.empty((self.size, *sent.shape), x.dtype)
        kind = cuda_library("nccl").NCCL_UINT8
        with self._on_stream(xp) as stream:
            self._nccl.allGather(sent.data.ptr, got.data.ptr, sent.nbytes, kind, stream)
        return xp.concatenate([part[:count] for part, count in zip(got, counts, strict=True)])

    def _allreduce(self, x: Array) -> Array:
        xp = namespace(x)
        if xp is np:
            return super()._allreduce(x)
        sent, got = xp.ascontiguousarray(x), xp.empty(x.shape, x.dtype)
        add, kind = cuda_library("nccl").NCCL_SUM, _nccl_type(x)
        with self._on_stream(xp) as stream:
            # Reduce, then broadcast: every rank gets the bits that rank 0 has.
            self._nccl.reduce(sent.data.ptr, got.data.ptr, x.size, kind, add, 0, stream)
            self._nccl.bcast(got.data.ptr, x.size, kind, 0, stream)
        return got

    def _exchange(self, x: Array, sent: Sequence[int], received: Sequence[int]) -> Array:
        xp = namespace(x)
        if xp is np:
            return super()._exchange(x, sent, received)
        out, got = xp.ascontiguousarray(x), xp.empty((sum(received), *x.shape[1:]), x.dtype)
        nccl = cuda_library("nccl")
        parts, places = (_split(a, counts) for a, counts in ((out, sent), (got, received)))
        places[self.rank][...] = parts[self.rank]
        with self._on_stream(xp) as stream:
            nccl.groupStart()
            for rank in range(self.size):
                for part, move in ((parts[rank], self._nccl.send), (places[rank], self._nccl.recv)):
                    if rank != self.rank and part.size:
                        move(part.data.ptr, part.nbytes, nccl.NCCL_UINT8, rank, stream)
            nccl.groupEnd()
        return got


class NcclDeviceMPI(NcclCollectives, DeviceMPI):
    """NCCL beside a CUDA-aware MPI."""


def _split(x: Array, counts: Sequence[int]) -> list[Array]:
    """Consecutive rows, so many each: views."""
    return [x[end - count : end] for end, count in zip(accumulate(counts), counts, strict=True)]


def _nccl_type(x: Array) -> int:
    """NCCL's type of the entries."""
    nccl = cuda_library("nccl")
    known: dict[Any, int] = {
        np.dtype(np.float32): nccl.NCCL_FLOAT32,
        np.dtype(np.float64): nccl.NCCL_FLOAT64,
        np.dtype(np.int64): nccl.NCCL_INT64,
        np.dtype(np.int32): nccl.NCCL_INT32,
    }
    return known[x.dtype]

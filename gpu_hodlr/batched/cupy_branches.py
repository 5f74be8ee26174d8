"""Branches of a captured function: streams forked from the one that is captured."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Self

import cupy

from gpu_hodlr.batched import cublas

LANES = 3  # streams for branches: leaf blocks, couplings, and a short one within a level
# Bytes for cuBLAS on one of them: two streams at a time must not have one workspace. Not what is
# best for the largest GPUs, as it does the smaller part of the work.
WORKSPACE = 4 << 20


@dataclass(frozen=True)
class Lane:
    """A stream for branches, and cuBLAS's workspace there; None where cuBLAS is not called."""

    stream: cupy.cuda.Stream
    workspace: cupy.cuda.MemoryPointer | None


class _OfThread(threading.local):
    free: list[Lane] | None = None  # lanes that no branch has; None: nothing is captured


_mine = _OfThread()


@contextmanager
def forking(lanes: Sequence[Lane]) -> Iterator[None]:
    """Branches of this thread fork onto these lanes.

    For a capture of our own, whose allocator gives no memory twice: what a pool gives back from one
    stream to another would be written while a branch still reads it.
    """
    _mine.free = list(lanes)
    try:
        yield
    finally:
        _mine.free = None


class Forked:
    """See `branches.Branch`; outside of `forking`, or of lanes, all stays on the current stream.

    It has a lane from its first block to its join.
    """

    def __init__(self) -> None:
        self._lane: Lane | None = None
        self._inside = ExitStack()

    def __enter__(self) -> Self:
        if self._lane is None and _mine.free:
            self._lane = _mine.free.pop()
        if self._lane is not None:
            _follow(self._lane.stream, cupy.cuda.get_current_stream())
            self._inside.enter_context(self._lane.stream)
            self._inside.enter_context(cublas.own_workspace(self._lane.workspace, WORKSPACE))
        return self

    def __exit__(self, *error: object) -> None:
        self._inside.close()

    def join(self) -> None:
        """See `branches.Branch`."""
        lane, self._lane = self._lane, None
        if lane is not None:
            _follow(cupy.cuda.get_current_stream(), lane.stream)
            if _mine.free is not None:
                _mine.free.append(lane)


def _follow(stream: cupy.cuda.Stream, other: cupy.cuda.Stream) -> None:
    """What a stream is asked for from now on waits for what the other one was asked for."""
    event = cupy.cuda.Event(disable_timing=True)
    event.record(other)
    stream.wait_event(event)

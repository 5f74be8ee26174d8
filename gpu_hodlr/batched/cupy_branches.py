"""Branches of a captured function: streams forked from the one that is captured."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Self

import cupy

from gpu_hodlr.batched import cublas

LANES = 2  # streams that branches share: what is forked from a product is wide enough by then
# Bytes for cuBLAS on one of them: two streams at a time must not have one workspace. Not what is
# best for the largest GPUs, as it does the smaller part of the work.
WORKSPACE = 4 << 20


@dataclass(frozen=True)
class Lane:
    """A stream for branches, and cuBLAS's workspace there; None where cuBLAS is not called."""

    stream: cupy.cuda.Stream
    workspace: cupy.cuda.MemoryPointer | None


class _OfThread(threading.local):
    lanes: Iterator[Lane] | None = None  # None: nothing is captured that could fork


_mine = _OfThread()


@contextmanager
def forking(lanes: Sequence[Lane]) -> Iterator[None]:
    """Branches of this thread fork onto these lanes, by turns.

    For a capture of our own, whose allocator gives no memory twice: what a pool gives back from one
    stream to another would be written while a branch still reads it.
    """
    _mine.lanes = cycle(lanes)
    try:
        yield
    finally:
        _mine.lanes = None


class Forked:
    """See `branches.Branch`; outside of `forking` everything stays on the current stream."""

    def __init__(self) -> None:
        self._lane: Lane | None = None
        self._inside = ExitStack()

    def __enter__(self) -> Self:
        if self._lane is None and _mine.lanes is not None:
            self._lane = next(_mine.lanes)
        if self._lane is not None:
            _follow(self._lane.stream, cupy.cuda.get_current_stream())
            self._inside.enter_context(self._lane.stream)
            self._inside.enter_context(cublas.own_workspace(self._lane.workspace, WORKSPACE))
        return self

    def __exit__(self, *error: object) -> None:
        self._inside.close()

    def join(self) -> None:
        """See `branches.Branch`."""
        if self._lane is not None:
            _follow(cupy.cuda.get_current_stream(), self._lane.stream)


def _follow(stream: cupy.cuda.Stream, other: cupy.cuda.Stream) -> None:
    """What a stream is asked for from now on waits for what the other one was asked for."""
    event = cupy.cuda.Event(disable_timing=True)
    event.record(other)
    stream.wait_event(event)

"""`cupy.cuda` of the stand-in: device, runtime, streams, events, graphs."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from host_cupy import memory, state
from host_cupy.state import (
    CAPTURED_EVENT,
    IMPLICIT,
    INVALIDATED,
    ISOLATION,
    MERGE,
    UNJOINED,
    UNMATCHED,
    UNSUPPORTED,
    Capture,
    CUDARuntimeError,
)

RUNTIME_VERSION, DRIVER_VERSION = 12090, 12090
COMPUTE_CAPABILITY = "90"
_handles = itertools.count(0x1000, 0x10)


class Event:
    """Work is done at once, so that an event is a time."""

    def __init__(
        self, block: bool = False, disable_timing: bool = False, interprocess: bool = False
    ) -> None:
        self.ptr, self._timed, self._time = next(_handles), not disable_timing, None
        self._recorded_by: Capture | None = None
        self._recorded_on = 0
        self._nodes: frozenset[int] = frozenset()  # of the capture
        self._before: dict[int, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = get_current_stream() if stream is None else stream
        self._recorded_by, self._recorded_on = state.captures.get(stream.ptr), stream.ptr
        if self._recorded_by is not None:
            self._nodes = self._recorded_by.last.get(stream.ptr, frozenset())
        self._time = None if self._recorded_by else time.perf_counter()
        self._before = state.progress.before(stream.ptr)

    @property
    def done(self) -> bool:
        state.refuse_capture("cudaEventQuery")
        return True

    def synchronize(self) -> None:
        if self._recorded_by in _open():
            state.wait("cudaEventSynchronize of an event of a capture")
        else:  # in CuPy's capture mode, "relaxed", a capture survives it
            state.counters.synchronizations += 1
        state.progress.waited(self._before)


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds between two events; meaningless as a GPU time."""
    for event in (start_event, end_event):
        if event._time is None or not event._timed:
            raise CUDARuntimeError(1, "an event that was not recorded or keeps no time")
    return (end_event._time - start_event._time) * 1e3


class Stream:
    null: Stream

    def __init__(
        self,
        null: bool = False,
        non_blocking: bool = False,
        ptds: bool = False,
        priority: int | None = None,
    ) -> None:
        if ptds:
            raise NotImplementedError("the stand-in has no per-thread default stream")
        self.ptr = 0 if null else next(_handles)
        self.is_non_blocking, self.device_id = non_blocking, -1 if null else 0
        self._before: list[Any] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __enter__(self) -> Stream:
        self._before.append(state.current.stream)
        state.current.stream = self
        return self

    def __exit__(self, *exception: object) -> None:
        state.current.stream = self._before.pop()

    def use(self) -> Stream:
        state.current.stream = self
        return self

    @property
    def done(self) -> bool:
        state.refuse_capture("cudaStreamQuery")
        return True

    def synchronize(self) -> None:
        state.wait("cudaStreamSynchronize")
        state.progress.waited(state.progress.before(self.ptr))

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        mine, its = state.captures.get(self.ptr), event._recorded_by
        if its is None:
            if mine is not None:
                raise CUDARuntimeError(ISOLATION)
            state.progress.follow(self.ptr, event._before)
            return
        if its not in _open():
            raise CUDARuntimeError(CAPTURED_EVENT)
        if mine is None:  # a fork: the stream takes part in the capture from now on
            if self.ptr == 0:
                raise CUDARuntimeError(IMPLICIT)
            state.captures[self.ptr] = its
        elif mine is not its:
            raise CUDARuntimeError(MERGE)
        its.follow(self.ptr, event._recorded_on, event._nodes)

    def begin_capture(self, mode: int | None = None) -> None:
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.ptr in state.captures:
            raise CUDARuntimeError(UNSUPPORTED, "the stream is capturing already")
        state.captures[self.ptr] = Capture(threading.get_ident(), self.ptr)

    def end_capture(self) -> Graph:
        capture = state.captures.get(self.ptr)
        if capture is None:
            raise CUDARuntimeError(UNSUPPORTED, "the stream is not capturing")
        if capture.origin != self.ptr:
            raise CUDARuntimeError(UNMATCHED)
        for pointer in [pointer for pointer, one in state.captures.items() if one is capture]:
            del state.captures[pointer]
        if capture.invalid:
            raise CUDARuntimeError(INVALIDATED)
        if capture.unjoined:
            raise CUDARuntimeError(UNJOINED)
        if state.failing_captures:
            raise CUDARuntimeError(state.failing_captures.pop(0))
        state.captured.append(state.Captured(len(capture.nodes), state.longest_path(capture.nodes)))
        return Graph._of(capture.nodes)

    def is_capturing(self) -> bool:
        return self.ptr in state.captures


Stream.null = Stream(null=True)


def _open() -> list[Capture]:
    return list(state.captures.values())


def get_current_stream(device_id: int = -1) -> Stream:
    return Stream.null if state.current.stream is None else state.current.stream


class Graph:
    """Recorded work, done again on the memory it was recorded with.

    A GPU does it in any order that the dependencies allow: here by turns in two of them.
    """

    _orders: list[list[state.Node]]
    _launched: dict[int, int]  # by stream: the number of the last launch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a graph comes from a stream's capture")

    @classmethod
    def _of(cls, nodes: list[state.Node]) -> Graph:
        graph = object.__new__(cls)
        graph._orders, graph._launched = [state.latest_first(nodes), nodes], {}
        return graph

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        launched = getattr(self, "_launched", {})
        if not is_finalizing() and not state.progress.is_done(launched):
            state.counters.graphs_freed_running += 1

    def launch(self, stream: Stream | None = None) -> None:
        pointer = state.stream_pointer() if stream is None else stream.ptr
        state.counters.graph_launches += 1
        self._launched[pointer] = state.progress.ask(pointer)
        for node in self._orders[0]:
            state.enqueue(node.work, pointer)
        self._orders.reverse()

    def upload(self, stream: Stream | None = None) -> None:
        state.refuse_capture("cudaGraphUpload")


class Device:
    """The one device."""

    attributes = {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 227 * 1024}  # noqa: RUF012
    compute_capability = COMPUTE_CAPABILITY

    def __init__(self, device: Any = None) -> None:
        self.id = 0 if device is None else int(device)
        if self.id != 0:
            raise CUDARuntimeError(1, "there is device 0 only")

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def use(self) -> None:
        pass

    def synchronize(self) -> None:
        deviceSynchronize()

    @property
    def mem_info(self) -> tuple[int, int]:
        return memGetInfo()


# ---- cupy.cuda.runtime -----------------------------------------------------------------------


def getDeviceCount() -> int:  # noqa: N802
    return 1


def getDevice() -> int:  # noqa: N802
    return 0


def setDevice(device: int) -> None:  # noqa: N802
    Device(device)


def memGetInfo() -> tuple[int, int]:  # noqa: N802
    accounts = memory.accounts
    return accounts.capacity - accounts.allocated, accounts.capacity


def driverGetVersion() -> int:  # noqa: N802
    return DRIVER_VERSION


def runtimeGetVersion() -> int:  # noqa: N802
    return RUNTIME_VERSION


def getDeviceProperties(device: int) -> dict[str, Any]:  # noqa: N802
    Device(device)
    return {
        "name": b"host stand-in, not a GPU",
        "totalGlobalMem": memory.accounts.capacity,
        "multiProcessorCount": 132,
        "major": 9,
        "minor": 0,
        "sharedMemPerBlockOptin": 227 * 1024,
        "warpSize": 32,
    }


def deviceSynchronize() -> None:  # noqa: N802
    state.wait("cudaDeviceSynchronize")
    state.progress.waited_for_all()


def is_available() -> bool:
    return True


def get_device_id() -> int:
    return 0

"""What has been counted, which stream is current and what is being captured."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

_NAMES = {
    1: ("cudaErrorInvalidValue", "invalid argument"),
    2: ("cudaErrorMemoryAllocation", "out of memory"),
    9: ("cudaErrorInvalidConfiguration", "invalid configuration argument"),
    700: ("cudaErrorIllegalAddress", "an illegal memory access was encountered"),
    900: (
        "cudaErrorStreamCaptureUnsupported",
        "operation not permitted when stream is capturing",
    ),
    901: (
        "cudaErrorStreamCaptureInvalidated",
        "operation failed due to a previous error during capture",
    ),
    902: (
        "cudaErrorStreamCaptureMerge",
        "operation would result in a merge of separate capture sequences",
    ),
    903: (
        "cudaErrorStreamCaptureUnmatched",
        "capture was not ended in the same stream as it began",
    ),
    904: (
        "cudaErrorStreamCaptureUnjoined",
        "capturing stream has unjoined work",
    ),
    905: (
        "cudaErrorStreamCaptureIsolation",
        "dependency created on uncaptured work in another stream",
    ),
    907: (
        "cudaErrorCapturedEvent",
        "operation not permitted on an event last recorded in a capturing stream",
    ),
    906: (
        "cudaErrorStreamCaptureImplicit",
        "operation would make the legacy stream depend on a capturing blocking stream",
    ),
}
UNSUPPORTED, INVALIDATED, MERGE, UNMATCHED, UNJOINED, ISOLATION, IMPLICIT = range(900, 907)
CAPTURED_EVENT = 907


def words(text: str) -> list[str]:
    return text.split()


class CUDARuntimeError(RuntimeError):
    """As CuPy's, with a remark on what the stand-in objects to."""

    def __init__(self, status: int, *remarks: str) -> None:
        self.status = status
        name, text = _NAMES.get(status, ("cudaErrorUnknown", "unknown error"))
        super().__init__(f"{name}: {text}{f' ({remarks[0]})' if remarks else ''}")


class CUDADriverError(RuntimeError):
    """As CuPy's."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


@dataclass
class Counters:
    """What the host asked of the device since the last `reset`."""

    launches: int = 0  # of raw kernels
    library_calls: int = 0  # cuBLAS and cuSOLVER, CuPy's matmul, dot and einsum included
    array_operations: int = 0  # CuPy functions that launch kernels of their own
    sorts: int = 0  # of those, sort and argsort: Thrust, which in older CuPy waits for the GPU
    synchronizations: int = 0  # the host waits: reads of values, boolean masks, ...
    host_to_device: int = 0  # copies of host memory
    device_allocations: int = 0  # cudaMalloc
    graph_launches: int = 0
    compilations: int = 0  # of kernel sources
    captured_without_workspace: int = 0  # cuBLAS calls: each puts an allocation into the graph
    graphs_freed_running: int = 0  # memory goes back while a launch may still use it

    def reset(self) -> None:
        for one in fields(self):
            setattr(self, one.name, 0)


counters = Counters()


@dataclass(eq=False, frozen=True)
class Node:
    """Work of a graph, and the numbers of the nodes that must be done before."""

    work: Callable[[], None]
    before: frozenset[int]


@dataclass(eq=False)
class Capture:
    """Work recorded instead of done, on the stream it began on and on those forked from it."""

    thread: int
    origin: int  # the stream's pointer
    nodes: list[Node] = field(default_factory=list)
    invalid: bool = False
    # By stream: the nodes that its next work follows.
    last: dict[int, frozenset[int]] = field(default_factory=dict)
    # Forked streams with work, or a fork, that no other stream has waited for.
    unjoined: set[int] = field(default_factory=set)

    def add(self, work: Callable[[], None], pointer: int) -> None:
        """Work on one of its streams."""
        self.nodes.append(Node(work, self.last.get(pointer, frozenset())))
        self.last[pointer] = frozenset([len(self.nodes) - 1])
        self._changed(pointer)

    def follow(self, pointer: int, recorded_on: int, nodes: frozenset[int]) -> None:
        """One of its streams waits for an event recorded on another one."""
        self.last[pointer] = self.last.get(pointer, frozenset()) | nodes
        if self.last.get(recorded_on, frozenset()) <= nodes:
            self.unjoined.discard(recorded_on)
        self._changed(pointer)

    def _changed(self, pointer: int) -> None:
        if pointer != self.origin:
            self.unjoined.add(pointer)


@dataclass(frozen=True)
class Captured:
    """The size of a graph: its nodes, and how many of them stand on its longest path."""

    nodes: int
    depth: int


def longest_path(nodes: list[Node]) -> int:
    """Nodes of the longest chain in which each must wait for the one before."""
    depths: list[int] = []
    for node in nodes:  # which follows earlier ones alone
        depths.append(1 + max((depths[i] for i in node.before), default=0))
    return max(depths, default=0)


def latest_first(nodes: list[Node]) -> list[Node]:
    """The nodes in another order that their dependencies allow: what was asked for last goes first.

    Work that lacks a dependency comes out wrong in it.
    """
    waiting = [len(node.before) for node in nodes]
    after: list[list[int]] = [[] for _ in nodes]
    for number, node in enumerate(nodes):
        for i in node.before:
            after[i].append(number)
    ready = [-number for number, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        number = -heapq.heappop(ready)
        order.append(nodes[number])
        for i in after[number]:
            waiting[i] -= 1
            if not waiting[i]:
                heapq.heappush(ready, -i)
    return order


class _Current(threading.local):
    stream: Any = None  # None: the null stream
    allocator: Callable[[int], Any] | None = None


current = _Current()
captures: dict[int, Capture] = {}  # of the streams that are capturing, by their pointer
compiled: set[str] = set()  # sources


class Progress:
    """What streams are asked for, in the order of asking, and what the host knows to be done.

    The stand-in does work at once; a GPU has done what the host has waited for, and no more is
    known.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        # By stream: the last work of every stream that has to be done for it to be done.
        self._asked: dict[int, dict[int, int]] = {}
        self._done: dict[int, int] = {}

    def ask(self, pointer: int) -> int:
        """Number of a piece of work on a stream."""
        number = next(self._numbers)
        self._asked.setdefault(pointer, {})[pointer] = number
        return number

    def before(self, pointer: int) -> dict[int, int]:
        """What an event recorded now stands for."""
        return dict(self._asked.get(pointer, {}))

    def follow(self, pointer: int, before: dict[int, int]) -> None:
        """A stream waits for an event."""
        _raise_to(self._asked.setdefault(pointer, {}), before)

    def waited(self, before: dict[int, int]) -> None:
        """The host has waited for an event or a stream."""
        _raise_to(self._done, before)

    def waited_for_all(self) -> None:
        for asked in self._asked.values():
            self.waited(asked)

    def is_done(self, work: dict[int, int]) -> bool:
        """Whether the host knows it of work by stream."""
        return all(self._done.get(pointer, 0) >= number for pointer, number in work.items())


def _raise_to(values: dict[int, int], others: dict[int, int]) -> None:
    for key, value in others.items():
        values[key] = max(values.get(key, 0), value)


progress = Progress()
failing_captures: list[int] = []  # what the next captures end with, instead of a graph
captured: list[Captured] = []  # the graphs that captures ended with


def stream_pointer() -> int:
    return 0 if current.stream is None else int(current.stream.ptr)


def capture_of(pointer: int) -> Capture | None:
    """The capture that work on a stream belongs to, None where it is done at once."""
    if not captures:
        return None
    if pointer in captures:
        return captures[pointer]
    if any(one.thread == threading.get_ident() for one in captures.values()):
        raise CUDARuntimeError(IMPLICIT, "work on another stream than the one being captured")
    return None


def is_capturing() -> bool:
    return stream_pointer() in captures


def enqueue(work: Callable[[], None], pointer: int | None = None) -> None:
    """Do work on a stream (the current one), or record it while the stream is capturing."""
    pointer = stream_pointer() if pointer is None else pointer
    capture = capture_of(pointer)
    if capture is None:
        work()
    else:
        capture.add(work, pointer)


def _mine() -> list[Capture]:
    return [one for one in captures.values() if one.thread == threading.get_ident()]


def wait(what: str) -> None:
    """The host waits for the device, which a capture does not survive."""
    mine = _mine()
    for capture in mine:
        capture.invalid = True
    if mine:
        raise CUDARuntimeError(UNSUPPORTED, what)
    counters.synchronizations += 1


def read(what: str) -> None:
    """A copy from the device, for which the host waits."""
    if _mine():
        raise RuntimeError(
            f"the current stream is capturing, so D2H transfers are disallowed ({what})"
        )
    counters.synchronizations += 1
    progress.waited(progress.before(stream_pointer()))


def send(what: str) -> None:
    """A copy of pageable host memory to the device."""
    if _mine():
        raise RuntimeError(
            f"the current stream is capturing, so H2D transfers are disallowed ({what})"
        )
    counters.host_to_device += 1


def refuse_capture(what: str) -> None:
    """For what may not happen, or is not known to work, during a capture."""
    if _mine():
        raise CUDARuntimeError(UNSUPPORTED, what)


def refuse_library(what: str) -> None:
    """CuPy's own calls of cuBLAS and cuSOLVER refuse to be captured."""
    if _mine():
        raise NotImplementedError(
            f"calling {what} API during stream capture is currently unsupported"
        )
    counters.library_calls += 1

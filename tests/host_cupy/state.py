"""What has been counted, which stream is current and what is being captured."""

from __future__ import annotations

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
    906: (
        "cudaErrorStreamCaptureImplicit",
        "operation would make the legacy stream depend on a capturing blocking stream",
    ),
}
UNSUPPORTED, INVALIDATED, IMPLICIT = 900, 901, 906


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

    def reset(self) -> None:
        for one in fields(self):
            setattr(self, one.name, 0)


counters = Counters()


@dataclass(eq=False)
class Capture:
    """Work recorded instead of done."""

    thread: int
    records: list[Callable[[], None]] = field(default_factory=list)
    invalid: bool = False


class _Current(threading.local):
    stream: Any = None  # None: the null stream
    allocator: Callable[[int], Any] | None = None


current = _Current()
captures: dict[int, Capture] = {}  # of the streams that are capturing, by their pointer


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
    capture = capture_of(stream_pointer() if pointer is None else pointer)
    if capture is None:
        work()
    else:
        capture.records.append(work)


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

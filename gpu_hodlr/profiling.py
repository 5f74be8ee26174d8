"""Seconds by phase, and NVTX ranges for nsys where the package nvtx is installed.

`with timing(device) as timer:` round the work; `with phase("sampling"):` wherever a phase is. The
timer is of the thread that set it (a context variable): ranks that are threads have their own.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

from gpu_hodlr.devices import elapsed, mark

_DOMAIN: Any = None


def _domain() -> Any:
    """The NVTX domain of the package, or False without nvtx; looked up once."""
    global _DOMAIN
    if _DOMAIN is None:
        try:
            import nvtx

            _DOMAIN = nvtx.get_domain("gpu_hodlr")
        except ImportError:
            _DOMAIN = False
    return _DOMAIN


class _Range:
    """A named range with its event attributes; it may be entered again, and by several threads."""

    __slots__ = ("_attributes", "_pop", "_push")

    def __init__(self, domain: Any, name: str) -> None:
        self._attributes = domain.get_event_attributes(message=name)
        self._push, self._pop = domain.push_range, domain.pop_range

    def __enter__(self) -> None:
        self._push(self._attributes)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pop()


@cache
def nvtx_range(name: str) -> AbstractContextManager[None]:
    """A range on the profiler's time line, built once for each name.

    Names are few: phases, and levels by their number of nodes. Around a function that a GPU
    replays as a graph a range shows its launch; ranges inside show at its capture alone.
    """
    domain = _domain()
    return _Range(domain, name) if domain else nullcontext()


class PhaseTimer:
    """Adds up seconds by phase and CPU seconds (all threads) over its life.

    On the CPU they are wall seconds. A GPU is still at work when a phase's calls have returned: a
    phase there is what lies between two marks on the current stream (`devices.mark`), which wait
    for nothing and are read when `seconds` is asked for. So its seconds are its own, not those of
    whichever phase waits next; where the host is busy, the time in which the GPU idles counts.

    Phases may lie within each other and in several threads: each is counted in full.

    Args:
        device: "cpu" or "cuda", where the phases' work is done.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._spans: deque[tuple[str, Any, Any]] = deque()  # not yet read
        self._seconds: dict[str, float] = {}
        self._reading = threading.Lock()
        self._cpu_start = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; the same name again adds to it."""
        start = mark(self._device)
        try:
            with nvtx_range(name):
                yield
        finally:
            self._spans.append((name, start, mark(self._device)))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, of those that have ended; on a GPU it waits for them."""
        with self._reading:
            while self._spans:
                name, start, end = self._spans.popleft()
                self._seconds[name] = self._seconds.get(name, 0.0) + elapsed(start, end)
            return dict(self._seconds)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of this process, all threads, since the timer was made."""
        return time.process_time() - self._cpu_start


_TIMER: ContextVar[PhaseTimer | None] = ContextVar("timer", default=None)


@contextmanager
def timing(device: str = "cpu") -> Iterator[PhaseTimer]:
    """Give a timer for the phases of the block; a `timing` around it does not get these.

    Args:
        device: see `PhaseTimer`.
    """
    timer = PhaseTimer(device)
    token = _TIMER.set(timer)
    try:
        yield timer
    finally:
        _TIMER.reset(token)


def phase(name: str) -> AbstractContextManager[None]:
    """A phase of what this thread times; where it times nothing, an NVTX range alone."""
    timer = _TIMER.get()
    return nvtx_range(name) if timer is None else timer.phase(name)

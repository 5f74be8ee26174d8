"""Seconds by phase, and NVTX ranges for nsys where the package nvtx is installed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

from gpu_hodlr.devices import synchronize

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
    """Adds up wall seconds by phase and CPU seconds (all threads) over its life.

    A GPU is still at work when the calls of a phase have returned: the timer waits for it
    (`devices.synchronize`) before it takes the time, so that a phase's seconds are its own and not
    those of whichever phase waits next.

    Args:
        device: "cpu" or "cuda", where the phases' work is done.

    Attributes:
        seconds: wall seconds by phase.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._cpu_start = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; the same name again adds to it."""
        start = time.perf_counter()
        try:
            with nvtx_range(name):
                yield
                synchronize(self._device)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of this process, all threads, since the timer was made."""
        return time.process_time() - self._cpu_start

"""Seconds by phase, and NVTX ranges for nsys where the package nvtx is installed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """Mark a range on the profiler's time line."""
    domain = _domain()
    if not domain:
        yield
        return
    domain.push_range(domain.get_event_attributes(message=name))
    try:
        yield
    finally:
        domain.pop_range()


class PhaseTimer:
    """Adds up wall seconds by phase and CPU seconds (all threads) over its life."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._cpu_start = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; the same name again adds to it."""
        start = time.perf_counter()
        try:
            with nvtx_range(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of this process, all threads, since the timer was made."""
        return time.process_time() - self._cpu_start

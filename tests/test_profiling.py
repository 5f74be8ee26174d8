"""Seconds by phase, and ranges with and without nvtx."""

import sys

import pytest

from gpu_hodlr import profiling


def test_phases_add_up(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 1.0, 10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(clock))
    timer = profiling.PhaseTimer()
    for name in ("a", "b", "a"):
        with timer.phase(name):
            pass
    assert timer.seconds == {"a": 1.25, "b": 2.5}
    assert timer.cpu_seconds >= 0


def test_a_phase_that_fails_is_counted():
    timer = profiling.PhaseTimer()
    with pytest.raises(ZeroDivisionError), timer.phase("a"):
        raise ZeroDivisionError
    assert set(timer.seconds) == {"a"}


def test_ranges_without_nvtx(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(profiling, "_DOMAIN", None)
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with profiling.nvtx_range("a"):
        pass
    assert profiling._DOMAIN is False


def test_ranges_with_nvtx(monkeypatch: pytest.MonkeyPatch):
    """Every range is pushed with its name and popped, also when it fails."""
    events = []

    class Domain:
        def get_event_attributes(self, message: str) -> str:
            return message

        def push_range(self, attributes: str) -> None:
            events.append(attributes)

        def pop_range(self) -> None:
            events.append("pop")

    monkeypatch.setattr(profiling, "_DOMAIN", Domain())
    with pytest.raises(KeyError), profiling.nvtx_range("outer"), profiling.nvtx_range("inner"):
        raise KeyError
    assert events == ["outer", "inner", "pop", "pop"]

"""Seconds by phase, and ranges with and without nvtx."""

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr import profiling, progress


class Domain:
    """As nvtx's: notes what is built, pushed and popped."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.events: list[Any] = []

    def get_event_attributes(self, message: str) -> tuple[str]:
        self.built.append(message)
        return (message,)

    def push_range(self, attributes: tuple[str]) -> None:
        self.events.append(attributes[0])

    def pop_range(self) -> None:
        self.events.append("pop")


@pytest.fixture(autouse=True)
def ranges_anew() -> Iterator[None]:
    """No range of another test, or for one."""
    profiling.nvtx_range.cache_clear()
    yield
    profiling.nvtx_range.cache_clear()


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Domain:
    found = Domain()
    monkeypatch.setattr(profiling, "_DOMAIN", found)
    return found


def nesting(events: list[str]) -> list[str]:
    """The ranges as paths, in the order of their beginning."""
    stack: list[str] = []
    paths = []
    for event in events:
        if event == "pop":
            stack.pop()
        else:
            stack.append(event)
            paths.append(" > ".join(stack))
    assert not stack
    return paths


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


def test_phases_of_a_device_wait_for_nothing(stand_in: Any):
    """Events are read once, when the seconds are asked for; then the next phases add to them."""
    timer = profiling.PhaseTimer("cuda")
    stand_in.counters.reset()
    for _ in range(5):
        with timer.phase("outer"), timer.phase("inner"):
            pass
    assert stand_in.counters.synchronizations == 0
    first = timer.seconds
    assert list(first) == ["inner", "outer"]
    assert all(type(value) is float and value > 0 for value in first.values())
    assert first["inner"] <= first["outer"]
    assert timer.seconds == first
    with timer.phase("inner"):
        pass
    assert timer.seconds["inner"] > first["inner"]
    assert timer.seconds["outer"] == first["outer"]


def test_a_phase_of_a_device_lasts_as_long_as_its_work(stand_in: Any, monkeypatch: Any):
    """The times are the device's: here 0, 1, 2, ... milliseconds at each event."""
    clock = iter(range(100))
    monkeypatch.setattr(stand_in.cupy.cuda, "get_elapsed_time", lambda a, b: b.at - a.at)

    class Event:
        waited = 0

        def record(self, stream: Any) -> None:
            self.at = float(next(clock))

        @property
        def done(self) -> bool:
            return False

        def synchronize(self) -> None:
            Event.waited += 1

    monkeypatch.setattr(stand_in.cupy.cuda, "Event", Event)
    timer = profiling.PhaseTimer("cuda")
    with timer.phase("outer"):  # 0 .. 5
        with timer.phase("inner"):  # 1 .. 2
            pass
        with pytest.raises(ZeroDivisionError), timer.phase("inner"):  # 3 .. 4
            raise ZeroDivisionError
    assert Event.waited == 0
    assert timer.seconds == {"inner": 2e-3, "outer": 5e-3}
    assert Event.waited == 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_phases_of_several_threads_and_streams(stand_in: Any, device: str):
    timer = profiling.PhaseTimer(device)

    def work() -> None:
        with stand_in.cupy.cuda.Stream(non_blocking=True):
            for _ in range(20):
                with timer.phase("a"):
                    time.sleep(1e-4)
                timer.seconds  # noqa: B018  read while others add

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timer.seconds["a"] >= 80 * 1e-4


def test_a_phase_is_of_the_timing_around_it():
    with profiling.phase("nowhere"):
        pass
    with profiling.timing() as outer:
        with profiling.phase("a"):
            pass
        with pytest.raises(ZeroDivisionError), profiling.timing() as inner, profiling.phase("b"):
            1 / 0  # noqa: B018
        with profiling.phase("c"):
            pass
    with profiling.phase("nowhere"):
        pass
    assert (set(outer.seconds), set(inner.seconds)) == ({"a", "c"}, {"b"})


def test_every_thread_times_its_own_phases():
    together, seen = threading.Barrier(3, timeout=10), {}

    def work(name: str) -> None:
        with profiling.timing() as timer:
            together.wait()
            with profiling.phase(name):
                together.wait()
            seen[name] = set(timer.seconds)

    with profiling.timing() as timer:
        threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for _ in range(2):
            together.wait()
        for thread in threads:
            thread.join()
    assert seen == {"a": {"a"}, "b": {"b"}}
    assert timer.seconds == {}


def test_a_bar_moves_with_the_levels_and_grows_with_the_sweeps(monkeypatch: pytest.MonkeyPatch):
    tqdm = pytest.importorskip("tqdm")
    seen = []

    class Bar(tqdm.tqdm):
        def update(self, n: float = 1) -> None:
            seen.append((self.n, self.total))
            super().update(n)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    progress.tick()
    with progress.bar(True, 2):
        progress.tick()
        with progress.bar(False, 2):  # a compression within
            progress.tick()
        for _ in range(2):
            progress.tick()
    progress.tick()
    assert seen == [(0, 2), (1, 2), (2, 4)]


def test_phases_of_a_compression_on_a_device(stand_in: Any):
    K = gh.compress(toeplitz(100), leaf_size=25, device="cuda")
    assert all(type(value) is float for value in K.report.seconds.values())
    assert sum(K.report.seconds.values()) > 0


def test_waiting_for_a_device(stand_in: Any):
    gh.devices.synchronize("cpu")
    stand_in.counters.reset()
    gh.devices.synchronize("cuda")
    assert stand_in.counters.synchronizations == 1


def test_ranges_without_nvtx(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(profiling, "_DOMAIN", None)
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with profiling.nvtx_range("a"), profiling.nvtx_range("b"), profiling.nvtx_range("a"):
        pass
    assert profiling._DOMAIN is False
    timer = profiling.PhaseTimer()
    with timer.phase("a"):
        pass
    assert set(timer.seconds) == {"a"}


def test_ranges_with_nvtx(domain: Domain):
    """Every range is pushed with its name and popped, also when it fails."""
    with pytest.raises(KeyError), profiling.nvtx_range("outer"), profiling.nvtx_range("inner"):
        raise KeyError
    assert domain.events == ["outer", "inner", "pop", "pop"]


def test_attributes_are_built_once_for_a_name(domain: Domain):
    for _ in range(3):
        with profiling.nvtx_range("a"), profiling.nvtx_range("b"), profiling.nvtx_range("a"):
            pass
    assert domain.built == ["a", "b"]
    assert domain.events == 3 * ["a", "b", "a", "pop", "pop", "pop"]


def test_threads_share_ranges(domain: Domain):
    def work() -> None:
        for _ in range(50):
            with profiling.nvtx_range("a"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert domain.events.count("a") == domain.events.count("pop") == 200


def test_ranges_with_the_package_nvtx(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("nvtx")
    monkeypatch.setattr(profiling, "_DOMAIN", None)
    with profiling.nvtx_range("a"), profiling.nvtx_range("a"):
        pass
    assert profiling._DOMAIN


def test_ranges_of_compression_factor_product_and_solve(domain: Domain):
    """By phase and level: 4 leaves, so that the sweep and the factor have two levels."""
    K = gh.compress(gh.DenseOperator(toeplitz(100)), leaf_size=25, ordering="natural")
    paths = nesting(domain.events)
    assert list(dict.fromkeys(path for path in paths if ">" not in path)) == [
        "probe", "sampling", "ordering", "diagonal blocks", "level of 4 nodes",
        "level of 2 nodes", "measuring", "spectral error",
    ]  # fmt: skip
    for level in ("level of 4 nodes", "level of 2 nodes"):
        for phase in ("sampling", "pivoted QR", "interpolation", "couplings"):
            assert f"{level} > {phase}" in paths
    assert set(K.report.seconds) == {
        path.rpartition(" > ")[2] for path in paths if not path.endswith("nodes")
    }
    domain.events.clear()
    F = K.factorize(1.0)
    F.solve(K @ np.ones(100))
    assert nesting(domain.events) == [
        "factor level of 4 nodes", "factor level of 2 nodes", "product", "solve",
    ]  # fmt: skip

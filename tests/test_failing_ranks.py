"""A user's function that fails on one rank: all ranks raise that, and go on together."""

from __future__ import annotations

import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import failing_ranks as cases
import numpy as np
import pytest
from mpi_runs import launch, on_ranks
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.applications import linear_solve
from gpu_hodlr.distributed import Communicator, watchdog
from gpu_hodlr.distributed.watchdog import Watchdog, patience
from gpu_hodlr.errors import ArgumentError, DistributedError


def positions(name: str, size: int) -> dict[tuple[Any, ...], tuple[int, int]]:
    """Every place from which a user's function is called: a rank, and which of its calls it is."""
    seen: list[list[Any]] = [[] for _ in range(size)]

    def called(rank: int) -> None:
        stack = traceback.extract_stack()
        ours = [(f.filename, f.lineno) for f in stack if "gpu_hodlr/" in f.filename]
        seen[rank].append(tuple(ours))

    ended = on_threads(size, lambda comm: cases.CASES[name](comm, lambda: called(comm.rank)))
    assert not any(isinstance(end, BaseException) for end in ended), ended
    return {
        (rank, *place): (rank, calls.index(place))
        for rank, calls in enumerate(seen)
        for place in dict.fromkeys(calls)
    }


@pytest.mark.parametrize("name", cases.CASES)
def test_at_every_call(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_solve, "_COMPRESSION", 0)  # seconds would decide
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        places = positions(name, 2)
        assert len(places) >= cases.LEAST.get(name, 2)
        for place, (rank, call) in places.items():
            found = on_threads(2, lambda comm, at=(rank, call): cases.failing(name, comm, *at), 20)
            assert found == [cases.SAID, cases.SAID], (place, found)


def test_at_a_call_of_one_rank_of_many():
    for call in range(0, 12, 3):
        found = on_threads(5, lambda comm, call=call: cases.failing("entries", comm, 3, call), 20)
        assert found == [cases.SAID] * 5


def test_by_mpi():
    assert on_ranks(2, cases.by_mpi) == [[cases.SAID] * len(cases.BY_MPI)] * 2


def test_devices_by_mpi():
    differ = "ArgumentError: device differs between ranks: 'cpu' on rank 0, 'cuda' on rank 1"
    assert on_ranks(2, cases.devices) == [[differ, cases.SAID]] * 2


# --- one rank alone ------------------------------------------------------------------------------

ALONE = """
import time
from mpi4py import MPI
import numpy as np
import gpu_hodlr as gh
comm = MPI.COMM_WORLD
def spread():
    return gh.compress(np.eye(100), leaf_size=20, comm=comm)
{before}
if comm.rank == {rank}:
    {call}
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("rank", "before", "call", "said"),
    [
        (0, "F = spread().factorize(1.0)", "F.logdet()", "in logdet"),
        (1, "K = spread()", "K @ np.ones(100)", "in matmat"),
        (1, "", "spread()", "in compress"),
    ],
)
def test_a_rank_that_calls_alone_ends_all(rank: int, before: str, call: str, said: str):
    script = ALONE.format(rank=rank, before=before, call=call)
    done = launch(2, "-c", script, timeout=50, GPU_HODLR_TIMEOUT="3")
    assert done.returncode != 0
    assert f"rank {rank} of 2 has waited for the others for 3 s (GPU_HODLR_TIMEOUT)" in done.stderr
    assert said in done.stderr
    assert f"rank {1 - rank}" not in done.stderr


def test_a_timeout_that_is_none(monkeypatch: pytest.MonkeyPatch):
    for wrong in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("GPU_HODLR_TIMEOUT", wrong)
        with pytest.raises(ArgumentError, match="GPU_HODLR_TIMEOUT must be a number of seconds"):
            patience()
    monkeypatch.setenv("GPU_HODLR_TIMEOUT", "0.5")
    assert patience() == 0.5
    monkeypatch.delenv("GPU_HODLR_TIMEOUT")
    assert patience() is None


def test_short_waits_are_not_summed(capfd: pytest.CaptureFixture[str]):
    ended = threading.Event()
    dog = Watchdog(0.5, "rank 3 of 4", ended.set)
    for _ in range(20):
        with dog:
            time.sleep(0.05)
    time.sleep(0.6)  # outside
    assert not ended.is_set()
    assert not capfd.readouterr().err  # nor will it be
    with dog:
        assert ended.wait(20)
    said = capfd.readouterr().err
    assert "rank 3 of 4 has waited" in said
    assert "test_short_waits_are_not_summed" in said


@pytest.mark.parametrize(
    ("seconds", "between", "grace"), [(2.5, 0.25, 1.0), (20, 1.0, 5.0), (80, 1.0, 10.0)]
)
def test_when_a_watchdog_looks_and_ends(
    seconds: float,
    between: float,
    grace: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Often enough, not at the very timeout; others have a while to tell theirs."""
    now, done, watching = [0.0], [], []

    def sleep(pause: float) -> None:
        done.append(pause)
        now[0] += pause

    def thread(target: Callable[[], None], daemon: bool, name: str) -> Any:
        assert daemon  # it must not keep the process
        return SimpleNamespace(start=lambda: watching.append(target))

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: now[0])
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(watchdog.threading, "Thread", thread)
    dog = Watchdog(seconds, "rank 0 of 2", lambda: done.append("end"))
    with dog:
        pass
    now[0] = 1000.0
    assert not dog._late()
    with dog:
        watching[0]()
    assert done == [between] * (round(seconds / between) + 1) + [grace, "end"]
    said = capsys.readouterr().err
    assert said.startswith(f"rank 0 of 2 has waited for the others for {seconds:g} s (GPU_HODLR_")
    assert said.count("it waits here") == 1


# --- sections -----------------------------------------------------------------------------------


def ended(comm: Communicator, run: Callable[[Communicator], Any]) -> Any:
    """How a run ended, after which all ranks still hear each other."""
    try:
        end = run(comm)
    except Exception as e:
        end = type(e), str(e)
    assert comm.share(comm.rank) == list(range(comm.size))
    assert comm.alike(1)
    return end


def outer_fails(comm: Communicator) -> None:
    """Rank 0 fails where the others are in a section of the section."""
    with comm.agreed():
        if comm.rank == 0:
            raise KeyError("outer")
        with comm.agreed():
            comm.share(1)


def inner_fails(comm: Communicator) -> str:
    """All leave the inner section, catch what it raised, and go on in the outer one."""
    with comm.agreed():
        try:
            with comm.agreed():
                comm.allreduce(gh.devices.namespace_on("cpu").ones(2))
                if comm.rank == 1:
                    raise ValueError("inner")
                comm.share(1)
        except ValueError as e:
            said = str(e)
        return f"{said} {comm.share(comm.rank)}"


def caught(comm: Communicator) -> None:
    """A rank that catches another's failure raises it at the next message or the end."""
    with comm.agreed():
        if comm.rank == 0:
            raise OSError("disk")
        with suppress(OSError):
            comm.share(1)
        if comm.rank == 2:
            comm.share(1)


def at_two_depths(comm: Communicator) -> None:
    with comm.agreed():
        if comm.rank == 0:
            raise OSError("disk")
        with comm.agreed():
            raise KeyError("inner")


class KnownHereError(Exception):
    """Of a class that other ranks do not have."""

    def __reduce__(self) -> Any:
        return _known_here, (threading.get_ident(), str(self))


def _known_here(thread: int, text: str) -> Exception:
    if threading.get_ident() != thread:
        raise AttributeError(text)
    return KnownHereError(text)


def unknown(comm: Communicator) -> None:
    with comm.agreed():
        if comm.rank == 1:
            raise KnownHereError("text")
        comm.share(1)


@pytest.mark.parametrize(
    ("run", "want"),
    [
        (outer_fails, [(KeyError, "'outer'")] * 3),
        (inner_fails, ["inner [0, 1, 2]"] * 3),
        (caught, [(OSError, "disk")] * 3),
        (
            unknown,
            [
                (DistributedError, "rank 1: KnownHereError: text"),
                (KnownHereError, "text"),
                (DistributedError, "rank 1: KnownHereError: text"),
            ],
        ),
        (at_two_depths, [(OSError, "disk"), *[(KeyError, "'inner'")] * 2]),
    ],
)
def test_sections(run: Callable[[Communicator], Any], want: list[Any]):
    assert on_threads(3, lambda comm: ended(comm, run), 10) == want


OPERATIONS: dict[str, Callable[[Communicator], Any]] = {
    "allgather": lambda comm: comm.allgather(np.ones((1, 2)), [1] * comm.size),
    "allreduce": lambda comm: comm.allreduce(np.ones(2)),
    "bcast": lambda comm: comm.bcast(comm.rank),
    "share": lambda comm: comm.share(comm.rank),
    "exchange": lambda comm: comm.exchange(np.ones(comm.size), [1] * 3, [1] * 3),
    "alike": lambda comm: comm.alike(comm.rank),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failure_is_known_before_every_operation(name: str):
    def run(comm: Communicator) -> None:
        with comm.agreed():
            if comm.rank == 1:
                raise OSError("disk")
            OPERATIONS[name](comm)

    assert on_threads(3, lambda comm: ended(comm, run), 5) == [(OSError, "disk")] * 3


def test_no_votes_outside_a_section(monkeypatch: pytest.MonkeyPatch):
    """A product sends no more than it did."""

    def job(comm: Any) -> int:
        K = gh.compress(cases.EXACT, rtol=1e-3, leaf_size=20, comm=comm)
        asked = []
        least = type(comm)._least
        comm._least = lambda numbers: asked.append(numbers) or least(comm, numbers)
        K @ cases.EXACT[K.rows]
        return len(asked)

    assert on_threads(2, job) == [1, 1]

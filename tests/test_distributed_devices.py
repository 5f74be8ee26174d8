"""GPU arrays between ranks, with the stand-in for CuPy and pretended MPIs.

Every rank of a pretended MPI has what this one has: gathered are copies, sums are multiples.
"""

from __future__ import annotations

import importlib
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy

from gpu_hodlr.distributed import OneRank, communicator
from gpu_hodlr.distributed.watchdog import Watchdog
from gpu_hodlr.errors import DtypeError

pytest.importorskip("mpi4py")

SIZE = 3


class PretendedMPI:
    """Keeps what it was given to send; `memory` is the type of buffer it can read and write."""

    def __init__(self, memory: type, one_gpu: bool = False) -> None:
        self._memory, self._one_gpu = memory, one_gpu
        self.sent: list[Any] = []

    def Get_rank(self) -> int:  # noqa: N802
        return 1

    def Get_size(self) -> int:  # noqa: N802
        return SIZE

    def allgather(self, found: tuple[bool, bool, Any]) -> list[tuple[bool, bool, Any]]:
        """Whether there is NCCL, whether MPI is CUDA-aware, and the GPU, of every rank."""
        *has, gpu = found
        return [(*has, gpu if self._one_gpu else (gpu, rank)) for rank in range(SIZE)]

    def Allreduce(self, sent: Any, received: Any, op: Any) -> None:  # noqa: N802
        received[...] = sent

    def bcast(self, name: Any, root: int) -> Any:
        assert (name, root) == (None, 0)  # this is rank 1
        return b"name"

    def _check(self, *buffers: Any) -> None:
        for buffer in buffers:
            assert isinstance(buffer, self._memory)
            assert buffer.flags.c_contiguous
        self.sent.append(buffers[0])

    def Allgatherv(self, sent: Any, received: Any) -> None:  # noqa: N802
        buffer, sizes, offsets, _ = received
        self._check(sent, buffer)
        assert offsets == [0, *np.cumsum(sizes[:-1])]
        for size, offset in zip(sizes, offsets, strict=True):
            buffer.reshape(-1)[offset : offset + size] = sent.reshape(-1)[:size]

    def Reduce(self, sent: Any, received: Any) -> None:  # noqa: N802
        self._check(sent, received)
        received[...] = SIZE * sent

    def Bcast(self, received: Any) -> None:  # noqa: N802
        self._check(received)

    def Alltoallv(self, sent: Any, received: Any) -> None:  # noqa: N802
        self._check(sent[0], received[0])
        n = min(sent[0].size, received[0].size)
        received[0].reshape(-1)[:n] = sent[0].reshape(-1)[:n]


class PretendedNccl:
    """Copies between the arrays whose addresses it is given; a rank sends what it is sent."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failed = False
        self._group: list[tuple[int, np.ndarray, bool]] | None = None

    def group_start(self) -> None:
        assert self._group is None
        self._group = []

    def group_end(self) -> None:
        assert self._group is not None
        sent = {peer: data for peer, data, is_sent in self._group if is_sent}
        for peer, data, is_sent in self._group:
            assert peer != 1, "to itself"
            if not is_sent:
                data[:] = sent[peer][: len(data)]
        self._group = None

    def send(self, pointer: int, count: int, kind: str, peer: int, stream: int) -> None:
        self.calls.append("send")
        assert self._group is not None
        self._group.append((peer, self._at(pointer, count, kind), True))

    def recv(self, pointer: int, count: int, kind: str, peer: int, stream: int) -> None:
        self.calls.append("recv")
        assert self._group is not None
        self._group.append((peer, self._at(pointer, count, kind), False))

    def _at(self, pointer: int, count: int, kind: str) -> np.ndarray:
        import ctypes

        address = (ctypes.c_char * (count * np.dtype(kind).itemsize)).from_address(pointer)
        return np.frombuffer(address, kind)

    def allGather(self, sent: int, got: int, count: int, kind: str, stream: int) -> None:  # noqa: N802
        self.calls.append("allGather")
        self._at(got, SIZE * count, kind)[:] = np.tile(self._at(sent, count, kind), SIZE)

    def reduce(
        self, sent: int, got: int, count: int, kind: str, op: int, root: int, stream: int
    ) -> None:
        self.calls.append("reduce")
        assert (op, root) == ("sum", 0)
        self._at(got, count, kind)[:] = SIZE * self._at(sent, count, kind)
        self._reduced = got, count, kind

    def bcast(self, got: int, count: int, kind: str, root: int, stream: int) -> None:
        self.calls.append("bcast")
        assert (got, count, kind, root) == (*self._reduced, 0)

    def check_async_error(self) -> None:
        if self.failed:
            raise RuntimeError("NCCL_ERROR_REMOTE_ERROR: a peer is gone")


def check(ranks: Any, xp: Any, dtype: Any) -> None:
    """What comes back is of the same library, and right."""
    x = xp.asarray(np.arange(8, dtype=dtype).reshape(4, 2).T)  # not contiguous
    counts = [2, 2, 2]
    gathered = ranks.allgather(x, counts)
    assert isinstance(gathered, xp.ndarray)
    want = np.arange(8, dtype=dtype).reshape(4, 2).T
    np.testing.assert_array_equal(gathered.get(), np.concatenate([want] * SIZE))
    total = ranks.allreduce(x)
    assert isinstance(total, xp.ndarray)
    np.testing.assert_array_equal(total.get(), SIZE * want)
    parts = xp.concatenate([xp.full((p, 3), p, dtype=dtype) for p in range(SIZE)])
    received = ranks.exchange(parts, [0, 1, 2], [0, 1, 2])
    assert isinstance(received, xp.ndarray)
    assert received.shape == (3, 3)
    np.testing.assert_array_equal(received.get(), parts.get())
    host = ranks.allgather(np.ones((2, 2), dtype), counts)
    assert isinstance(host, np.ndarray)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_staged_through_the_host(stand_in: HostCupy, dtype: Any):
    from gpu_hodlr.distributed.host_mpi import HostMPI

    check(HostMPI(PretendedMPI(np.ndarray)), stand_in.cupy, dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_from_device_memory(stand_in: HostCupy, dtype: Any):
    """Nothing passes the host, and the stream is waited for before every message."""
    from gpu_hodlr.distributed.device_mpi import DeviceMPI

    comm = PretendedMPI((stand_in.cupy.ndarray, np.ndarray))  # type: ignore[arg-type]
    ranks = DeviceMPI(comm)
    check(ranks, stand_in.cupy, dtype)
    x = stand_in.cupy.ones((2, 2), dtype)
    counters = stand_in.counters
    counters.reset()
    ranks.allgather(x, [2] * SIZE)
    assert counters.synchronizations == 2  # what is sent is there, what is received is free
    assert counters.host_to_device == 0
    assert isinstance(comm.sent[-1], stand_in.cupy.ndarray)


def install_nccl(pretended: PretendedNccl, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CuPy's package of library bindings has, where it finds NCCL."""
    kinds = {f"NCCL_{k.upper()}": k for k in ("float32", "float64", "int32", "int64", "uint8")}
    nccl = SimpleNamespace(
        NCCL_SUM="sum", groupStart=pretended.group_start, groupEnd=pretended.group_end,
        get_unique_id=lambda: b"name", NcclCommunicator=lambda *arguments: arguments, **kinds,
    )  # fmt: skip
    monkeypatch.setitem(vars(importlib.import_module("cupy_backends.cuda.libs")), "nccl", nccl)


@pytest.mark.parametrize("aware", [True, False], ids=["aware", "of host memory"])
@pytest.mark.parametrize("installed", [True, False], ids=["with NCCL", "without"])
def test_what_the_ranks_of_gpus_become(
    stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch, installed: bool, aware: bool
):
    """NCCL where it is installed and every rank has a GPU of its own, else MPI."""
    from gpu_hodlr.distributed import factory
    from gpu_hodlr.distributed.cuda_aware import OVERRIDE
    from gpu_hodlr.distributed.host_mpi import HostMPI

    used: list[int] = []
    device = SimpleNamespace(use=lambda: used.append(2))
    monkeypatch.setattr(stand_in.cupy.cuda, "Device", lambda gpu: device if gpu == 2 else None)
    monkeypatch.setattr(factory, "number_on_node", lambda comm: 5)
    monkeypatch.setattr(factory, "local_device", lambda number: number - 3)
    monkeypatch.setenv(OVERRIDE, "1" if aware else "0")

    def made(comm: Any) -> Any:
        return factory._of_gpus(comm, HostMPI(comm))

    if installed:
        install_nccl(PretendedNccl(), monkeypatch)
    own = made(PretendedMPI(np.ndarray))
    shared = made(PretendedMPI(np.ndarray, one_gpu=True))
    monkeypatch.setenv("GPU_HODLR_NCCL", "0")
    unwanted = made(PretendedMPI(np.ndarray))
    without, with_nccl = ("DeviceMPI", "NcclDeviceMPI") if aware else ("HostMPI", "NcclCollectives")
    assert type(own).__name__ == (with_nccl if installed else without)
    assert {type(shared).__name__, type(unwanted).__name__} == {without}
    assert used == [2, 2, 2]
    if installed:
        assert own._nccl == (SIZE, b"name", 1)


def test_not_all_that_mpi4py_has_are_ranks():
    from mpi4py import MPI

    with pytest.raises(DtypeError, match="must be an mpi4py communicator, got Info"):
        communicator(MPI.INFO_NULL)
    for one in (None, MPI.COMM_SELF):
        assert isinstance(communicator(one), OneRank)


@pytest.mark.parametrize("own_hook", [True, False])
def test_an_exception_that_nothing_catches_ends_all(
    own_hook: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Told on stderr, then to the hook there was, then to MPI; mpirun has time to read it."""
    from mpi4py import MPI

    from gpu_hodlr.distributed import factory

    done: list[Any] = []
    world = SimpleNamespace(
        Get_rank=lambda: 1, Get_size=lambda: 3, Abort=lambda code: done.append(("abort", code))
    )
    monkeypatch.setattr(MPI, "COMM_WORLD", world)
    monkeypatch.setattr(factory.time, "sleep", lambda seconds: done.append(("slept", seconds)))
    before = (lambda *error: done.append(error)) if own_hook else sys.__excepthook__
    monkeypatch.setattr(sys, "excepthook", before)
    factory._abort_on_exceptions()
    try:
        raise ValueError("the disk is full")
    except ValueError:
        error = sys.exc_info()
        sys.excepthook(*error)
    told = [error] if own_hook else []
    assert done == [*told, ("slept", 1.0), ("abort", 1)]
    said = capsys.readouterr().err
    assert said.startswith("rank 1 of 3 failed, all are ended:\nTraceback")
    assert said.endswith("ValueError: the disk is full\n")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_by_nccl(stand_in: HostCupy, dtype: Any, monkeypatch: pytest.MonkeyPatch):
    from gpu_hodlr.distributed.device_mpi import NcclCollectives

    pretended = PretendedNccl()
    install_nccl(pretended, monkeypatch)
    ranks = NcclCollectives(PretendedMPI(np.ndarray), pretended)
    check(ranks, stand_in.cupy, dtype)
    assert pretended.calls == ["allGather", "reduce", "bcast", "send", "recv"]  # nothing is empty
    one = stand_in.cupy.ones((1, 2), dtype)
    assert ranks.allgather(one, [1, 2, 1]).shape == (4, 2)  # parts of different sizes are padded


@pytest.mark.parametrize("failed", [False, True])
def test_a_message_that_nccl_does_not_end(
    stand_in: HostCupy,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    failed: bool,
):
    """The host goes on; the GPU waits, from when its own work before is done."""
    from gpu_hodlr.distributed.device_mpi import NcclCollectives

    recorded: list[Any] = []  # events, two a message
    passed: set[int] = set()  # which of them the stream has come to
    event = stand_in.cupy.cuda.Event
    done = property(lambda self: self not in recorded or recorded.index(self) in passed)
    monkeypatch.setattr(event, "done", done)
    record = event.record

    def noted(self: Any, stream: Any) -> None:
        assert stream.ptr == stand_in.cupy.cuda.get_current_stream().ptr
        recorded.append(self)
        record(self, stream)

    monkeypatch.setattr(event, "record", noted)
    pretended, ended = PretendedNccl(), threading.Event()
    install_nccl(pretended, monkeypatch)
    ranks = NcclCollectives(PretendedMPI(np.ndarray), pretended)
    monkeypatch.setattr(ranks, "_watched", Watchdog(0.4, "rank 1 of 3", ended.set))
    x = stand_in.cupy.ones((2, 2))
    ranks.allgather(x, [2] * SIZE)
    ranks.allreduce(x)
    assert len(recorded) == 4
    assert not ended.wait(1.0)  # what is before the first message takes long
    passed.update([0, 1])  # it is done, and so is the message; then the second waits for that
    assert not ended.wait(1.0)
    passed.add(2)
    time.sleep(0.1)
    passed.add(3)
    assert not ended.wait(1.0)
    ranks.exchange(x, [0, 0, 2], [0, 0, 2])
    pretended.failed = failed
    passed.add(4)
    assert ended.wait(20)
    said = capfd.readouterr().err
    assert "rank 1 of 3 has waited for the others for 0.4 s (GPU_HODLR_TIMEOUT)" in said
    assert ("NCCL_ERROR_REMOTE_ERROR" in said) == failed
    assert "ranks.exchange(x, [0, 0, 2], [0, 0, 2])" in said
    assert "ranks.allreduce(x)" not in said


def test_without_a_timeout_no_event_is_recorded(
    stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch
):
    from gpu_hodlr.distributed.device_mpi import NcclCollectives

    pretended = PretendedNccl()
    install_nccl(pretended, monkeypatch)
    ranks = NcclCollectives(PretendedMPI(np.ndarray), pretended)
    monkeypatch.delattr(stand_in.cupy.cuda.Event, "record")
    assert len(ranks.allgather(stand_in.cupy.ones((2, 2)), [2] * SIZE)) == 6


def test_an_event_that_fails_is_not_waited_for(capfd: pytest.CaptureFixture[str]):
    """The error is the stream's next user's, and the watch goes on."""

    class Failing:
        @property
        def done(self) -> bool:
            raise RuntimeError("cudaErrorLaunchFailure")

    ended = threading.Event()
    dog = Watchdog(0.2, "rank 0 of 2", ended.set)
    dog.follow(Failing(), Failing(), str)
    assert not ended.wait(0.6)
    with dog:
        assert ended.wait(20)
    assert "on the GPU" not in capfd.readouterr().err

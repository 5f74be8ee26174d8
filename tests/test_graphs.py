"""CUDA graphs of products and solves where they fail, beside cuBLAS, and when they are dropped.

Each body runs on the host stand-in for CuPy (not a GPU run), some also with `pytest -m gpu`.
"""

import ctypes
import gc
import importlib
import os
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from host_cupy.state import INVALIDATED
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr.batched.replay import Replay
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import DeviceError, GraphWarning

N = 120
REFUSED = 3.0  # what `refused_when_captured` does to its argument


def compressed() -> gh.HSSMatrix:
    return gh.compress(toeplitz(N), rtol=1e-6, leaf_size=N // 8, device="cuda")


def columns(cupy: ModuleType, k: int, seed: int = 0) -> Any:
    return cupy.asarray(np.random.default_rng(seed).standard_normal((N, k)))


# --- captures that fail ----------------------------------------------------------------------


def copies_from_the_host(x: Any) -> Any:
    return x * importlib.import_module("cupy").asarray(np.full(x.shape, REFUSED))


def waits(x: Any) -> Any:
    y = x * REFUSED
    importlib.import_module("cupy").cuda.get_current_stream().synchronize()
    return y


@pytest.mark.parametrize(
    ("function", "reason"),
    [(copies_from_the_host, "H2D|captur"), (waits, "captur")],
    ids=["a refused copy", "a wait"],
)
def test_what_cannot_be_captured_runs_as_it_is(cupy: ModuleType, function: Any, reason: str):
    """A refused operation: its own error is in the warning, every later call is right."""
    replay, v = Replay(), columns(cupy, 2)
    want = REFUSED * to_host(v)
    with pytest.warns(GraphWarning, match=f"2 columns cannot be captured.*({reason})") as caught:
        np.testing.assert_array_equal(to_host(replay(function, v)), want)
    assert len(caught) == 1
    for _ in range(3):  # remembered: neither another capture nor another warning
        np.testing.assert_array_equal(to_host(replay(function, v)), want)
    w = columns(cupy, 3)  # another shape is another capture
    with pytest.warns(GraphWarning, match="3 columns"):
        replay(function, w)


def test_a_capture_that_ends_in_an_error(stand_in: HostCupy):
    """cudaStreamEndCapture fails; products and solves go on, others are captured as ever."""
    cupy = stand_in.cupy
    K = compressed()
    F = K.factorize(0.5)
    v = columns(cupy, 2)
    dense = to_host(K.to_dense())
    for call, matrix in ((K.matmat, dense), (F.solve, np.linalg.inv(dense + 0.5 * np.eye(N)))):
        stand_in.failing_captures.append(INVALIDATED)
        with pytest.warns(GraphWarning, match="cudaErrorStreamCaptureInvalidated") as caught:
            first = call(v)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        stand_in.counters.reset()
        for result in (first, call(v), call(v)):
            np.testing.assert_allclose(to_host(result), matrix @ to_host(v), atol=1e-10)
        assert stand_in.counters.graph_launches == 0
        w = columns(cupy, 1)
        call(w)
        stand_in.counters.reset()
        np.testing.assert_allclose(to_host(call(w)), matrix @ to_host(w), atol=1e-10)
        assert stand_in.counters.graph_launches == 1


def test_a_failed_capture_where_warnings_are_errors(stand_in: HostCupy):
    """The first product raises the warning, the next one is right."""
    K, v = compressed(), columns(stand_in.cupy, 2)
    stand_in.failing_captures.append(INVALIDATED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(GraphWarning):
            K @ v
        product = K @ v
    np.testing.assert_allclose(to_host(product), to_host(K.to_dense()) @ to_host(v), atol=1e-11)


def test_an_interrupted_capture_is_ended(stand_in: HostCupy):
    """What no warning may hide goes through, and the stream is not left capturing."""
    cupy, runs, streams = stand_in.cupy, [], []

    def interrupted(x: Any) -> Any:
        runs.append(x)
        streams.append(cupy.cuda.get_current_stream())
        if len(runs) == 2:
            raise KeyboardInterrupt
        return x + 1.0

    replay, v = Replay(), columns(cupy, 1)
    with pytest.raises(KeyboardInterrupt):
        replay(interrupted, v)
    assert not streams[1].is_capturing()
    np.testing.assert_array_equal(to_host(replay(interrupted, v)), to_host(v) + 1.0)


# --- cuBLAS within a graph -------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 20])
def test_cublas_uses_the_graphs_workspace(stand_in: HostCupy, k: int):
    """Every captured call has one; wide products call cuBLAS, narrow ones do not and have none."""
    cupy = stand_in.cupy
    K, v = compressed(), columns(cupy, k)
    dense = to_host(K.to_dense())
    pool = cupy.get_default_memory_pool()
    used = pool.used_bytes()
    stand_in.counters.reset()
    result = K @ v
    assert stand_in.counters.captured_without_workspace == 0
    assert (stand_in.counters.library_calls > 0) == (k == 20)
    assert (pool.used_bytes() - used > 32 << 20) == (k == 20)
    for seed in range(2):
        v = columns(cupy, k, seed)
        result = K @ v
        np.testing.assert_allclose(to_host(result), dense @ to_host(v), atol=1e-11)
    del K
    gc.collect()
    assert pool.used_bytes() < used  # the workspace went with the graph


def test_the_workspace_counts_as_the_graphs_memory(
    stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch
):
    """A graph that holds too much is not made; one without cuBLAS holds no workspace."""
    graphs = importlib.import_module("gpu_hodlr.batched.cupy_graphs")
    K = compressed()
    monkeypatch.setattr(graphs, "free_bytes", lambda device: 8 * ((32 << 20) - 1))
    for k, launches in ((1, 1), (20, 0)):
        v = columns(stand_in.cupy, k)
        K @ v
        stand_in.counters.reset()
        K @ v
        assert stand_in.counters.graph_launches == launches


def test_the_workspace_is_the_graphs_alone(stand_in: HostCupy):
    """After a capture cuBLAS has its own again: the graph's may be freed."""
    cublas = importlib.import_module("gpu_hodlr.batched.cublas")
    cupy = stand_in.cupy
    memory = cupy.cuda.alloc(cublas.WORKSPACE)
    scribbled = cupy.ndarray((8,), np.uint8, memory)
    a, b, c = (cupy.ones((2, 3, 3)) for _ in range(3))

    def touched() -> bool:
        """Whether a call writes to the workspace, as the stand-in's calls do."""
        scribbled.fill(1)
        cublas.gemm(a, b, c)
        return bool((scribbled != 1).any())

    assert not touched()
    with suppress(ZeroDivisionError), cublas.own_workspace(memory):
        assert touched()
        assert touched()  # again: each call sets the stream, which takes it away
        raise ZeroDivisionError
    assert not touched()
    seen: list[bool] = []
    with cublas.own_workspace(memory):
        other = threading.Thread(target=lambda: seen.append(touched()))
        other.start()
        other.join()
    assert seen == [False]  # another thread has a handle of its own
    with cublas.own_workspace(memory + 8), pytest.raises(DeviceError, match="SetWorkspace"):
        cublas.gemm(a, b, c)  # not aligned


def test_the_stand_in_notices_a_lost_workspace(stand_in: HostCupy):
    """Set before SetStream it is gone, as in cuBLAS."""
    cupy = stand_in.cupy
    library = ctypes.CDLL("libcublas.so.12")
    handle = ctypes.c_void_p(cupy.cuda.device.get_cublas_handle())
    block, size = cupy.cuda.alloc(1 << 20), ctypes.c_size_t(1 << 20)
    a, one = cupy.ones((4, 4)), ctypes.byref(ctypes.c_double(1.0))
    stream = cupy.cuda.Stream(non_blocking=True)

    def set_stream() -> None:
        assert library.cublasSetStream_v2(handle, ctypes.c_void_p(stream.ptr)) == 0

    def set_workspace(at: int = block.ptr) -> None:
        assert library.cublasSetWorkspace_v2(handle, ctypes.c_void_p(at), size) == 0

    def gemm() -> int:
        at = ctypes.c_void_p(a.data.ptr)
        arguments = (0, 0, 4, 4, 4, one, at, 4, at, 4, one, at, 4)
        return int(library.cublasDgemm_v2(handle, *arguments))

    with stream:
        stream.begin_capture()
        for calls, lost in (
            ((set_stream, set_workspace), 0),
            ((set_workspace, set_stream), 1),
            ((set_stream,), 1),
        ):
            stand_in.counters.reset()
            for call in calls:
                call()
            assert gemm() == 0
            assert stand_in.counters.captured_without_workspace == lost
        set_stream()
        set_workspace(np.zeros(1 << 21, np.uint8).ctypes.data & ~0xFF)
        assert gemm() == 13  # host memory
        stream.end_capture()


# --- dropped graphs --------------------------------------------------------------------------


def test_a_dropped_graph_has_come_to_its_end(stand_in: HostCupy):
    """Its memory goes back to the pool, whose next user knows nothing of the replay's stream."""
    cupy = stand_in.cupy
    K, v = compressed(), columns(cupy, 1)
    K @ v
    K @ v
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        K @ v
    counters = stand_in.counters
    counters.reset()
    del K
    gc.collect()
    assert counters.graphs_freed_running == 0
    assert counters.synchronizations >= 1


def test_an_evicted_graph_has_come_to_its_end(stand_in: HostCupy):
    cupy = stand_in.cupy
    K = compressed()
    stream = cupy.cuda.Stream(non_blocking=True)
    for k in range(1, 9):
        K @ columns(cupy, k)
    v = columns(cupy, 1)
    with stream:
        K @ v  # now the one used last
    for k in range(9, 17):
        K @ columns(cupy, k)
    gc.collect()
    assert stand_in.counters.graphs_freed_running == 0


def test_the_stand_in_notices_a_graph_dropped_while_it_runs(stand_in: HostCupy):
    cupy, counters = stand_in.cupy, stand_in.counters
    x = cupy.ones(3)

    def launched(stream: Any) -> Any:
        with stream:
            stream.begin_capture()
            x.fill(2.0)
            graph = stream.end_capture()
        graph.launch(stream)
        return graph

    first, second = cupy.cuda.Stream(), cupy.cuda.Stream()
    early = first.record()
    launched(first)  # dropped at once
    assert counters.graphs_freed_running == 1
    graph = launched(first)
    early.synchronize()
    second.synchronize()
    del graph
    assert counters.graphs_freed_running == 2
    for wait in (first.synchronize, cupy.cuda.Device().synchronize,
                 lambda: first.record().synchronize(),
                 lambda: (second.wait_event(first.record()), second.synchronize())):  # fmt: skip
        graph = launched(first)
        wait()
        del graph
    assert counters.graphs_freed_running == 2


def test_a_graph_may_be_dropped_during_another_capture(stand_in: HostCupy):
    """The garbage collector runs where it likes: the capture goes on."""
    cupy = stand_in.cupy
    K, v = compressed(), columns(cupy, 1)
    K @ v
    K @ v
    stream = cupy.cuda.Stream(non_blocking=True)
    x = cupy.zeros(4)
    with stream:
        stream.begin_capture()
        x += 1.0
        del K
        gc.collect()
        graph = stream.end_capture()
        graph.launch(stream)
    assert to_host(x).tolist() == [1.0] * 4


def test_an_error_of_a_dropped_graph_is_left_to_the_next_call(stand_in: HostCupy):
    """A finalizer cannot raise; pytest would report what it prints."""
    graphs = importlib.import_module("gpu_hodlr.batched.cupy_graphs")

    class Failed:
        def synchronize(self) -> None:
            raise stand_in.cupy.cuda.runtime.CUDARuntimeError(700)

    graphs._wait(Failed())


def test_the_end_of_a_process_with_graphs_is_silent(host_library_folder: Path):
    script = """
import sys
from pathlib import Path
import numpy as np
from host_cupy import installed
import gpu_hodlr as gh
context = installed(Path(sys.argv[1]))
host = context.__enter__()  # and never left: as a process with a GPU ends
K = gh.compress(np.eye(60) + 0.01, leaf_size=10, device="cuda")
v = host.cupy.ones((60, 1))
K @ v
with host.cupy.cuda.Stream(non_blocking=True):
    K @ v
print(host.counters.graph_launches)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(host_library_folder)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 0

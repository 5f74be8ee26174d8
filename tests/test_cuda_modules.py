"""Compiling and loading kernel sources: how often, where, by which threads, and how it fails.

On the host stand-in for CuPy (not a GPU run), where compilations are counted.
"""

import importlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from host_cupy.install import COMPILER_THREAD
from host_cupy.state import CUDADriverError

from gpu_hodlr import batched, kernel_sources
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError, DeviceError

MOST = 227 * 1024  # bytes of shared memory on the stand-in's device


@pytest.fixture
def modules(stand_in: HostCupy) -> ModuleType:
    return importlib.import_module("gpu_hodlr.batched.cuda_modules")


def wait_for_threads() -> None:
    for thread in compilers():
        thread.join()


def compilers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == COMPILER_THREAD]


def at_once(work: Callable[[], Any], count: int = 4) -> list[Any]:
    """Results of the same work in several threads that start together."""
    start, results = threading.Barrier(count), []

    def run() -> None:
        start.wait()
        try:
            results.append(work())
        except Exception as e:
            results.append(e)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_the_threads_have_the_name_that_the_stand_in_waits_for(modules: ModuleType):
    assert modules.THREAD_NAME == COMPILER_THREAD


# --- how often and where ---------------------------------------------------------------------


def test_the_first_kernel_has_every_source_compiled_once(stand_in: HostCupy, modules: ModuleType):
    cupy = stand_in.cupy
    x = cupy.asarray(np.arange(12.0).reshape(6, 2))
    stand_in.counters.reset()
    rows = batched.gather_rows(x, cupy.asarray([[5, 0]]))
    wait_for_threads()
    np.testing.assert_array_equal(to_host(rows), [[[10, 11], [0, 1]]])
    everything = len(kernel_sources.source_names())
    assert stand_in.counters.compilations == everything
    batched.gather_rows(x, cupy.asarray([[5, 0]]))
    modules.compile_all()
    assert stand_in.counters.compilations == everything


def test_nothing_is_compiled_before(stand_in: HostCupy, modules: ModuleType):
    importlib.import_module("gpu_hodlr.batched.cupy_linalg")
    assert stand_in.cupy.zeros(3).sum() == 0
    assert stand_in.counters.compilations == 0
    assert compilers() == []


def test_threads_that_ask_at_once_get_one_module(stand_in: HostCupy, modules: ModuleType):
    """A source is compiled by the first, the others wait; CuPy's own cache would not see to it."""
    compile_source = stand_in.cupy.RawModule.compile
    compiled = []

    def slowly(self: Any, log_stream: Any = None) -> None:
        compiled.append(self.code)
        threading.Event().wait(0.02)
        compile_source(self, log_stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_in.cupy.RawModule, "compile", slowly)
        found = at_once(lambda: modules.module("rows"))
        modules.compile_all()
        wait_for_threads()
    assert len({id(one) for one in found}) == 1
    assert sorted(compiled) == sorted(
        map(kernel_sources.read_source, kernel_sources.source_names())
    )


def test_who_needs_a_source_does_not_wait_for_the_others(
    stand_in: HostCupy, modules: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """With all threads busy it is compiled by the caller."""
    compile_source, go_on = stand_in.cupy.RawModule.compile, threading.Event()

    def held_up(self: Any, log_stream: Any = None) -> None:
        if threading.current_thread().name == COMPILER_THREAD:
            go_on.wait(30)
        compile_source(self, log_stream)

    monkeypatch.setattr(stand_in.cupy.RawModule, "compile", held_up)
    monkeypatch.setattr(modules, "num_threads", lambda: 2)
    try:
        small = min(kernel_sources.source_names(), key=lambda n: len(kernel_sources.read_source(n)))
        assert modules.module(small).code == kernel_sources.read_source(small)
        assert len(compilers()) == 2
        assert not go_on.is_set()
    finally:
        go_on.set()
    wait_for_threads()
    assert stand_in.counters.compilations == len(kernel_sources.source_names())


def test_the_threads_work_on_the_device_that_was_asked_for(
    stand_in: HostCupy, modules: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """The current device is a thread's own: a new one starts on device 0."""
    used = []
    device = stand_in.cupy.cuda.Device

    class Second:
        """The second GPU of a machine."""

        id = 1

        def __init__(self, number: int | None = None) -> None:
            assert number in (None, 1)

        def use(self) -> None:
            used.append(threading.current_thread())

    monkeypatch.setattr(stand_in.cupy.cuda, "Device", Second)
    monkeypatch.setattr(modules, "num_threads", lambda: 3)
    modules.module("rows")
    workers = {*compilers(), *used}
    wait_for_threads()
    assert set(used) == workers
    assert len(used) == 3
    assert list(modules._on_device) == [1]
    monkeypatch.setattr(stand_in.cupy.cuda, "Device", device)
    modules.module("rows")  # another device: modules of its own
    wait_for_threads()
    assert sorted(modules._on_device) == [0, 1]


# --- failures --------------------------------------------------------------------------------


@pytest.fixture
def broken(modules: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two sources that no compiler takes."""
    names = ("rows", "normal")
    read = kernel_sources.read_source
    monkeypatch.setattr(
        modules, "read_source", lambda n: f"#error planted in {n}\n" if n in names else read(n)
    )
    return names


def test_sources_that_cannot_be_compiled_are_named(
    stand_in: HostCupy, modules: ModuleType, broken: tuple[str, str]
):
    with pytest.raises(DeviceError) as caught:
        modules.compile_all()
    for name in broken:
        assert re.search(rf"kernels/{name}\.cu cannot be compiled:.*planted in {name}",
                         str(caught.value), re.DOTALL)  # fmt: skip
    assert str(caught.value).count("cannot be compiled") == 2
    wait_for_threads()
    assert modules.module("pivoted_qr").get_function("pivoted_qr_f64")


def test_a_kernel_of_a_source_that_cannot_be_compiled(
    stand_in: HostCupy, modules: ModuleType, broken: tuple[str, str]
):
    """Whoever needs it is told, in every thread and every time; the threads stay silent."""
    x = stand_in.cupy.zeros((3, 2))
    index = stand_in.cupy.asarray([[0]])
    for error in at_once(lambda: batched.gather_rows(x, index)):
        assert isinstance(error, DeviceError)
        assert "kernels/rows.cu cannot be compiled" in str(error)
    with pytest.raises(DeviceError, match=r"(?s)rows\.cu.*planted in rows"):
        batched.gather_rows(x, index)
    wait_for_threads()


def test_a_source_that_is_not_there(modules: ModuleType):
    with pytest.raises(ArgumentError, match=r"one of basis_products, .*got 'columns'"):
        modules.module("columns")


def test_the_end_of_a_process_waits_for_no_more_than_was_begun(host_library_folder: Path):
    """A process that ends while its threads compile: what nobody has begun with stays."""
    script = """
import atexit, sys, threading, time
from pathlib import Path
from host_cupy import installed
import gpu_hodlr.batched.threads as threads
threads.num_threads = lambda: 2
compiled, begun = [], threading.Event()
host = installed(Path(sys.argv[1]))
cupy = host.__enter__().cupy  # and never left: as a process with a GPU ends
def slowly(self, log_stream=None):
    compiled.append(self.code)
    if threading.current_thread() is not threading.main_thread():
        begun.set()
        while threading.main_thread().is_alive():
            time.sleep(0.01)
cupy.RawModule.compile = slowly
from gpu_hodlr.batched import cuda_modules as modules
modules.module("rows")
begun.wait()
atexit.register(lambda: print(len(compiled)))  # called when the threads have ended
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(host_library_folder)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert 2 <= int(done.stdout) <= 3 < len(kernel_sources.source_names())


# --- shared memory ---------------------------------------------------------------------------


def test_a_kernel_may_use_all_shared_memory_from_its_first_launch(stand_in: HostCupy):
    """The limit is no launch's own: a small one would lower it for a large one beside it."""
    cuda = importlib.import_module("gpu_hodlr.batched.cuda")
    cupy = stand_in.cupy
    x, index = cupy.zeros((4, 2)), cupy.zeros((1, 3), np.int64)
    out = cupy.empty((1, 3, 2))

    def copy(shared: int) -> None:
        arguments = (x, index, out, np.int64(3), 2)
        cuda.launch("rows", "gather_rows_f64", (1,), (2, 16), arguments, shared)

    function = cuda._function("rows", "gather_rows_f64", 0)
    for shared in (0, 100_000, 60_000, MOST, 1):
        copy(shared)
        assert function.max_dynamic_shared_size_bytes == MOST
    with pytest.raises(CUDADriverError, match="shared memory"):
        copy(MOST + 1)


def test_kernels_declare_no_shared_memory_of_their_own():
    """It would come on top of what a launch asks for."""
    for name in kernel_sources.source_names():
        text = kernel_sources.read_source(name)
        assert len(re.findall(r"\b__shared__\b", text)) == len(
            re.findall(r"\bextern\s+__shared__\b", text)
        ), name

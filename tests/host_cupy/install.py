"""The stand-in's modules, and putting them in CuPy's place."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from host_cupy import contractions, cuda, functions, generators, kernels, memory, state
from host_cupy.array import ndarray
from host_cupy.library import Library

_ROOTS = ("cupy", "cupy_backends", "cupyx")
_PRODUCT = "gpu_hodlr"
COMPILER_THREAD = "gpu_hodlr_compile"
_CACHED = type(cache(int))
_CONSTANTS = ("bool_", "float32", "float64", "int8", "int32", "int64", "uint8", "uint64", "newaxis",
              "inf", "nan", "pi", "dtype")  # fmt: skip
_FUNCTIONS = state.words(
    "arange argsort array asarray ascontiguousarray asnumpy bincount broadcast_to clip concatenate "
    "copyto count_nonzero diag dot empty empty_like expand_dims eye flatnonzero flip "
    "from_dlpack full full_like get_array_module hstack identity linspace matmul moveaxis ones "
    "ones_like outer partition put_along_axis repeat roll searchsorted sort stack take_along_axis "
    "tensordot tile tri tril triu unique vdot vstack where zeros zeros_like"
)


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name, "A stand-in on the host, see tests/host_cupy.")
    for key, value in contents.items():
        setattr(module, key, value)
    return module


def _names(source: Any, names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names.split()}


def _libraries_package(cusolver: ModuleType, nvrtc: ModuleType) -> ModuleType:
    """`cupy_backends.cuda.libs`, which finds CUDA's libraries in its `__getattr__`.

    As on a machine whose libraries come from pip packages: a submodule imported by its full name
    before that fails. nvrtc finds its library later; NCCL is not installed.
    """
    libs = _module("cupy_backends.cuda.libs", nvrtc=nvrtc)

    def load(name: str) -> ModuleType:
        if name == "cusolver":
            sys.modules[cusolver.__name__] = libs.cusolver = cusolver  # type: ignore[attr-defined]
            return cusolver
        if name == "nccl":
            raise ImportError('Failure finding "libnccl.so.2"')
        raise AttributeError(f"module {libs.__name__!r} has no attribute {name!r}")

    libs.__getattr__ = load  # type: ignore[method-assign]
    return libs


def modules(library: Library) -> dict[str, ModuleType]:
    """The stand-in's modules by name."""
    runtime = _module(
        "cupy.cuda.runtime",
        **_names(
            cuda,
            "getDeviceCount getDevice setDevice memGetInfo driverGetVersion runtimeGetVersion "
            "getDeviceProperties deviceSynchronize",
        ),
        CUDARuntimeError=state.CUDARuntimeError,
        streamCaptureModeGlobal=0,
        streamCaptureModeThreadLocal=1,
        streamCaptureModeRelaxed=2,
        is_hip=False,
    )
    driver = _module("cupy_backends.cuda.api.driver", CUDADriverError=state.CUDADriverError)
    device = _module(
        "cupy.cuda.device",
        Device=cuda.Device,
        get_device_id=cuda.get_device_id,
        get_compute_capability=lambda: cuda.COMPUTE_CAPABILITY,
        get_cublas_handle=lambda: library.handle("cublas"),
        get_cusolver_handle=lambda: library.handle("cusolver"),
    )
    memory_names = (
        "MemoryPool MemoryPointer PythonFunctionAllocator alloc get_allocator set_allocator"
    )
    memory_module = _module(
        "cupy.cuda.memory", **_names(memory, memory_names + " OutOfMemoryError")
    )
    stream_names = "Stream Event get_current_stream get_elapsed_time"
    stream = _module("cupy.cuda.stream", **_names(cuda, stream_names))
    graph = _module("cupy.cuda.graph", Graph=cuda.Graph)
    compiler = _module("cupy.cuda.compiler", CompileException=kernels.CompileException)
    cuda_module = _module(
        "cupy.cuda",
        **_names(memory, memory_names + " using_allocator"),
        **_names(cuda, stream_names + " Device Graph is_available get_device_id"),
        get_cublas_handle=device.get_cublas_handle,
        runtime=runtime, driver=driver, device=device, memory=memory_module, stream=stream,
        graph=graph, compiler=compiler,
    )  # fmt: skip
    random = _module("cupy.random", **_names(generators, "Generator Philox4x3210 XORWOW"))
    linalg = _module("cupy.linalg", **_names(functions, "eigh eigvalsh norm svd"))
    cupy = _module(
        "cupy",
        __version__="14.2.0",
        **{name: getattr(functions, name) for name in _FUNCTIONS},
        **{name: functions._ufunc(name) for name in functions.UFUNCS},
        **{name: functions._method(name) for name in functions.METHODS},
        **{name: getattr(np, name) for name in _CONSTANTS},
        einsum=contractions.einsum, ndarray=ndarray,
        RawModule=kernels.RawModule,
        get_default_memory_pool=memory.get_default_memory_pool,
        is_available=cuda.is_available, cuda=cuda_module, random=random, linalg=linalg,
    )  # fmt: skip
    cupy.abs = cupy.absolute  # type: ignore[attr-defined]
    cupy.invert = functions._ufunc("invert")  # type: ignore[attr-defined]
    cusolver = _module(
        "cupy_backends.cuda.libs.cusolver",
        spotrfBatched=library.spotrfBatched,
        dpotrfBatched=library.dpotrfBatched,
    )
    nvrtc = _module("cupy_backends.cuda.libs.nvrtc", getVersion=lambda: (12, 9))
    libs = _libraries_package(cusolver, nvrtc)
    api = _module("cupy_backends.cuda.api", driver=driver)
    backend = _module("cupy_backends.cuda", libs=libs, api=api)
    package = _module("cupy_backends", cuda=backend)
    cupyx = _module("cupyx", empty_pinned=np.empty)
    found = [cupy, cupyx, cuda_module, runtime, driver, device, memory_module, stream, graph,
             compiler, random, linalg, package, backend, api, libs, nvrtc]  # fmt: skip
    for module in found:
        module.__path__ = []  # a package: what it lacks cannot be imported
    return {module.__name__: module for module in found}


class HostCupy:
    """What a test holds while the stand-in is installed."""

    def __init__(self, cupy: ModuleType, library: Library) -> None:
        self.cupy, self.library = cupy, library
        self.counters = state.counters
        self.accounts = memory.accounts
        self.failing_captures, self.captured = state.failing_captures, state.captured

    @property
    def problem(self) -> Exception | None:
        """Why the last failing cuBLAS call failed, where its status does not say."""
        return self.library.problem


_libraries: dict[Path, Library] = {}


@contextmanager
def installed(folder: Path, capacity: int = 16 << 30, schedule: int = 0) -> Iterator[HostCupy]:
    """Put the stand-in in CuPy's place; the real one, if it was loaded, comes back at the end.

    Modules of gpu_hodlr that hold a CuPy as a global are imported anew, before and after.

    Args:
        folder: for built libraries, as `host_cuda.runner.HostKernels` takes it.
        capacity: bytes of the pretended GPU.
        schedule: seed of the order in which the threads of a kernel are executed.
    """
    kernels.build.folder, kernels.build.schedule = folder, schedule
    if folder not in _libraries:
        _libraries[folder] = Library(folder)
    library = _libraries[folder]
    before = _taken_out()
    _forget_cupy()
    mine = modules(library)
    sys.modules.update(mine)
    memory.start(capacity)
    _new_process()
    try:
        with library.found_by_name():
            yield HostCupy(mine["cupy"], library)
    finally:
        _wait_for_compilers()
        _new_process()
        state.current.stream = state.current.allocator = None
        _taken_out()
        _forget_cupy()
        sys.modules.update(before)
        library.reset()


def _new_process() -> None:
    state.captures.clear()
    state.compiled.clear()
    state.failing_captures.clear()
    state.captured.clear()
    state.counters.reset()
    kernels.build.forget_launches()


def _wait_for_compilers() -> None:
    """Until the package's threads, which hold on to this CuPy, have compiled everything."""
    for thread in threading.enumerate():
        if thread.name == COMPILER_THREAD:
            thread.join()


def _taken_out() -> dict[str, ModuleType]:
    names = [n for n in sys.modules if n.startswith(_ROOTS) and n.partition(".")[0] in _ROOTS]
    return {name: sys.modules.pop(name) for name in names}


def _forget_cupy() -> None:
    """Modules and caches of the product that hold on to the CuPy of before."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(_PRODUCT):
            continue
        holds = False
        for value in list(vars(module).values()):  # thousands, twice a test: types alone are asked
            if type(value) is _CACHED:
                value.cache_clear()
            elif type(value) is ModuleType:
                holds = holds or value.__name__.partition(".")[0] in _ROOTS
        if holds:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if hasattr(sys.modules.get(parent), child):
                delattr(sys.modules[parent], child)

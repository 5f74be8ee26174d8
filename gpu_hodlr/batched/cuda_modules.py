"""Kernel sources compiled and loaded on a device: each once, all of them by several threads.

The first kernel that a device is asked for starts threads that compile every source, the longest
first, while the work goes on: it waits for its own source alone, and compiles that itself where no
thread has begun with it. NVRTC releases the GIL, and since CUDA 12.3 its threads work side by side.
Compiled code stays in memory for the process and, by CuPy, on disk for the next one
(~/.cupy/kernel_cache or CUPY_CACHE_DIR, keyed by the source, the options, the GPU's architecture
and NVRTC's version): a later process loads everything in a fraction of a second.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress

import cupy

from gpu_hodlr.batched.threads import num_threads
from gpu_hodlr.errors import DeviceError
from gpu_hodlr.kernel_sources import read_source, source_names

_COMPILER = ("--std=c++17",)
THREAD_NAME = "gpu_hodlr_compile"


class _Source:
    """One source on one device, compiled by who asks first; others wait for that."""

    def __init__(self, name: str) -> None:
        self.name, self.code = name, read_source(name)
        self._lock = threading.Lock()
        self._module: cupy.RawModule | None = None

    def module(self) -> cupy.RawModule:
        """The loaded module, on the current device.

        Raises:
            DeviceError: it cannot be compiled or loaded; the next call tries again.
        """
        with self._lock:
            return self._compiled()

    def compile_unless_begun(self) -> None:
        """Compile it where nobody has begun with that; a failure is left to who needs it."""
        if self._lock.acquire(blocking=False):
            try:
                with suppress(DeviceError):
                    self._compiled()
            finally:
                self._lock.release()

    def _compiled(self) -> cupy.RawModule:
        if self._module is None:
            module = cupy.RawModule(code=self.code, options=_COMPILER)
            try:
                module.compile()
            except Exception as e:
                raise DeviceError(f"kernels/{self.name}.cu cannot be compiled: {e}") from e
            self._module = module
        return self._module


_lock = threading.Lock()
_on_device: dict[int, dict[str, _Source]] = {}


def module(source: str) -> cupy.RawModule:
    """A source's module on the current device.

    Args:
        source: file name without ".cu".

    Raises:
        ArgumentError: there is no such source.
        DeviceError: it cannot be compiled or loaded.
    """
    known = _sources(cupy.cuda.Device().id)
    if source not in known:
        read_source(source)  # raises, with the names there are
    return known[source].module()


def compile_all() -> None:
    """Compile and load every source on the current device; returns when all are there.

    For who measures, or is about to capture a graph in a mode in which no thread may load code.

    Raises:
        DeviceError: some cannot be compiled or loaded; it says which, and why.
    """
    problems = []
    for source in _sources(cupy.cuda.Device().id).values():
        try:
            source.module()
        except DeviceError as e:
            problems.append(str(e))
    if problems:
        raise DeviceError("\n".join(problems))


def _sources(device: int) -> dict[str, _Source]:
    """The sources on a device; the first call starts compiling them."""
    with _lock:
        if device not in _on_device:
            sources = [_Source(name) for name in source_names()]
            sources.sort(key=lambda one: -len(one.code))
            _on_device[device] = {one.name: one for one in sources}
            queue = deque(sources)
            for _ in range(min(num_threads(), len(sources))):
                # Not daemons, which the end of the process would meet within the compiler.
                thread = threading.Thread(
                    target=_compile_from, args=(queue, device), name=THREAD_NAME
                )
                with suppress(RuntimeError):  # near the end of the process none may start
                    thread.start()
        return _on_device[device]


def _compile_from(queue: deque[_Source], device: int) -> None:
    """Compile what nobody has begun with, until all is done or the main thread has ended."""
    cupy.cuda.Device(device).use()  # the current device is a thread's own
    with suppress(IndexError):  # the queue is empty
        while threading.main_thread().is_alive():
            queue.popleft().compile_unless_begun()

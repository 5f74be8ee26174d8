"""CUDA graphs of products and solves."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import cupy

from gpu_hodlr.batched import cublas, cupy_branches
from gpu_hodlr.devices import Array, free_bytes
from gpu_hodlr.errors import GraphWarning

_MOST_GRAPHS = 8  # shapes and types kept; the one used longest ago goes first
_MEMORY_SHARE = 8  # a graph holds its intermediates: at most this part of the free memory
_ALIGNMENT = 512  # bytes, that of CuPy's pool
_WORKSPACES = cublas.WORKSPACE + cupy_branches.LANES * cupy_branches.WORKSPACE


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _Counter:
    """An allocator that adds up what is asked for."""

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self._allocate, self.bytes = allocate, 0

    def __call__(self, size: int) -> cupy.cuda.MemoryPointer:
        self.bytes += _rounded(size)
        return self._allocate(size)


class _Arena:
    """An allocator that hands out a block from front to back: no cudaMalloc while capturing."""

    def __init__(self, block: cupy.cuda.MemoryPointer, size: int) -> None:
        self._block, self._size, self._used = block, size, 0

    def __call__(self, size: int) -> cupy.cuda.MemoryPointer:
        start = self._used
        self._used += _rounded(size)
        if self._used > self._size:
            raise MemoryError("a captured function allocated more than in its first run")
        return self._block + start


def _lanes(workspace: cupy.cuda.MemoryPointer | None) -> list[cupy_branches.Lane]:
    """For the branches of a captured function; their parts of the workspace follow its own."""
    starts = [cublas.WORKSPACE + i * cupy_branches.WORKSPACE for i in range(cupy_branches.LANES)]
    return [
        cupy_branches.Lane(
            cupy.cuda.Stream(non_blocking=True), None if workspace is None else workspace + start
        )
        for start in starts
    ]


def _captured(
    stream: cupy.cuda.Stream, function: Callable[[Array], Array], x: Array
) -> tuple[Any, Array]:
    """The graph of function(x), and where it puts the result."""
    stream.begin_capture()
    try:
        output = function(x)
    except BaseException:
        with suppress(Exception):  # the error before says more
            stream.end_capture()
        raise
    return stream.end_capture(), output


def _wait(event: cupy.cuda.Event) -> None:
    with suppress(RuntimeError):  # the error of a kernel comes up at the next call as well
        event.synchronize()


class _Graph:
    """One captured function with its own input, intermediates, workspace and output.

    Where it is dropped the host waits for its last replay: that may be running on another stream
    than the one whose work the pool gives the memory to next.

    Args:
        function: to capture.
        x: of the shape and type of the inputs.
        size: bytes of the intermediates.
        calls_cublas: whether it needs workspaces.
    """

    def __init__(
        self, function: Callable[[Array], Array], x: Array, size: int, calls_cublas: bool
    ) -> None:
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._input = cupy.empty_like(x, order="C")
        self._block = cupy.cuda.alloc(size)
        self._workspace = cupy.cuda.alloc(_WORKSPACES) if calls_cublas else None
        self._done = cupy.cuda.Event(disable_timing=True)
        caller = cupy.cuda.get_current_stream()
        self._stream.wait_event(caller.record())
        with (
            self._stream,
            cupy.cuda.using_allocator(_Arena(self._block, size)),
            cublas.own_workspace(self._workspace),
            cupy_branches.forking(_lanes(self._workspace)),
        ):
            self._graph, self._output = _captured(self._stream, function, self._input)
        self._done.record(caller)
        # At the interpreter's end the driver waits, and CuPy may be gone.
        weakref.finalize(self, _wait, self._done).atexit = False

    def replay(self, x: Array) -> Array:
        """The function of x, on the current stream."""
        stream = cupy.cuda.get_current_stream()
        stream.wait_event(self._done)  # another stream may still be reading the output
        self._input[...] = x
        self._graph.launch(stream)
        result = self._output.copy()
        self._done.record(stream)
        return result


class Graphs:
    """The graphs of one function, by shape and dtype; see `replay.Replay`.

    The first call of a shape runs the function as it is, which compiles kernels and counts the
    memory of its intermediates; it is captured at the same time, unless that memory is too much:
    then the work is so large that its launches do not matter. What cannot be captured is run as
    it is from then on, and a warning says why.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple[Any, ...], _Graph | None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, function: Callable[[Array], Array], x: Array) -> Array:
        """function(x), on the current stream."""
        stream = cupy.cuda.get_current_stream()
        if stream.is_capturing():  # the caller makes a graph of their own
            return function(x)
        with self._lock:  # a graph has one input: one thread at a time fills it
            key = (cupy.cuda.Device().id, x.shape, x.dtype.str)
            if key not in self._graphs:
                return self._first(key, function, x)
            self._graphs.move_to_end(key)
            graph = self._graphs[key]
            if graph is not None:
                return graph.replay(x)
        return function(x)

    def _first(self, key: tuple[Any, ...], function: Callable[[Array], Array], x: Array) -> Array:
        counter, calls = _Counter(cupy.cuda.get_allocator()), cublas.calls()
        with cupy.cuda.using_allocator(counter):
            result = function(x)
        calls_cublas = cublas.calls() > calls
        self._graphs[key] = None
        if len(self._graphs) > _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        held = counter.bytes + (_WORKSPACES if calls_cublas else 0)
        if held <= free_bytes("cuda") // _MEMORY_SHARE:
            try:
                self._graphs[key] = _Graph(function, x, counter.bytes, calls_cublas)
            except Exception as e:  # the function has just run: it is the capture that failed
                warnings.warn(
                    f"a product or solve of {x.shape[1]} columns cannot be captured into a CUDA "
                    f"graph and is launched kernel by kernel: {type(e).__name__}: {e}",
                    GraphWarning,
                    stacklevel=6,  # the caller of matmat or solve, past `autograd`
                )
        return result

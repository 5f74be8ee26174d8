"""CUDA graphs of products and solves."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import cupy

from gpu_hodlr.devices import Array, free_bytes

_MOST_GRAPHS = 8  # shapes and types kept; the one used longest ago goes first
_MEMORY_SHARE = 8  # a graph holds its intermediates: at most this part of the free memory
_ALIGNMENT = 512  # bytes, that of CuPy's pool


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _Counter:
    """An allocator that adds up what is asked for."""

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self._allocate, self.bytes = allocate, 0

    def __call__(self, size: int) -> Any:
        self.bytes += _rounded(size)
        return self._allocate(size)


class _Arena:
    """An allocator that hands out a block from front to back: no cudaMalloc while capturing."""

    def __init__(self, block: Any, size: int) -> None:
        self._block, self._size, self._used = block, size, 0

    def __call__(self, size: int) -> Any:
        start = self._used
        self._used += _rounded(size)
        if self._used > self._size:
            raise MemoryError("a captured function allocated more than in its first run")
        return self._block + start


class _Graph:
    """One captured function with its own input, intermediates and output."""

    def __init__(self, function: Callable[[Array], Array], x: Array, size: int) -> None:
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._input = cupy.empty_like(x, order="C")
        self._block = cupy.cuda.alloc(size)
        arena = _Arena(self._block, size)
        caller = cupy.cuda.get_current_stream()
        self._stream.wait_event(caller.record())
        with self._stream, cupy.cuda.using_allocator(arena):
            self._stream.begin_capture()
            try:
                self._output = function(self._input)
            finally:
                self._graph = self._stream.end_capture()
        self._free = caller.record()

    def replay(self, x: Array) -> Array:
        """The function of x, on the current stream."""
        stream = cupy.cuda.get_current_stream()
        stream.wait_event(self._free)  # another stream may still be reading the output
        self._input[...] = x
        self._graph.launch(stream)
        result = self._output.copy()
        self._free = stream.record()
        return result

    def wait(self) -> None:
        """Until its memory is no longer in use."""
        self._free.synchronize()


class Graphs:
    """The graphs of one function, by shape and dtype; see `replay.Replay`.

    The first call of a shape runs the function as it is, which compiles kernels and counts the
    memory of its intermediates; it is captured at the same time, unless that memory is too much:
    then the work is so large that its launches do not matter.
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
        counter = _Counter(cupy.cuda.get_allocator())
        with cupy.cuda.using_allocator(counter):
            result = function(x)
        affordable = counter.bytes <= free_bytes("cuda") // _MEMORY_SHARE
        self._graphs[key] = _Graph(function, x, counter.bytes) if affordable else None
        if len(self._graphs) > _MOST_GRAPHS:
            _, oldest = self._graphs.popitem(last=False)
            if oldest is not None:
                oldest.wait()
        return result

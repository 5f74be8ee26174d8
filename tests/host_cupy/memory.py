"""Device memory of the stand-in: NumPy buffers behind CuPy's allocator interface.

The pool is CuPy's: sizes in units of 512 bytes, free blocks kept per stream, the smallest that
fits is split, neighbours merge again when they are freed. Fresh and freed memory is filled with
0xFF (NaN, -1), so that reading it does not go unnoticed.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import weakref
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from host_cupy import state
from host_cupy.state import CUDARuntimeError

_UNIT = 512
POISON = 0xFF


class _Ranges:
    """Address ranges that are in use."""

    def __init__(self) -> None:
        self._sorted: list[tuple[int, int]] = []  # start, size

    def add(self, start: int, size: int) -> None:
        insort(self._sorted, (start, size))

    def remove(self, start: int, size: int) -> None:
        self._sorted.remove((start, size))

    def hold(self, start: int, size: int) -> bool:
        """Whether one of the ranges holds another; ranges that begin there may be several."""
        place = bisect_right(self._sorted, (start, sys.maxsize))
        return any(a <= start and start + size <= a + n for a, n in self._sorted[:place][-4:])


class _Accounts:
    """The memory of the pretended GPU."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.allocated = capacity, 0
        self.used = self.most_used = 0  # bytes that pools have handed out
        self.memory = _Ranges()  # what cudaMalloc gave
        self.arrays = _Ranges()  # what arrays are on

    def use(self, size: int) -> None:
        """A pool has handed out memory, or taken it back."""
        self.used += size
        self.most_used = max(self.most_used, self.used)


accounts = _Accounts(0)


def start(capacity: int) -> None:
    """An empty GPU; arrays from before live on in books of their own."""
    global accounts
    accounts = _Accounts(capacity)
    allocation.pool = MemoryPool()
    allocation.allocator = allocation.pool.malloc


class OutOfMemoryError(MemoryError):
    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        bound = f" (limit set to: {limit:,} bytes)" if limit else ""
        super().__init__(
            f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes){bound}."
        )


class BaseMemory:
    ptr = 0
    size = 0
    device_id = 0

    def _buffer(self, pointer: int, size: int) -> np.ndarray[Any, Any]:
        """Bytes of the memory; the buffer outlives it, as addresses do."""
        raise NotImplementedError


class Memory(BaseMemory):
    """One cudaMalloc."""

    def __init__(self, size: int) -> None:
        self.size = size
        if size == 0:
            return
        state.refuse_capture("cudaMalloc")
        if accounts.allocated + size > accounts.capacity:
            raise CUDARuntimeError(2)
        whole = np.full(size + _UNIT, POISON, np.uint8)
        start = -whole.ctypes.data % _UNIT
        self._bytes = whole[start : start + size]
        self.ptr = self._bytes.ctypes.data
        self._accounts = accounts
        accounts.allocated += size
        accounts.memory.add(self.ptr, size)
        state.counters.device_allocations += 1

    def _buffer(self, pointer: int, size: int) -> np.ndarray[Any, Any]:
        start = pointer - self.ptr
        if start < 0 or start + size > self.size:
            raise CUDARuntimeError(700, "an array reaches past its memory")
        return self._bytes[start : start + size]

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.ptr and not is_finalizing():
            self._accounts.allocated -= self.size
            self._accounts.memory.remove(self.ptr, self.size)
            self._bytes.fill(POISON)


class MemoryPointer:
    """An address in device memory, which it keeps alive."""

    def __init__(self, mem: BaseMemory, offset: int) -> None:
        self.mem, self._offset = mem, offset

    @property
    def ptr(self) -> int:
        return self.mem.ptr + self._offset if self.mem.ptr else 0

    @property
    def device_id(self) -> int:
        return self.mem.device_id

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self._offset + int(offset))

    __radd__ = __add__

    def __sub__(self, offset: int) -> MemoryPointer:
        return self + -int(offset)

    def memset_async(self, value: int, size: int, stream: Any = None) -> None:
        target = self.mem._buffer(self.ptr, size)
        pointer = state.stream_pointer() if stream is None else stream.ptr
        state.enqueue(lambda: target.fill(value), pointer)


class _Chunk:
    """Part of a cudaMalloc that a pool hands out whole."""

    def __init__(self, mem: Memory, offset: int, size: int, arena: int) -> None:
        self.mem, self.offset, self.size, self.arena = mem, offset, size, arena
        self.prev: _Chunk | None = None
        self.next: _Chunk | None = None

    @property
    def whole(self) -> bool:
        return self.prev is None and self.next is None

    def __lt__(self, other: _Chunk) -> bool:
        return (self.size, id(self)) < (other.size, id(other))

    def split(self, size: int) -> _Chunk | None:
        if size == self.size:
            return None
        rest = _Chunk(self.mem, self.offset + size, self.size - size, self.arena)
        rest.prev, rest.next, self.next, self.size = self, self.next, rest, size
        if rest.next is not None:
            rest.next.prev = rest
        return rest

    def absorb_next(self) -> None:
        gone = self.next
        assert gone is not None
        self.size += gone.size
        self.next = gone.next
        if self.next is not None:
            self.next.prev = self


class PooledMemory(BaseMemory):
    """A block of a pool, returned when nothing refers to it any more."""

    def __init__(self, chunk: _Chunk, pool: MemoryPool) -> None:
        self._chunk, self._pool = chunk, weakref.ref(pool)
        self.ptr, self.size = chunk.mem.ptr + chunk.offset, chunk.size

    def _buffer(self, pointer: int, size: int) -> np.ndarray[Any, Any]:
        if not self.ptr <= pointer or pointer + size > self.ptr + self.size:
            raise CUDARuntimeError(700, "an array reaches past its block")
        return self._chunk.mem._buffer(pointer, size)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        pool = self._pool()
        if pool is not None and not is_finalizing():
            self._chunk.mem._buffer(self.ptr, self.size).fill(POISON)
            pool._take_back(self._chunk)


class MemoryPool:
    """CuPy's memory pool, of one device."""

    def __init__(self, allocator: Callable[[int], MemoryPointer] | None = None) -> None:
        if allocator is not None:
            raise NotImplementedError("the stand-in's pools allocate by cudaMalloc only")
        self._free: dict[int, list[_Chunk]] = {}
        self._returned: list[_Chunk] = []  # finalizers run anywhere: sorted in later
        self._used = self._total = self._limit = 0
        self._lock = threading.RLock()

    def malloc(self, size: int) -> MemoryPointer:
        size = -(-int(size) // _UNIT) * _UNIT
        if size == 0:
            return MemoryPointer(Memory(0), 0)
        stream = state.stream_pointer()
        with self._lock:
            self._sort_in()
            free = self._free.setdefault(stream, [])
            chunk = next((one for one in free if one.size >= size), None)
            if chunk is None:
                chunk = _Chunk(self._new_memory(size), 0, size, stream)
            else:
                free.remove(chunk)
                rest = chunk.split(size)
                if rest is not None:
                    insort(free, rest)
            self._used += chunk.size
            accounts.use(chunk.size)
        return MemoryPointer(PooledMemory(chunk, self), 0)

    def _new_memory(self, size: int) -> Memory:
        for attempt in range(3):
            if not self._limit or self._total + size <= self._limit:
                try:
                    memory = Memory(size)
                except CUDARuntimeError as e:
                    if e.status != 2:
                        raise
                else:
                    self._total += size
                    return memory
            if attempt == 1:
                gc.collect()
            self.free_all_blocks()
        raise OutOfMemoryError(size, self._total, self._limit)

    def _take_back(self, chunk: _Chunk) -> None:
        self._used -= chunk.size
        chunk.mem._accounts.use(-chunk.size)
        self._returned.append(chunk)

    def _sort_in(self) -> None:
        while self._returned:
            chunk = self._returned.pop()
            free = self._free[chunk.arena]
            while chunk.next is not None and chunk.next in free:
                free.remove(chunk.next)
                chunk.absorb_next()
            while chunk.prev is not None and chunk.prev in free:
                chunk = chunk.prev
                free.remove(chunk)
                chunk.absorb_next()
            insort(free, chunk)

    def free_all_blocks(self, stream: Any = None) -> None:
        """Return to the driver what is free and was not split."""
        with self._lock:
            self._sort_in()
            for pointer, free in self._free.items():
                if stream is None or stream.ptr == pointer:
                    self._total -= sum(chunk.size for chunk in free if chunk.whole)
                    free[:] = [chunk for chunk in free if not chunk.whole]

    def n_free_blocks(self) -> int:
        with self._lock:
            self._sort_in()
            return sum(map(len, self._free.values()))

    def used_bytes(self) -> int:
        return self._used

    def free_bytes(self) -> int:
        return self._total - self._used

    def total_bytes(self) -> int:
        return self._total

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        if fraction is not None:
            size = int(fraction * accounts.capacity)
        self._limit = size or 0

    def get_limit(self) -> int:
        return self._limit


class _ForeignMemory(BaseMemory):
    """Memory that a function gave, of a part of what cudaMalloc gave."""

    def __init__(self, allocator: PythonFunctionAllocator, size: int) -> None:
        self._free, self.size = allocator._free, size
        self.ptr = int(allocator._malloc(size, self.device_id))
        if size and not accounts.memory.hold(self.ptr, size):
            raise CUDARuntimeError(700, f"{size} bytes at {self.ptr:#x} are not device memory")

    def _buffer(self, pointer: int, size: int) -> np.ndarray[Any, Any]:
        if not self.ptr <= pointer or pointer + size > self.ptr + self.size:
            raise CUDARuntimeError(700, "an array reaches past its block")
        return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), np.uint8)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.ptr and not is_finalizing():
            self._free(self.ptr, self.device_id)


class PythonFunctionAllocator:
    """CuPy's, of functions malloc(size, device) and free(address, device)."""

    def __init__(
        self, malloc_func: Callable[[int, int], int], free_func: Callable[[int, int], None]
    ) -> None:
        self._malloc, self._free = malloc_func, free_func

    def malloc(self, size: int) -> MemoryPointer:
        return MemoryPointer(_ForeignMemory(self, int(size)), 0)


def _malloc(size: int) -> MemoryPointer:
    return MemoryPointer(Memory(size), 0)


class _Allocation:
    """The pool and the allocator that CuPy starts with."""

    def __init__(self) -> None:
        self.pool = MemoryPool()
        self.allocator: Callable[[int], MemoryPointer] = self.pool.malloc


allocation = _Allocation()


def get_default_memory_pool() -> MemoryPool:
    return allocation.pool


def get_allocator() -> Callable[[int], MemoryPointer]:
    return state.current.allocator or allocation.allocator


def set_allocator(allocator: Callable[[int], MemoryPointer] | None = None) -> None:
    if state.current.allocator is not None:
        raise ValueError(
            "Can't change the global allocator inside `using_allocator` context manager"
        )
    allocation.allocator = _malloc if allocator is None else allocator


@contextmanager
def using_allocator(
    allocator: Callable[[int], MemoryPointer] | None = None,
) -> Iterator[None]:
    before = state.current.allocator
    state.current.allocator = _malloc if allocator is None else allocator
    try:
        yield
    finally:
        state.current.allocator = before


def alloc(size: int) -> MemoryPointer:
    return get_allocator()(size)

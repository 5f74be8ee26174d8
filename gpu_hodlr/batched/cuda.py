"""Raw kernels as the CuPy implementation launches them: one launch a call."""

from __future__ import annotations

from functools import cache
from typing import Any

import cupy
import numpy as np

from gpu_hodlr.batched.cuda_modules import module
from gpu_hodlr.devices import Array, HostIndex
from gpu_hodlr.errors import DeviceError

NULL = np.uint64(0)  # a pointer to nothing
_EACH = 256  # threads of a block whose threads work alone
_MOST, _MOST_ASIDE = 2**31 - 1, 65_535  # of an `int`, and of a grid's blocks; in y and z


def suffix(dtype: np.dtype[Any]) -> str:
    """The ending of a kernel's name."""
    return "f32" if dtype == np.float32 else "f64"


def narrow(name: str, dtype: np.dtype[Any], columns: int) -> str:
    """The kernel compiled for the least width 1, 2, 4 or 8 that holds so many columns."""
    return f"{name}_{suffix(dtype)}_{1 << (columns - 1).bit_length()}"


def device_index(x: Array) -> Array:
    """Indices of either library as a contiguous int64 device array."""
    return cupy.ascontiguousarray(cupy.asarray(x, dtype=np.int64))


def device_indices(*arrays: HostIndex) -> list[Array]:
    """Host arrays of indices as contiguous int64 device arrays, by one copy."""
    together = cupy.asarray(np.concatenate([x.ravel() for x in arrays]), dtype=np.int64)
    ends = np.cumsum([x.size for x in arrays]).tolist()
    return [together[e - x.size : e].reshape(x.shape) for e, x in zip(ends, arrays, strict=True)]


@cache
def most_shared(device: int) -> int:
    """Bytes of dynamic shared memory a block can ask for."""
    return int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


@cache
def _function(source: str, name: str, device: int) -> cupy.RawKernel:
    """An entry point on the current device, which may use all shared memory there is.

    The limit is set here once: a launch that set it to its own size would lower it for another
    thread's.
    """
    function = module(source).get_function(name)
    # What the source declares itself comes on top of what a launch asks for.
    most = most_shared(device) - function.shared_size_bytes
    function.max_dynamic_shared_size_bytes = most
    return function


def _exact(name: str, argument: object) -> object:
    """An argument as the kernel declares it: of a Python integer an `int`."""
    if not isinstance(argument, int):
        return argument
    if abs(argument) > _MOST:
        raise DeviceError(f"{name}: a size of {argument} is past the 32 bits of its parameter")
    return np.int32(argument)


def launch(
    source: str,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: tuple[Any, ...],
    shared: int = 0,
) -> None:
    """Launch a kernel of kernels/ on CuPy's current stream; an empty grid is no launch.

    Args:
        source: file name without ".cu".
        name: of the entry point.
        grid: blocks.
        block: threads a block.
        arguments: contiguous arrays, NumPy scalars of the parameters' types, and Python integers
            for `int` parameters (CuPy itself would pass them as int64).
        shared: bytes of dynamic shared memory.

    Raises:
        DeviceError: a size does not fit into an `int`, or the grid is larger than any GPU's.
    """
    if 0 in grid:
        return
    function = _function(source, name, cupy.cuda.Device().id)
    if grid[0] > _MOST or max(grid[1:], default=0) > _MOST_ASIDE:
        raise DeviceError(f"{name}: a grid of {' x '.join(map(str, grid))} blocks is too large")
    exact = tuple(_exact(name, a) for a in arguments)
    function(grid, block, exact, shared_mem=shared)


def launch_each(source: str, name: str, count: int, arguments: tuple[Any, ...]) -> None:
    """Launch a thread for each of so many numbers; how many is the kernel's last parameter.

    Raises:
        DeviceError: see `launch`.
    """
    launch(source, name, (-(-count // _EACH),), (_EACH,), (*arguments, np.int64(count)))

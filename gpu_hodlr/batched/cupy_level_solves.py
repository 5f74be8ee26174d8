"""A level of a narrow solve on a GPU, one launch each way; kernels/ulv_steps.cu."""

from __future__ import annotations

import cupy

from gpu_hodlr.batched.cuda import device_index, launch, most_shared, narrow
from gpu_hodlr.devices import Array

_ENOUGH_NODES = 264  # two blocks for each of a large GPU's multiprocessors
# Bytes of a node's matrices that one multiprocessor reads in about the time of the launches saved,
# at some 60 GB/s: an estimate, not measured.
_SMALL_NODE = 1 << 20


def _shared(rest: int, r: int, k: int, itemsize: int) -> int:
    width = 1 << (k - 1).bit_length()
    return itemsize * (4224 + 32 * width * (-(-r // 32) + -(-rest // 32)))


def fits(T: Array, x: Array) -> bool:
    """Whether a block can hold a node's vectors, and reads its matrices fast enough."""
    nodes, rest, r = T.shape
    matrices = T.itemsize * rest * (rest // 2 + 2 * r)
    fast = nodes >= _ENOUGH_NODES or matrices <= _SMALL_NODE
    shared = _shared(rest, r, x.shape[-1], x.itemsize)
    return fast and shared <= most_shared(cupy.cuda.Device().id)


def _launch(name: str, T: Array, x: Array, step: int, arguments: tuple[Array, ...]) -> None:
    """Launch a kernel for the type and the columns of x; `step` rows of x a node."""
    nodes, rest, r = T.shape
    k = x.shape[-1]
    threads = 32 * min(16, max(2, -(-(rest + r) // 16)))
    launch(
        "ulv_steps", narrow(name, x.dtype, k), (nodes,), (threads,),
        (*arguments, rest + r, r, k, step), _shared(rest, r, k, x.itemsize),
    )  # fmt: skip


def eliminate(T: Array, L: Array, W: Array, index: Array, x: Array) -> tuple[Array, Array]:
    """See `level_solves.eliminate`."""
    nodes, rest, r = T.shape
    k = x.shape[-1]
    y, w = cupy.empty((nodes, rest, k), x.dtype), cupy.empty((nodes, r, k), x.dtype)
    T, L, W, x = (cupy.ascontiguousarray(a) for a in (T, L, W, x))
    step = 0 if x.ndim == 2 else rest + r
    _launch("eliminate", T, x, step, (T, L, W, x, device_index(index), y, w))
    return y, w


def substitute(
    T: Array, L: Array, W: Array, index: Array, y: Array, w: Array, n: int | None
) -> Array:
    """See `level_solves.substitute`."""
    nodes, rest, r = T.shape
    k = w.shape[-1]
    T, L, W, y, w = (cupy.ascontiguousarray(a) for a in (T, L, W, y, w))
    x = cupy.empty((nodes, rest + r, k) if n is None else (n, k), w.dtype)
    step = rest + r if n is None else 0
    _launch("substitute", T, x, step, (T, L, W, y, w, device_index(index), x))
    return x

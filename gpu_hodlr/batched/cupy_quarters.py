"""CuPy implementation of stacks of blocks in quarters; kernels/quarters.cu, one launch each."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import device_index, launch, suffix
from gpu_hodlr.devices import Array

_THREADS = 256
_NULL = np.uint64(0)


def _each(name: str, count: int, like: Array, arguments: tuple[Any, ...]) -> None:
    """A thread for each of so many numbers."""
    launch(
        "quarters", f"{name}_{suffix(like.dtype)}", (-(-count // _THREADS),), (_THREADS,),
        (*arguments, np.int64(count)),
    )  # fmt: skip


def quartered(
    blocks: Array, r: int, order: Array | None, added: Array | None
) -> tuple[Array, Array, Array, Array]:
    """See `quarters.quartered`."""
    nodes, m, _ = blocks.shape
    shapes = ((r, r), (m - r, r), (r, m - r), (m - r, m - r))
    upper, lower, across, own = (cupy.empty((nodes, *shape), blocks.dtype) for shape in shapes)
    places = _NULL if order is None else device_index(order)
    ridge = _NULL if added is None else cupy.ascontiguousarray(added)
    _each(
        "quartered", blocks.size, blocks,
        (cupy.ascontiguousarray(blocks), places, ridge, upper, lower, across, own, m, r),
    )  # fmt: skip
    return upper, lower, across, own


def paired(d: Array, b: Array) -> Array:
    """See `quarters.paired`."""
    pairs, r, _ = b.shape
    out = cupy.empty((pairs, 2 * r, 2 * r), d.dtype)
    d, b = cupy.ascontiguousarray(d), cupy.ascontiguousarray(b)
    _each("paired", out.size, out, (d, b, out, r))
    return out

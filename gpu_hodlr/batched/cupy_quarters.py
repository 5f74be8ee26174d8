"""CuPy implementation of stacks of blocks in quarters; kernels/quarters.cu, one launch each."""

from __future__ import annotations

import cupy

from gpu_hodlr.batched.cuda import NULL, device_index, launch_each, suffix
from gpu_hodlr.devices import Array


def quartered(
    blocks: Array, r: int, order: Array | None, added: Array | None
) -> tuple[Array, Array, Array, Array]:
    """See `quarters.quartered`."""
    nodes, m, _ = blocks.shape
    shapes = ((r, r), (m - r, r), (r, m - r), (m - r, m - r))
    upper, lower, across, own = (cupy.empty((nodes, *shape), blocks.dtype) for shape in shapes)
    places = NULL if order is None else device_index(order)
    ridge = NULL if added is None else cupy.ascontiguousarray(added)
    launch_each(
        "quarters", f"quartered_{suffix(blocks.dtype)}", blocks.size,
        (cupy.ascontiguousarray(blocks), places, ridge, upper, lower, across, own, m, r),
    )  # fmt: skip
    return upper, lower, across, own


def paired(d: Array, b: Array) -> Array:
    """See `quarters.paired`."""
    pairs, r, _ = b.shape
    out = cupy.empty((pairs, 2 * r, 2 * r), d.dtype)
    d, b = cupy.ascontiguousarray(d), cupy.ascontiguousarray(b)
    launch_each("quarters", f"paired_{suffix(out.dtype)}", out.size, (d, b, out, r))
    return out

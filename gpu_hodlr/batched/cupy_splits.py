"""CuPy implementation of the steps of a bisection; kernels/splits.cu."""

from __future__ import annotations

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import NULL, device_index, launch, launch_each, suffix
from gpu_hodlr.devices import Array


def pad_segments(values: Array, offsets: Array, width: int, step: int) -> Array:
    """See `splits.pad_segments`."""
    out = cupy.empty(((len(offsets) - 1) // step, width), np.int64)
    launch_each(
        "splits", "pad_segments", out.size, (device_index(values), offsets, out, width, step)
    )
    return out


def join_segments(rows: Array, offsets: Array, out: Array, order: Array | None, step: int) -> None:
    """See `splits.join_segments`."""
    places = NULL if order is None else device_index(order)
    arguments = (device_index(rows), places, offsets, out, rows.shape[1], step)
    launch_each("splits", "join_segments", rows.size, arguments)


def sort_segments(rows: Array, key: Array, offsets: Array, out: Array, step: int) -> None:
    """See `splits.sort_segments`; what is no number comes before padding."""
    rows, key = device_index(rows), cupy.ascontiguousarray(key)
    sorted_by, number = cupy.empty(key.shape, key.dtype), key.dtype.type
    last = number(np.finfo(key.dtype).max)
    launch_each(
        "splits",
        f"sort_keys_{suffix(key.dtype)}",
        key.size,
        (key, rows, sorted_by, last, number(np.inf)),
    )
    join_segments(rows, offsets, out, cupy.argsort(sorted_by, axis=1, kind="stable"), step)


def distances(
    name: str, inner: Array, norms: Array, rows: Array, cols: Array, summed: bool
) -> Array:
    """See `splits.distances`."""
    _, m, c = inner.shape
    inner = cupy.ascontiguousarray(inner)
    out = cupy.empty(inner.shape[: 2 if summed else 3], inner.dtype)
    launch_each(
        "splits", f"{name}_distances_{suffix(inner.dtype)}", out.size,
        (inner, cupy.ascontiguousarray(norms), device_index(rows), device_index(cols), out, m, c,
         int(summed)),
    )  # fmt: skip
    return out


def farthest(index: Array, distance: Array) -> Array:
    """See `splits.farthest`; a block a node."""
    nodes, m = index.shape
    out, dtype = cupy.empty((nodes, 1), np.int64), distance.dtype
    launch(
        "splits", f"farthest_{suffix(dtype)}", (nodes,), (32 * min(32, -(-m // 32)),),
        (device_index(index), cupy.ascontiguousarray(distance), out, dtype.type(-np.inf), m),
        32 * (8 + dtype.itemsize),
    )  # fmt: skip
    return out


def split_keys(near: Array, far: Array, norms: Array, index: Array) -> Array:
    """See `splits.split_keys`."""
    near, far, norms = (cupy.ascontiguousarray(x) for x in (near, far, norms))
    out, dtype = cupy.empty(near.shape, near.dtype), near.dtype
    last = dtype.type(np.finfo(dtype).max)
    arguments = (near, far, norms, device_index(index), out, last)
    launch_each("splits", f"split_keys_{suffix(dtype)}", out.size, arguments)
    return out

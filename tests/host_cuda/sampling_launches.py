"""Launches of bisection, ranking and draws, for kernel sources executed on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from host_cuda.launches import NDArray, _poisoned, _suffix
from host_cuda.runner import HostKernels

from gpu_hodlr.batched.ranking import Boxes, Rows


def _each(kernels: HostKernels, name: str, count: int, *arguments: Any, **schedule: int) -> None:
    kernels.launch(name, (-(-count // 64),), (64,), (*arguments, count), **schedule)


def pad_segments(
    kernels: HostKernels, values: NDArray, offsets: NDArray, width: int, step: int, **schedule: int
) -> NDArray:
    """See `splits.pad_segments`."""
    out = _poisoned(((len(offsets) - 1) // step, width), np.int64)
    _each(kernels, "pad_segments", out.size, values, offsets, out, width, step, **schedule)
    return out


def join_segments(
    kernels: HostKernels,
    rows: NDArray,
    order: NDArray | None,
    offsets: NDArray,
    step: int,
    **schedule: int,
) -> NDArray:
    """See `splits.join_segments`."""
    out, width = _poisoned((int(offsets[-1] - offsets[0]),), np.int64), rows.shape[1]
    arguments = (rows, order, offsets, out, width, step)
    _each(kernels, "join_segments", rows.size, *arguments, **schedule)
    return out


def distances(
    kernels: HostKernels,
    name: str,
    inner: NDArray,
    norms: NDArray,
    rows: NDArray,
    cols: NDArray,
    summed: bool,
    **schedule: int,
) -> NDArray:
    """See `splits.distances`."""
    _, m, c = inner.shape
    out = _poisoned(inner.shape[:2] if summed else inner.shape, inner.dtype)
    _each(
        kernels, f"{name}_distances_{_suffix(inner.dtype)}", out.size, inner, norms, rows, cols,
        out, m, c, int(summed), **schedule,
    )  # fmt: skip
    return out


def farthest(
    kernels: HostKernels, index: NDArray, distance: NDArray, *, warps: int = 3, **schedule: int
) -> NDArray:
    """See `splits.farthest`."""
    nodes, m = index.shape
    out = _poisoned((nodes, 1), np.int64)
    kernels.launch(
        f"farthest_{_suffix(distance.dtype)}", (nodes,), (32 * warps,),
        (index, distance, out, -np.inf, m), shared_bytes=32 * (8 + distance.dtype.itemsize),
        **schedule,
    )  # fmt: skip
    return out


def split_keys(
    kernels: HostKernels, near: NDArray, far: NDArray, norms: NDArray, index: NDArray,
    **schedule: int,
) -> NDArray:  # fmt: skip
    """See `splits.split_keys`."""
    out, last = _poisoned(near.shape, near.dtype), float(np.finfo(near.dtype).max)
    name = f"split_keys_{_suffix(near.dtype)}"
    _each(kernels, name, out.size, near, far, norms, index, out, last, **schedule)
    return out


def sort_keys(kernels: HostKernels, key: NDArray, index: NDArray, **schedule: int) -> NDArray:
    """What `splits.sort_segments` sorts by."""
    out, last = _poisoned(key.shape, key.dtype), float(np.finfo(key.dtype).max)
    name = f"sort_keys_{_suffix(key.dtype)}"
    _each(kernels, name, out.size, key, index, out, last, np.inf, **schedule)
    return out


def examine_cells(
    kernels: HostKernels, cell: NDArray, boxes: Boxes, rows: Rows, **schedule: int
) -> tuple[NDArray, NDArray, NDArray]:
    """See `ranking.examined`."""
    first, held = (_poisoned(cell.shape, np.int64) for _ in range(2))
    distance = _poisoned(cell.shape, rows.low.dtype)
    _each(
        kernels, f"examine_cells_{_suffix(distance.dtype)}", cell.size, cell, boxes.offsets,
        boxes.low, boxes.high, rows.low, rows.high, rows.run, rows.left, rows.size, first, held,
        distance, np.inf, cell.shape[1], rows.low.shape[1], rows.left.shape[1], **schedule,
    )  # fmt: skip
    return first, held, distance


def divide_cells(
    kernels: HostKernels, order: NDArray, split: int, cell: NDArray, seen: tuple[NDArray, ...],
    kept: tuple[NDArray, ...], at: int, **schedule: int,
) -> tuple[NDArray, ...]:  # fmt: skip
    """See `ranking.divided`: the halves, and the arrays of what is kept."""
    half = _poisoned((len(cell), 2 * split), np.int64)
    kept = tuple(x.copy() for x in kept)
    _each(
        kernels, f"divide_cells_{_suffix(seen[2].dtype)}", cell.size, order, cell, *seen, half,
        *kept, cell.shape[1], split, at, kept[0].shape[1], **schedule,
    )  # fmt: skip
    return half, *kept


def draw_chances(
    kernels: HostKernels, count: NDArray, wanted: int, *, warps: int = 2, **schedule: int
) -> NDArray:
    """See `draws.chances`."""
    rows, q = count.shape
    out = _poisoned((rows, q), np.float64)
    kernels.launch(
        "draw_chances_f64", (rows,), (32 * warps,), (count, out, 0.1, q, wanted), shared_bytes=656,
        **schedule,
    )  # fmt: skip
    return out


def draw_systematic(
    kernels: HostKernels, first: NDArray, count: NDArray, chance: NDArray, wanted: int,
    start: NDArray, *, warps: int = 2, **schedule: int,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """See `draws.systematic`."""
    rows, q = count.shape
    position, drawn = _poisoned((rows, wanted), np.int64), _poisoned((rows, wanted), np.float64)
    kernels.launch(
        "draw_systematic_f64", (rows,), (32 * warps,),
        (first, count, chance, start, position, drawn, q, wanted), shared_bytes=656, **schedule,
    )  # fmt: skip
    return position, drawn

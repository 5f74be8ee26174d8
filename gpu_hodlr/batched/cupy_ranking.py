"""CuPy implementation of the ranking of cells; kernels/ranking.cu, one launch each."""

from __future__ import annotations

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import launch_each, suffix
from gpu_hodlr.batched.ranking import Boxes, Examined, Rows
from gpu_hodlr.devices import Array


def examined(cell: Array, boxes: Boxes, rows: Rows) -> Examined:
    """See `ranking.examined`."""
    first, held = cupy.empty(cell.shape, np.int64), cupy.empty(cell.shape, np.int64)
    distance = cupy.empty(cell.shape, rows.low.dtype)
    given = (cell, boxes.offsets, boxes.low, boxes.high, rows.low, rows.high, rows.run, rows.left,
             rows.size)  # fmt: skip
    launch_each(
        "ranking", f"examine_cells_{suffix(distance.dtype)}", distance.size,
        (*map(cupy.ascontiguousarray, given), first, held, distance, distance.dtype.type(np.inf),
         cell.shape[1], rows.low.shape[1], rows.left.shape[1]),
    )  # fmt: skip
    return first, held, distance


def divided(
    order: Array, split: int, cell: Array, seen: Examined, kept: Examined, at: int
) -> Array:
    """See `ranking.divided`."""
    rows, q = cell.shape
    half = cupy.empty((rows, 2 * split), np.int64)
    arguments = (order, cell, *seen, half, *kept, q, split, at, kept[0].shape[1])
    name = f"divide_cells_{suffix(seen[2].dtype)}"
    launch_each("ranking", name, seen[2].size, arguments)
    return half

"""CuPy implementation of the ranking of cells; kernels/ranking.cu, one launch each."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import launch, suffix
from gpu_hodlr.batched.ranking import Boxes, Examined, Rows
from gpu_hodlr.devices import Array

_THREADS = 256


def _each(name: str, like: Array, arguments: tuple[Any, ...]) -> None:
    """A thread for each of the numbers of an array."""
    launch(
        "ranking", f"{name}_{suffix(like.dtype)}", (-(-like.size // _THREADS),), (_THREADS,),
        (*arguments, np.int64(like.size)),
    )  # fmt: skip


def examined(cell: Array, boxes: Boxes, rows: Rows) -> Examined:
    """See `ranking.examined`."""
    first, held = cupy.empty(cell.shape, np.int64), cupy.empty(cell.shape, np.int64)
    distance = cupy.empty(cell.shape, rows.low.dtype)
    given = (cell, boxes.offsets, boxes.low, boxes.high, rows.low, rows.high, rows.run, rows.left,
             rows.size)  # fmt: skip
    _each(
        "examine_cells", distance,
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
    _each("divide_cells", seen[2], arguments)
    return half

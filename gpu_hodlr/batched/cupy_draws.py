"""CuPy implementation of draws of columns; kernels/draws.cu, a block a row."""

from __future__ import annotations

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import device_index, launch
from gpu_hodlr.batched.numpy_draws import ANYWHERE
from gpu_hodlr.devices import Array

_SHARED = 656


def _threads(q: int) -> tuple[int]:
    """Of a block that goes over so many cells."""
    return (32 * min(16, -(-q // 32)),)


def chances(count: Array, wanted: int) -> Array:
    """See `draws.chances`."""
    rows, q = count.shape
    out = cupy.empty((rows, q), np.float64)
    launch(
        "draws", "draw_chances_f64", (rows,), _threads(q),
        (device_index(count), out, np.float64(ANYWHERE), q, np.int64(wanted)), _SHARED,
    )  # fmt: skip
    return out


def systematic(
    first: Array, count: Array, chance: Array, wanted: int, start: Array
) -> tuple[Array, Array]:
    """See `draws.systematic`."""
    rows, q = count.shape
    position = cupy.empty((rows, wanted), np.int64)
    drawn = cupy.empty((rows, wanted), np.float64)
    if wanted:
        launch(
            "draws", "draw_systematic_f64", (rows,), _threads(q),
            (device_index(first), device_index(count), cupy.ascontiguousarray(chance),
             cupy.ascontiguousarray(start), position, drawn, q, wanted),
            _SHARED,
        )  # fmt: skip
    return position, drawn

"""CuPy implementation of dot products and squared norms; kernels/dots.cu.

Chunks are summed by a block or warp each, then, if there are several, those of a result. CuPy gives
einsum("ij,ij->j") to cuBLAS as a batch of products of a row with a column.
"""

from __future__ import annotations

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import device_indices, launch, suffix
from gpu_hodlr.devices import Array, HostIndex

_THREADS = 256
_MOST_CHUNKS = 512  # of a result: few enough for one block to add up
_EACH_THREAD = 16  # rows of a column's chunk at least
_EACH_WARP = 8192  # values of a row's chunk at least
_WARPS = 8


def _block(k: int) -> tuple[int, int]:
    width = min(32, 1 << (k - 1).bit_length())
    return width, _THREADS // width


def _sum_columns(partial: Array, out: Array) -> Array:
    """out[j] = sum over c of partial[c, j]."""
    chunks, k = partial.shape
    block = _block(k)
    launch(
        "dots", f"sum_columns_{suffix(out.dtype)}", (-(-k // block[0]),), block,
        (partial, out, np.int64(chunks), np.int64(k)), 8 * _THREADS,
    )  # fmt: skip
    return out


def column_dots(u: Array, v: Array) -> Array:
    """See `batched.column_dots`."""
    n, k = u.shape
    if not u.size:
        return cupy.zeros(k, u.dtype)
    block = _block(k)
    rows = max(_EACH_THREAD * block[1], -(-n // _MOST_CHUNKS))
    chunks = -(-n // rows)
    out = cupy.empty(k, u.dtype)
    partial = cupy.empty((chunks if chunks > 1 else 0, k), np.float64)
    launch(
        "dots", f"column_dots_{suffix(u.dtype)}", (chunks, -(-k // block[0])), block,
        (cupy.ascontiguousarray(u), cupy.ascontiguousarray(v), partial, out, np.int64(n), k,
         np.int64(rows)),
        8 * _THREADS,
    )  # fmt: skip
    return out if chunks == 1 else _sum_columns(partial, out)


def squared_norms(x: Array) -> Array:
    """See `batched.squared_norms`."""
    n = len(x)
    if not x.size:
        return cupy.zeros(n, np.float64)
    length = x.size // n
    each = max(_EACH_WARP, -(-length // _MOST_CHUNKS))
    chunks = -(-length // each)
    partial = cupy.empty((chunks, n), np.float64)
    launch(
        "dots", f"squared_rows_{suffix(x.dtype)}", (-(-n * chunks // _WARPS),), (32, _WARPS),
        (cupy.ascontiguousarray(x), partial, np.int64(n), np.int64(length), np.int64(each),
         np.int64(chunks)),
    )  # fmt: skip
    if chunks == 1:
        return partial[0]
    return _sum_columns(partial, cupy.empty(n, np.float64))


def pair_dots(c: Array, u: HostIndex, v: HostIndex) -> Array:
    """See `dots.pair_dots`; a thread a number."""
    _, outputs, k = c.shape
    left, right = device_indices(u, v)
    out = cupy.empty((len(u), k), c.dtype)
    launch(
        "dots", f"pair_dots_{suffix(c.dtype)}", (-(-out.size // _THREADS),), (_THREADS,),
        (cupy.ascontiguousarray(c), left, right, out, np.int64(out.size), outputs, k),
    )  # fmt: skip
    return out

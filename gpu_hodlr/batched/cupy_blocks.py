"""CuPy implementation of block-sparse products; kernels/block_sparse.cu."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import launch, narrow, suffix
from gpu_hodlr.batched.level_products import NARROW
from gpu_hodlr.batched.stored import unpacked
from gpu_hodlr.devices import Array

if TYPE_CHECKING:
    from gpu_hodlr.batched import BlockPattern


_FEW_BLOCKS = 264  # two blocks for each of a large GPU's multiprocessors
_LEAST_TILE = 8  # rows: a transposed block is read so many values at a time
_SIDE, _STEP = 64, 16  # of a wide product's tiles: rows, depth


def block_sparse_matmul(blocks: Array, pattern: BlockPattern, x: Array, add_to: Array) -> Array:
    """See `batched.block_sparse_matmul`; one launch, for columns up to `NARROW` or for more."""
    nodes, m, k = add_to.shape
    if blocks.size == 0 or k == 0:
        return add_to
    y = add_to if add_to.flags.c_contiguous else add_to.copy(order="C")
    shape = _narrow if k <= NARROW else _wide
    name, tiles, block, shared_values = shape(nodes, m, k, y.dtype)
    launch(
        "block_sparse", name, (nodes * tiles,), block,
        (cupy.ascontiguousarray(unpacked(blocks, y.dtype)), pattern.starts, pattern.terms,
         cupy.ascontiguousarray(x), y, m, k),
        shared_values * y.itemsize,
    )  # fmt: skip
    if y is not add_to:
        add_to[...] = y
    return add_to


def _narrow(
    nodes: int, m: int, k: int, dtype: np.dtype[Any]
) -> tuple[str, int, tuple[int, int], int]:
    """Entry point, tiles of a node, threads of a block, values of shared memory."""
    rows = 4 if k <= 2 else 2  # of a warp
    tile = 8 * rows
    if nodes * -(-m // tile) < _FEW_BLOCKS:  # wide tiles would leave the GPU idle
        tile = _LEAST_TILE
    return narrow("block_sparse_narrow", dtype, k), -(-m // tile), (tile, 32 // rows), 2080


def _wide(
    nodes: int, m: int, k: int, dtype: np.dtype[Any]
) -> tuple[str, int, tuple[int, int], int]:
    """As `_narrow`, tiles of rows and columns."""
    columns = 32 if k <= 32 else 64
    rows = 8 if columns == 64 and suffix(dtype) == "f32" else 4  # of a thread
    shared = _STEP * (_SIDE + 16 // dtype.itemsize + columns)
    return (
        f"block_sparse_wide_{suffix(dtype)}_{columns}", -(-m // _SIDE) * -(-k // columns),
        (columns // 4, _SIDE // rows), shared,
    )  # fmt: skip

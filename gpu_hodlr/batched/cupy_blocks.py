"""CuPy implementation of block-sparse products; kernels/block_sparse.cu."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from gpu_hodlr.batched.cublas import gemm
from gpu_hodlr.batched.cuda import launch, narrow, suffix
from gpu_hodlr.batched.cupy_linalg import gather_rows
from gpu_hodlr.batched.level_products import NARROW
from gpu_hodlr.batched.stored import unpacked
from gpu_hodlr.devices import Array

if TYPE_CHECKING:
    from gpu_hodlr.batched import BlockPattern


_FEW_BLOCKS = 264  # two blocks for each of a large GPU's multiprocessors
_ADDED = 256  # threads that add up terms, a number each
_LEAST_TILE = 8  # rows: a transposed block is read so many values at a time
_SIDE, _STEP = 64, 16  # of a wide product's tiles: rows, depth
# A term of a block row is 2 m^2 k operations. The kernel does about half of what plain
# multiply-adds reach (on an H200 17 Tflop/s in float64, 33 in float32); GEMM about 50, in float64
# on tensor cores, but moves 4 m k numbers more than the kernel (4.3 TB/s): the panel of x and the
# product, written and read. It is the faster from m = 96 rows on, in float32 from 180; below 32
# columns the bytes of the blocks decide, which both read once.
_GEMM_ROWS, _GEMM_COLUMNS = {8: 96, 4: 192}, 32
_SCRATCH = 1 << 28  # bytes of panels and products at a time: not of what is free, for a graph


def block_sparse_matmul(blocks: Array, pattern: BlockPattern, x: Array, add_to: Array) -> Array:
    """See `batched.block_sparse_matmul`; one launch, or GEMM for large blocks and many columns."""
    _, m, k = add_to.shape
    if blocks.size == 0 or k == 0:
        return add_to
    y = add_to if add_to.flags.c_contiguous else add_to.copy(order="C")
    if m >= _GEMM_ROWS[y.itemsize] and k >= _GEMM_COLUMNS:
        by_products(blocks, pattern, cupy.ascontiguousarray(x), y)
    else:
        by_kernel(blocks, pattern, x, y)
    if y is not add_to:
        add_to[...] = y
    return add_to


def by_products(blocks: Array, pattern: BlockPattern, x: Array, y: Array) -> None:
    """Panels of x gathered, multiplied by their blocks, and added up: some blocks at a time.

    A block row adds up its terms in the order of its blocks: where these are in the order of their
    pairs, how many are multiplied at a time changes no bit.
    """
    nodes, m, k = y.shape
    step = max(1, _SCRATCH // (3 * m * k * y.itemsize))
    for first in range(0, len(blocks), step):
        some = unpacked(blocks[first : first + step], y.dtype)
        z = cupy.empty((2, len(some), m, k), y.dtype)
        for transposed in (False, True):
            panels = gather_rows(
                x.reshape(len(x), m * k), pattern.pairs[int(not transposed), first : first + step]
            )
            gemm(some, panels.reshape(-1, m, k), z[int(transposed)], transpose_a=transposed)
        launch(
            "block_sparse", f"add_terms_{suffix(y.dtype)}", (nodes * -(-m * k // _ADDED),),
            (_ADDED,),
            (pattern.starts, pattern.terms, z, y, first, len(some), np.int64(m * k)),
        )  # fmt: skip


def by_kernel(blocks: Array, pattern: BlockPattern, x: Array, y: Array) -> None:
    """One launch, for columns up to `NARROW` or for more."""
    nodes, m, k = y.shape
    shape = _narrow if k <= NARROW else _wide
    name, tiles, block, shared_values = shape(nodes, m, k, y.dtype)
    launch(
        "block_sparse", name, (nodes * tiles,), block,
        (cupy.ascontiguousarray(unpacked(blocks, y.dtype)), pattern.starts, pattern.terms,
         cupy.ascontiguousarray(x), y, m, k),
        shared_values * y.itemsize,
    )  # fmt: skip


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

"""Narrow products of a level on a GPU, one launch each; kernels/basis_products.cu."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import NULL, launch, narrow
from gpu_hodlr.batched.stored import kind_of
from gpu_hodlr.devices import Array

_THREADS = 256
_FEW_BLOCKS = 264  # two blocks for each of a large GPU's multiprocessors
_SHARED_VALUES = 2080


def _shape(blocks_wide: int) -> tuple[int, int]:
    """Threads (bx, by) of a block: narrower where wide blocks would leave the GPU idle."""
    width = 32 if blocks_wide >= _FEW_BLOCKS else 8
    return width, _THREADS // width


def _strips(rows: int, block: tuple[int, int], k: int) -> int:
    """Blocks that take the rows of a matrix, a few rows a warp."""
    rows_a_warp = 4 if k <= 2 else 2
    return -(-rows // (rows_a_warp * block[0] * block[1] // 32))


def reads(stored: np.dtype[Any], dtype: np.dtype[Any]) -> bool:
    """Whether the kernels multiply blocks of a type by vectors of another."""
    return stored == dtype or (kind_of(stored) is not None and dtype == np.float32)


def _launch(
    name: str, blocks: int, block: tuple[int, int], stored: Array, x: Array, *arguments: object
) -> None:
    """Launch a kernel for the types of the stored blocks and of x, and for x's columns.

    Of TF32 the bits are those of float32, and the product is one in float32.
    """
    kernel = narrow(name, x.dtype, x.shape[-1])
    if kind_of(stored.dtype) == "bfloat16":
        kernel = kernel.replace("f32", "bf16")
    elif stored.dtype != x.dtype:
        stored = stored.view(x.dtype)
    launch(
        "basis_products", kernel, (blocks,), block, (_rows(stored), _rows(x), *arguments),
        _SHARED_VALUES * x.itemsize,
    )  # fmt: skip


def _rows(x: Array) -> Array:
    """The kernels take arrays by rows; a view of another layout is copied."""
    return cupy.ascontiguousarray(x)


def _order(order: Array | None) -> Array | np.uint64:
    return NULL if order is None else _rows(order)


def _step(x: Array, rows: int) -> int:
    """Rows from a node's to the next one's: none where x is (n, k) and numbered as a whole."""
    return 0 if x.ndim == 2 else rows


def _target(shape: tuple[int, ...], like: Array, add_to: Array | None) -> Array:
    """Where a product is written: new, or add_to, or a copy of it by rows."""
    return cupy.empty(shape, like.dtype) if add_to is None else _rows(add_to)


def _written(y: Array, add_to: Array | None) -> Array:
    """The product, where the caller wants it."""
    if add_to is None or y is add_to:
        return y
    add_to[...] = y
    return add_to


def restrict(T: Array, order: Array | None, x: Array) -> Array:
    """See `level_products.restrict`."""
    nodes, rest, r = T.shape
    k = x.shape[-1]
    w = cupy.empty((nodes, r, k), x.dtype)
    if w.size:
        block = _shape(nodes * -(-r // 32))
        _launch(
            "restrict_rows", nodes * -(-r // block[0]), block, T, x,
            _order(order), w, rest + r, r, k, _step(x, rest + r),
        )  # fmt: skip
    return w


def prolong(T: Array, order: Array | None, z: Array, add_to: Array | None) -> Array:
    """See `level_products.prolong`."""
    nodes, rest, r = T.shape
    k = z.shape[2]
    y = _target((nodes, rest + r, k), z, add_to)
    if y.size:
        block = _shape(nodes * max(1, _strips(rest, (32, 8), k)))
        _launch(
            "prolong_rows", nodes * max(1, _strips(rest, block, k)), block, T, z,
            _order(order), y, rest + r, r, k, int(add_to is not None), _step(y, rest + r),
        )  # fmt: skip
    return _written(y, add_to)


def couple(B: Array, w: Array, add_to: Array | None) -> Array:
    """See `level_products.couple`."""
    pairs, r, _ = B.shape
    k = w.shape[2]
    z = _target(w.shape, w, add_to)
    if z.size:
        block = _shape(2 * pairs * -(-r // 32))
        _launch(
            "couple", pairs * (_strips(r, block, k) + -(-r // block[0])), block, B, w,
            z, r, k, int(add_to is not None),
        )  # fmt: skip
    return _written(z, add_to)


def leaf_product(D: Array, v: Array, leaves: Array, scattered: bool) -> Array:
    """D x of `level_products.leaf_product`; the kernel gathers rows for itself, and may scatter."""
    nodes, m, _ = D.shape
    k = v.shape[1]
    y = cupy.empty(v.shape if scattered else (nodes, m, k), v.dtype)
    if y.size:
        block = _shape(nodes * _strips(m, (32, 8), k))
        _launch(
            "block_diagonal", nodes * _strips(m, block, k), block, D, v,
            _rows(leaves), y, m, k, int(scattered),
        )  # fmt: skip
    return y

"""How each kernel is launched, for kernel sources executed on the host (not a GPU run).

The shapes of grids, blocks and shared memory are those in the header comments of kernels/*.cu.
`schedule` is passed on to `HostKernels.launch`: seed, removed_barrier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from host_cuda.runner import HostKernels

from gpu_hodlr.batched import PointKernel

NDArray = np.ndarray[Any, Any]


def _suffix(dtype: np.dtype[Any]) -> str:
    return {"float32": "f32", "float64": "f64"}[dtype.name]


def _poisoned(shape: tuple[int, ...], dtype: Any) -> NDArray:
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF
    return array


def _walk_rows(kernels: HostKernels, name: str, k: int, *arguments: Any, **schedule: int) -> None:
    width = min(32, 1 << max(0, k - 1).bit_length())
    # Three blocks, however many rows, and two along them: the grid's strides are at work as well.
    kernels.launch(name, (3, 2), (min(width, 16), 64 // width), arguments, **schedule)


def gather_rows(kernels: HostKernels, x: NDArray, index: NDArray, **schedule: int) -> NDArray:
    """See `batched.gather_rows`."""
    k = x.shape[1]
    out = _poisoned((*index.shape, k), x.dtype)
    name = f"gather_rows_{_suffix(x.dtype)}"
    _walk_rows(kernels, name, k, x, index, out, index.size, k, **schedule)
    return out


def scatter_rows(
    kernels: HostKernels, blocks: NDArray, index: NDArray, n: int, **schedule: int
) -> NDArray:
    """See `batched.scatter_rows`."""
    k = blocks.shape[2]
    out = np.zeros((n, k), blocks.dtype)
    name = f"scatter_rows_{_suffix(blocks.dtype)}"
    _walk_rows(kernels, name, k, blocks, index, out, index.size, k, **schedule)
    return out


def permute_rows(kernels: HostKernels, x: NDArray, order: NDArray, **schedule: int) -> NDArray:
    """See `batched.permute_rows`."""
    _, m, k = x.shape
    out = _poisoned((*order.shape, k), x.dtype)
    name = f"permute_rows_{_suffix(x.dtype)}"
    _walk_rows(kernels, name, k, x, order, out, order.size, m, order.shape[1], k, **schedule)
    return out


def unpermute_rows(kernels: HostKernels, x: NDArray, order: NDArray, **schedule: int) -> NDArray:
    """See `batched.unpermute_rows`."""
    _, m, k = x.shape
    out = _poisoned(x.shape, x.dtype)
    name = f"unpermute_rows_{_suffix(x.dtype)}"
    _walk_rows(kernels, name, k, x, order, out, order.size, m, k, **schedule)
    return out


def scaled_panels(
    kernels: HostKernels, x: NDArray, y: NDArray, node: NDArray, slot: NDArray, feature: NDArray,
    slots: NDArray, row_of: NDArray, **schedule: int,
) -> NDArray:  # fmt: skip
    """x[feature[t, j]] * y[row_of[slot[g], slots[t, j]]], t = node[g]; 0 where either is -1."""
    k, columns = x.shape[1], feature.shape[1]
    out = _poisoned((len(node), columns, k), x.dtype)
    _walk_rows(
        kernels, f"scaled_panels_{_suffix(x.dtype)}", k, x, y, node, slot, feature, slots, row_of,
        out, len(node) * columns, columns, len(row_of), k, **schedule,
    )  # fmt: skip
    return out


def _tiles(rows: NDArray, cols: NDArray) -> int:
    return len(rows) * -(-rows.shape[1] // 32) * -(-cols.shape[1] // 32)


def point_entries(
    kernels: HostKernels,
    points: NDArray,
    kernel: PointKernel,
    nugget: NDArray,
    rows: NDArray,
    cols: NDArray,
    **schedule: int,
) -> NDArray:
    """See `batched.point_entries`."""
    m, k, itemsize = rows.shape[1], cols.shape[1], points.dtype.itemsize
    out = _poisoned((len(rows), m, k), points.dtype)
    kernels.launch(
        f"point_entries_{kernel.profile}_{_suffix(points.dtype)}", (_tiles(rows, cols),), (32, 8),
        (points, rows, cols, out, m, k, points.shape[1], kernel.parameter, kernel.variance, nugget,
         int(len(nugget) > 1)),
        shared_bytes=512 + 1088 * itemsize, **schedule,
    )  # fmt: skip
    return out


def khatri_rao_entries(
    kernels: HostKernels,
    features: NDArray,
    feature_of: NDArray,
    slot_of: NDArray,
    gram: NDArray,
    rows: NDArray,
    cols: NDArray,
    **schedule: int,
) -> NDArray:
    """See `batched.khatri_rao_entries`; `gram` is the table of the units in play."""
    m, k, itemsize = rows.shape[1], cols.shape[1], features.dtype.itemsize
    out = _poisoned((len(rows), m, k), features.dtype)
    maps = [np.where(i < 0, -1, of[i]) for i in (rows, cols) for of in (feature_of, slot_of)]
    slots, n = len(gram), features.shape[1]
    nonzero = gram.any(axis=2)  # rows of zeros are left out, as the CuPy implementation does
    row_of = np.where(nonzero, np.cumsum(nonzero).reshape(slots, slots) - 1, -1)
    kernels.launch(
        f"khatri_rao_entries_{_suffix(features.dtype)}", (_tiles(rows, cols),), (16, 16),
        (features, *maps, row_of, gram[nonzero], out, m, k, n, slots),
        shared_bytes=1032 + 5184 * itemsize, **schedule,
    )  # fmt: skip
    return out


def _width(k: int) -> int:
    """Right-hand sides a kernel is compiled for."""
    return next(width for width in (1, 2, 4, 8) if k <= width)


def _strips(rows: int, k: int, block: tuple[int, int]) -> int:
    return -(-rows // (block[0] * block[1] // 32 * (4 if k <= 2 else 2)))


def _basis_product(
    kernels: HostKernels,
    name: str,
    blocks: int,
    block: tuple[int, int],
    k: int,
    *arguments: Any,
    **schedule: int,
) -> None:
    stored, dtype = (argument.dtype for argument in arguments[:2])
    suffix = "bf16" if stored == np.uint16 else _suffix(dtype)
    kernels.launch(
        f"{name}_{suffix}_{_width(k)}", (blocks,), block, arguments,
        shared_bytes=2080 * dtype.itemsize, **schedule,
    )  # fmt: skip


def restrict_rows(
    kernels: HostKernels,
    basis: NDArray,
    x: NDArray,
    order: NDArray | None,
    *,
    block: tuple[int, int] = (16, 4),
    **schedule: int,
) -> NDArray:
    """U^T x for U = P [I; basis]; of x (n, k) the order numbers all rows."""
    (nodes, rest, r), k = basis.shape, x.shape[-1]
    rows, step = rest + r, 0 if x.ndim == 2 else rest + r
    w = _poisoned((nodes, r, k), x.dtype)
    _basis_product(
        kernels, "restrict_rows", nodes * -(-r // block[0]), block, k,
        basis, x, order, w, rows, r, k, step, **schedule,
    )  # fmt: skip
    return w


def prolong_rows(
    kernels: HostKernels,
    basis: NDArray,
    z: NDArray,
    order: NDArray | None,
    add_to: NDArray | None = None,
    *,
    block: tuple[int, int] = (16, 4),
    **schedule: int,
) -> NDArray:
    """U z, or add_to + U z, for U = P [I; basis]."""
    (nodes, rest, r), k = basis.shape, z.shape[2]
    y = _poisoned((nodes, rest + r, k), z.dtype) if add_to is None else add_to.copy()
    _basis_product(
        kernels, "prolong_rows", nodes * max(1, _strips(rest, k, block)), block, k,
        basis, z, order, y, rest + r, r, k, int(add_to is not None),
        0 if y.ndim == 2 else rest + r, **schedule,
    )  # fmt: skip
    return y


def couple(
    kernels: HostKernels,
    coupling: NDArray,
    w: NDArray,
    add_to: NDArray | None = None,
    *,
    block: tuple[int, int] = (16, 4),
    **schedule: int,
) -> NDArray:
    """[[0, B], [B^T, 0]] w for every pair of nodes, or add_to + that."""
    (pairs, r, _), k = coupling.shape, w.shape[2]
    z = _poisoned(w.shape, w.dtype) if add_to is None else add_to.copy()
    _basis_product(
        kernels, "couple", pairs * (_strips(r, k, block) + -(-r // block[0])), block, k,
        coupling, w, z, r, k, int(add_to is not None), **schedule,
    )  # fmt: skip
    return z


def block_diagonal(
    kernels: HostKernels,
    blocks: NDArray,
    x: NDArray,
    index: NDArray,
    *,
    scattered: bool = False,
    block: tuple[int, int] = (16, 4),
    **schedule: int,
) -> NDArray:
    """blocks[t] x[index[t]], 0 for x where index is -1; or that in the rows index[t]."""
    (nodes, m, _), k = blocks.shape, x.shape[1]
    y = _poisoned(x.shape if scattered else (nodes, m, k), x.dtype)
    _basis_product(
        kernels, "block_diagonal", nodes * _strips(m, k, block), block, k,
        blocks, x, index, y, m, k, int(scattered), **schedule,
    )  # fmt: skip
    return y


def block_sparse(
    kernels: HostKernels,
    blocks: NDArray,
    starts: NDArray,
    terms: NDArray,
    x: NDArray,
    y: NDArray,
    *,
    warps: int = 2,
    **schedule: int,
) -> NDArray:
    """y + the block-sparse product; `warps` of a narrow product's blocks."""
    (nodes, m, k), itemsize, added = y.shape, y.dtype.itemsize, y.copy()
    if k <= 8:
        rows = 4 if k <= 2 else 2
        name, block = f"narrow_{_suffix(y.dtype)}_{_width(k)}", (rows * warps, 32 // rows)
        tiles, shared = -(-m // block[0]), 2080 * itemsize
    else:
        columns = 32 if k <= 32 else 64
        rows = 8 if columns == 64 and itemsize == 4 else 4
        name, block = f"wide_{_suffix(y.dtype)}_{columns}", (columns // 4, 64 // rows)
        tiles, shared = -(-m // 64) * -(-k // columns), 16 * (64 + columns) * itemsize + 256
    kernels.launch(
        f"block_sparse_{name}", (nodes * tiles,), block, (blocks, starts, terms, x, added, m, k),
        shared_bytes=shared, **schedule,
    )  # fmt: skip
    return added


def add_terms(
    kernels: HostKernels,
    starts: NDArray,
    terms: NDArray,
    z: NDArray,
    y: NDArray,
    first: int,
    **schedule: int,
) -> NDArray:
    """y + the terms among the products z (2, count, m, k) of the blocks from `first` on."""
    values, added = y[0].size, y.copy()
    kernels.launch(
        f"add_terms_{_suffix(y.dtype)}", (len(y) * -(-values // 256),), (256,),
        (starts, terms, z, added, first, z.shape[1], values), **schedule,
    )  # fmt: skip
    return added


def inner_products(
    kernels: HostKernels,
    x: NDArray,
    index: NDArray,
    centers: NDArray,
    *,
    threads: int = 64,
    **schedule: int,
) -> NDArray:
    """x[index[t, i]] . x[centers[t, c]], 0 where either index is -1."""
    (nodes, m), count = index.shape, centers.shape[1]
    out = _poisoned((nodes, m, count), x.dtype)
    kernels.launch(
        f"inner_products_{_suffix(x.dtype)}_{_width(count)}",
        (nodes * -(-m // threads),), (threads,),
        (x, index, centers, out, m, x.shape[1], count),
        shared_bytes=2080 * x.dtype.itemsize, **schedule,
    )  # fmt: skip
    return out


def merge_smallest(
    kernels: HostKernels,
    values: NDArray,
    index: NDArray,
    rows: NDArray,
    found: NDArray,
    candidates: NDArray,
    *,
    warps: int = 3,
    long: bool = False,
    **schedule: int,
) -> tuple[NDArray, NDArray]:
    """See `batched.merge_smallest`; the merged lists. `long`: without shared memory."""
    (nodes, m, c), count = found.shape, values.shape[1]
    values, index = values.copy(), index.copy()
    kernels.launch(
        f"merge_smallest_{'long_' if long else ''}{_suffix(values.dtype)}",
        (-(-nodes * m // warps),), (32 * warps,),
        (values, index, rows, found, candidates, nodes, m, c, count),
        shared_bytes=0 if long else warps * count * (8 + values.dtype.itemsize), **schedule,
    )  # fmt: skip
    return values, index


def normal(
    kernels: HostKernels, n: int, columns: range, dtype: Any, *, seed_of_numbers: int = 0,
    blocks: int = 2, **schedule: int,
) -> NDArray:  # fmt: skip
    """Columns of a seed, (n, columns)."""
    out = _poisoned((len(columns), n), dtype)
    kernels.launch(
        f"normal_{_suffix(np.dtype(dtype))}", (len(columns), blocks), (64,),
        (out, n, columns.start, seed_of_numbers), **schedule,
    )  # fmt: skip
    return out.T


def sum_columns(
    kernels: HostKernels,
    partial: NDArray,
    dtype: Any,
    *,
    block: tuple[int, int] = (8, 8),
    **schedule: int,
) -> NDArray:
    """Sums over the first axis."""
    n, k = partial.shape
    out = _poisoned((k,), dtype)
    kernels.launch(
        f"sum_columns_{_suffix(out.dtype)}", (-(-k // block[0]),), block, (partial, out, n, k),
        shared_bytes=8 * block[0] * block[1], **schedule,
    )  # fmt: skip
    return out


def column_dots(
    kernels: HostKernels,
    u: NDArray,
    v: NDArray,
    *,
    rows: int = 40,
    block: tuple[int, int] = (8, 8),
    **schedule: int,
) -> NDArray:
    """See `batched.column_dots`."""
    n, k = u.shape
    chunks = -(-n // rows)
    partial, out = _poisoned((chunks, k), np.float64), _poisoned((k,), u.dtype)
    kernels.launch(
        f"column_dots_{_suffix(u.dtype)}", (chunks, -(-k // block[0])), block,
        (u, v, partial, out, n, k, rows),
        shared_bytes=8 * block[0] * block[1], **schedule,
    )  # fmt: skip
    if chunks == 1:
        return out
    return sum_columns(kernels, partial, u.dtype, block=block, **schedule)


def squared_norms(
    kernels: HostKernels, x: NDArray, *, each: int = 50, warps: int = 2, **schedule: int
) -> NDArray:
    """See `batched.squared_norms`."""
    n, length = len(x), x.size // len(x)
    chunks = -(-length // each)
    partial = _poisoned((chunks, n), np.float64)
    kernels.launch(
        f"squared_rows_{_suffix(x.dtype)}", (-(-n * chunks // warps),), (32, warps),
        (x, partial, n, length, each, chunks), **schedule,
    )  # fmt: skip
    return sum_columns(kernels, partial, np.float64, **schedule)


def sparse_rows(
    kernels: HostKernels,
    starts: NDArray,
    columns: NDArray,
    values: NDArray,
    x: NDArray,
    *,
    kind: str,
    warps: int = 2,
    **schedule: int,
) -> NDArray:
    """See `batched.SparseRows.matmul`."""
    rows, k = len(starts) - 1, x.shape[1]
    y = _poisoned((rows, k), x.dtype)
    kernels.launch(
        f"sparse_rows_{kind}_{_suffix(x.dtype)}",
        (-(-rows // warps), 1 if kind == "narrow" else -(-k // 32)), (32, warps),
        (starts, columns, values, x, y, rows, k), **schedule,
    )  # fmt: skip
    return y


def pair_dots(kernels: HostKernels, c: NDArray, u: NDArray, v: NDArray, **schedule: int) -> NDArray:
    """See `dots.pair_dots`."""
    out = _poisoned((len(u), c.shape[2]), c.dtype)
    kernels.launch(
        f"pair_dots_{_suffix(c.dtype)}", (-(-out.size // 64),), (64,),
        (c, u, v, out, out.size, c.shape[1], c.shape[2]), **schedule,
    )  # fmt: skip
    return out

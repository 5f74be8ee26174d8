"""How each kernel is launched, for kernel sources executed on the host (not a GPU run).

The shapes of grids, blocks and shared memory are those in the header comments of kernels/*.cu.
`schedule` is passed on to `HostKernels.launch`: seed, removed_barrier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from host_cuda.runner import HostKernels

NDArray = np.ndarray[Any, Any]


def _suffix(dtype: np.dtype[Any]) -> str:
    return {"float32": "f32", "float64": "f64"}[dtype.name]


def _poisoned(shape: tuple[int, ...], dtype: Any) -> NDArray:
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF
    return array


def pivoted_qr(
    kernels: HostKernels,
    samples: NDArray,
    *,
    threshold: float = -1.0,
    max_rank: int = 1 << 30,
    threads: int = 96,
    **schedule: int,
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Pivots, R, tails and ranks."""
    nodes, m, s = samples.shape
    steps, dtype = min(m, s), samples.dtype
    pivots = _poisoned((nodes, m), np.int64)
    r = _poisoned((nodes, steps, m), dtype)
    tails = _poisoned((nodes, steps + 1), np.float64)
    ranks = _poisoned((nodes,), np.int32)
    kernels.launch(
        f"pivoted_qr_{_suffix(dtype)}", (nodes,), (threads,),
        (samples.copy(), pivots, r, tails, ranks, m, s, max_rank, threshold),
        shared_bytes=8 * (steps + 33) + dtype.itemsize * (2 * m + steps) + 4 * m, **schedule,
    )  # fmt: skip
    return pivots, r, tails, ranks


def _walk_rows(kernels: HostKernels, name: str, k: int, *arguments: Any, **schedule: int) -> None:
    width = min(32, 1 << max(0, k - 1).bit_length())
    # Three blocks, however many rows: the grid's stride is at work as well.
    kernels.launch(name, (3,), (width, 64 // width), arguments, **schedule)


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


def _tiles(rows: NDArray, cols: NDArray) -> int:
    return len(rows) * -(-rows.shape[1] // 32) * -(-cols.shape[1] // 32)


def point_entries(
    kernels: HostKernels,
    points: NDArray,
    profile: str,
    lengthscale: float,
    nugget: float,
    rows: NDArray,
    cols: NDArray,
    **schedule: int,
) -> NDArray:
    """See `batched.point_entries`."""
    m, k, itemsize = rows.shape[1], cols.shape[1], points.dtype.itemsize
    out = _poisoned((len(rows), m, k), points.dtype)
    kernels.launch(
        f"point_entries_{profile}_{_suffix(points.dtype)}", (_tiles(rows, cols),), (32, 8),
        (points, rows, cols, out, m, k, points.shape[1], lengthscale, nugget),
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

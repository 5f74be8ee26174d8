"""CuPy implementation of the entry generators: batches of blocks of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import device_index, launch, narrow, suffix
from gpu_hodlr.batched.cupy_khatri_rao import Side, Tables, fill
from gpu_hodlr.batched.cupy_linalg import columns_at_once, gather_rows, matmul
from gpu_hodlr.batched.level_products import NARROW
from gpu_hodlr.devices import Array, HostIndex, to_hosts

if TYPE_CHECKING:
    from gpu_hodlr.batched import GramRows, PointKernel


_TILE = 32  # of the entry kernels
_MARKS = 16  # a key: sorting it takes about as long
_MOST_UNITS = 1 << 13  # of several nodes at a time: the table of their pairs has 512 MB


def _tiles(nodes: int, m: int, k: int) -> int:
    return nodes * -(-m // _TILE) * -(-k // _TILE)


def dense_entries(array: Array, rows: Array, cols: Array) -> Array:
    """See `batched.dense_entries`."""
    i, j = device_index(rows)[:, :, None], device_index(cols)[:, None, :]
    return cupy.where((i >= 0) & (j >= 0), array[i, j], array.dtype.type(0))


def point_entries(
    points: Array, kernel: PointKernel, nugget: Array, rows: Array, cols: Array
) -> Array:
    """See `batched.point_entries`; kernels/point_entries.cu, one block a tile."""
    rows, cols = device_index(rows), device_index(cols)
    (nodes, m), k, dtype = rows.shape, cols.shape[1], points.dtype
    out = cupy.empty((nodes, m, k), dtype)
    launch(
        "point_entries", f"point_entries_{kernel.profile}_{suffix(dtype)}", (_tiles(nodes, m, k),),
        (32, 8),
        (cupy.ascontiguousarray(points), rows, cols, out, m, k,
         points.shape[1], dtype.type(kernel.parameter), dtype.type(kernel.variance), nugget,
         int(len(nugget) > 1)),
        512 + 1088 * dtype.itemsize,
    )  # fmt: skip
    return out


def inner_products(x: Array, rows: Array, cols: Array) -> Array:
    """See `batched.inner_products`; kernels/inner_products.cu, one warp 32 rows; many: a GEMM."""
    rows, cols = device_index(rows), device_index(cols)
    (nodes, m), count = rows.shape, cols.shape[1]
    if count > NARROW:
        return matmul(gather_rows(x, rows), gather_rows(x, cols), False, True, None, 1)
    out = (cupy.empty if x.shape[1] else cupy.zeros)((nodes, m, count), x.dtype)
    if out.size == 0 or x.shape[1] == 0:
        return out
    threads = 32 * min(8, -(-m // 32))
    launch(
        "inner_products", narrow("inner_products", x.dtype, count),
        (nodes * -(-m // threads),), (threads,),
        (cupy.ascontiguousarray(x), rows, cols, out, m, x.shape[1],
         count),
        2080 * x.itemsize,
    )  # fmt: skip
    return out


def khatri_rao_entries(
    features: Array,
    feature_of: HostIndex,
    unit_of: HostIndex,
    unit_gram: GramRows,
    rows: Array,
    cols: Array,
) -> Array:
    """See `batched.khatri_rao_entries`; GEMM, or kernels/khatri_rao_entries.cu for thin blocks.

    The rows G[u, v] that the blocks need are tabulated first, each pair of units once; as many
    nodes at a time as the table has memory for, and the one that says where each pair is.
    """
    rows, cols = to_hosts(rows, cols)
    out = cupy.empty((*rows.shape, cols.shape[1]), features.dtype)
    row_units, col_units = (np.where(i < 0, -1, unit_of[i]) for i in (rows, cols))
    most = columns_at_once(features.shape[1] * out.itemsize)  # a row of G is one such column
    num_units = int(unit_of.max()) + 1
    node, u, v = _pairs_of_nodes(row_units, col_units, num_units)
    ends = np.searchsorted(node, np.arange(len(rows)), side="right")
    first = 0
    while first < len(rows):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        mine = slice(before, ends[last - 1])
        while num_units > _MOST_UNITS and last > first + 1:
            if len(_distinct(np.concatenate([u[mine], v[mine]]), num_units)) <= _MOST_UNITS:
                break
            last = (first + last) // 2
            mine = slice(before, ends[last - 1])
        part = slice(first, last)
        index = [
            np.where(i[part] < 0, -1, of)
            for i, units in ((rows, row_units), (cols, col_units))
            for of in (feature_of[i[part]], units[part])
        ]
        _fill(out[part], features, index, u[mine], v[mine], num_units, unit_gram)
        first = last
    return out


def _pairs_of_nodes(
    row_units: HostIndex, col_units: HostIndex, units: int
) -> tuple[HostIndex, HostIndex, HostIndex]:
    """Every (node, unit of a row, unit of a column), sorted by node."""
    nodes = np.arange(len(row_units))[:, None]
    (row_node, u), (col_node, v) = (
        np.divmod(_distinct((nodes * units + x)[x >= 0], len(nodes) * units), units)
        for x in (row_units, col_units)
    )
    count = np.bincount(col_node, minlength=len(nodes))
    first = np.cumsum(count) - count
    repeats = count[row_node]  # each row unit of a node meets all its column units
    which = np.repeat(np.arange(len(row_node)), repeats)
    within = np.arange(len(which)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    return row_node[which], u[which], v[first[row_node[which]] + within]


def _distinct(keys: HostIndex, below: int) -> HostIndex:
    """The different keys, ascending, of keys in 0 .. below - 1: by marks, where that is quicker."""
    if below > _MARKS * keys.size:
        return np.unique(keys)
    marks = np.zeros(below, bool)
    marks[keys] = True
    return np.flatnonzero(marks)


def _fill(
    out: Array,
    features: Array,
    index: list[HostIndex],
    u: HostIndex,
    v: HostIndex,
    num_units: int,
    unit_gram: GramRows,
) -> None:
    """Blocks of some nodes; index: features and units of the rows, then of the columns."""
    in_play = _distinct(np.concatenate([[0], u, v]), num_units)
    slots = len(in_play)
    slot_of = np.full(num_units + 1, -1)  # the last is that of padding
    slot_of[in_play] = np.arange(slots)
    i, j = slot_of[u], slot_of[v]
    key = _distinct(np.minimum(i, j) * slots + np.maximum(i, j), slots * slots)
    low, high = np.divmod(key, slots)
    coupled = unit_gram.coupled(in_play[low], in_play[high])
    low, high = low[coupled], high[coupled]
    gram = unit_gram.pairs(in_play[low], in_play[high])
    row_of = np.full((slots, slots), -1)
    row_of[low, high] = row_of[high, low] = np.arange(len(low))
    rows, cols = (_side(slot_of, *of) for of in (index[:2], index[2:]))
    fill(out, Tables(features, gram, device_index(row_of)), rows, cols)


def _side(slot_of: HostIndex, feature: HostIndex, unit: HostIndex) -> Side:
    """Rows or columns; those of a node that has nothing to meet them are padding."""
    slot = slot_of[unit]
    meets = slot >= 0
    return Side(np.where(meets, feature, -1), np.where(meets, slot, 0))

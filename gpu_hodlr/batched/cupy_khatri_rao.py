"""Blocks of a Khatri-Rao Gram matrix on a GPU: by GEMM on scaled panels, or entry by entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import cupy
import numpy as np

from gpu_hodlr.batched.cublas import gemm
from gpu_hodlr.batched.cuda import device_indices, launch, suffix
from gpu_hodlr.batched.cupy_linalg import columns_at_once, gather_rows, put_rows, scaled_panels
from gpu_hodlr.devices import Array, HostArray, HostIndex

_TILE = 32  # of the entry kernels
# Of an entry and a sample the kernel makes two instructions, about 0.2 ps in float64 and 0.1 in
# float32 on an H200 (60 % of 34 and 67 Tflop/s); GEMM two operations, 0.04 ps, after a panel of h
# rows and one of k columns were written and read, 2 v bytes a number of v bytes (4.3 TB/s: 3.7 ps,
# 1.9 ps in float32). It is the faster where h k (0.2 - 0.04) > 3.7 (h + k).
_LEAST = {8: 24, 4: 31}
_LEAST_HEIGHT = 16  # of the matrices of a GEMM: fewer rows are padded
_SCRATCH = 1 << 30  # bytes of panels and products at a time, and an eighth of what is free


@dataclass(frozen=True)
class Side:
    """The rows, or the columns, of some blocks; host arrays.

    Attributes:
        feature: (t, m) the features of their indices, -1 for padding.
        slot: (t, m) their units, numbered as in a table of pairs; anything for padding.
    """

    feature: HostIndex
    slot: HostIndex


@dataclass(frozen=True)
class Tables:
    """What the entries are made of.

    Attributes:
        features: X (num_features, n).
        gram: (pairs, n) the rows of G in play.
        row_of: (slots, slots) the row of `gram` of two units, -1 where G is 0; symmetric.
    """

    features: Array
    gram: Array
    row_of: Array


def _runs(keys: HostIndex) -> tuple[HostIndex, HostIndex, HostIndex]:
    """The different ones of ascending keys, where each begins, and how many there are."""
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], first, np.diff(first, append=len(keys))


@dataclass(frozen=True)
class _Groups:
    """Indices of a node and of one unit, group by group; host arrays.

    Attributes:
        place: (real indices,) their places in the flattened side, those of a group together.
        first: (groups,) where each begins.
        size: (groups,) how many there are in each.
        node: (groups,) its node.
        slot: (groups,) its unit.
    """

    place: HostIndex
    first: HostIndex
    size: HostIndex
    node: HostIndex
    slot: HostIndex

    @classmethod
    def of(cls, side: Side) -> _Groups:
        """Those of a side."""
        [real] = np.nonzero(side.feature.ravel() >= 0)
        slots = int(side.slot.max(initial=0)) + 1
        key = real // side.feature.shape[1] * slots + side.slot.ravel()[real]
        order = np.argsort(key, kind="stable")
        found, first, size = _runs(key[order])
        return cls(real[order], first, size, found // slots, found % slots)

    def saved(self, width: int, least: int) -> HostArray:
        """(groups,) what a GEMM with so many columns saves, in entries of the kernel; or costs."""
        return self.size * width - least * (self.size + width)

    def some(self, which: HostArray) -> _Groups:
        """Some of the groups; of the same places."""
        parts = (x[which] for x in (self.first, self.size, self.node, self.slot))
        return _Groups(self.place, *parts)

    def rows(self, height: int) -> HostIndex:
        """(groups, height) the places of each, -1 for padding."""
        slot = np.arange(height)
        place = np.minimum(self.first[:, None] + slot, len(self.place) - 1)
        return np.where(slot < self.size[:, None], self.place[place], -1)

    def of_nodes(self) -> _Groups:
        """A group a node of what these have, whatever the unit."""
        row = self.rows(int(self.size.max()))
        place, node = row[row >= 0], np.repeat(self.node, self.size)
        found, first, size = _runs(node)
        return _Groups(place, first, size, found, found)


def fill(out: Array, tables: Tables, rows: Side, cols: Side) -> None:
    """The blocks (t, m, k) of rows and columns.

    A group of rows of one unit u has one panel X[f(j)] * G[u, u(j)] for the columns j of its node,
    and is a GEMM with it; so is, the other way round, a group of columns. Thin groups, with few
    indices of a unit, are left to the kernel.
    """
    m, k, least = out.shape[1], out.shape[2], _LEAST[out.itemsize]
    groups, turned = _Groups.of(rows), _Groups.of(cols)
    saved, saved_turned = groups.saved(k, least), turned.saved(m, least)
    if max(saved.max(initial=0), saved_turned.max(initial=0)) <= 0:
        _by_kernel(out, tables, rows, cols)
    elif np.maximum(saved, 0).sum() >= np.maximum(saved_turned, 0).sum():
        _by_groups(out, tables, groups, saved > 0, rows, cols)
    else:
        transposed = cupy.empty((len(out), k, m), out.dtype)
        _by_groups(transposed, tables, turned, saved_turned > 0, cols, rows)
        out[...] = transposed.swapaxes(1, 2)


def _by_groups(
    out: Array, tables: Tables, groups: _Groups, wide: HostArray, side: Side, other: Side
) -> None:
    """The rows of wide groups by GEMM, those of the others by the kernel."""
    out.fill(0)  # rows of padding
    every_row = out.reshape(-1, out.shape[2])
    _by_products(every_row, tables, groups.some(wide), side, other)
    if not wide.all():
        thin = groups.some(~wide).of_nodes()
        rows = thin.rows(int(thin.size.max()))
        there = rows >= 0
        mine = Side(*(np.where(there, x.ravel()[rows], -1) for x in (side.feature, side.slot)))
        block = cupy.empty((*rows.shape, out.shape[2]), out.dtype)
        columns = Side(other.feature[thin.node], other.slot[thin.node])
        _by_kernel(block, tables, mine, columns)
        put_rows(block, rows, every_row)


def _by_products(
    every_row: Array, tables: Tables, groups: _Groups, side: Side, other: Side
) -> None:
    """Groups padded to a power of two: a GEMM for each, of as many as there is room for."""
    k, value, n = every_row.shape[1], every_row.itemsize, tables.features.shape[1]
    heights = np.maximum(1 << np.ceil(np.log2(groups.size)).astype(np.int64), _LEAST_HEIGHT)
    room = min(_SCRATCH, columns_at_once(1))
    widths: list[int] = []
    indices: list[HostIndex] = []
    for height in np.unique(heights).tolist():
        width = min(n, max(1, (room // value - height * k) // (height + k)))
        most = max(1, room // (((height + k) * width + height * k) * value))
        [chosen] = np.nonzero(heights == height)
        for start in range(0, len(chosen), most):
            some = groups.some(chosen[start : start + most])
            place = some.rows(height)
            own = np.where(place >= 0, side.feature.ravel()[place], -1)
            widths.append(width)
            indices += [place, own, some.node, some.slot]
    feature, slots, *sent = device_indices(other.feature, other.slot, *indices)  # by one copy
    parts: list[Tables] = []
    for i, width in enumerate(widths):
        to, mine, node, slot = sent[4 * i : 4 * i + 4]
        if i == 0 or width != widths[i - 1]:
            parts = list(_samples(tables, width))
        product = cupy.empty((*to.shape, k), every_row.dtype)
        for j, part in enumerate(parts):
            panels = scaled_panels(
                part.features, part.gram, node, slot, feature, slots, tables.row_of
            )
            rows = gather_rows(part.features, mine)
            gemm(rows, panels, product, transpose_b=True, beta=float(j > 0))
        put_rows(product, to, every_row)


def _samples(tables: Tables, width: int) -> Iterator[Tables]:
    """The tables at some samples after the other."""
    for first in range(0, tables.features.shape[1], width):
        some = slice(first, first + width)
        yield replace(
            tables,
            features=cupy.ascontiguousarray(tables.features[:, some]),
            gram=cupy.ascontiguousarray(tables.gram[:, some]),
        )


def _by_kernel(out: Array, tables: Tables, rows: Side, cols: Side) -> None:
    """By kernels/khatri_rao_entries.cu, one block a tile."""
    nodes, m, k = out.shape
    maps = device_indices(rows.feature, rows.slot, cols.feature, cols.slot)
    launch(
        "khatri_rao_entries", f"khatri_rao_entries_{suffix(out.dtype)}",
        (nodes * -(-m // _TILE) * -(-k // _TILE),), (16, 16),
        (cupy.ascontiguousarray(tables.features), *maps, tables.row_of,
         cupy.ascontiguousarray(tables.gram), out, m, k, tables.features.shape[1],
         len(tables.row_of)),
        1032 + 5184 * out.itemsize,
    )  # fmt: skip

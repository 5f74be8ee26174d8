"""NumPy implementation of the merge of short sorted lists."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.batched.threads import over_nodes
from gpu_hodlr.devices import HostArray

_ROWS = 1024  # merged together: what a task holds stays near


def merge_smallest(
    values: HostArray, index: HostArray, rows: HostArray, found: HostArray, candidates: HostArray
) -> None:
    """See `batched.merge_smallest`."""
    nodes, m, c = found.shape
    count, parts = values.shape[1], -(-m // _ROWS)  # one node may hold all the rows

    def work(task: int) -> None:
        t, part = task // parts, slice(task % parts * _ROWS, (task % parts + 1) * _ROWS)
        row, here, other = rows[t, part], found[t, part], candidates[t]
        here[:, other < 0] = np.inf
        order = np.argsort(other)
        itself = order[np.searchsorted(other, row, sorter=order).clip(max=c - 1)]
        here[np.arange(len(row)), itself] = np.where(
            other[itself] == row, np.inf, here[np.arange(len(row)), itself]
        )
        real = row >= 0
        if not real.all():
            row, here = row[real], here[real]
        new, new_index = _smallest(here, other, count)
        both = np.concatenate([values[row], new], axis=1)
        both_index = np.concatenate([index[row], new_index], axis=1)
        values[row], index[row] = _merged(both, both_index, count)

    if c:
        over_nodes(work, nodes * parts)


def _smallest(values: HostArray, index: HostArray, count: int) -> tuple[HostArray, HostArray]:
    """The smallest of values (rows, c), equal ones by index (c,); and their index; in any order."""
    if count >= len(index):
        return values, np.broadcast_to(index, values.shape)
    chosen = np.argpartition(values, count - 1, axis=1)[:, :count]
    smallest = np.take_along_axis(values, chosen, axis=1)
    tied = np.count_nonzero(values <= smallest.max(axis=1, keepdims=True), axis=1) > count
    if tied.any():  # which of the equal ones were chosen is chance
        by_index = np.argsort(index)
        order = np.argsort(values[tied][:, by_index], axis=1, kind="stable")[:, :count]
        chosen[tied] = by_index[order]
        smallest = np.take_along_axis(values, chosen, axis=1)
    return smallest, index[chosen]


def _merged(values: HostArray, index: HostArray, count: int) -> tuple[HostArray, HostArray]:
    """The smallest values of each row in ascending order, of an index met twice the smaller."""
    there = np.isfinite(values)
    values, index = np.where(there, values, np.inf), np.where(there, index, -1)
    order = np.lexsort((values, index))
    values, index = (np.take_along_axis(a, order, axis=1) for a in (values, index))
    again = index[:, 1:] == index[:, :-1]
    values[:, 1:][again], index[:, 1:][again] = np.inf, -1
    order = np.lexsort((index, values))[:, :count]
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(index, order, axis=1)

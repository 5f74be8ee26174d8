"""Cells of a tree as block rows see them: how far each is, and which are divided."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_hodlr.batched import _implementation
from gpu_hodlr.devices import Array

Examined = tuple[Array, Array, Array]
"""Of cells (rows, q): first position, columns of the row in it, and the distance from the row."""


@dataclass(frozen=True)
class Boxes:
    """The cells of a level, runs of positions, and the boxes that hold their points.

    Attributes:
        offsets: (cells + 1,) int64 where each begins.
        low, high: (cells, d) the least and largest coordinates; infinite ones of an empty cell.
    """

    offsets: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Rows:
    """Block rows: their boxes and their columns, a run of positions less some runs in it.

    Attributes:
        low, high: (rows, d), see `Boxes`.
        run: (rows, 2) int64 the first position and the last one + 1.
        left: (rows, k) int64 the first positions of what is left out, ascending.
        size: (rows, k) int64 how many are.
    """

    low: Array
    high: Array
    run: Array
    left: Array
    size: Array


def examined(cell: Array, boxes: Boxes, rows: Rows) -> Examined:
    """Cells as block rows see them.

    A cell without columns of the row is infinitely far, one with others' as well is nearest of
    all, at -1; the others are at the squared distance of the boxes, and a little of the centers'.

    Args:
        cell: (rows, q) int64 numbers of cells, -1 for none.
        boxes: of the cells.
        rows: the block rows.
    """
    result: Examined = _implementation("ranking", cell).examined(cell, boxes, rows)
    return result


def divided(
    order: Array, split: int, cell: Array, seen: Examined, kept: Examined, at: int
) -> Array:
    """The halves (rows, 2 split) of the first cells in an order, -1 where they hold nothing.

    Args:
        order: (rows, q) int64.
        split: how many are divided, at most q.
        cell: see `examined`.
        seen: what `examined` gave of it.
        kept: (rows, width) each, where what was seen of the others goes, in their order.
        at: their first column there.
    """
    result: Array = _implementation("ranking", cell).divided(order, split, cell, seen, kept, at)
    return result

"""Columns drawn of cells that come in the order of their distance, near many of them, far few."""

from __future__ import annotations

from gpu_hodlr.batched import _implementation
from gpu_hodlr.devices import Array


def chances(count: Array, wanted: int) -> Array:
    """(t, q) how probable a column of each cell is drawn; of a row they add up to `wanted`.

    They are a multiple of the density (1 - a) / k / the sum of these + a / number, k the rank of
    the middle of a cell, a = 0.1; the nearest ones, for which that would be above 1, are certain.

    Args:
        count: (t, q) int64 columns of the cells, nearest first; padding has none, and comes last.
        wanted: columns of a row.
    """
    result: Array = _implementation("draws", count).chances(count, wanted)
    return result


def systematic(
    first: Array, count: Array, chance: Array, wanted: int, start: Array
) -> tuple[Array, Array]:
    """Systematic sampling (Madow, Ann. Math. Statist. 20 (1949)), none is drawn twice.

    Args:
        first: (t, q) int64 the first position of each cell.
        count: (t, q) int64 its columns.
        chance: (t, q) of each column.
        wanted: columns of a row.
        start: (t, 1) uniform in [0, 1).

    Returns:
        Positions (t, wanted), -1 for none, and their chances, 1 for none.
    """
    result: tuple[Array, Array] = _implementation("draws", count).systematic(
        first, count, chance, wanted, start
    )
    return result

"""Stacks of blocks cut into quarters, and put together of them."""

from __future__ import annotations

from gpu_hodlr.batched import _implementation
from gpu_hodlr.devices import Array

Quarters = tuple[Array, Array, Array, Array]
"""b[:r, :r], b[r:, :r], b[:r, r:] and b[r:, r:] of every block b of a stack."""


def quartered(
    blocks: Array, r: int, order: Array | None = None, added: Array | None = None
) -> Quarters:
    """The quarters of blocks (nodes, m, m), rows and columns in an order (nodes, m) if it is given.

    The first, second and last are new arrays; the third may be a part of the blocks.

    Args:
        blocks: symmetric; left as they are.
        r: rows and columns of the first.
        order: of int64.
        added: (nodes, m) to the diagonal, in the order of the quarters.
    """
    result: Quarters = _implementation("quarters", blocks).quartered(blocks, r, order, added)
    return result


def paired(d: Array, b: Array) -> Array:
    """[[d[2 p], b[p]], [b[p]^T, d[2 p + 1]]] for every pair: (pairs, 2 r, 2 r).

    Args:
        d: (2 pairs, r, r).
        b: (pairs, r, r).
    """
    result: Array = _implementation("quarters", d).paired(d, b)
    return result

"""The telescoping form of a symmetric matrix: nested bases, siblings coupled on every level (HSS).

    K_l = blockdiag(D_l) + blockdiag(U_l) K_(l-1) blockdiag(U_l)^T,   K_depth = K,   K_0 = D_0,

D_l = [[0, B], [B^T, 0]] above the leaves (Martinsson, SIAM J. Matrix Anal. Appl. 32 (2011)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from gpu_hodlr.batched import level_products
from gpu_hodlr.devices import Array, HostIndex
from gpu_hodlr.structures.nested import NestedBases, unpack_levels
from gpu_hodlr.structures.stored import Part, Ranks, Stack, diagonal_blocks


@dataclass(frozen=True, repr=False)
class Telescope(NestedBases):
    """A symmetric matrix in telescoping form; `levels` are empty when it is a single leaf.

    B of a level is (nodes / 2, r, r): K(skeleton, skeleton) of the left and right child.
    """

    def _coupled(self, index: int, w: Array) -> Array:
        return self.owners.complete(self.depth - index, w)[0]

    def _couple(self, index: int, w: Array, z: None) -> Array:
        return level_products.couple(self.levels[index].B, w)

    def _num_pairs(self, index: int) -> int:
        return 1 << (self.depth - index - 1)

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`; one coupling a parent."""
        stacks = super().stacks(leaves, levels, read)
        depth = len(leaves).bit_length() - 1
        return stacks | {f"B{i}": Stack(depth - i - 1) for i in range(min(levels, depth))}

    @classmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        D = diagonal_blocks(part)
        if len(ranks) != part.depth:
            raise ValueError(f"{len(part.leaves)} leaves do not fit {len(ranks)} levels")
        levels = unpack_levels(part, D, ranks)
        return cls(part.own_leaves(), D, levels, owners=part.owners)


def real_rows(leaves: Any, widths: Sequence[int]) -> list[Any]:
    """For every level, leaf level first, and at last the root: rows that are not padding.

    A level's entry has shape (nodes,), of all ranks: leaf sizes first, then sums over the two
    children of min(real rows, width).

    Args:
        leaves: (2^depth, m) of the whole tree, padding -1; a host array.
        widths: of each level, leaf level first, the rows of a skeleton, padding included.
    """
    counts = [np.count_nonzero(leaves >= 0, axis=1)]
    for width in widths:
        counts.append(np.minimum(counts[-1], width).reshape(-1, 2).sum(axis=1))
    return counts

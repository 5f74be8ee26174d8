"""The FMM form of a symmetric matrix (strong admissibility).

    K = sum over near leaf pairs (a, b) of K_ab + sum over levels and far pairs of U_a B_ab U_b^T,

U the nested bases of `structures.nested`. The telescoping form is the case with no near pairs but
a leaf with itself: there the far pairs are the siblings (Yu, Levitt, Reiz, Biros, SC17; Greengard
and Rokhlin, J. Comput. Phys. 73 (1987)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import level_products
from gpu_hodlr.batched.branches import Branch
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import Halo
from gpu_hodlr.interactions import interaction_lists
from gpu_hodlr.structures.nested import NestedBases, unpack_levels
from gpu_hodlr.structures.stored import Part, Ranks, Stack, diagonal_blocks
from gpu_hodlr.structures.structure import Map
from gpu_hodlr.structures.telescope import Telescope


@dataclass(frozen=True, repr=False)
class Multipole(NestedBases):
    """A symmetric matrix in FMM form. Every pair of nodes is stored once, the smaller node first.

    `levels` ends with the highest level that has far pairs; the B of a level belong to its
    far pairs.

    On many ranks a block is stored by every rank that works on one of its two nodes, or of far
    pairs on the sibling of one.

    Attributes:
        near: (q, m, m) the dense blocks of near pairs of different leaves, zero on the padding.
        near_pairs: (q, 2) those leaves; a host array, of all ranks.
        far_pairs: for every one of `levels` (p, 2) nodes; host arrays, of all ranks.
    """

    near: Array
    near_pairs: HostIndex
    far_pairs: tuple[Any, ...]

    @cached_property
    def near_halo(self) -> Halo:
        """Which near pairs this rank stores."""
        return Halo(self.owners, self.near_pairs, self.depth, siblings=False)

    @cached_property
    def far_halos(self) -> tuple[Halo, ...]:
        """Which far pairs of each of `levels` this rank stores."""
        return tuple(
            Halo(self.owners, pairs, self.depth - i) for i, pairs in enumerate(self.far_pairs)
        )

    @cached_property
    def _near_pattern(self) -> batched.BlockPattern:
        return pattern(self.near_halo, self.near)

    @cached_property
    def _far_patterns(self) -> tuple[batched.BlockPattern, ...]:
        return tuple(
            pattern(halo, level.B) for halo, level in zip(self.far_halos, self.levels, strict=True)
        )

    def _leaf_product(self, v: Array, aside: Branch) -> tuple[Array, Array]:
        x, y = level_products.leaf_product(self.D, v, self.leaves, aside)
        with aside:
            [every] = self.near_halo.extend(x)
            return x, batched.block_sparse_matmul(self.near, self._near_pattern, every, y)

    def _coupled(self, index: int, w: Array) -> Array:
        return self.far_halos[index].extend(w)[0]

    def _coupling_targets(self, v: Array) -> list[Any]:
        counts, k = [halo.count for halo in self.far_halos], v.shape[1]
        ranks = [level.rank for level in self.levels]
        ends = np.cumsum([0, *(count * r * k for count, r in zip(counts, ranks, strict=True))])
        zeros = namespace(v).zeros(int(ends[-1]), v.dtype)  # of all levels: one launch
        parts = [zeros[start:end] for start, end in pairwise(ends.tolist())]
        return [x.reshape(n, r, k) for x, n, r in zip(parts, counts, ranks, strict=True)]

    def _couple(self, index: int, w: Array, z: Array) -> Array:
        return batched.block_sparse_matmul(self.levels[index].B, self._far_patterns[index], w, z)

    def _num_pairs(self, index: int) -> int:
        return len(self.far_pairs[index])

    @property
    def num_stored(self) -> int:
        """See `Structure`."""
        return super().num_stored + len(self.near_pairs) * int(self.D.shape[1]) ** 2

    def arrays(self) -> list[Array]:
        """See `Structure`."""
        return [*super().arrays(), self.near]

    def index_arrays(self) -> list[Any]:
        """See `Structure`."""
        return [*super().index_arrays(), self.near_pairs, *self.far_pairs]

    def pack(self) -> dict[str, Any]:
        """See `Stored`."""
        return super().pack() | {"near": to_host(self.near), "near_pairs": self.near_pairs}

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`."""
        pairs = read("near_pairs")
        _check_near_pairs(pairs, len(leaves))
        depth = len(leaves).bit_length() - 1
        far = interaction_lists(depth, pairs).far
        stacks = super().stacks(leaves, levels, read)
        stacks["near"] = Stack(depth, pairs=pairs, siblings=False)
        for i in range(min(levels, depth)):
            stacks[f"B{i}"] = Stack(depth - i, pairs=far[depth - i])
        return stacks

    @classmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        D, near, pairs = diagonal_blocks(part), part["near"], part["near_pairs"]
        if near.shape != (part.count("near"), *D.shape[1:]):
            raise ValueError(f"{pairs.shape} near pairs do not fit blocks of shape {near.shape}")
        if near.dtype != D.dtype:
            raise ValueError("the near blocks have another type than the diagonal blocks")
        if len(ranks) != part.depth + 1 - interaction_lists(part.depth, pairs).top:
            raise ValueError(f"{len(ranks)} levels do not fit the near pairs")
        levels = unpack_levels(part, D, ranks)
        far_pairs = tuple(part.stacks[f"B{i}"].pairs for i in range(len(levels)))
        return cls(part.own_leaves(), D, levels, near, pairs, far_pairs, owners=part.owners)

    def scaled(self, factor: float) -> Self:
        """See `Structure`."""
        return replace(super().scaled(factor), near=self.near * self.near.dtype.type(factor))

    def _mapped(self, floats: Map, indices: Map, far: Map | None = None) -> Self:
        return replace(super()._mapped(floats, indices, far), near=floats(self.near))

    def telescope(self) -> Telescope | None:
        """The telescoping form of the same arrays, if the far pairs are the siblings; else None."""
        if len(self.near_pairs) or len(self.levels) < self.depth:
            return None
        return Telescope(self.leaves, self.D, self.levels, owners=self.owners)


def pattern(halo: Halo, like: Array) -> batched.BlockPattern:
    """Of a halo's pairs, for a stack of its base; in each row the order of all ranks."""
    every = halo.every_pair[halo.chosen]
    return batched.block_pattern(halo.pairs, halo.count, like, order_by=every)


def _check_near_pairs(pairs: HostIndex, nodes: int) -> None:
    """Refuse what is no list of pairs of different leaves, sorted.

    Raises:
        ValueError: it is none.
    """
    if pairs.ndim != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"the near pairs have shape {pairs.shape} and type {pairs.dtype}")
    if pairs.size and (pairs.min() < 0 or pairs.max() >= nodes):
        raise ValueError(f"a near pair is not of {nodes} leaves")
    if not np.array_equal(interaction_lists(nodes.bit_length() - 1, pairs).near, pairs):
        raise ValueError("the near pairs are not sorted")

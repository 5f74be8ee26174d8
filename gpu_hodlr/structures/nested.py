"""Nested interpolative bases U_t = P_t [I; T_t], and the product of a matrix that has them.

The identity rows of a basis are the node's skeleton; a parent's basis acts on the skeletons of its
children (Martinsson, SIAM J. Matrix Anal. Appl. 32 (2011)).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import level_products
from gpu_hodlr.batched.branches import Branch, branch
from gpu_hodlr.batched.stored import times
from gpu_hodlr.devices import Array, HostIndex, to_host
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.structures.stored import Part, Ranks, Stack, check_far
from gpu_hodlr.structures.structure import Map, Structure, add_to_diagonals


@dataclass(frozen=True)
class Level:
    """The nodes of one level, all of the same padded rank r.

    Attributes:
        order: (nodes, rows) the rows of a node, its r skeleton rows first, padding last; None on
            the leaf level, where it is folded into the leaves themselves.
        T: (nodes, rows - r, r) interpolates the other rows from the skeleton.
        B: (pairs, r, r) K(skeleton, skeleton) of the pairs of nodes that are coupled.
        ranks: numerical rank of every node, at most r.
    """

    order: Array | None
    T: Array
    B: Array
    ranks: tuple[int, ...]

    @property
    def rank(self) -> int:
        """r, the columns of every basis of the level."""
        return int(self.T.shape[2])


@dataclass(frozen=True, repr=False)
class NestedBases(Structure):
    """Dense blocks at the leaves, and nested bases with couplings above them.

    A subclass says which pairs of nodes the couplings B of a level belong to.

    Attributes:
        leaves: (2^depth, m) the user's indices of each leaf, padding (-1) last; D's library.
        D: (2^depth, m, m) the diagonal blocks, zero on the padding.
        levels: leaf level first. Spread over ranks, T and order of a level are of the nodes that
            this rank works on, B of pairs with these or with their siblings.
        owners: see `Structure`.
    """

    leaves: Array
    D: Array
    levels: tuple[Level, ...]
    owners: Ownership = field(default=ALONE, kw_only=True)

    @abstractmethod
    def _coupled(self, index: int, w: Array) -> Array:
        """Of w (nodes, r, k) of this rank's nodes: `family`, and after it what that is coupled to.

        The one message of levels[index].
        """

    @abstractmethod
    def _couple(self, index: int, w: Array, z: Any) -> Array:
        """The couplings of levels[index] times `_coupled` w, for `family`, in z if it is given."""

    def _coupling_targets(self, v: Array) -> list[Any]:
        """For every level the z of `_couple` in a product with v (N, k); None: a new array."""
        return [None] * len(self.levels)

    @abstractmethod
    def _num_pairs(self, index: int) -> int:
        """Couplings of levels[index], of all ranks."""

    @cached_property
    def num_rows(self) -> int:
        """Rows of vectors on this rank."""
        return int((self.leaves >= 0).sum())

    @property
    def n(self) -> int:
        """N."""
        return self.owners.total(self.num_rows)

    @cached_property
    def depth(self) -> int:
        """Levels of the tree below the root."""
        return (self.owners.num_leaves(len(self.leaves)) - 1).bit_length()

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """See `Structure`."""
        return tuple(level.ranks for level in self.levels)

    def matmat(self, v: Array) -> Array:
        """K v for v (N, k): up W <- U^T W, across Z = B W, down Z <- Z + U Z, and last D W + U Z.

        Leaf blocks and couplings stand beside the way up: a product waits for two launches a level.
        """
        blocks, couplings = branch(v), branch(v)
        with couplings:
            across = self._coupling_targets(v)
        x, y = self._leaf_product(v, blocks)
        for index, level in enumerate(self.levels):
            w = level_products.restrict(level.T, self._order(index, x), x)
            w = self._coupled(index, w)
            with couplings:
                across[index] = self._couple(index, w, across[index])
            x = self.owners.of_family(w, self.depth - index)
            x = x.reshape(len(x) // 2, 2 * level.rank, x.shape[2])
        couplings.join()
        for index in range(len(self.levels) - 1, 0, -1):
            z, below = across[index], across[index - 1]
            parents = below.reshape(len(below) // 2, 2 * below.shape[1], below.shape[2])
            across[index - 1] = self._add_prolonged(index, z, parents).reshape(below.shape)
        blocks.join()
        if self.levels:
            y = self._add_prolonged(0, across[0], y)
        if y.ndim == 2:
            return y
        return batched.scatter_rows(y, self.leaves, self.num_rows, every=True)

    def _leaf_product(self, v: Array, aside: Branch) -> tuple[Array, Array]:
        """See `level_products.leaf_product`; with the dense blocks of different leaves."""
        return level_products.leaf_product(self.D, v, self.leaves, aside, gathered=False)

    def _order(self, index: int, x: Array) -> Array | None:
        """The order that rows of x are taken by, of the nodes of levels[index] or of vectors."""
        return self.leaves if x.ndim == 2 else self.levels[index].order

    def _add_prolonged(self, index: int, z: Array, to: Array) -> Array:
        """To `to`, by the nodes of levels[index] or (N, k), U z of these, z of their family."""
        level, z = self.levels[index], self.owners.own(z, self.depth - index)
        return level_products.prolong(level.T, self._order(index, to), z, add_to=to)

    def diagonal(self) -> Array:
        """The diagonal, (N,), that of the leaf blocks."""
        blocks = self.D.diagonal(axis1=1, axis2=2)[:, :, None]
        return batched.scatter_rows(blocks, self.leaves, self.num_rows)[:, 0]

    def arrays(self) -> list[Array]:
        """See `Structure`."""
        return [self.D, *(a for level in self.levels for a in (level.T, level.B))]

    @property
    def num_stored(self) -> int:
        """See `Structure`."""
        total = int(self.D.shape[1]) ** 2 << self.depth
        for index, level in enumerate(self.levels):
            of_node = int(level.T.shape[1]) * level.rank
            total += (of_node << (self.depth - index)) + self._num_pairs(index) * level.rank**2
        return total

    def index_arrays(self) -> list[Any]:
        """See `Structure`."""
        return [self.leaves, *(a.order for a in self.levels if a.order is not None)]

    def pack(self) -> dict[str, Any]:
        """See `Stored`."""
        arrays = {"leaves": self.all_leaves, "D": to_host(self.D)}
        for i, level in enumerate(self.levels):
            arrays[f"T{i}"], arrays[f"B{i}"] = to_host(level.T), to_host(level.B)
            if level.order is not None:
                arrays[f"order{i}"] = to_host(level.order)
        return arrays

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`; a subclass adds those of the couplings."""
        depth = len(leaves).bit_length() - 1
        stacks = {"D": Stack(depth)}
        for i in range(min(levels, depth)):
            stacks[f"T{i}"] = stacks[f"order{i}"] = Stack(depth - i)
        return stacks

    def scaled(self, factor: float) -> Self:
        """See `Structure`."""
        if factor == 1.0:
            return self
        number = self.D.dtype.type(factor)
        levels = tuple(replace(level, B=times(level.B, number)) for level in self.levels)
        return replace(self, D=self.D * number, levels=levels)

    def plus_diagonal(self, d: Array) -> Self:
        """See `Structure`: it enters the leaves."""
        return replace(self, D=add_to_diagonals(self.D, self.leaves, d))

    def _mapped(self, floats: Map, indices: Map, far: Map | None = None) -> Self:
        far = far or floats
        levels = tuple(
            Level(None if a.order is None else indices(a.order), far(a.T), far(a.B), a.ranks)
            for a in self.levels
        )
        return replace(self, leaves=indices(self.leaves), D=floats(self.D), levels=levels)


def unpack_levels(part: Part, D: Array, ranks: Ranks) -> tuple[Level, ...]:
    """The levels of packed arrays.

    Raises:
        KeyError, ValueError: arrays are missing, or do not fit the leaves or each other.
    """
    levels = tuple(
        Level(part.get(f"order{i}"), part[f"T{i}"], part[f"B{i}"], level_ranks)
        for i, level_ranks in enumerate(ranks)
    )
    _check_levels(part, D, levels)
    return levels


def _check_levels(part: Part, D: Array, levels: tuple[Level, ...]) -> None:
    """Refuse levels that do not fit the leaves, each other, or their numbers of couplings.

    Raises:
        ValueError: what does not fit.
    """
    rows = D.shape[1]
    for i, level in enumerate(levels):
        r = level.T.shape[2]
        nodes = part.count(f"T{i}")
        shapes = (level.T.shape, level.B.shape, len(level.ranks))
        every = len(part.leaves) >> i
        if shapes != ((nodes, rows - r, r), (part.count(f"B{i}"), r, r), every):
            raise ValueError(f"level {i} has shapes {shapes}")
        if max(level.ranks) > r:
            raise ValueError(f"level {i} has a block of rank {max(level.ranks)}, its width is {r}")
        check_far({f"T{i}": level.T, f"B{i}": level.B}, D.dtype)
        check_order(level.order, i, nodes, rows)
        rows = 2 * r


def check_order(order: Any, index: int, nodes: int, rows: int) -> None:
    """Refuse what does not order the rows of every node of a level; the leaves have no order.

    Raises:
        ValueError: it does not.
    """
    each = np.tile(np.arange(rows), (nodes, 1))
    if (order is None) != (index == 0) or (
        order is not None and not np.array_equal(np.sort(order, axis=1), each)
    ):
        raise ValueError(f"the order of level {index} is not a permutation")

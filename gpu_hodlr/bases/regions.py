"""What of a node's block row is sampled: the regions of HSS, FMM and HODLR.

A scheme with low-rank blocks elsewhere is a region of its own; samplers and sweeps are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.bases.columns import Columns, TreeLevel
from gpu_hodlr.batched import level_products
from gpu_hodlr.devices import Array, HostArray, HostIndex, move, namespace, to_host
from gpu_hodlr.distributed import Halo, Ownership, Siblings
from gpu_hodlr.interactions import InteractionLists, partners
from gpu_hodlr.structures.multipole import pattern
from gpu_hodlr.tree import ClusterTree

Samples = tuple[Array, Array, Array]
"""S (nodes, rows, s), the squared norms of the products it was made of, (nodes,), and U^T Omega of
the same nodes, (nodes, rows, s), or (nodes, 0, s) where nothing goes up."""


class Region(Protocol):
    """The columns R(t) outside t that the block row of a node t is sampled in: S_t ~ K(t, R(t)).

    `EntrySampler` asks for `columns`, `points` and `neighbours`, `ProductSampler` for `samples`.

    Attributes:
        stream: of `gpu_hodlr.streams`, what columns are drawn by.
    """

    stream: ClassVar[int]

    @property
    def tree(self) -> ClusterTree:
        """The cluster tree."""

    @property
    def owners(self) -> Ownership:
        """Which rank has what of it."""

    @property
    def first(self) -> int:
        """The level that is sampled first."""

    def dealt(self, level: int) -> tuple[Ownership, int]:
        """How a level's block rows are dealt out: as the nodes of a level by these owners."""

    def columns(self, nodes: TreeLevel) -> Columns:
        """R(t) of all block rows of a level, as many as there are nodes of `dealt`."""

    @property
    def points(self) -> HostArray | None:
        """(N, d) coordinates that say which columns are near; None: their places in the tree."""

    def neighbours(self, index: Array) -> Array | None:
        """(k, q) neighbours of indices (k,), whose columns matter most; -1 for none.

        Both are where the matrix is. They are looked at where they are in R(t). None where nothing
        was searched.
        """

    def samples(self, level: int, omega: Array, y: Array) -> Samples:
        """K(t, R(t)) Omega on the level sampled first, or on one whose products are made for it.

        Args:
            level: of the nodes.
            omega: (N, s), this rank's rows, as of the next.
            y: (N, s) K Omega, from which what is known of the rest of the block row is taken off.
        """


class NestedRegion(Region, Protocol):
    """One that grows from a node to its parent by less than all: samples go up with the bases.

    R(c) of a child c is R(t) of its parent t and the nodes that c is coupled to on its own level.
    """

    @property
    def top(self) -> int:
        """The last level with bases."""

    def coupled(self, level: int, *arrays: Array) -> list[Array]:
        """Of arrays of this rank's nodes (nodes, ...): `Ownership.family`, then what is coupled.

        All arrays come as one message.
        """

    def pairs(self, level: int) -> Any:
        """(q, 2) coupled nodes, a host array of places in what `coupled` gives."""

    def lifted(self, S: Array, B: Array, omega: Array, level: int) -> Array:
        """The parents' samples K(t, R(t)) Omega, (family / 2, 2 r, s); S may be overwritten.

        S_t = [S_c - sum over c's partners b of B_cb Omega_b; the same of the other child].

        Args:
            S: (family, r, s) the samples of a level's nodes on their skeletons.
            B: (q, r, r) couplings of `pairs`.
            omega: (nodes, r, s) U_b^T Omega_b of the nodes of `coupled`.
            level: of the children.
        """


@dataclass(frozen=True, eq=False)
class Outside:
    """R(t) = all columns outside t: HSS, where siblings are coupled.

    Attributes:
        tree, owners: see `Region`.
        D: (leaves, m, m) this rank's diagonal blocks.
        points: (N, d) host array of coordinates, or None.
    """

    tree: ClusterTree
    owners: Ownership
    D: Array
    points: HostArray | None = None
    top: int = 1
    stream: ClassVar[int] = streams.ENTRY_COLUMNS

    @property
    def first(self) -> int:
        """The leaves."""
        return self.tree.depth

    def dealt(self, level: int) -> tuple[Ownership, int]:
        """See `Region`: as nodes are."""
        return self.owners, level

    def columns(self, nodes: TreeLevel) -> Columns:
        """See `Region`."""
        every = np.arange(1 << nodes.level)
        return Columns(nodes, every, _all_positions(nodes), every[:, None])

    def neighbours(self, index: Array) -> Array | None:
        """See `Region`: none were searched."""
        return None

    def samples(self, level: int, omega: Array, y: Array) -> Samples:
        """See `Region`: Y_t - K_tt Omega_t of the leaves."""
        return _off_diagonal(self.tree, self.owners, self.D, omega, y)

    def coupled(self, level: int, *arrays: Array) -> list[Array]:
        """See `NestedRegion`: siblings."""
        return self.owners.complete(level, *arrays)

    def pairs(self, level: int) -> Any:
        """See `NestedRegion`: siblings."""
        family = self.owners.family(level)
        return np.arange(family.stop - family.start).reshape(-1, 2)

    def lifted(self, S: Array, B: Array, omega: Array, level: int) -> Array:
        """See `NestedRegion`: [S_l - B Omega_r; S_r - B^T Omega_l]."""
        return _by_parents(level_products.couple(B, omega, subtract_from=S))


@dataclass(frozen=True, eq=False)
class FarField:
    """R(t) = the columns of all nodes that are not near t: FMM, where far pairs are coupled.

    Attributes:
        tree, owners: see `Region`.
        D: (leaves, m, m) this rank's diagonal blocks.
        near_blocks: (q, m, m) the near pairs' blocks that concern this rank.
        lists: near and far pairs.
        searched: (N, k) neighbours of every index, -1 for none.
        points: (N, d) host array of coordinates, or None.
    """

    tree: ClusterTree
    owners: Ownership
    D: Array
    near_blocks: Array
    lists: InteractionLists
    searched: Array
    points: HostArray | None = None
    _patterns: dict[int, batched.BlockPattern] = field(default_factory=dict, init=False, repr=False)
    stream: ClassVar[int] = streams.ENTRY_COLUMNS

    @property
    def first(self) -> int:
        """The leaves."""
        return self.tree.depth

    @property
    def top(self) -> int:
        """The last level with far pairs."""
        return self.lists.top

    @cached_property
    def near_halo(self) -> Halo:
        """The near pairs of leaves."""
        return Halo(self.owners, self.lists.near, self.tree.depth, siblings=False)

    @cached_property
    def _halos(self) -> list[Halo]:
        return [Halo(self.owners, pairs, level) for level, pairs in enumerate(self.lists.far)]

    def dealt(self, level: int) -> tuple[Ownership, int]:
        """See `Region`: as nodes are."""
        return self.owners, level

    def columns(self, nodes: TreeLevel) -> Columns:
        """See `Region`."""
        near = partners(self.lists.near_nodes[nodes.level], len(nodes.sizes))
        itself = np.arange(len(near))
        taken = np.concatenate([itself[:, None], np.where(near < 0, len(near), near)], axis=1)
        return Columns(nodes, itself, _all_positions(nodes), np.sort(taken, axis=1))

    def neighbours(self, index: Array) -> Array | None:
        """See `Region`: those found before."""
        return self.searched[index]

    def samples(self, level: int, omega: Array, y: Array) -> Samples:
        """See `Region`: Y_t - K_tt Omega_t - sum over near leaves s of K_ts Omega_s."""
        S, energy, omega = _off_diagonal(self.tree, self.owners, self.D, omega, y)
        [x] = self.near_halo.extend(-omega)
        S = batched.block_sparse_matmul(self.near_blocks, self._near_pattern, x, S)
        return self._zero_where_empty(S, level), energy, omega

    @cached_property
    def _near_pattern(self) -> batched.BlockPattern:
        return pattern(self.near_halo, self.near_blocks)

    def coupled(self, level: int, *arrays: Array) -> list[Array]:
        """See `NestedRegion`: nodes of the level that are far, of parents that are near."""
        return self._halos[level].extend(*arrays)

    def pairs(self, level: int) -> Any:
        """See `NestedRegion`: far pairs."""
        return self._halos[level].pairs

    def lifted(self, S: Array, B: Array, omega: Array, level: int) -> Array:
        """See `NestedRegion`."""
        if level not in self._patterns:
            self._patterns[level] = pattern(self._halos[level], B)
        batched.block_sparse_matmul(B, self._patterns[level], -omega, S)
        return self._zero_where_empty(_by_parents(S), level - 1)

    def _zero_where_empty(self, S: Array, level: int) -> Array:
        """Nodes that are near to all others: what is left there is rounding."""
        nodes = 1 << level
        alone = np.bincount(self.lists.near_nodes[level].ravel(), minlength=nodes) == nodes - 1
        [places] = np.nonzero(alone[self.owners.mine(level)])
        if len(places):  # by place: for a mask on the device the host would wait
            S[namespace(S).asarray(places)] = 0
        return S


@dataclass(frozen=True, eq=False)
class Sibling:
    """R(a) = the columns of b for siblings a (the even node) and b: HODLR, top level first.

    There is a block row for every pair. Where siblings span ranks, these have all of them.

    Attributes:
        tree, owners: see `Region`.
        points: (N, d) host array of coordinates, or None.
        above: v (N, s) -> the product of the levels above with v, (leaves, m, s), both of this
            rank; where there are products.
    """

    tree: ClusterTree
    owners: Ownership
    points: HostArray | None = None
    above: Callable[[Array], Array] | None = None
    first: int = 1
    stream: ClassVar[int] = streams.SIBLING_COLUMNS

    def dealt(self, level: int) -> tuple[Ownership, int]:
        """See `Region`: as the nodes above are, or to all ranks."""
        return Siblings(self.owners, level).dealt, level - 1

    def columns(self, nodes: TreeLevel) -> Columns:
        """See `Region`."""
        even = np.arange(0, 1 << nodes.level, 2)
        ends = to_host(nodes.offsets)
        run = np.stack([ends[even + 1], ends[even + 2]], axis=1)
        return Columns(nodes, even, run, np.empty((len(even), 0), np.int64))

    def neighbours(self, index: Array) -> Array | None:
        """See `Region`: none were searched."""
        return None

    def where(self, level: int, dtype: Any, device: str) -> Array:
        """(N, 1) the rows of Omega that are not zero: those of odd nodes.

        K Omega on an even node a then has K(a, b) Omega_b, and what the levels above contribute.
        """
        mask = np.zeros((self.tree.n, 1), dtype)
        odd = self.tree.nodes(level)[1::2]
        mask[odd[odd >= 0]] = 1
        return move(mask, device)

    def samples(self, level: int, omega: Array, y: Array) -> Samples:
        """See `Region`: Y_a less what the levels above contribute, for Omega zero where it must be.

        Peeling: Lin, Lu, Ying, J. Comput. Phys. 230 (2011); Martinsson, SIAM J. Sci. Comput. 38
        (2016). The number of columns does not depend on the number of nodes.
        """
        assert self.above is not None
        siblings = Siblings(self.owners, level)
        rows = self.owners.local(siblings.even(siblings.index(self.tree.leaves)))
        S = batched.gather_rows(y, rows)
        energy = siblings.sum_even(batched.squared_norms(S))
        S -= siblings.even(siblings.by_pieces(self.above(omega)))
        S = siblings.whole_even(S)
        return S, energy, S[:, :0]


def _all_positions(nodes: TreeLevel) -> HostIndex:
    return np.broadcast_to(to_host(nodes.offsets)[[0, -1]], (len(nodes.sizes), 2))


def _off_diagonal(
    tree: ClusterTree, owners: Ownership, D: Array, omega: Array, y: Array
) -> Samples:
    """Y_t - K_tt Omega_t of this rank's leaves."""
    y, omega = (by_leaves(tree, owners, a) for a in (y, omega))
    energy = batched.squared_norms(y)
    return batched.matmul(D, omega, subtract_from=y), energy, omega


def by_leaves(tree: ClusterTree, owners: Ownership, x: Array) -> Array:
    """This rank's rows (rows, k) as a stack of its leaves (leaves, m, k)."""
    return batched.gather_rows(x, owners.local(tree.leaves[owners.mine(tree.depth)]))


def _by_parents(x: Array) -> Array:
    """(nodes, r, s) -> (nodes / 2, 2 r, s), a view."""
    nodes, r, s = x.shape
    return x.reshape(nodes // 2, 2 * r, s)

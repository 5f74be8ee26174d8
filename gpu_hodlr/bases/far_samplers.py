"""Samples of the range of K(t, far field of t): the near field is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.bases.entry_sampler import EntrySampler
from gpu_hodlr.bases.samplers import Carried, ProductSampler, Samples
from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed import ALONE, Halo, Ownership
from gpu_hodlr.interactions import InteractionLists, partners
from gpu_hodlr.operators import Operator, Sketch
from gpu_hodlr.structures import Level
from gpu_hodlr.structures.multipole import pattern
from gpu_hodlr.tree import ClusterTree


class FarProductSampler(ProductSampler):
    """S_t = K(t, far field of t) Omega from one product Y = K Omega.

    Leaf: S = Y_t - K_tt Omega_t - sum over near leaves s of K_ts Omega_s. Parent: the samples of
    its children on their skeletons, less sum over their far pairs of B Omega_b, Omega_b =
    U_b^T Omega (the far field of a child is its parent's and the child's own far pairs).

    Args:
        sketch: Omega and Y; it is grown in place.
        tree: the cluster tree.
        D: its diagonal blocks, (leaves, m, m).
        near: (q, m, m) the blocks of the near pairs.
        lists: near and far pairs.
        limit: columns at most.
        owners: which rank has what; the sketch, D and near are of this rank.
    """

    def __init__(
        self,
        sketch: Sketch,
        tree: ClusterTree,
        D: Array,
        near: Array,
        lists: InteractionLists,
        limit: int,
        owners: Ownership = ALONE,
    ) -> None:
        self._near, self._lists = near, lists
        self._near_halo = Halo(owners, lists.near, tree.depth, siblings=False)
        self._near_pattern = pattern(self._near_halo, near)
        self._far_patterns: dict[int, batched.BlockPattern] = {}
        self._halos = [Halo(owners, pairs, level) for level, pairs in enumerate(lists.far)]
        super().__init__(sketch, tree, D, limit, owners)

    def _leaf_samples(self, columns: slice) -> Samples:
        S, noise, omega = super()._leaf_samples(columns)
        [x] = self._near_halo.extend(-omega)
        S = batched.block_sparse_matmul(self._near, self._near_pattern, x, S)
        return self._without_far_field(S, self._tree.depth), noise, omega

    def _carried(self, samples: Samples, order: Array, T: Array, depth: int) -> Carried:
        _, (S, noise, omega) = super()._carried(samples, order, T, depth)
        # Below the cut siblings are of one rank, and S is needed of siblings alone.
        below = depth > self._owners.cut
        return ((S, noise), (omega,)) if below else ((), (S, noise, omega))

    def _coupled(self, depth: int, arrays: Sequence[Array]) -> list[Array]:
        return self._halos[depth].extend(*arrays)

    def _lifted(self, carried: Sequence[Array], level: Level, depth: int) -> Samples:
        S, noise, omega = super()._lifted(carried, level, depth)
        return self._without_far_field(S, depth - 1), noise, omega

    def _subtract_couplings(self, B: Array, omega: Array, S: Array, depth: int) -> None:
        if depth not in self._far_patterns:
            self._far_patterns[depth] = pattern(self._halos[depth], B)
        batched.block_sparse_matmul(B, self._far_patterns[depth], -omega, S)

    def _without_far_field(self, S: Array, depth: int) -> Array:
        """Nodes that are near to all others: what is left there is rounding."""
        nodes = 1 << depth
        alone = np.bincount(self._lists.near_nodes[depth].ravel(), minlength=nodes) == nodes - 1
        [places] = np.nonzero(alone[self._owners.mine(depth)])
        if len(places):  # by place: for a mask on the device the host would wait
            S[namespace(S).asarray(places)] = 0
        return S


class FarEntrySampler(EntrySampler):
    """S_t = K(t, columns of the far field of t), drawn in thirds as `EntrySampler` does.

    Next to t: neighbours of its rows that are in its far field. Near: nodes of its far pairs on
    this level. Anywhere: in the far field.

    Args:
        operator: with entries.
        tree: the cluster tree.
        lists: near and far pairs.
        neighbours: (N, k) neighbours of every index, -1 for none.
        start: columns at first.
        limit: columns at most.
        seed: of the draws.
        owners: see `EntrySampler`.
    """

    def __init__(
        self,
        operator: Operator,
        tree: ClusterTree,
        lists: InteractionLists,
        neighbours: Any,
        start: int,
        limit: int,
        seed: int,
        owners: Ownership = ALONE,
    ) -> None:
        self._lists, self._neighbours = lists, neighbours
        super().__init__(operator, tree, start, limit, seed, owners)

    def _begin(self, level: int, rows: Any, count: int) -> None:
        near = partners(self._lists.near_nodes[level], 1 << level)
        itself = np.arange(len(near))[:, None]
        taken = np.concatenate([itself, np.where(near < 0, len(near), near)], axis=1)
        self._taken = np.sort(taken, axis=1)  # itself and its near nodes, padding last
        super()._begin(level, rows, count)

    def _taken_sizes(self) -> Any:
        return np.append(self._sizes, 0)[self._taken]

    def _num_outside(self) -> Any:
        return self._tree.n - self._taken_sizes().sum(axis=1)

    def _outside(self, slots: Any) -> Any:
        taken = self._taken[self._mine]
        sizes = np.append(self._sizes, 0)[taken]
        free_before = self._offsets[taken] - (np.cumsum(sizes, axis=1) - sizes)
        position = np.broadcast_to(slots, (len(sizes), slots.shape[-1])).copy()
        for size, before in zip(sizes.T, free_before.T, strict=True):
            position += np.where(slots >= before[:, None], size[:, None], 0)
        return position

    def _neighbour_positions(self, own: slice) -> Any:
        position = np.full(self._tree.n + 1, -1)  # the last for those that are none
        position[self._permutation] = np.arange(self._tree.n)
        return position[self._neighbours[self._permutation[own]]]

    def _beside(self) -> tuple[Any, Any]:
        return self._along_edges()

    def _sampled_for(self, node: Any, other: Any) -> tuple[Any, Any]:
        nodes, near = len(self._sizes), self._lists.near_nodes[self._level]
        near_keys = np.concatenate([near @ [nodes, 1], near @ [1, nodes]])
        return node, (node != other) & ~np.isin(node * nodes + other, near_keys)

    def _near_nodes(self) -> Any:
        found = partners(self._lists.far[self._level], len(self._sizes))[self._mine]
        return np.where(found < 0, self._row_nodes()[:, None], found)

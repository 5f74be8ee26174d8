"""Samples made of columns of the matrix itself, for matrices whose products are expensive."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr.arrays import Array, namespace, to_host
from gpu_hodlr.compress.samplers import Sample, regression_inflation
from gpu_hodlr.operators import Operator
from gpu_hodlr.telescope import Level
from gpu_hodlr.tree import ClusterTree

_NEAR = 6  # nodes a node's near columns are drawn from


class EntrySampler:
    """S_t = K(t, sampled columns outside t), half of them near, half anywhere.

    Near columns come from the nodes whose centers are nearest (or, without points, from the nodes
    beside t in the tree). Column j is weighted by 1 / sqrt(s p_j), p_j its density in the mixture
    of both draws, so that E[S S^T] = K(t, outside) K(outside, t) (balance heuristic: Veach and
    Guibas, SIGGRAPH 95). Where all columns outside are no more than wanted, S has them all.

    Args:
        operator: with entries.
        tree: the cluster tree.
        start: columns at first.
        limit: columns at most.
        seed: of the draws.
    """

    name = "entries"

    def __init__(
        self, operator: Operator, tree: ClusterTree, start: int, limit: int, seed: int
    ) -> None:
        self._operator, self._tree, self._seed = operator, tree, seed
        self._start, self._limit = min(start, limit), limit
        self._permutation = tree.permutation
        self.reset()

    @property
    def num_samples(self) -> int:
        """Columns of the sample."""
        return int(self._raw.shape[2])

    def reset(self) -> None:
        """See `Sampler`."""
        self._rng = np.random.default_rng((self._seed, 0xE7))
        self._begin(self._tree.depth, self._tree.leaves, self._start)

    def _begin(self, level: int, rows: Any, count: int) -> None:
        self._level, self._rows = level, rows
        sizes = np.count_nonzero(self._tree.nodes(level) >= 0, axis=1)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._sizes = sizes
        outside = self._tree.n - sizes
        self._exact = int(outside.max()) <= count
        if self._exact:
            slots = np.arange(int(outside.max()))
            position = slots + np.where(slots >= self._offsets[:-1, None], sizes[:, None], 0)
            valid = slots < outside[:, None]
            cols = np.where(valid, self._permutation[np.minimum(position, self._tree.n - 1)], -1)
            self._raw = self._operator._entries(rows, cols)
            self._density = np.ones(cols.shape)
        else:
            self._near = self._near_nodes()
            self._raw, self._density = self._draw(count)

    def _near_nodes(self) -> Any:
        """(nodes, q) the nodes near columns are drawn from."""
        nodes = len(self._sizes)
        q = min(_NEAR, nodes - 1)
        points = self._operator.points
        if points is None:
            steps = np.array([d for k in range(1, nodes) for d in (k, -k)][:q])
            beside = np.arange(nodes)[:, None] + steps
            return np.where((beside >= 0) & (beside < nodes), beside, np.arange(nodes)[:, None] ^ 1)
        x = to_host(points)
        index = self._tree.nodes(self._level)
        real = (index >= 0)[:, :, None]
        centers = np.where(real, x[index], 0).sum(1) / np.maximum(self._sizes, 1)[:, None]
        gap = ((centers[:, None] - centers) ** 2).sum(axis=2)
        gap[np.arange(nodes), np.arange(nodes)] = np.inf
        gap[:, self._sizes == 0] = np.inf
        return np.argsort(gap, axis=1, kind="stable")[:, :q]

    def _draw(self, count: int) -> tuple[Array, Any]:
        """More columns: the blocks (nodes, rows, count) and the density of each column."""
        nodes = len(self._sizes)
        outside = self._tree.n - self._sizes
        near_sizes = self._sizes[self._near]
        near_sizes = np.where(self._near == np.arange(nodes)[:, None], 0, near_sizes)
        ends = np.cumsum(near_sizes, axis=1)
        num_near = count // 2
        # anywhere: the v-th position outside t
        v = (self._rng.random((nodes, count)) * outside[:, None]).astype(np.int64)
        position = v + np.where(v >= self._offsets[:-1, None], self._sizes[:, None], 0)
        # near: the w-th position of the near nodes laid end to end
        w = (self._rng.random((nodes, num_near)) * ends[:, -1:]).astype(np.int64)
        box = (w[:, :, None] >= ends[:, None, :]).sum(axis=2)
        box = np.minimum(box, self._near.shape[1] - 1)
        chosen = np.take_along_axis(self._near, box, axis=1)
        before = np.take_along_axis(ends - near_sizes, box, axis=1)
        has_near = ends[:, -1:] > 0
        position[:, :num_near] = np.where(
            has_near, self._offsets[chosen] + w - before, position[:, :num_near]
        )
        is_near = np.zeros((nodes, nodes), bool)
        np.put_along_axis(is_near, self._near, near_sizes > 0, axis=1)
        owner = np.searchsorted(self._offsets, position, side="right") - 1
        hit = np.take_along_axis(is_near, owner, axis=1)
        share = np.where(has_near, num_near / count, 0.0)
        density = (1 - share) / outside[:, None]
        density = density + np.where(hit, share / np.maximum(ends[:, -1:], 1), 0.0)
        raw = self._operator._entries(self._rows, self._permutation[position])
        return raw, density

    def sample(self) -> Sample:
        """See `Sampler`."""
        s = self.num_samples
        if self._exact:
            S, inflation = self._raw, np.ones(s + 1)
        else:
            weight = 1.0 / np.sqrt(s * self._density)
            S = self._raw * weight[:, None, :].astype(self._raw.dtype)
            inflation = regression_inflation(s, float(s))
        energy = to_host((S * S).sum(axis=(1, 2), dtype=np.float64))
        return Sample(S, inflation, energy * (8 * float(np.finfo(S.dtype).eps)) ** 2)

    def grow(self) -> bool:
        """See `Sampler`: doubles the columns."""
        s = self.num_samples
        more = min(s, self._limit - s)
        if self._exact or more <= 0:
            return False
        if int((self._tree.n - self._sizes).max()) <= s + more:
            self._begin(self._level, self._rows, s + more)
            return True
        raw, density = self._draw(more)
        self._raw = namespace(raw).concatenate([self._raw, raw], axis=2)
        self._density = np.concatenate([self._density, density], axis=1)
        return True

    def advance(self, level: Level, skeleton: Array) -> None:
        """See `Sampler`."""
        if self._level > 1:
            count = min(max(self.num_samples, self._start), self._limit)
            pairs = skeleton.reshape(len(skeleton) // 2, 2 * level.rank)
            self._begin(self._level - 1, pairs, count)

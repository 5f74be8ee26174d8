"""Samples of the range of K(a, b) for siblings a (the even node) and b, top level first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.bases.entry_sampler import EntrySampler
from gpu_hodlr.bases.samplers import Sample, regression_inflation, squared_rounding
from gpu_hodlr.batched import NormalSource
from gpu_hodlr.devices import Array, move, namespace
from gpu_hodlr.distributed import Ownership, Siblings
from gpu_hodlr.operators import Operator, Product
from gpu_hodlr.tree import ClusterTree


class SiblingEntrySampler(EntrySampler):
    """S_a = K(a, columns of b), drawn as `EntrySampler` does: next to a, and anywhere in b.

    Args:
        operator: with entries.
        tree: the cluster tree, of one level below the root at least.
        start: columns at first.
        limit: columns at most.
        seed: of the draws.
        owners: see `EntrySampler`; where siblings span ranks, all read all entries.
    """

    def reset(self) -> None:
        """Back to the top level."""
        self._start_draws(streams.SIBLING_COLUMNS)
        self.begin(1)

    def begin(self, level: int) -> None:
        """Go to a level."""
        pairs = Siblings(self._owners, level).pairs
        self._begin(level, self._tree.nodes(level)[0::2][pairs], self._start)

    def _dealt(self) -> tuple[Ownership, int]:
        return Siblings(self._owners, self._level).dealt, self._level - 1

    def _row_nodes(self) -> Any:
        return 2 * super()._row_nodes()

    def _num_outside(self) -> Any:
        return self._sizes[1::2]

    def _outside(self, slots: Any) -> Any:
        return self._offsets[1:-1:2][self._mine, None] + slots

    def _sampled_for(self, node: Any, other: Any) -> tuple[Any, Any]:
        return node // 2, (node % 2 == 0) & (other == node + 1)

    def _near_nodes(self) -> Any:
        return self._row_nodes()[:, None] + 1


class SiblingProductSampler:
    """S_a = K(a, b) Omega_b of all siblings of a level from one product with Omega.

    Omega is zero on all even nodes: K Omega on a then has K(a, b) Omega_b and what the levels
    above contribute, which is subtracted (peeling: Lin, Lu, Ying, J. Comput. Phys. 230 (2011);
    Martinsson, SIAM J. Sci. Comput. 38 (2016)). The number of columns does not depend on the
    number of nodes. Where siblings span ranks, all ranks gather the samples.

    Args:
        operator: with products.
        tree: the cluster tree.
        level: of the siblings.
        above: v (N, k) -> the product of the levels above with v, (leaves, m, k).
        normal: source of Omega.
        start: columns at first.
        limit: columns at most.
        owners: which rank has what; `above` takes and gives what is of this rank.
    """

    def __init__(
        self,
        operator: Operator,
        tree: ClusterTree,
        level: int,
        above: Callable[[Array], Array],
        normal: NormalSource,
        start: int,
        limit: int,
        owners: Ownership,
    ) -> None:
        self._operator, self._above, self._normal = operator, above, normal
        self._limit, self._owners = limit, owners
        self._siblings = Siblings(owners, level)
        nodes = tree.nodes(level)
        self._rows = owners.local(self._siblings.even(self._siblings.index(tree.leaves)))
        mask = np.zeros((tree.n, 1), operator.dtype)
        mask[nodes[1::2][nodes[1::2] >= 0]] = 1
        self._mask = move(mask, operator.device)
        self._S, self._noise = self._draw(start)

    def _draw(self, columns: int) -> tuple[Array, Any]:
        """Samples of fresh columns, and the squared rounding error in them."""
        operator, shape = self._operator, (self._operator.shape[0], columns)
        product = Product.shared(
            operator,
            columns,
            lambda part: self._normal(shape, operator.dtype, part) * self._mask,
            self._owners.comm,
        )
        product.to_rows(self._owners)
        y = batched.gather_rows(product.y, self._rows)
        siblings = self._siblings
        energy = siblings.sum_even(batched.squared_norms(y))
        y -= siblings.even(siblings.by_pieces(self._above(product.v)))
        return siblings.whole_even(y), squared_rounding(energy, y.dtype)

    @property
    def num_samples(self) -> int:
        """Columns of the sample."""
        return int(self._S.shape[2])

    def sample(self) -> Sample:
        """See `LevelSampler`."""
        return Sample(self._S, regression_inflation(self.num_samples, 1.0), self._noise)

    def check(self, order: Array, T: Array) -> float:
        """See `LevelSampler`: for Gaussian columns the regression's estimate holds."""
        return 0.0

    def grow(self) -> bool:
        """See `LevelSampler`: doubles the columns; old ones are kept."""
        more = min(self.num_samples, self._limit - self.num_samples)
        if more <= 0:
            return False
        S, noise = self._draw(more)
        self._S = namespace(S).concatenate([self._S, S], axis=2)
        self._noise = self._noise + noise
        return True

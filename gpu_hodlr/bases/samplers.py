"""Samples of the range of K(t, outside t) for every node t of a level.

A sampler is reset to the leaves, gives the samples of the current level, can draw more, and is
advanced to the parents once the level's bases are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import nested
from gpu_hodlr.devices import Array
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.operators import Sketch
from gpu_hodlr.operators.sketch import AT_ONCE
from gpu_hodlr.structures import Level
from gpu_hodlr.tree import ClusterTree

OVERSAMPLING = 10
RATIO = 1.5  # samples for each unit of rank: a regression on fewer loses accuracy


def samples_for(rank: int) -> int:
    """Columns of a sample that can be trusted up to `rank`."""
    return int(RATIO * rank) + OVERSAMPLING


@dataclass(frozen=True)
class Sample:
    """Samples of a level.

    Attributes:
        S: (nodes, rows, s).
        inflation: (s + 1,): times norm(R22)_F^2 of the rank-k pivoted QR of S^T it estimates the
            squared error of that interpolation over all of K(t, outside t). R22 is what a linear
            regression with k regressors leaves of s samples; out of the sample the error is
            (s - 1) / (s - k - 1) times the residual variance norm(R22)^2 / (s - k).
        noise: (nodes,) squared rounding error in S, where S is.
    """

    S: Array
    inflation: Any
    noise: Array


class LevelSampler(Protocol):
    """What the bases of one level ask of a sampler."""

    @property
    def num_samples(self) -> int:
        """Columns of the sample now."""

    def sample(self) -> Sample:
        """The samples of the current level."""

    def check(self, order: Array, T: Array) -> float:
        """Squared error of a level's bases seen on fresh columns; 0 if the estimate needs none.

        Of all nodes, as every rank asks for it.
        """

    def grow(self) -> bool:
        """Draw more columns; False when the limit is reached."""


Carried = tuple[Sequence[Array], Sequence[Array]]
"""Stacks needed of this rank's nodes alone, and of all nodes that are coupled to them."""
Samples = tuple[Array, Array, Array]
"""S (nodes, rows, s), the squared rounding error in it (nodes,), and U^T Omega (nodes, rows, s)."""


class Sampler(LevelSampler, Protocol):
    """What the sweep asks of a sampler."""

    def reset(self) -> None:
        """Back to the leaf level."""

    def widen(self) -> None:
        """After a sweep that missed: look at more columns where that may be the cause."""

    def carried(self, order: Array, T: Array) -> Carried:
        """What the parents' samples need of a level's nodes; then `advance` must be called."""

    def advance(self, level: Level, skeleton: Any, carried: Sequence[Array]) -> None:
        """Go up to the parents.

        Args:
            level: its order is set on the leaf level too.
            skeleton: (family, r) the indices of the rows kept.
            carried: what `carried` gave, the second part of all nodes that are coupled.
        """


def squared_rounding(energy: Any, dtype: Any) -> Any:
    """`Sample.noise`: squared rounding error in samples made of terms of such an energy."""
    return energy * (8 * float(np.finfo(dtype).eps)) ** 2


def regression_inflation(s: int, scale: float) -> Any:
    """`Sample.inflation` for s random columns with E[S S^T] = s / scale K K^T."""
    k = np.arange(s + 1)
    free = np.maximum((s - k) * (s - k - 1.0), 0.0)
    with np.errstate(divide="ignore"):
        return scale * np.where(free > 0, (s - 1.0) / free, np.inf)


FIRST_COLUMNS = 160  # of a sample: enough for most levels, and cheap


class ProductSampler:
    """S_t = K(t, outside t) Omega from one product Y = K Omega.

    Leaf: S = Y_t - K_tt Omega_t. Parent: S = [S_l - B Omega_r; S_r - B^T Omega_l] on the skeletons,
    Omega_c = U_c^T Omega_c (Martinsson 2011, section 4).

    Args:
        sketch: Omega and Y; it is grown in place.
        tree: the cluster tree.
        D: its diagonal blocks, (leaves, m, m).
        limit: columns at most.
        owners: which rank has what; the sketch and D are of this rank.
    """

    def __init__(
        self,
        sketch: Sketch,
        tree: ClusterTree,
        D: Array,
        limit: int,
        owners: Ownership = ALONE,
    ) -> None:
        self._sketch, self._tree, self._D = sketch, tree, D
        self._owners = owners
        self._leaves = owners.local(tree.leaves[owners.mine(tree.depth)])
        self._limit = limit
        self.reset()

    def _leaf_samples(self, columns: slice) -> Samples:
        """Those of the leaves, of some columns of the sketch."""
        y = batched.gather_rows(self._sketch.y[:, columns], self._leaves)
        omega = batched.gather_rows(self._sketch.omega[:, columns], self._leaves)
        noise = squared_rounding(batched.squared_norms(y), y.dtype)
        return batched.matmul(self._D, omega, subtract_from=y), noise, omega

    def _carried(self, samples: Samples, order: Array, T: Array, depth: int) -> Carried:
        """S on the skeletons, and U^T Omega, of a level."""
        S, noise, omega = samples
        omega = nested.restrict(T, order, omega)
        return (), (batched.permute_rows(S, order[:, : T.shape[2]]), noise, omega)

    def _coupled(self, depth: int, arrays: Sequence[Array]) -> list[Array]:
        """Arrays of this rank's nodes of a level, of all that are coupled to them."""
        return self._owners.complete(depth, *arrays)

    def _lifted(self, carried: Sequence[Array], level: Level, depth: int) -> Samples:
        """The parents' samples, from what is carried of a level's nodes that are coupled."""
        S, noise, every_omega = carried
        S, noise, omega = (self._owners.of_family(a, depth) for a in (S, noise, every_omega))
        self._subtract_couplings(level.B, every_omega, S, depth)
        pairs = (len(S) // 2, 2 * level.rank, S.shape[2])
        return S.reshape(pairs), noise.reshape(-1, 2).sum(axis=1), omega.reshape(pairs)

    def _subtract_couplings(self, B: Array, omega: Array, S: Array, depth: int) -> None:
        """What is in the far field of a node and not of its parent."""
        S -= nested.couple(B, omega)

    @property
    def num_samples(self) -> int:
        """Columns of Omega."""
        return int(self._samples[0].shape[2])

    def reset(self) -> None:
        """See `Sampler`; the columns drawn so far are kept."""
        self._levels: list[Level] = []
        self._samples = self._leaf_samples(slice(None))

    def widen(self) -> None:
        """See `Sampler`: Gaussian columns miss nothing."""

    def sample(self) -> Sample:
        """See `Sampler`."""
        S, noise, _ = self._samples
        return Sample(S, regression_inflation(self.num_samples, 1.0), noise)

    def check(self, order: Array, T: Array) -> float:
        """See `Sampler`: for Gaussian columns the regression's estimate holds."""
        return 0.0

    def grow(self) -> bool:
        """See `Sampler`: doubles the columns; old ones are kept."""
        first = self.num_samples
        more = min(first, self._limit - first)
        if more <= 0:
            return False
        self._sketch.grow(more)
        S, noise, omega = self._samples
        del self._samples  # so that one array at a time is there twice
        S = batched.widened(S, more)
        omega = batched.widened(omega, more)
        for start in range(first, first + more, AT_ONCE):
            part = slice(start, min(start + AT_ONCE, first + more))
            S[:, :, part], more_noise, omega[:, :, part] = self._from_leaves(part)
            noise = noise + more_noise
        self._samples = S, noise, omega
        return True

    def _from_leaves(self, columns: slice) -> Samples:
        """The samples of some columns of the sketch, lifted from the leaves to this level."""
        samples = self._leaf_samples(columns)
        for index, level in enumerate(self._levels):
            depth = self._tree.depth - index
            assert level.order is not None
            kept, needed = self._carried(samples, level.order, level.T, depth)
            del samples
            samples = self._lifted([*kept, *self._coupled(depth, needed)], level, depth)
        return samples

    @property
    def _depth(self) -> int:
        """The current level."""
        return self._tree.depth - len(self._levels)

    def carried(self, order: Array, T: Array) -> Carried:
        """See `Sampler`."""
        carried = self._carried(self._samples, order, T, self._depth)
        del self._samples  # the parents' are made of what is carried
        return carried

    def advance(self, level: Level, skeleton: Any, carried: Sequence[Array]) -> None:
        """See `Sampler`."""
        self._samples = self._lifted(carried, level, self._depth)
        self._levels.append(level)

"""Samples of the range of K(t, outside t) for every node t of a level.

A sampler is reset to the leaves, gives the samples of the current level, can draw more, and is
advanced to the parents once the level's bases are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import nested
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.operators import Sketch
from gpu_hodlr.structures import Level
from gpu_hodlr.tree import ClusterTree

OVERSAMPLING = 10
_AT_ONCE = 128  # columns drawn and lifted together: bounds what they take on the leaf level
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
        noise: (nodes,) squared rounding error in S.
    """

    S: Array
    inflation: Any
    noise: Any


class LevelSampler(Protocol):
    """What the bases of one level ask of a sampler."""

    @property
    def num_samples(self) -> int:
        """Columns of the sample now."""

    def sample(self) -> Sample:
        """The samples of the current level."""

    def check(self, order: Array, T: Array) -> float:
        """Squared error of a level's bases seen on fresh columns; 0 if the estimate needs none."""

    def grow(self) -> bool:
        """Draw more columns; False when the limit is reached."""


class Sampler(LevelSampler, Protocol):
    """What the sweep asks of a sampler."""

    def reset(self) -> None:
        """Back to the leaf level."""

    def widen(self) -> None:
        """After a sweep that missed: look at more columns where that may be the cause."""

    def advance(self, level: Level, skeleton: Array) -> None:
        """Go up to the parents; skeleton (nodes, r) are the indices of the rows kept.

        level.order is set on the leaf level too.
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
        self._noise_leaf: Any = 0.0
        self.reset()

    def _leaf_samples(self, first: int) -> tuple[Array, Array]:
        """S and Omega on the leaf level, columns from `first` on."""
        y = batched.gather_rows(self._sketch.y[:, first:], self._leaves)
        omega = batched.gather_rows(self._sketch.omega[:, first:], self._leaves)
        energy = to_host(namespace(y).einsum("tij,tij->t", y, y))
        noise = squared_rounding(energy, y.dtype)
        self._noise_leaf = self._noise_leaf + noise if first else noise
        return batched.matmul(self._D, omega, subtract_from=y), omega

    def _lift(self, S: Array, omega: Array, index: int) -> tuple[Array, Array]:
        """The parents' samples from those of a level, counted from the leaves up."""
        level, depth = self._levels[index], self._tree.depth - index
        assert level.order is not None
        S = self._owners.gather(batched.permute_rows(S, level.order[:, : level.rank]), depth)
        omega = self._owners.gather(nested.restrict(level.T, level.order, omega), depth)
        self._subtract_couplings(level.B, omega, S, depth)
        pairs = (len(S) // 2, 2 * level.rank, S.shape[2])
        return S.reshape(pairs), omega.reshape(pairs)

    def _subtract_couplings(self, B: Array, omega: Array, S: Array, depth: int) -> None:
        """What is in the far field of a node and not of its parent."""
        S -= nested.couple(B, omega)

    @property
    def num_samples(self) -> int:
        """Columns of Omega."""
        return int(self._S.shape[2])

    def reset(self) -> None:
        """See `Sampler`; the columns drawn so far are kept."""
        self._levels: list[Level] = []
        self._S, self._omega = self._leaf_samples(0)

    def widen(self) -> None:
        """See `Sampler`: Gaussian columns miss nothing."""

    def sample(self) -> Sample:
        """See `Sampler`."""
        noise = self._noise_of_nodes()
        return Sample(self._S, regression_inflation(self.num_samples, 1.0), noise)

    def _noise_of_nodes(self) -> Any:
        """Squared rounding errors of the leaves below every node of the level."""
        depth = self._tree.depth - len(self._levels)
        noise = self._noise_leaf
        if depth < self._owners.cut:
            noise = self._owners.gather_all(noise, self._tree.depth)
        return noise.reshape(len(self._S), -1).sum(axis=1)

    def check(self, order: Array, T: Array) -> float:
        """See `Sampler`: for Gaussian columns the regression's estimate holds."""
        return 0.0

    def grow(self) -> bool:
        """See `Sampler`: doubles the columns; old ones are kept."""
        more = min(self.num_samples, self._limit - self.num_samples)
        for start in range(0, more, _AT_ONCE):
            self._draw(min(_AT_ONCE, more - start))
        return more > 0

    def _draw(self, columns: int) -> None:
        """Add columns to the sketch, and lifted from the leaves to this level's samples."""
        first = self._sketch.omega.shape[1]
        self._sketch.grow(columns)
        S, omega = self._leaf_samples(first)
        for index in range(len(self._levels)):
            S, omega = self._lift(S, omega, index)
        xp = namespace(S)
        self._S = xp.concatenate([self._S, S], axis=2)
        self._omega = xp.concatenate([self._omega, omega], axis=2)

    def advance(self, level: Level, skeleton: Array) -> None:
        """See `Sampler`."""
        self._levels.append(level)
        self._S, self._omega = self._lift(self._S, self._omega, len(self._levels) - 1)

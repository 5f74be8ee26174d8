"""Samples of the range of K(t, R(t)) for every node t of a level, R(t) the columns of a `Region`.

A sampler is reset to the first level, gives the samples of the current level, can draw more, and is
advanced to the parents once the level's bases are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.bases.regions import NestedRegion, Region, Samples, by_leaves
from gpu_hodlr.batched import level_products
from gpu_hodlr.devices import Array, HostArray, HostIndex, namespace
from gpu_hodlr.structures import Level

OVERSAMPLING = 10
RATIO = 1.5  # samples for each unit of rank: a regression on fewer loses accuracy


def samples_for(rank: int) -> int:
    """Columns of a sample that can be trusted up to `rank`."""
    return int(RATIO * rank) + OVERSAMPLING


def trusted_rank(columns: int) -> int:
    """The largest rank that a sample of so many columns can be trusted up to, see `samples_for`."""
    return max(0, int((columns - OVERSAMPLING) / RATIO))


@dataclass(frozen=True)
class Sample:
    """Samples of a level.

    Attributes:
        S: (nodes, rows, s).
        inflation: (s + 1,): times norm(R22)_F^2 of the rank-k pivoted QR of S^T it estimates the
            squared error of that interpolation over all of K(t, R(t)). R22 is what a linear
            regression with k regressors leaves of s samples; out of the sample the error is
            (s - 1) / (s - k - 1) times the residual variance norm(R22)^2 / (s - k).
        noise: (nodes,) squared rounding error in S, where S is; see `batched.squared_rounding`.
    """

    S: Array
    inflation: HostArray
    noise: Array


class LevelSampler(Protocol):
    """What the bases of one level ask of a sampler.

    Attributes:
        together: whether all nodes have the same columns, always.
    """

    together: ClassVar[bool]

    @property
    def num_samples(self) -> int:
        """Columns of the sample now, of nodes that have grown."""

    @property
    def sampled(self) -> HostIndex | None:
        """Places among this rank's nodes of those that `samples` are of; None: of all."""

    def samples(self) -> Iterator[Sample]:
        """The samples of the current level, of some of this rank's nodes after the other.

        They are made when they are asked for: not all need be there at once.
        """

    def check(self, order: Array, T: Array) -> HostArray | None:
        """(nodes,) squared errors of a level's bases seen on fresh columns.

        Of this rank's nodes. None, on every rank, if the estimate needs none.
        """

    def grow(self, nodes: HostArray | None = None) -> bool:
        """Draw more columns; False, on every rank, when the limit is reached.

        Args:
            nodes: (nodes,) which of this rank's need them, all by default. Where all are sampled
                together all have them.
        """


Carried = tuple[Sequence[Array], Sequence[Array]]
"""Stacks needed of this rank's nodes alone, and of all nodes that are coupled to them."""


class Sampler(LevelSampler, Protocol):
    """What the sweep asks of a sampler.

    Attributes:
        rows_stand_for_all: whether an error of skeleton rows is counted for all rows that are
            interpolated from them.
    """

    rows_stand_for_all: ClassVar[bool]

    def reset(self) -> None:
        """Back to the first level."""

    def widen(self) -> None:
        """After a sweep that missed: look at more columns where that may be the cause."""

    def carried(self, order: Array, T: Array) -> Carried:
        """What the parents' samples need of a level's nodes; then `advance` must be called."""

    def advance(self, level: Level, skeleton: Array, carried: Sequence[Array]) -> None:
        """Go up to the parents.

        Args:
            level: its order is set on the leaf level too.
            skeleton: (family, r) the indices of the rows kept.
            carried: what `carried` gave, the second part of all nodes that are coupled.
        """


def regression_inflation(s: int, scale: float) -> HostArray:
    """`Sample.inflation` for s random columns with E[S S^T] = s / scale K K^T."""
    k = np.arange(s + 1)
    free = np.maximum((s - k) * (s - k - 1.0), 0.0)
    with np.errstate(divide="ignore"):
        return scale * np.where(free > 0, (s - 1.0) / free, np.inf)


FIRST_COLUMNS = 160  # of a sample: enough for most levels, and cheap


@runtime_checkable
class RandomColumns(Protocol):
    """Where Gaussian Omega (N, s) and Y = K Omega come from: this rank's rows of them."""

    def drawn(self) -> tuple[Array, Array]:
        """Omega and Y of the columns there are."""

    def more(self, columns: int) -> Iterator[tuple[Array, Array]]:
        """Those of so many more columns, some at a time."""


@runtime_checkable
class LargeColumns(RandomColumns, Protocol):
    """Columns too large to be kept: Omega is drawn again where it is wanted once more.

    Attributes:
        kept: whether they are kept all the same.
    """

    kept: bool

    def omegas(self) -> Iterator[tuple[slice, Array]]:
        """Which columns of Omega, and these by rows, (rows, k): all, some at a time."""


_R = TypeVar("_R", bound=Region, covariant=True)


class ProductSampler(Generic[_R]):
    """S_t = K(t, R(t)) Omega from one product Y = K Omega.

    On the first level the region takes off Y_t what is known of the rest of the block row. Above,
    S_t is made of the children's S on their skeletons, and Omega_t = U_t^T Omega (Martinsson 2011,
    section 4).

    Args:
        source: of Omega and Y.
        region: what R(t) is; of a `NestedRegion` samples go up.
        limit: columns at most.
        level: that Omega is for; the region's first by default.
    """

    rows_stand_for_all: ClassVar[bool] = False  # the aim has room for that: see `Scheme`
    together: ClassVar[bool] = True

    def __init__(
        self, source: RandomColumns, region: _R, limit: int, level: int | None = None
    ) -> None:
        self._source, self._region, self._limit = source, region, limit
        self._first = region.first if level is None else level
        self.reset()

    def reset(self) -> None:
        """See `Sampler`; the columns drawn so far are kept."""
        self._below: list[tuple[NestedRegion, Level, int]] = []  # the levels whose bases are known
        self._samples = self._region.samples(self._first, *self._source.drawn())
        if self._drawn_again is not None:
            S, energy, omega = self._samples
            self._samples = S, energy, omega[:, :, :0].copy()

    @property
    def _drawn_again(self) -> LargeColumns | None:
        """Where the current level's Omega comes from, if it is not among the samples."""
        source = self._source
        large = isinstance(source, LargeColumns) and not source.kept and not self._below
        return source if large else None  # type: ignore[return-value]

    @property
    def num_samples(self) -> int:
        """Columns of Omega."""
        return int(self._samples[0].shape[2])

    @property
    def sampled(self) -> HostIndex | None:
        """See `LevelSampler`: a product is one with all nodes."""
        return None

    def samples(self) -> Iterator[Sample]:
        """See `LevelSampler`: they are there, all of them."""
        S, energy, _ = self._samples
        inflation = regression_inflation(self.num_samples, 1.0)
        yield Sample(S, inflation, batched.squared_rounding(energy, S.dtype))

    def check(self, order: Array, T: Array) -> HostArray | None:
        """See `LevelSampler`: for Gaussian columns the regression's estimate holds."""
        return None

    def grow(self, nodes: HostArray | None = None) -> bool:
        """See `LevelSampler`: doubles the columns; old ones are kept."""
        first = self.num_samples
        more = min(first, self._limit - first)
        if more <= 0:
            return False
        S, energy, omega = self._samples
        del self._samples  # so that one array at a time is there twice
        S = batched.widened(S, more)
        again = self._drawn_again is not None
        omega = omega if again else batched.widened(omega, more)
        for columns in self._source.more(more):
            part = slice(first, first + columns[0].shape[1])
            S[:, :, part], more_energy, more_omega = self._lifted_from_first(*columns)
            if not again:
                omega[:, :, part] = more_omega
            energy = energy + more_energy
            first = part.stop
            del columns, more_omega
        self._samples = S, energy, omega
        return True

    def _lifted_from_first(self, omega: Array, y: Array) -> Samples:
        """The samples of some columns of Omega and Y on this level."""
        samples = self._region.samples(self._first, omega, y)
        for region, level, depth in self._below:
            assert level.order is not None
            order, T = level.order, level.T
            S, energy, omega = samples
            restricted = level_products.restrict(T, order, omega)
            kept, needed = _carried(region, _skeleton(S, order, T), energy, restricted, depth)
            del samples, S, omega
            brought = region.coupled(depth, *needed)
            samples = _lifted(region, [*kept, *brought], level, depth)
        return samples

    # --- going up ----------------------------------------------------------------------------

    def widen(self: ProductSampler[NestedRegion]) -> None:
        """See `Sampler`: Gaussian columns miss nothing."""

    def carried(self: ProductSampler[NestedRegion], order: Array, T: Array) -> Carried:
        """See `Sampler`."""
        S, energy, omega = self._samples
        source = self._drawn_again
        del self._samples  # the parents' are made of what is carried
        S = _skeleton(S, order, T)
        if source is None:
            omega = level_products.restrict(T, order, omega)
        else:
            omega = _restricted(source, self._region, order, T, S)
        return _carried(self._region, S, energy, omega, self._depth)

    def advance(
        self: ProductSampler[NestedRegion], level: Level, skeleton: Array, carried: Sequence[Array]
    ) -> None:
        """See `Sampler`."""
        depth = self._depth
        self._samples = _lifted(self._region, carried, level, depth)
        self._below.append((self._region, level, depth))

    @property
    def _depth(self) -> int:
        """The current level."""
        return self._first - len(self._below)


def _skeleton(S: Array, order: Array, T: Array) -> Array:
    """S on the skeletons."""
    return batched.permute_rows(S, order[:, : T.shape[2]])


def _restricted(
    source: LargeColumns, region: NestedRegion, order: Array, T: Array, like: Array
) -> Array:
    """U^T Omega of the leaves, (leaves, r, s), as S on the skeletons is, from Omega by rows."""
    out = namespace(like).empty_like(like)
    for part, omega in source.omegas():
        rows = by_leaves(region.tree, region.owners, omega)
        out[:, :, part] = level_products.restrict(T, order, rows)
    return out


def _carried(region: NestedRegion, S: Array, energy: Array, omega: Array, depth: int) -> Carried:
    """What of S on the skeletons and U^T Omega the parents need."""
    # S is needed of siblings alone.
    here = region.owners.has_siblings(depth)
    return ((S, energy), (omega,)) if here else ((), (S, energy, omega))


def _lifted(region: NestedRegion, carried: Sequence[Array], level: Level, depth: int) -> Samples:
    """The parents' samples, from what is carried of a level's nodes that are coupled."""
    S, energy, every_omega = carried
    of_family = region.owners.of_family
    S, energy, omega = (of_family(a, depth) for a in (S, energy, every_omega))
    S = region.lifted(S, level.B, every_omega, depth)
    return S, energy.reshape(-1, 2).sum(axis=1), omega.reshape(S.shape)

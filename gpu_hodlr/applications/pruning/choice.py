"""What is pruned one by one: single weights, or whole units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from gpu_hodlr.applications.pruning.quadratic import Quadratic
from gpu_hodlr.applications.pruning.units import Units
from gpu_hodlr.devices import HostArray


class Cut(NamedTuple):
    """Weights (N,) bool that become zero.

    Attributes:
        removed: what they did is to be made good.
        idle: they do nothing without those.
    """

    removed: HostArray
    idle: HostArray


class Choice(ABC):
    """Items, of which the cheapest are pruned.

    Attributes:
        what: their name.
        count: how many there are.
        least: how many are kept at least.
    """

    what: str
    count: int
    least: int

    @abstractmethod
    def there(self, kept: HostArray) -> HostArray:
        """(count,) bool, of (N,) weights kept: items that are not pruned."""

    @abstractmethod
    def costs(self, quadratic: Quadratic, theta: HostArray, kept: HostArray) -> HostArray:
        """(count,) what the removal of each alone costs."""

    @abstractmethod
    def cut(self, items: HostArray) -> Cut:
        """The weights of (count,) bool items."""

    def cheapest(
        self, quadratic: Quadratic, theta: HostArray, kept: HostArray, left: int
    ) -> HostArray:
        """(count,) bool: the items to be pruned so that so many are left; of equals the first."""
        there = self.there(kept)
        costs = np.where(there, self.costs(quadratic, theta, kept), np.inf)
        chosen = np.zeros(self.count, bool)
        chosen[np.argsort(costs, kind="stable")[: int(there.sum()) - left]] = True
        return chosen


class SingleWeights(Choice):
    """Every weight for itself.

    Args:
        prunable: (N,) bool.
    """

    what, least = "weights", 0

    def __init__(self, prunable: HostArray) -> None:
        self._index = np.nonzero(prunable)[0]
        self._n, self.count = len(prunable), len(self._index)

    def there(self, kept: HostArray) -> HostArray:
        """See `Choice`, as the next two."""
        return kept[self._index]

    def costs(self, quadratic: Quadratic, theta: HostArray, kept: HostArray) -> HostArray:
        """By the diagonal of the inverse."""
        return quadratic.costs(theta, kept)[self._index]

    def cut(self, items: HostArray) -> Cut:
        """Themselves."""
        removed = np.zeros(self._n, bool)
        removed[self._index[items]] = True
        return Cut(removed, np.zeros(self._n, bool))


class WholeUnits(Choice):
    """Units of hidden layers, of which every layer keeps half of what all keep, and one at least.

    To second order a layer of many weights can make good nearly all of another, down to its last
    unit; the network cannot.

    Args:
        units: what they are.
        fraction: of them that is pruned.
    """

    what = "units"

    def __init__(self, units: Units, fraction: float) -> None:
        self._units, self.count = units, units.count
        stay = np.maximum(1, (1 - fraction) / 2 * np.bincount(units.layer)).astype(int)
        self.least = len(stay)
        # Of many layers of few units these may be more than all that are kept.
        self._stay = stay if stay.sum() <= (1 - fraction) * self.count else np.ones_like(stay)

    def there(self, kept: HostArray) -> HostArray:
        """See `Choice`, as the next two: units with a weight or bias that is kept."""
        own = self._units.own
        return np.bincount(own[kept & (own >= 0)], minlength=self.count) > 0

    def costs(self, quadratic: Quadratic, theta: HostArray, kept: HostArray) -> HostArray:
        """By blocks of the inverse; none for the costliest of every layer, which stay."""
        there, layer = self.there(kept), self._units.layer
        units = np.where(kept, self._units.own, -1)
        costs = np.where(there, quadratic.unit_costs(theta, units, self.count, kept), -np.inf)
        for number, stay in enumerate(self._stay):
            mine = np.nonzero(layer == number)[0]
            costs[mine[np.argsort(-costs[mine], kind="stable")[:stay]]] = np.inf
        return costs

    def cut(self, items: HostArray) -> Cut:
        """Their rows and biases; what reads them alone is idle."""
        gone = np.nonzero(items)[0]
        removed = np.isin(self._units.own, gone)
        return Cut(removed, np.isin(self._units.readers, gone) & ~removed)

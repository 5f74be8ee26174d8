"""What ways to the matrix by its Linear layers share: entries by Khatri-Rao products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import GramRows
from gpu_hodlr.devices import Array, HostIndex, device_of, namespace
from gpu_hodlr.networks.access import Access, chunk_of_blocks
from gpu_hodlr.networks.unit_products import TrainedLayer
from gpu_hodlr.operators import Runs


class Products(Protocol):
    """A way to multiply by K."""

    def chunk(self) -> int:
        """Columns that go through together."""

    def multiply(self, v: Array, out: Array, chunk: int) -> None:
        """Write K v, (N, columns), for v alike, so many columns at a time."""


class UnitsGram(GramRows, Protocol):
    """G of the units' pre-activations, a sample at a time."""

    @property
    def num_units(self) -> int:
        """Its size."""


class ByLayers(Access):
    """K of parameters that are weights and biases of Linear layers.

    Entry of parameters i, j, weights or biases of units u, v with inputs x: K_ij = sum_k x_i,k
    x_j,k G_uv,k, a Khatri-Rao product (Schraudolph, Neural Computation 14 (2002); Martens, JMLR 21
    (2020), section 8).

    Args:
        layers: with their inputs at all samples.
        gram: G.
        num_samples: n.

    Attributes:
        gram, num_samples: as given.
    """

    name = "khatri-rao"
    has_entries = has_eigenbasis = True

    def __init__(
        self, layers: Sequence[TrainedLayer], gram: UnitsGram, num_samples: int, like: Array
    ) -> None:
        size = sum(layer.width * len(layer.features) for layer in layers)
        super().__init__(size, like.dtype, device_of(like))
        self.gram, self.num_samples = gram, num_samples
        self._features = namespace(like).concatenate([layer.features for layer in layers])
        self._feature_of, self._unit_of = _parameter_maps(layers)
        self.entry_cost = 2.0 * num_samples

    def runs(self) -> Runs:
        """Parameters unit by unit, a unit's bias beside its weights."""
        permutation = np.lexsort((self._feature_of, self._unit_of))
        units = self._unit_of[permutation]
        return Runs(permutation, np.nonzero(np.diff(units, prepend=-1))[0])

    def blocks(self, rows: Array, cols: Array) -> Array:
        """Blocks of entries."""
        return batched.khatri_rao_entries(
            self._features, self._feature_of, self._unit_of, self.gram, rows, cols
        )

    @batched.one_blas_thread()
    def diagonal(self) -> Array:
        """The diagonal, by one product of squares."""
        xp = namespace(self._features)
        units = np.arange(self.gram.num_units)
        by_feature_and_unit = (self._features**2) @ self.gram.pairs(units, units).T
        return by_feature_and_unit[xp.asarray(self._feature_of), xp.asarray(self._unit_of)]

    def matmat(self, v: Array) -> Array:
        """Chunks of columns through the layers and back."""
        products = self._products(v.shape[1])
        return self._in_chunks(products, v, products.chunk())

    def matmat_by_blocks(self, v: Array, width: int) -> Array:
        """In chunks that cut no block."""
        products = self._products(width)
        return self._in_chunks(products, v, chunk_of_blocks(width, products.chunk()))

    def _in_chunks(self, products: Products, v: Array, chunk: int) -> Array:
        out = namespace(v).empty(v.shape, v.dtype)
        products.multiply(v, out, chunk)
        return out

    @abstractmethod
    def _products(self, columns: int) -> Products:
        """The quickest way for so many columns."""


def _parameter_maps(layers: Sequence[TrainedLayer]) -> tuple[HostIndex, HostIndex]:
    """feature_of and unit_of, (N,): row of the stacked features and unit of every parameter."""
    features: list[Any] = []
    units: list[Any] = []
    first_feature = first_unit = 0
    for layer in layers:
        width, inputs = layer.width, layer.inputs
        features.append(first_feature + np.tile(np.arange(inputs), width))
        units.append(first_unit + np.repeat(np.arange(width), inputs))
        if layer.bias:
            features.append(np.full(width, first_feature + inputs))
            units.append(first_unit + np.arange(width))
        first_feature += len(layer.features)
        first_unit += width * (len(layer.features) > 0)
    return np.concatenate(features), np.concatenate(units)

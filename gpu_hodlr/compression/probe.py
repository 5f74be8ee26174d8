"""Norm and error measured against the exact matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.arrays import power_of_two
from gpu_hodlr.devices import Array, namespace, namespace_on, to_host
from gpu_hodlr.distributed import ALONE, Communicator, Ownership
from gpu_hodlr.operators import (
    Operator,
    ProductColumns,
    ProductRows,
    block_width,
    column_share,
    half_even,
)
from gpu_hodlr.structures import Structure

_VECTORS, _ROWS = 10, 128


class ErrorProbe:
    """Vectors V with E[V V^T] = I, and the exact K V, by columns.

    norm(A V)_F^2 is then an unbiased estimate of norm(A)_F^2 for any A. With products V is
    Gaussian; with entries alone V picks exact rows of K, drawn half evenly, half by the
    diagonal, so that few heavy rows are not missed.

    Attributes:
        norm: estimate of norm(K)_F.
    """

    def __init__(
        self, operator: Operator, products: bool, seed: int, comm: Communicator = ALONE.comm
    ) -> None:
        self._comm = comm
        self._product: ProductColumns | _ExactRows
        if products:
            normal = batched.normal_source((seed, streams.PROBE), operator.device)
            shape = (operator.shape[0], _VECTORS)
            self._product = ProductColumns.shared(
                operator,
                _VECTORS,
                lambda part: normal(shape, operator.dtype, part) / _VECTORS**0.5,
                comm,
            )
        else:
            rng = np.random.default_rng((seed, streams.PROBE))
            self._product = _sampled_rows(operator, rng, comm)
        self.norm = self._norm()

    def _norm(self) -> float:
        """norm(K V)_F from the columns' norms: a column is whole on one rank."""
        xp = namespace(self._product.y)
        columns = xp.ascontiguousarray(self._product.y.T, dtype=np.float64)
        size = power_of_two(float(abs(columns).max()) if columns.size else 0.0)
        own = np.sqrt(to_host(batched.squared_norms(columns / size))) * size
        return math.hypot(*np.concatenate(self._comm.share(own)))

    def scale_to_one(self, stored: np.dtype[Any] | None = None) -> float:
        """Where squares of K's entries might leave the range of what is stored: scale K.

        Args:
            stored: the type of what is stored; K's by default.

        Returns:
            The power of two that K is multiplied by from now on, often 1.
        """
        exact = self._product.y
        largest = max(self._comm.share(float(abs(exact).max()) if exact.size else 0.0))
        factor = 1.0 / power_of_two(largest, exact.dtype)
        if abs(math.log2(factor)) < np.finfo(stored or exact.dtype).maxexp // 8:
            return 1.0
        self._product = replace(self._product, y=exact * exact.dtype.type(factor))
        self.norm = self._norm()
        return factor

    def to_rows(self, owners: Ownership) -> SpreadProbe:
        """The same by rows, as the structures measured will be."""
        return SpreadProbe(self._product.to_rows(owners), self.norm, owners)


@dataclass(frozen=True, eq=False)
class SpreadProbe:
    """The vectors V of an `ErrorProbe` and the exact K V, by rows.

    Attributes:
        product: V and K V.
        norm: estimate of norm(K)_F.
        owners: which rank has which rows.
    """

    product: ProductRows
    norm: float
    owners: Ownership

    def error(self, compressed: Structure) -> float:
        """norm(K - K~)_F / norm(K)_F (0 for K = K~ = 0).

        Summed leaf by leaf, so that the order is the same for any number of ranks.
        """
        v, owners = self.product.v.astype(compressed.dtype, copy=False), self.owners
        missed = compressed.matmat(v).astype(np.float64) - self.product.y
        leaves = owners.local(owners.leaves[owners.mine(owners.depth)])
        squares = (batched.gather_rows(missed, leaves) ** 2).sum(axis=(1, 2))
        difference = math.sqrt(owners.sum_of_nodes(to_host(squares), owners.depth))
        return difference / self.norm if self.norm else difference


def _sampled_rows(operator: Operator, rng: np.random.Generator, comm: Communicator) -> _ExactRows:
    n = operator.shape[0]
    weight = np.abs(to_host(operator.diagonal()).astype(np.float64))
    probability = half_even(weight)
    count = min(_ROWS, n)
    if count == n:
        rows, scale = np.arange(n), np.ones(n)
    else:
        rows = rng.choice(n, size=count, p=probability)
        scale = 1.0 / np.sqrt(count * probability[rows])
    return _ExactRows.read(operator, rows, scale.astype(operator.dtype), comm)


@dataclass(frozen=True, eq=False)
class _ExactRows:
    """Y = K V by columns for V with one number a column: rows of K, read as entries.

    Attributes:
        y: (N, this rank's columns).
        widths: columns of every rank.
        rows: (k,) where the numbers stand; host arrays, as the next.
        scale: (k,) the numbers.
    """

    y: Array
    widths: Sequence[int]
    rows: Any
    scale: Any

    @classmethod
    def read(cls, operator: Operator, rows: Any, scale: Any, comm: Communicator) -> _ExactRows:
        """Read them, some blocks of rows by every rank."""
        part, widths = column_share(len(rows), comm)
        n, k, width = operator.shape[0], part.stop - part.start, block_width(len(rows))
        blocks = np.full((-(-k // width), width), -1)
        blocks.reshape(-1)[:k] = rows[part]
        xp = namespace_on(operator.device)
        y = operator.reader.blocks(blocks, np.broadcast_to(np.arange(n), (len(blocks), n)))
        y = y.reshape(blocks.size, n)[:k].T * xp.asarray(scale[part])
        return cls(y, widths, rows, scale)

    def to_rows(self, owners: Ownership) -> ProductRows:
        """See `ProductColumns`; V need not be sent."""
        xp, mine, y = namespace(self.y), owners.rows.mine, owners.by_rows(self.y, self.widths)
        place = np.minimum(np.searchsorted(mine, self.rows), len(mine) - 1)
        [here] = np.nonzero(mine[place] == self.rows)
        v = xp.zeros((len(mine), len(self.rows)), self.y.dtype)
        v[xp.asarray(place[here]), xp.asarray(here)] = xp.asarray(self.scale[here])
        return ProductRows(v, y)

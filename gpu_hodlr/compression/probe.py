"""Norm and error measured against the exact matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from scipy.special import gammaincinv, rel_entr

from gpu_hodlr import batched, streams
from gpu_hodlr.arrays import power_of_two
from gpu_hodlr.devices import HostArray, HostIndex, namespace, namespace_on, to_host
from gpu_hodlr.distributed import ALONE, Communicator, Ownership, shares
from gpu_hodlr.operators import (
    Operator,
    ProductColumns,
    ProductRows,
    ScaledOperator,
    half_even,
)
from gpu_hodlr.structures import Structure

VECTORS = 10
LEAST_ROWS, MOST_ROWS = 128, 512
EVERY_ROW = 2048  # a matrix of no more rows is read whole: cheap, and nothing is missed
CONFIDENCE = 0.95

_BLOCK = 8  # rows read as one block: the same for any number of ranks, and so are their bits
_AT_ONCE = 1 << 19  # entries in memory at a time, but for _LEAST_COLUMNS of a large matrix
_LEAST_COLUMNS = 32


@dataclass(frozen=True)
class Measured:
    """What a probe says of a structure.

    Attributes:
        error: estimate of norm(K - K~)_F / norm(K)_F (of norm(K - K~)_F for K = 0).
        bound: what the same does not exceed, with confidence `CONFIDENCE`.
    """

    error: float
    bound: float


class SpreadProbe(Protocol):
    """A probe by rows, as the structures measured are."""

    @property
    def norm(self) -> float:
        """That of K, estimated."""

    def measure(self, compressed: Structure) -> Measured:
        """The error of a structure.

        Summed leaf by leaf, so that the order is the same for any number of ranks.
        """


class ErrorProbe:
    """Vectors V with E[V V^T] = I, and the exact K V.

    norm(A V)_F^2 is then an unbiased estimate of norm(A)_F^2 for any A. With products V is
    Gaussian; with entries alone V picks exact rows of K, all of them up to order `EVERY_ROW`, or
    else some drawn half evenly, half by the diagonal, so that few heavy rows are not missed.

    Args:
        operator: K.
        products: whether products are made.
        seed: of V.
        comm: the ranks.
        rows: how many rows are drawn without products.

    Attributes:
        norm: estimate of norm(K)_F.
        how: in words.
    """

    def __init__(
        self,
        operator: Operator,
        products: bool,
        seed: int,
        comm: Communicator = ALONE.comm,
        rows: int = LEAST_ROWS,
    ) -> None:
        self._seen: _Vectors | _Rows = (
            _Vectors.multiplied(operator, seed, comm)
            if products
            else _Rows.read(operator, rows, seed, comm)
        )
        self.how = self._seen.how
        self.norm = self._seen.norm()

    def scale_to_one(self, stored: np.dtype[Any] | None = None) -> float:
        """Where squares of K's entries might leave the range of what is stored: scale K.

        Args:
            stored: the type of what is stored; K's by default.

        Returns:
            The power of two that K is multiplied by from now on, often 1.
        """
        dtype = self._seen.dtype
        factor = 1.0 / power_of_two(self._seen.largest, dtype)
        if abs(math.log2(factor)) < np.finfo(stored or dtype).maxexp // 8:
            return 1.0
        self._seen = self._seen.scaled(factor)
        self.norm = self._seen.norm()
        return factor

    def to_rows(self, owners: Ownership) -> SpreadProbe:
        """The same by rows, as the structures measured will be."""
        return self._seen.to_rows(owners, self.norm)


@dataclass(frozen=True, eq=False)
class _Vectors:
    """Gaussian V and Y = K V, by columns.

    Attributes:
        product: V and Y.
        comm: the ranks.
        largest: of the absolute values of Y.
    """

    product: ProductColumns
    comm: Communicator
    largest: float
    how = f"{VECTORS} products with random vectors"

    @classmethod
    def multiplied(cls, operator: Operator, seed: int, comm: Communicator) -> _Vectors:
        """Draw and multiply, a share of the columns on each rank."""
        normal = batched.normal_source((seed, streams.PROBE), operator.device)
        shape = (operator.shape[0], VECTORS)
        product = ProductColumns.shared(
            operator,
            VECTORS,
            lambda part: normal(shape, operator.dtype, part) / VECTORS**0.5,
            comm,
        )
        own = float(abs(product.y).max()) if product.y.size else 0.0
        return cls(product, comm, max(comm.share(own)))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of K."""
        return self.product.y.dtype

    def norm(self) -> float:
        """That of K V, from its columns' norms: a column is whole on one rank."""
        y = self.product.y
        columns = namespace(y).ascontiguousarray(y.T, dtype=np.float64)
        size = power_of_two(float(abs(columns).max()) if columns.size else 0.0)
        own = np.sqrt(to_host(batched.squared_norms(columns / size))) * size
        return math.hypot(*np.concatenate(self.comm.share(own)))

    def scaled(self, factor: float) -> _Vectors:
        """Of factor * K."""
        product = replace(self.product, y=self.product.y * self.dtype.type(factor))
        return replace(self, product=product, largest=self.largest * factor)

    def to_rows(self, owners: Ownership, norm: float) -> SpreadVectors:
        """See `ErrorProbe`."""
        return SpreadVectors(self.product.to_rows(owners), norm, owners)


@dataclass(frozen=True, eq=False)
class SpreadVectors:
    """The Gaussian vectors V of an `ErrorProbe` and the exact K V, by rows.

    Attributes:
        product: V and K V.
        norm: see `SpreadProbe`.
        owners: which rank has which rows.
    """

    product: ProductRows
    norm: float
    owners: Ownership

    def measure(self, compressed: Structure) -> Measured:
        """See `SpreadProbe`.

        norm(A V)_F^2 / norm(A)_F^2 is a mean of chi-squared numbers weighted by the squared
        singular values of A; it falls furthest below one where A has rank one (Roosta-Khorasani,
        Szekely, Ascher, SIAM/ASA J. Uncertainty Quantification 3 (2015)).
        """
        v, owners = self.product.v.astype(compressed.dtype, copy=False), self.owners
        missed = compressed.matmat(v).astype(np.float64)
        missed -= self.product.y
        leaves = owners.local(owners.leaves[owners.mine(owners.depth)])
        squares = batched.squared_norms(batched.gather_rows(missed, leaves))
        difference = math.sqrt(owners.sum_of_nodes(to_host(squares), owners.depth))
        error = difference / self.norm if self.norm else difference
        half = VECTORS / 2
        return Measured(error, error / math.sqrt(gammaincinv(half, 1 - CONFIDENCE) / half))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Exact rows of K, read as entries whenever they are needed; host arrays.

    Attributes:
        operator: K, with entries.
        rows: (k,) their indices, ascending.
        weight: (k,) 1 / probability; 1 where all rows are taken.
        times: (k,) how often each was drawn.
        draws: how many in all; 1 where all rows are taken.
        norms: (k,) of each row.
        largest: of their absolute values.
    """

    operator: Operator
    rows: HostIndex
    weight: HostArray
    times: HostArray
    draws: int
    norms: HostArray
    largest: float

    @classmethod
    def read(cls, operator: Operator, count: int, seed: int, comm: Communicator) -> _Rows:
        """Choose rows, with replacement so that they are independent, and read their norms."""
        n = operator.shape[0]
        if n <= max(EVERY_ROW, count):
            rows, times, draws, weight = np.arange(n), np.ones(n, np.int64), 1, np.ones(n)
        else:
            rng = np.random.default_rng((seed, streams.PROBE))
            diagonal = np.abs(to_host(operator.diagonal()).astype(np.float64))
            probability = half_even(diagonal)
            drawn = rng.choice(n, size=count, p=probability)
            rows, times = np.unique(drawn, return_counts=True)
            draws, weight = count, 1.0 / probability[rows]
        norms, largest = _row_norms(operator, rows, comm)
        return cls(operator, rows, weight, times, draws, norms, largest)

    @property
    def how(self) -> str:
        """See `ErrorProbe`."""
        n = self.operator.shape[0]
        return "all rows" if self.complete else f"{len(self.rows)} of {n} rows, drawn at random"

    @property
    def complete(self) -> bool:
        """Whether no row is left out."""
        return len(self.rows) == self.operator.shape[0] and self.draws == 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of K."""
        return self.operator.dtype

    def norm(self) -> float:
        """See `ErrorProbe`."""
        return math.hypot(*(np.sqrt(self.times * self.weight / self.draws) * self.norms))

    def scaled(self, factor: float) -> _Rows:
        """Of factor * K."""
        return replace(
            self,
            operator=ScaledOperator(self.operator, factor),
            norms=self.norms * factor,
            largest=self.largest * factor,
        )

    def to_rows(self, owners: Ownership, norm: float) -> SpreadRows:
        """See `ErrorProbe`; nothing need be sent."""
        return SpreadRows(self, norm, owners)


@dataclass(frozen=True, eq=False)
class SpreadRows:
    """The rows of an `ErrorProbe`; every rank reads of them what stands in its own leaves.

    Attributes:
        seen: the rows.
        norm: see `SpreadProbe`.
        owners: which rank has which rows.
    """

    seen: _Rows
    norm: float
    owners: Ownership

    def measure(self, compressed: Structure) -> Measured:
        """See `SpreadProbe`.

        X_i = norm(row i of K - K~)^2 / p_i of a row drawn with probability p_i has the mean
        norm(K - K~)_F^2. Of numbers in [0, b] whose average over s draws is a, the mean is with
        confidence c no more than b u, kl(a / b, u) = log(1 / (1 - c)) / s (Hoeffding, J. Amer.
        Statist. Assoc. 58 (1963), theorem 1; for a = 0 the "rule of three", b 3 / s). b is the
        largest norm(row i of K)^2 / p_i among the rows seen: that no unseen one is heavier, and
        that none is approximated worse than by zero, is assumed.
        """
        seen = self.seen
        squares = self._missed(compressed)
        numbers = seen.weight * squares
        difference = math.sqrt(float(seen.times @ numbers) / seen.draws)
        scale = self.norm or 1.0
        if seen.complete:
            return Measured(difference / scale, difference / scale)
        most = float(max(numbers.max(), (seen.weight * seen.norms**2).max()))
        share = _largest_mean(difference**2 / most, seen.draws) if most else 0.0
        return Measured(difference / scale, math.sqrt(share * most) / scale)

    def _missed(self, compressed: Structure) -> HostArray:
        """(k,) squared norms of the rows of K - K~."""
        owners, rows, n = self.owners, self.seen.rows, self.owners.n
        leaves = owners.leaves[owners.mine(owners.depth)]
        local, mine = owners.local(leaves), owners.rows.mine
        place = np.minimum(np.searchsorted(mine, rows), len(mine) - 1)
        here = mine[place] == rows
        xp = namespace_on(self.seen.operator.device)
        squares = np.empty((len(leaves), len(rows)))
        width = columns_at_once(n, len(rows))
        for start in range(0, len(rows), width):
            part = slice(start, min(start + width, len(rows)))
            [columns] = np.nonzero(here[part])
            v = xp.zeros((len(mine), part.stop - part.start), compressed.dtype)
            v[xp.asarray(place[part][columns]), xp.asarray(columns)] = 1
            product = batched.gather_rows(compressed.matmat(v), local).astype(np.float64)
            wanted = np.broadcast_to(rows[part], (len(leaves), v.shape[1]))
            product -= self.seen.operator.reader.blocks(leaves, wanted)
            squares[:, part] = to_host((product * product).sum(axis=1))
        found: HostArray = owners.sum_of_nodes(squares, owners.depth)
        return found


def columns_at_once(n: int, rows: int) -> int:
    """How many of so many rows of a matrix of order n are compared at a time."""
    return min(rows, max(_LEAST_COLUMNS, _AT_ONCE // n))


def _row_norms(operator: Operator, rows: HostIndex, comm: Communicator) -> tuple[HostArray, float]:
    """(k,) norms of rows of K, and the largest absolute entry: some rows read by each rank."""
    n, k = operator.shape[0], len(rows)
    blocks = np.full((-(-k // _BLOCK), _BLOCK), -1)
    blocks.reshape(-1)[:k] = rows
    part = shares(len(blocks), comm.size)[comm.rank]
    norms, largest = np.zeros((len(blocks), _BLOCK)), np.zeros((len(blocks), _BLOCK))
    at_once = max(1, _AT_ONCE // (n * _BLOCK))
    for start in range(part.start, part.stop, at_once):
        now = slice(start, min(start + at_once, part.stop))
        count = now.stop - now.start
        every = np.broadcast_to(np.arange(n), (count, n))
        y = operator.reader.blocks(blocks[now], every).reshape(count * _BLOCK, n)
        y = y.astype(np.float64)
        most = to_host(abs(y).max(axis=1))
        # Squares of the entries as they are might leave the range.
        exponent = np.clip(np.frexp(most)[1], -1000, 1000)
        y *= namespace(y).asarray(np.ldexp(1.0, -exponent))[:, None]
        found = np.ldexp(np.sqrt(to_host(batched.squared_norms(y))), exponent)
        norms[now], largest[now] = found.reshape(count, _BLOCK), most.reshape(count, _BLOCK)
    every_norm = np.concatenate(comm.share(norms[part])).reshape(-1)[:k]
    return every_norm, max(float(a.max(initial=0.0)) for a in comm.share(largest[part]))


def _largest_mean(average: float, draws: int) -> float:
    """The u in [average, 1] with kl(average, u) = log(1 / (1 - CONFIDENCE)) / draws."""
    allowed = -math.log(1 - CONFIDENCE) / draws
    average = min(average, 1.0)
    low, high = average, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        apart = rel_entr(average, middle) + rel_entr(1 - average, 1 - middle)
        low, high = (middle, high) if apart <= allowed else (low, middle)
    return high

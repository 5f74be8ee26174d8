"""Entries of a network's matrix in the Kronecker-factored eigenbasis, block row by block row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostArray, HostIndex, namespace, to_host
from gpu_hodlr.eigenbasis.kronecker import KroneckerBasis

_UNITS = 16  # whose entries are prepared together
_STRIPS = 6  # of a unit's rows, each with its own bound on the columns

# Of (unit, some of its rows, other layer, some of its units, columns): (units, rows, columns).
Panel = Callable[[int, slice, int, slice, int], Array]


@dataclass(frozen=True)
class Strip:
    """Entries K'[rows, columns] for rows of one unit and columns of a few units of one layer.

    Attributes:
        entries: (units, rows, columns).
        row: the first row, a coordinate of the basis.
        column: the first column of the first unit.
        stride: from a column of one unit to that of the next.
    """

    entries: Array
    row: int
    column: int
    stride: int

    @property
    def crosses(self) -> bool:
        """Whether the diagonal may lie in it."""
        return self.column + len(self.entries) * self.stride > self.row


@dataclass(frozen=True)
class Rotated(ABC):
    """K' = Q^T K Q - P C P^T of K = A^T A, Q the Kronecker-factored eigenbasis.

    A subclass says how entries of Q^T K Q are computed. |K'_ij| <= s_i s_j with s the roots of the
    diagonal.

    Attributes:
        basis: Q, and K outside its range.
        d: (M,) the diagonal of K', float64.
        apart: whether the last layer's units are not coupled to one another.
        P: (M, r), what is taken off; None for nothing.
        C: (r,).
    """

    basis: KroneckerBasis
    d: Array
    apart: bool = field(default=False, kw_only=True)
    P: Array | None = field(default=None, kw_only=True)
    C: Array | None = field(default=None, kw_only=True)

    @property
    def size(self) -> int:
        """M."""
        return self.basis.size

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Of entries."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """That of factor * K, factor > 0."""

    @abstractmethod
    def _cast(self, dtype: DTypeLike) -> Self:
        """With Q^T K Q from arrays in another precision."""

    @abstractmethod
    def _panels(self, units: slice) -> Panel:
        """Blocks of Q^T K Q whose rows are of some units."""

    @abstractmethod
    def _rows(self, index: HostIndex) -> Array:
        """Whole rows of Q^T K Q, (rows, M)."""

    def _column_numbers(self, height: int) -> int:
        """In memory for each column of a panel of so many rows."""
        return height

    def without(self, P: Array, C: Array) -> Self:
        """Less P C P^T, P (M, r) and C (r,), which leaves K' positive semi-definite."""
        taken = ((P * P) @ C).astype(np.float64)
        return replace(self, P=P, C=C, d=namespace(P).maximum(self.d - taken, 0.0))

    def astype(self, dtype: DTypeLike) -> Self:
        """With panels in another precision; the diagonal and the basis keep theirs."""
        if self.dtype == dtype:
            return self
        P, C = (None if a is None else a.astype(dtype) for a in (self.P, self.C))
        return replace(self._cast(dtype), P=P, C=C)

    @cached_property
    def first_units(self) -> HostIndex:
        """(layers + 1,) the first unit of every layer among all."""
        return np.cumsum([0, *(layer.units for layer in self.basis.layers)])

    @cached_property
    def bounds(self) -> tuple[HostArray, ...]:
        """(units, g) a layer: the largest s of a unit from a feature on, so that it falls."""
        s = np.sqrt(to_host(self.d))
        firsts = self.basis.firsts
        by_unit = [
            s[a:b].reshape(layer.units, -1)
            for layer, a, b in zip(self.basis.layers, firsts[:-1], firsts[1:], strict=True)
        ]
        return tuple(np.maximum.accumulate(x[:, ::-1], axis=1)[:, ::-1] for x in by_unit)

    @cached_property
    def _largest(self) -> float:
        """Of s."""
        return max((float(b.max(initial=0.0)) for b in self.bounds), default=0.0)

    def block_rows(self, units: range, tau: float) -> Iterator[tuple[slice, Iterator[Strip]]]:
        """The rows of some units, each with all entries of block columns up to its own above tau.

        What the bound s_i s_j rules out is not computed: rows and columns end where it falls below
        tau. Entries that do not exceed it are among the others.
        """
        total = int(self.first_units[-1])
        for start in range(units.start // _UNITS * _UNITS, units.stop, _UNITS):
            # Whatever the units asked for, the same products, and so the same bits.
            panels = self._panels(slice(start, min(start + _UNITS, total)))
            for unit in range(max(start, units.start), min(start + _UNITS, units.stop)):
                layer, row = self._place(unit)
                rows = slice(row, row + self.basis.layers[layer].features)
                yield rows, self._unit_strips(unit, partial(panels, unit), tau)

    def work(self, tau: float) -> HostArray:
        """(units,) how many entries `block_rows` computes."""
        total = np.zeros(int(self.first_units[-1]))
        for unit in range(len(total)):
            for _, group, rows, columns in self._screened(unit, tau):
                total[unit] += (group.stop - group.start) * (rows.stop - rows.start) * columns
        return total

    def row_of(self, unit: int) -> int:
        """The first coordinate of a unit, or M after the last."""
        return self.size if unit == int(self.first_units[-1]) else self._place(unit)[1]

    def _place(self, unit: int) -> tuple[int, int]:
        """The layer of a unit, and its first coordinate."""
        layer = int(np.searchsorted(self.first_units, unit, side="right")) - 1
        own = unit - int(self.first_units[layer])
        return layer, int(self.basis.firsts[layer]) + own * self.basis.layers[layer].features

    def _screened(self, unit: int, tau: float) -> Iterator[tuple[int, slice, slice, int]]:
        """(other layer, its units, rows, columns) of everything that may exceed tau."""
        layer, _ = self._place(unit)
        own = unit - int(self.first_units[layer])
        bound = self.bounds[layer][own]
        if bound[0] * self._largest <= tau:
            return  # of a table, most rows of which no sample has
        for other in range(layer + 1):
            last = own + 1 if other == layer else len(self.bounds[other])
            alone = self.apart and other == layer == len(self.bounds) - 1
            column = self._column_numbers(len(bound)) * self.dtype.itemsize
            together = batched.columns_at_once(self.d, column * self.bounds[other].shape[1])
            for b in range(own if alone else 0, last, together):
                group = slice(b, min(b + together, last))
                most = self.bounds[other][group].max(axis=0, initial=0.0)
                for rows, columns in _strips(bound, most, tau):
                    yield other, group, rows, columns

    def _unit_strips(
        self, unit: int, panel: Callable[[slice, int, slice, int], Array], tau: float
    ) -> Iterator[Strip]:
        _, row = self._place(unit)
        for other, group, rows, columns in self._screened(unit, tau):
            entries = panel(rows, other, group, columns)
            if self.P is not None:
                here = slice(row + rows.start, row + rows.stop)
                entries -= products(self.P[here] * self.C, self._of(self.P, other, group, columns))
            column, f = self._column(other, group), self.basis.layers[other].features
            yield Strip(entries, row + rows.start, column, f)

    def _column(self, layer: int, group: slice) -> int:
        """The first coordinate of some units of a layer."""
        return int(self.basis.firsts[layer]) + group.start * self.basis.layers[layer].features

    def _of(self, a: Array, layer: int, group: slice, columns: int) -> Array:
        """The first rows of some units of a layer, (units, columns, r), of (M, r)."""
        column, f = self._column(layer, group), self.basis.layers[layer].features
        units = group.stop - group.start
        return a[column : column + units * f].reshape(units, f, -1)[:, :columns]

    def rows(self, index: HostIndex) -> Array:
        """Whole rows of K', (rows, M)."""
        result = self._rows(index)
        if self.P is not None:
            some = self.P[namespace(self.d).asarray(index)]
            result -= products(some * self.C, self.P[None])[0]
        return result


def products(left: Array, right: Array) -> Array:
    """Left right^T, (units, rows, columns), of (rows, r) and (units, columns, r)."""
    units, columns, r = right.shape
    flat = namespace(right).ascontiguousarray(right).reshape(1, units * columns, r)
    product = batched.matmul(left[None], flat, transpose_b=True)[0]
    return product.reshape(len(left), units, columns).transpose(1, 0, 2)


def _strips(rows: HostArray, columns: HostArray, tau: float) -> Iterator[tuple[slice, int]]:
    """Strips of rows, and how many columns, where the product of two falling bounds exceeds tau."""
    if not len(columns) or not len(rows):
        return
    count = _above(rows, tau / columns[0] if columns[0] else np.inf)
    strips = min(_STRIPS, -(-count // 32))
    edges = np.arange(strips + 1) * count // max(strips, 1)
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        wide = _above(columns, tau / rows[start])
        if wide:
            yield slice(start, stop), wide


def _above(falling: HostArray, least: float) -> int:
    """How many of falling numbers exceed another."""
    return int(np.searchsorted(-falling, -least, side="left"))

"""Random sketches of an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import ALONE, Communicator, Ownership
from gpu_hodlr.operators.operator import Operator
from gpu_hodlr.operators.product import ProductColumns, ProductRows, column_share

# Columns of a sketch that grows: bounds what drawing and spreading them takes; of many rows fewer.
_AT_ONCE, _OF_MANY, _MANY = 128, 40, 1 << 18


@dataclass(frozen=True, eq=False)
class _Draw:
    """Draws columns of Omega; the ranks multiply a share each.

    Attributes:
        operator: K, with products.
        normal: source of Omega.
        comm: the ranks.
    """

    operator: Operator
    normal: batched.NormalSource
    comm: Communicator

    def __call__(self, columns: int, mask: Array | None = None) -> ProductColumns:
        """So many columns, zero where mask (N, 1) is."""

        def drawn(part: slice) -> Array:
            omega = self._omega(columns, part)
            return omega if mask is None else omega * mask

        return ProductColumns.shared(self.operator, columns, drawn, self.comm)

    def _omega(self, columns: int, part: slice) -> Array:
        return self.normal((self.operator.shape[0], columns), self.operator.dtype, part)

    def without_products(self, columns: int, owners: Ownership) -> Array:
        """So many columns of Omega alone, by rows."""
        mine, widths = column_share(columns, self.comm)
        return owners.by_rows(self._omega(columns, mine), widths)


class SketchColumns:
    """Gaussian Omega (N, s) and Y = K Omega by columns: each rank draws and multiplies a share.

    The same numbers on any number of ranks.

    Args:
        operator: with products.
        columns: s.
        seed: of Omega.
        comm: the ranks.

    Attributes:
        product: Omega and Y.
    """

    def __init__(
        self, operator: Operator, columns: int, seed: int, comm: Communicator = ALONE.comm
    ) -> None:

        def begin() -> _Draw:
            normal = batched.normal_source((seed, streams.SKETCH), operator.device)
            return _Draw(operator, normal, comm)

        self._begin, self._draw = begin, begin()
        self.product = self._draw(columns)

    def to_rows(self, owners: Ownership) -> SketchRows:
        """The same by rows, to which columns can be added."""
        begin = self._begin

        def by_rows(draw: _Draw) -> Put:
            def put(columns: int, into: tuple[Array, Array]) -> None:
                draw(columns).to_rows(owners, into)

            return put

        def omegas() -> Callable[[int], Array]:
            draw = begin()
            return lambda columns: draw.without_products(columns, owners)

        rows = self.product.to_rows(owners)
        width = _AT_ONCE if self._draw.operator.shape[0] <= _MANY else _OF_MANY
        return SketchRows(rows, by_rows(self._draw), lambda: by_rows(begin()), omegas, width)

    def energy(self) -> Any:
        """(N,) squared norms of the rows of Y; a host array."""
        return to_host(self.product.squares(self._draw.comm).sum(axis=0))

    def sampled_rows(self, index: HostIndex) -> tuple[Array, Array]:
        """The rows of Omega and Y of nodes (t, m), (t, m, s) each."""
        omega, y = (batched.gather_rows(a, index) for a in (self.product.v, self.product.y))
        comm = self._draw.comm
        if comm.size > 1:
            xp = namespace(y)
            t, m, k = y.shape
            columns = xp.ascontiguousarray(xp.stack([omega, y]).reshape(2 * t * m, k).T)
            every = comm.allgather(columns, self.product.widths)
            omega, y = xp.ascontiguousarray(every.T).reshape(2, t, m, len(every))
        return omega, y


Put = Callable[[int, tuple[Array, Array]], None]
"""Draws so many columns of Omega, and writes this rank's rows (rows, columns) of them and of their
products into two arrays."""


class SketchRows:
    """Gaussian Omega (N, s) and Y = K Omega by rows; columns can be added.

    Args:
        product: Omega and Y at first.
        put: draws the next columns.
        again: gives a `put` that draws from the first column on.
        omegas: gives what draws so many columns of Omega alone, from the first on.
        width: columns that are drawn at a time.

    Attributes:
        num: s.
        kept: whether old columns are kept. Else they are handed over once, and where they are
            asked for again the first ones are drawn again.
        grows: asked before columns are added, (columns now, columns then).
    """

    grows: Callable[[int, int], None] | None = None
    kept = True

    def __init__(
        self,
        product: ProductRows,
        put: Put,
        again: Callable[[], Put] | None = None,
        omegas: Callable[[], Callable[[int], Array]] | None = None,
        width: int = _AT_ONCE,
    ) -> None:
        self._held: ProductRows | None = product
        self._put, self._again, self._omegas, self._width = put, again, omegas, width
        self._shape, self._dtype = tuple(product.v.shape), product.v.dtype
        self._xp = namespace(product.v)
        self.num = int(product.v.shape[1])

    @property
    def omega(self) -> Array:
        """(this rank's rows, s)."""
        return self._rows().v

    @property
    def y(self) -> Array:
        """(this rank's rows, s)."""
        return self._rows().y

    def drawn(self) -> tuple[Array, Array]:
        """Omega and Y."""
        rows = self._rows()
        if not self.kept:
            self._held = None
        return rows.v, rows.y

    def omegas(self) -> Iterator[tuple[slice, Array]]:
        """Which columns of Omega, and these: all there are, some at a time; none need be kept."""
        if self._held is not None:
            yield slice(0, self.num), self._held.v
            return
        assert self._omegas is not None
        draw = self._omegas()
        for part in self._parts(0, self.num):
            yield part, draw(part.stop - part.start)

    def _parts(self, first: int, stop: int) -> Iterator[slice]:
        return (slice(i, min(i + self._width, stop)) for i in range(first, stop, self._width))

    def _rows(self) -> ProductRows:
        if self._held is None:
            assert self._again is not None
            self._put, self.num = self._again(), self._shape[1]
            self._held = ProductRows(*self._new(self.num))
            self._put(self.num, (self._held.v, self._held.y))
        return self._held

    def _new(self, columns: int) -> tuple[Array, Array]:
        shape = (self._shape[0], columns)
        return self._xp.empty(shape, self._dtype), self._xp.empty(shape, self._dtype)

    def _widen(self, columns: int) -> None:
        """Make room for so many more columns, where they are kept."""
        if self._held is None:
            return
        v, y, self._held = self._held.v, self._held.y, None  # so that one at a time is there twice
        v = batched.widened(v, columns)
        y = batched.widened(y, columns)
        self._held = ProductRows(v, y)

    def grow(self, columns: int) -> None:
        """Add columns."""
        for _ in self.more(columns):
            pass

    def more(self, columns: int) -> Iterator[tuple[Array, Array]]:
        """Add columns, some at a time, and give Omega and Y of each time's."""
        first = self.num
        if self.grows is not None:
            self.grows(first, first + columns)
        self._widen(columns)
        for part in self._parts(first, first + columns):
            wide, held = part.stop - part.start, self._held
            added = self._new(wide) if held is None else (held.v[:, part], held.y[:, part])
            self._put(wide, added)
            self.num = part.stop
            yield added


class FreshSketch:
    """Gaussian Omega (N, s), zero in some rows, and Y = K Omega by rows: drawn, and not kept.

    They are for one level alone: what is made of them is all that is wanted of Omega.

    Args:
        operator: K, with products.
        owners: which rank has which rows.
        normal: source of Omega.
        columns: s at first.
        mask: (N, 1) zero where Omega is.
    """

    def __init__(
        self,
        operator: Operator,
        owners: Ownership,
        normal: batched.NormalSource,
        columns: int,
        mask: Array,
    ) -> None:
        self._draw = _Draw(operator, normal, owners.comm)
        self._owners, self._columns, self._mask = owners, columns, mask

    def drawn(self) -> tuple[Array, Array]:
        """Omega and Y of the first columns, drawn at every call."""
        return self._rows(self._columns)

    def more(self, columns: int) -> Iterator[tuple[Array, Array]]:
        """Those of so many more columns, all at once."""
        yield self._rows(columns)

    def _rows(self, columns: int) -> tuple[Array, Array]:
        rows = self._draw(columns, self._mask).to_rows(self._owners)
        return rows.v, rows.y


def half_even(weight: Any) -> Any:
    """Probabilities drawn half evenly, half by weight >= 0; they sum to one."""
    even = np.full(len(weight), 1.0 / len(weight))
    total = weight.sum(dtype=np.float64)
    density = 0.5 * (even + (weight / total if total else even))
    return density / density.sum()

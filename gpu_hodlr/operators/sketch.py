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
from gpu_hodlr.operators.product import ProductColumns, ProductRows

_AT_ONCE = 128  # columns of a sketch that grows: bounds what drawing and spreading them takes


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
        operator = self.operator

        def drawn(part: slice) -> Array:
            omega = self.normal((operator.shape[0], columns), operator.dtype, part)
            return omega if mask is None else omega * mask

        return ProductColumns.shared(operator, columns, drawn, self.comm)


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
        normal = batched.normal_source((seed, streams.SKETCH), operator.device)
        self._draw = _Draw(operator, normal, comm)
        self.product = self._draw(columns)

    def to_rows(self, owners: Ownership) -> SketchRows:
        """The same by rows, to which columns can be added."""
        draw = self._draw

        def put(columns: int, into: tuple[Array, Array]) -> None:
            draw(columns).to_rows(owners, into)

        return SketchRows(self.product.to_rows(owners), put)

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


class SketchRows:
    """Gaussian Omega (N, s) and Y = K Omega by rows; columns can be added, old ones are kept.

    Args:
        product: Omega and Y at first.
        put: draws so many columns of Omega, and writes this rank's rows (rows, columns) of them
            and of their products into two arrays.

    Attributes:
        omega, y: (this rank's rows, s).
        grows: asked before columns are added, (columns now, columns then).
    """

    grows: Callable[[int, int], None] | None = None

    def __init__(
        self, product: ProductRows, put: Callable[[int, tuple[Array, Array]], None]
    ) -> None:
        self.omega, self.y, self._put = product.v, product.y, put

    @property
    def num(self) -> int:
        """S."""
        return int(self.omega.shape[1])

    def drawn(self) -> tuple[Array, Array]:
        """Omega and Y."""
        return self.omega, self.y

    def grow(self, columns: int) -> None:
        """Add columns."""
        for _ in self.more(columns):
            pass

    def more(self, columns: int) -> Iterator[tuple[Array, Array]]:
        """Add columns, some at a time, and give Omega and Y of each time's."""
        first = self.num
        if self.grows is not None:
            self.grows(first, first + columns)
        self.omega = batched.widened(self.omega, columns)
        self.y = batched.widened(self.y, columns)
        for start in range(first, first + columns, _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, first + columns))
            added = self.omega[:, part], self.y[:, part]
            self._put(part.stop - part.start, added)
            yield added


class FreshSketch:
    """Gaussian Omega (N, s), zero in some rows, and Y = K Omega by rows: drawn, and not kept.

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

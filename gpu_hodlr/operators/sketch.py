"""Random sketches of an operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.distributed import ALONE, Communicator, Ownership
from gpu_hodlr.operators.base import Operator
from gpu_hodlr.operators.product import Product

AT_ONCE = 128  # columns of a sketch that grows: bounds what drawing and spreading them takes


class Sketch:
    """Gaussian Omega (N, s) and Y = K Omega; columns can be added, old ones are kept.

    On many ranks each draws and multiplies a share of Omega's columns, and after `to_rows` has its
    own rows of both: the same numbers on any number of ranks.

    Args:
        operator: with products.
        columns: s at first.
        seed: of Omega.
        comm: the ranks.
    """

    def __init__(
        self, operator: Operator, columns: int, seed: int, comm: Communicator = ALONE.comm
    ) -> None:
        self._operator, self._comm = operator, comm
        self._normal = batched.normal_source((seed, streams.SKETCH), operator.device)
        self._owners = ALONE
        self._first = self._draw(columns)
        self.omega, self.y = self._first.v, self._first.y

    def _draw(self, columns: int) -> Product:
        operator = self._operator
        return Product.shared(
            operator,
            columns,
            lambda part: self._normal((operator.shape[0], columns), operator.dtype, part),
            self._comm,
        )

    def to_rows(self, owners: Ownership) -> None:
        """Keep this rank's rows, of this draw and of those to come."""
        self._owners = owners
        self._first.to_rows(owners)
        self.omega, self.y = self._first.v, self._first.y
        del self._first

    def drawn(self) -> tuple[Array, Array]:
        """Omega and Y."""
        return self.omega, self.y

    def grow(self, columns: int) -> None:
        """Add columns; on many ranks after `to_rows`."""
        for _ in self.more(columns):
            pass

    def more(self, columns: int) -> Iterator[tuple[Array, Array]]:
        """Add columns, some at a time, and give Omega and Y of each time's."""
        first = self.omega.shape[1]
        self.omega = batched.widened(self.omega, columns)
        self.y = batched.widened(self.y, columns)
        for start in range(first, first + columns, AT_ONCE):
            part = slice(start, min(start + AT_ONCE, first + columns))
            drawn = self._draw(part.stop - part.start)
            added = self.omega[:, part], self.y[:, part]
            drawn.to_rows(self._owners, added)
            yield added

    def energy(self) -> Any:
        """(N,) squared norms of the rows of Y, before `to_rows`; a host array."""
        return to_host(self._first.squares(self._comm).sum(axis=0))

    def sampled_rows(self, index: Any) -> tuple[Array, Array]:
        """The rows of Omega and Y of nodes (t, m), (t, m, s) each, before `to_rows`."""
        omega, y = (batched.gather_rows(a, index) for a in (self.omega, self.y))
        if self._comm.size > 1:
            xp = namespace(y)
            t, m, k = y.shape
            columns = xp.ascontiguousarray(xp.stack([omega, y]).reshape(2 * t * m, k).T)
            every = self._comm.allgather(columns, self._first.widths)
            omega, y = xp.ascontiguousarray(every.T).reshape(2, t, m, len(every))
        return omega, y


@dataclass(frozen=True, eq=False)
class FreshColumns:
    """Gaussian Omega (N, s), zero in some rows, and Y = K Omega: drawn anew, and not kept.

    Attributes:
        operator: K, with products.
        owners: which rank has which rows of what is drawn.
        normal: source of Omega.
        columns: s at first.
        mask: (N, 1) one where Omega is not zero.
    """

    operator: Operator
    owners: Ownership
    normal: batched.NormalSource
    columns: int
    mask: Array

    def drawn(self) -> tuple[Array, Array]:
        """Omega and Y of the first columns, drawn at every call."""
        return self._draw(self.columns)

    def more(self, columns: int) -> Iterator[tuple[Array, Array]]:
        """Those of so many more columns, all at once."""
        yield self._draw(columns)

    def _draw(self, columns: int) -> tuple[Array, Array]:
        operator, shape = self.operator, (self.operator.shape[0], columns)
        product = Product.shared(
            operator,
            columns,
            lambda part: self.normal(shape, operator.dtype, part) * self.mask,
            self.owners.comm,
        )
        product.to_rows(self.owners)
        return product.v, product.y


def half_even(weight: Any) -> Any:
    """Probabilities drawn half evenly, half by weight >= 0; they sum to one."""
    even = np.full(len(weight), 1.0 / len(weight))
    total = weight.sum(dtype=np.float64)
    density = 0.5 * (even + (weight / total if total else even))
    return density / density.sum()

"""Products with known vectors, formed by all ranks together, and random sketches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.distributed import ALONE, Communicator, Ownership, shares
from gpu_hodlr.operators.base import Operator


class Product:
    """Y = K V for V (N, k), a share of the columns formed by each rank.

    Args:
        v: V, the same on every rank.
        columns: gives K V of a slice of V's columns, (N, columns).
        comm: the ranks.

    Attributes:
        v: (N, k), or after `to_rows` this rank's rows.
        y: (N, this rank's columns) of Y, or after `to_rows` this rank's rows, all columns.
        widths: columns of every rank.
    """

    def __init__(
        self, v: Array, columns: Callable[[slice], Array], comm: Communicator = ALONE.comm
    ) -> None:
        parts = shares(v.shape[1], comm.size)
        self.widths = [part.stop - part.start for part in parts]
        self.v = v
        self.y = columns(parts[comm.rank])

    def to_rows(self, owners: Ownership) -> None:
        """Spread by rows from now on."""
        if not owners.alone:
            self.v = owners.rows.take(self.v)
            self.y = owners.rows.from_columns(self.y, self.widths)


class Sketch:
    """Gaussian Omega (N, s) and Y = K Omega; columns can be added, old ones are kept.

    On many ranks each draws all of Omega, multiplies a share of its columns, and after `to_rows`
    keeps its own rows of both.

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
        self._normal = batched.normal_source((seed, 0xA5), operator.device)
        self._owners: Ownership | None = None
        self._first = self._draw(columns)
        self.omega, self.y = self._first.v, self._first.y

    def _draw(self, columns: int) -> Product:
        omega = self._normal((self._operator.shape[0], columns), self._operator.dtype)
        return Product(omega, lambda part: self._operator._matmat(omega[:, part]), self._comm)

    def to_rows(self, owners: Ownership) -> None:
        """Keep this rank's rows, of this draw and of those to come."""
        self._owners = owners
        self._first.to_rows(owners)
        self.omega, self.y = self._first.v, self._first.y
        del self._first

    def grow(self, columns: int) -> None:
        """Add columns."""
        drawn = self._draw(columns)
        if self._owners is not None:
            drawn.to_rows(self._owners)
        xp = namespace(drawn.y)
        self.omega = xp.concatenate([self.omega, drawn.v], axis=1)
        self.y = xp.concatenate([self.y, drawn.y], axis=1)

    def energy(self) -> Any:
        """(N,) squared norms of the rows of Y, before `to_rows`; a host array."""
        return to_host(self._comm.allreduce(namespace(self.y).einsum("ij,ij->i", self.y, self.y)))

    def sampled_rows(self, index: Any) -> tuple[Array, Array]:
        """The rows of Omega and Y of nodes (t, m), (t, m, s) each, before `to_rows`."""
        omega, y = (batched.gather_rows(a, index) for a in (self.omega, self.y))
        if self._comm.size > 1:
            xp = namespace(y)
            flat = xp.ascontiguousarray(y.reshape(-1, y.shape[2]).T)
            widths = self._first.widths
            flat = self._comm.allgather(flat, widths)
            y = xp.ascontiguousarray(flat.T).reshape(omega.shape)
        return omega, y


def half_even(weight: Any) -> Any:
    """Probabilities drawn half evenly, half by weight >= 0; they sum to one."""
    even = np.full(len(weight), 1.0 / len(weight))
    total = weight.sum(dtype=np.float64)
    density = 0.5 * (even + (weight / total if total else even))
    return density / density.sum()

"""Products with known vectors, formed by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed import ALONE, Communicator, Ownership, shares
from gpu_hodlr.operators.base import Operator


class Product:
    """V (N, k) and Y = K V; every rank has some columns of both, or after `to_rows` some rows.

    Args:
        v: this rank's columns of V.
        multiply: v -> K v.
        widths: columns of every rank; without it this rank has them all.

    Attributes:
        v, y: (N, this rank's columns), or after `to_rows` (this rank's rows, k).
        widths: columns of every rank.
    """

    def __init__(
        self, v: Array, multiply: Callable[[Array], Array], widths: Sequence[int] | None = None
    ) -> None:
        self.v, self.y = v, multiply(v)
        self.widths = [v.shape[1]] if widths is None else widths

    @classmethod
    def shared(
        cls,
        operator: Operator,
        num: int,
        columns: Callable[[slice], Array],
        comm: Communicator = ALONE.comm,
    ) -> Product:
        """K V, a share of the columns made and multiplied by each rank.

        Args:
            operator: with products.
            num: columns of V.
            columns: gives a slice of them, (N, columns).
            comm: the ranks.
        """
        part, widths = column_share(num, comm)
        return cls(columns(part), operator._matmat, widths)

    def to_rows(self, owners: Ownership) -> None:
        """Spread by rows from now on."""
        if owners.alone:  # what is kept by rows is gathered by rows
            self.v, self.y = (namespace(a).ascontiguousarray(a) for a in (self.v, self.y))
        else:
            self.v, self.y = owners.rows.from_columns((self.v, self.y), self.widths)


def column_share(num: int, comm: Communicator) -> tuple[slice, list[int]]:
    """This rank's part of so many columns, and how many every rank has."""
    parts = shares(num, comm.size)
    return parts[comm.rank], [part.stop - part.start for part in parts]

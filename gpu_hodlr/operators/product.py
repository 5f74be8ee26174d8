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

        Where there are more ranks than columns and K is a sum (see `Operator.summand`), the ranks
        of a group make the same column and multiply it by a part of K each; their first has it and
        the sum. Without summands the ranks too many do nothing.

        Args:
            operator: with products.
            num: columns of V.
            columns: gives a slice of them, (N, columns).
            comm: the ranks.
        """
        if 0 < num < comm.size:
            groups = shares(comm.size, num)
            column = next(c for c, ranks in enumerate(groups) if comm.rank < ranks.stop)
            group = groups[column]
            part = operator.summand(comm.rank - group.start, group.stop - group.start)
            if part is not None:
                v = columns(slice(column, column + 1))
                total = _sum_at_first(part.reader.matmat(v), group, comm)
                firsts = {ranks.start for ranks in groups}
                widths = [int(rank in firsts) for rank in range(comm.size)]
                return cls(v[:, : total.shape[1]], lambda _: total, widths)
        mine, widths = column_share(num, comm)
        return cls(columns(mine), operator.reader.matmat, widths)

    def to_rows(self, owners: Ownership, into: tuple[Array, Array] | None = None) -> None:
        """Spread by rows from now on.

        Args:
            owners: which rank has which rows.
            into: (rows, k) for V and Y, where they are put; new arrays by default.
        """
        if into is None:  # kept by rows, as rows are what is gathered of it
            rows, xp = len(self.v) if owners.alone else len(owners.rows.mine), namespace(self.v)
            shape = (rows, sum(self.widths))
            into = xp.empty(shape, self.v.dtype), xp.empty(shape, self.y.dtype)
        if owners.alone:
            into[0][:], into[1][:] = self.v, self.y
        else:
            owners.rows.from_columns((self.v, self.y), self.widths, into)
        self.v, self.y = into


def column_share(num: int, comm: Communicator) -> tuple[slice, list[int]]:
    """This rank's part of so many columns, and how many every rank has."""
    parts = shares(num, comm.size)
    return parts[comm.rank], [part.stop - part.start for part in parts]


def _sum_at_first(y: Array, group: slice, comm: Communicator) -> Array:
    """The sum of the y (N, 1) of a group of ranks on its first, (N, 0) on the others.

    Each adds some of the rows, in the order of the ranks, so that none receives more than N.
    """
    sizes, nothing = [0] * comm.size, [0] * comm.size
    parts = shares(len(y), group.stop - group.start)
    sizes[group] = [part.stop - part.start for part in parts]
    from_each = list(nothing)
    from_each[group] = [sizes[comm.rank]] * len(parts)
    got = comm.exchange(y, sizes, from_each).reshape(len(parts), sizes[comm.rank], 1)
    total = sum(got[1:], start=got[0])
    to_first = list(nothing)
    to_first[group.start] = len(total)
    if comm.rank == group.start:
        return comm.exchange(total, to_first, sizes)
    return comm.exchange(total, to_first, nothing).reshape(len(y), 0)

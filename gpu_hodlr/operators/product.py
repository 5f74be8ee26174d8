"""Products with known vectors, formed by all ranks together.

Columns are dealt out and multiplied in blocks that are the same for every number of ranks, 1
included, and with them every bit of the product: BLAS sums in another order for another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed import ALONE, Communicator, Ownership, shares
from gpu_hodlr.operators.operator import Operator

# Columns: a sketch of 160 serves 2 and 4 ranks alike; half as many cost a dense matrix up to three
# times as much.
_BLOCK = 40
_BLOCKS = 4  # at least, of few columns


@dataclass(frozen=True, eq=False)
class ProductRows:
    """V (N, k) and Y = K V by rows.

    Attributes:
        v, y: (this rank's rows, k).
    """

    v: Array
    y: Array


@dataclass(frozen=True, eq=False)
class ProductColumns:
    """V (N, k) and Y = K V by columns, as they are formed.

    Attributes:
        v, y: (N, this rank's columns).
        widths: columns of every rank, whole blocks.
        block: columns of a block.
    """

    v: Array
    y: Array
    widths: Sequence[int]
    block: int

    @classmethod
    def shared(
        cls,
        operator: Operator,
        num: int,
        columns: Callable[[slice], Array],
        comm: Communicator = ALONE.comm,
    ) -> ProductColumns:
        """K V, a share of the columns made and multiplied by each rank.

        The same bits on up to 4 ranks, and on any number with one exception. Where there are more
        ranks than blocks of `_BLOCK` columns or more in all, and K is a sum (see
        `Operator.summand`), the ranks of a group make the same block and multiply it by a part of
        K each; their first has it and the sum, whose order, and so rounding, is another for another
        number of ranks. Without summands, or of fewer columns, the ranks too many do nothing.
        Of a matrix that is read from memory for every product few columns are one block.

        Args:
            operator: with products.
            num: columns of V.
            columns: gives a slice of them, (N, columns).
            comm: the ranks.
        """
        block = block_width(num, operator.least_columns)
        blocks = column_blocks(num, block)
        if num >= _BLOCK and len(blocks) < comm.size:
            groups = shares(comm.size, len(blocks))
            mine = next(b for b, ranks in enumerate(groups) if comm.rank < ranks.stop)
            group = groups[mine]
            part = operator.summand(comm.rank - group.start, group.stop - group.start)
            if part is not None:
                v = columns(blocks[mine])
                total = _sum_at_first(part.reader.matmat(v), group, comm)
                widths = [0] * comm.size
                for ranks, own in zip(groups, blocks, strict=True):
                    widths[ranks.start] = own.stop - own.start
                return cls(v[:, : total.shape[1]], total, widths, block)
        share, widths = column_share(num, comm, block)
        v = columns(share)
        y = operator.reader.matmat_by_blocks(v, block) if v.shape[1] else v
        return cls(v, y, widths, block)

    def squares(self, comm: Communicator) -> Array:
        """(blocks, N) squared norms of the rows of Y, of every block that is multiplied as one."""
        xp, n, block = namespace(self.y), len(self.y), self.block
        own = xp.empty((-(-self.y.shape[1] // block), n), np.float64)
        for b, squares in enumerate(own):
            y = xp.ascontiguousarray(self.y[:, b * block : (b + 1) * block])
            squares[:] = batched.squared_norms(y)
        return comm.allgather(own, [-(-width // block) for width in self.widths])

    def to_rows(self, owners: Ownership, into: tuple[Array, Array] | None = None) -> ProductRows:
        """The same by rows.

        Args:
            owners: which rank has which rows.
            into: (rows, k) for V and Y, where they are put; new arrays by default.
        """
        if into is None:  # kept by rows, as rows are what is gathered of it
            rows, xp = owners.num_rows(len(self.v)), namespace(self.v)
            shape = (rows, sum(self.widths))
            into = xp.empty(shape, self.v.dtype), xp.empty(shape, self.y.dtype)
        owners.from_columns((self.v, self.y), self.widths, into)
        return ProductRows(*into)


def block_width(num: int, least: int = 1) -> int:
    """Columns of a block of so many, `least` where there are as many; the last may have fewer."""
    return max(1, min(num, least), min(_BLOCK, -(-num // _BLOCKS)))


def column_blocks(num: int, width: int = 0) -> list[slice]:
    """The blocks of so many columns, of so wide ones or as many as `block_width` says."""
    width = width or block_width(num)
    return [slice(start, min(start + width, num)) for start in range(0, num, width)]


def column_share(num: int, comm: Communicator, width: int = 0) -> tuple[slice, list[int]]:
    """This rank's part of so many columns, whole blocks, and how many columns every rank has."""
    width = width or block_width(num)
    blocks = len(column_blocks(num, width))
    parts = [
        slice(min(part.start * width, num), min(part.stop * width, num))
        for part in shares(blocks, comm.size)
    ]
    return parts[comm.rank], [part.stop - part.start for part in parts]


def _sum_at_first(y: Array, group: slice, comm: Communicator) -> Array:
    """The sum of the y (N, k) of a group of ranks on its first, (N, 0) on the others.

    Each adds some of the rows, in the order of the ranks, so that none receives more than N.
    """
    n, k = y.shape
    sizes, nothing = [0] * comm.size, [0] * comm.size
    parts = shares(n, group.stop - group.start)
    sizes[group] = [k * (part.stop - part.start) for part in parts]
    from_each = list(nothing)
    from_each[group] = [sizes[comm.rank]] * len(parts)
    # Flat: blocks of other groups may be narrower.
    got = comm.exchange(y.reshape(-1), sizes, from_each).reshape(len(parts), sizes[comm.rank])
    total = sum(got[1:], start=got[0])
    to_first = list(nothing)
    to_first[group.start] = len(total)
    if comm.rank == group.start:
        return comm.exchange(total, to_first, sizes).reshape(n, k)
    return comm.exchange(total, to_first, nothing).reshape(n, 0)

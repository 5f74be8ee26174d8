"""An operator whose products are formed by all ranks together."""

from __future__ import annotations

from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed import Communicator, shares
from gpu_hodlr.operators.operator import Operator
from gpu_hodlr.operators.wrapped import WrappedOperator


class SharedOperator(WrappedOperator):
    """K, of which every rank has all; vectors are whole on every rank.

    Where K is a sum (of a network, over its samples), each rank multiplies by a part of it, and
    the products are summed. Else each takes a share of the columns, if there are enough.

    Args:
        operator: K, the same on every rank.
        comm: the ranks.

    Raises:
        ArgumentError: another kind of operator on another rank.
    """

    def __init__(self, operator: Operator, comm: Communicator) -> None:
        super().__init__(operator)
        if comm.size > 1:  # parts of different sums do not add up
            comm.same(op=operator.said)
        self._comm = comm
        self._summand = operator.summand(comm.rank, comm.size) if comm.size > 1 else None

    def summand(self, index: int, count: int) -> Operator | None:
        """None: the products are shared out already."""
        return None

    def _matmat(self, v: Array) -> Array:
        with self._comm.phase("operator"):
            if self._summand is not None:
                return self._comm.allreduce(self._summand.reader.matmat(v))
            if v.shape[1] < self._comm.size:
                return self._operator.reader.matmat(v)
            parts = shares(v.shape[1], self._comm.size)
            own = namespace(v).ascontiguousarray(
                self._operator.reader.matmat(v[:, parts[self._comm.rank]]).T
            )
            return self._comm.allgather(own, [part.stop - part.start for part in parts]).T

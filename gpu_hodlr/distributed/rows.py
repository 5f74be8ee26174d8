"""Vectors spread over ranks by rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_hodlr.arrays import as_columns
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed.cuda_aware import switch
from gpu_hodlr.distributed.messages import Communicator
from gpu_hodlr.errors import ShapeError

VECTORS = "GPU_HODLR_CHECK_VECTORS"


class Rows:
    """Which of N rows every rank has; a vector is given by these, or whole on every rank.

    Args:
        comm: the ranks.
        of: for every rank the indices of its rows, in the order it has them; host arrays.
    """

    def __init__(self, comm: Communicator, of: Sequence[Any]) -> None:
        self._comm, self.of = comm, of

    @property
    def mine(self) -> HostIndex:
        """The indices of this rank's rows; a host array."""
        return self.of[self._comm.rank]

    def right_hand_side(
        self,
        x: Any,
        dtype: np.dtype[Any],
        device: str,
        name: str,
        result: Rows | None = None,
    ) -> tuple[Array, Callable[[Array], Any]]:
        """This rank's rows of a right-hand side, and a function that gives a result x's form.

        All ranks must agree on the columns, on whether x is whole, and then on its values, which
        are compared by a checksum: on the CPU, and on a GPU where GPU_HODLR_CHECK_VECTORS=1, as it
        has to be waited for. If x cannot be used on one rank, all are told. It is one message.

        Args:
            x: (N,) or (N, k), the same on every rank, or this rank's rows of it.
            dtype: see `arrays.as_columns`, as the rest.
            device: of the matrix.
            name: what error messages call x.
            result: which rows of the result every rank has; these by default.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.
        """
        n, here = sum(map(len, self.of)), len(self.mine)
        error: Exception | None = None
        checksum = 0
        whole = tuple(getattr(x, "shape", ()))[:1] != (here,)
        try:
            columns, restore = as_columns(x, n if whole else here, dtype, device, name)
            form = 2 * columns.shape[1] + whole
            if whole and _compares_values(device):
                checksum = zlib.crc32(np.ascontiguousarray(to_host(columns)).data)
        except ShapeError as e:
            error, form = ShapeError(f"{e}, or {here} rows, this rank's own"), -1
        except Exception as e:
            error, form = e, -1
        if not self._comm.alike((form << 32) + checksum) or error is not None:
            with self._comm.agreed():
                if error is not None:
                    raise error
            said = f"{form // 2} columns of {'all rows' if whole else 'the rows of each rank'}"
            self._comm.same(**{name: f"{said}, checksum {checksum:08x}" if checksum else said})
        if not whole:
            return columns, restore
        return self.take(columns), lambda y: restore((result or self).whole(y))

    def take(self, x: Array) -> Array:
        """This rank's rows of x (N, ...)."""
        return x[namespace(x).asarray(self.mine)]

    def whole(self, x: Array) -> Array:
        """(N, ...) on every rank from every rank's rows of it."""
        xp = namespace(x)
        together = self._comm.allgather(x, [len(rows) for rows in self.of])
        whole = xp.empty_like(together)
        whole[xp.asarray(np.concatenate(self.of))] = together
        return whole

    def to_columns(self, x: Array, part: slice) -> Array:
        """All rows of a slice of the columns, (N, columns), from the ranks' rows of x.

        Each rank asks for the slice it wants.
        """
        xp = namespace(x)
        parts = [x[:, wanted].reshape(-1) for wanted in self._comm.share(part)]
        n, k = sum(map(len, self.of)), part.stop - part.start
        sent, received = [part.size for part in parts], [len(rows) * k for rows in self.of]
        got = self._comm.exchange(xp.concatenate(parts), sent, received).reshape(n, k)
        columns = xp.empty_like(got)
        columns[xp.asarray(np.concatenate(self.of))] = got
        return columns

    def from_columns(
        self, arrays: Sequence[Array], columns: Sequence[int], into: Sequence[Array]
    ) -> None:
        """This rank's rows, all columns, of arrays of which every rank has some columns.

        Args:
            arrays: each all rows of this rank's columns, (N, columns[rank]); one message for all.
            columns: of every rank.
            into: for each array (rows, all columns), which is written.
        """
        xp, like, here = namespace(arrays[0]), arrays[0], len(self.mine)
        n, k = like.shape
        packed, first = xp.empty(len(arrays) * n * k, like.dtype), 0
        for rows in self.of:  # filled, not stacked: this is most of the memory here
            for x in arrays:
                part = packed[first : first + len(rows) * k].reshape(len(rows), k)
                part[:] = x[xp.asarray(rows)]
                first += part.size
        sent, received = (
            [len(arrays) * count for count in counts]
            for counts in ([len(rows) * k for rows in self.of], [here * c for c in columns])
        )
        got = self._comm.exchange(packed, sent, received)
        del packed
        first = column = 0
        for c in columns:
            for to in into:
                to[:, column : column + c] = got[first : first + here * c].reshape(here, c)
                first += here * c
            column += c


def _compares_values(device: str) -> bool:
    """Whether ranks that give whole vectors compare the values."""
    wanted = switch(VECTORS)
    return device == "cpu" if wanted is None else wanted

"""A network's matrix in its eigenbasis, less a low-rank part: what is to be kept of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_hodlr.bases import samples_for
from gpu_hodlr.devices import Array, check_memory, namespace, to_host
from gpu_hodlr.distributed import Ownership
from gpu_hodlr.eigenbasis import Energies, Rotated, energies
from gpu_hodlr.once import once
from gpu_hodlr.operators import Operator, SketchColumns
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes.nystrom import nystrom

_SHORT = 1 << 16  # columns that 16 bits are enough for
_SPARSE = 32  # numbers a row: with fewer no low-rank part is tried
_SHARES = (1.0, 0.75, 0.5, 0.25)  # tried, of the rank that would do alone
_LARGER = 1.25  # times the rank that was formed: beyond it a larger one is
_SKETCH = 7  # numbers a row and column, at the peak of Nystrom's approximation (measured)


@dataclass(frozen=True)
class Rest:
    """What is left of K' = Q^T K Q where a low-rank part is taken off.

    Attributes:
        matrix: entries of the rest, and the low-rank part.
        energies: how the entries off the diagonal are distributed, from sampled rows.
    """

    matrix: Rotated
    energies: Energies

    def numbers(self, tolerance: float) -> float:
        """How many the entries off the diagonal and the low-rank part would take."""
        index = 0.25 if self.matrix.size <= _SHORT else 0.5
        rank = 0 if self.matrix.P is None else self.matrix.P.shape[1]
        above = self.energies.above(self.energies.threshold(tolerance))
        return (1 + index) * above + rank * self.matrix.size


class RotatedRanks:
    """K' without a low-rank part, and with those of a few ranks.

    The low-rank part is Nystrom's, which leaves K' positive semi-definite; its largest rank is the
    one beyond which it would take more than the entries do.

    Args:
        operator: K, which has an eigenbasis.
        max_rank: cap of the rank.
        seed: of sampled rows and of the sketch.
        owners: the ranks of MPI; all call.
    """

    def __init__(self, operator: Operator, max_rank: int, seed: int, owners: Ownership) -> None:
        self._operator, self._max_rank = operator, max_rank
        self._seed, self._owners = seed, owners
        self._energies: dict[int, Energies] = {}
        self._formed: tuple[int, Array, Array] | None = None

    @once
    def plain(self) -> Rest:
        """K' itself."""
        with phase("eigenbasis"):
            matrix = self._operator.eigenbasis()
        assert matrix is not None
        return Rest(matrix, self._sampled(matrix, 0))

    def least(self, tolerance: float) -> Rest:
        """Of the ranks tried for the low-rank part, what stores least."""
        best = self.plain
        matrix, least = best.matrix, best.numbers(tolerance)
        if matrix.apart or least < _SPARSE * matrix.size:
            return best  # a low-rank part would fill the blocks of outputs that are not coupled
        P, C = self._leading(min(self._max_rank, int(least) // matrix.size))
        alone = _rank(C, tolerance)
        for rank in dict.fromkeys(int(share * alone) for share in _SHARES):
            if rank == 0 or rank * matrix.size > least:
                continue
            rest = matrix.without(namespace(P).ascontiguousarray(P[:, :rank]), C[:rank])
            tried = Rest(rest, self._sampled(rest, rank))
            if tried.numbers(tolerance) < least:
                best, least = tried, tried.numbers(tolerance)
        return best

    def _sampled(self, matrix: Rotated, rank: int) -> Energies:
        if rank not in self._energies:
            with phase("sampling"):
                self._energies[rank] = energies(matrix, self._seed, self._owners.comm)
        return self._energies[rank]

    def _leading(self, rank: int) -> tuple[Array, Array]:
        """P (M, r), C (r,) of Nystrom's approximation, the largest eigenvalues first.

        What was made for another tolerance does where it is nearly of this rank.
        """
        if self._formed is None or rank > _LARGER * self._formed[0]:
            with phase("low rank"):
                self._formed = (rank, *self._nystrom(rank))
            self._energies = {0: self._energies[0]}
        return self._formed[1:]

    def _nystrom(self, rank: int) -> tuple[Array, Array]:
        operator, owners = self._operator, self._owners
        n = operator.shape[0]
        columns = min(samples_for(rank), n // 2)
        check_memory(
            _SKETCH * columns * n * operator.dtype.itemsize,
            "the low-rank part in the eigenbasis", "max_rank", operator.device,
        )  # fmt: skip
        sketch = SketchColumns(operator, columns, self._seed, owners.comm).to_rows(owners)
        # Of whole vectors, as P will be, and so of the same bits on any number of ranks.
        found = nystrom(owners.whole(sketch.omega), owners.whole(sketch.y), np.inf)
        form = found.form(rank)
        U, C = owners.comm.bcast((form.U, form.eigenvalues), 0)
        return self.plain.matrix.basis.rotate(U), C


def _rank(eigenvalues: Array, tolerance: float) -> int:
    """The least number of leading eigenvalues that leaves no more than the tolerance, or all."""
    squares = to_host(eigenvalues).astype(np.float64) ** 2
    tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return int(np.nonzero(tails <= tolerance**2)[0][0])

"""What one level adds to the symmetric factor of a HODLR matrix."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_hodlr import batched
from gpu_hodlr.batched.pair_solves import Pairs
from gpu_hodlr.batched.tall import inner
from gpu_hodlr.devices import Array
from gpu_hodlr.distributed import Siblings


@dataclass(frozen=True)
class PairStep(Pairs):
    """See `Pairs`.

    Attributes:
        siblings: of the level, pairs of this rank.
    """

    siblings: Siblings

    def pieces(self) -> Array:
        """Q in even nodes and P in odd ones, (nodes, rows, r)."""
        return self.siblings.merged(self.Q, self.P)

    def inverse_cores(self) -> Array:
        """(nodes, r, r) of (W W^T)^-1, what stands between Q and Q^T, P and P^T, beside I."""
        return self.siblings.merged(*_inverse_cores(self.Y))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return int(self.Q.nbytes + self.P.nbytes + self.Y.nbytes)


@dataclass(frozen=True)
class SpreadStep:
    """The same where siblings span ranks; one message for the sums.

    Attributes:
        siblings: of the level, all pairs.
        QP: (pieces, rows, r) this rank's rows of Q in even nodes, of P in odd ones.
        Y: (pairs, r, r) of all pairs.
        chunk: see `inner`.
    """

    siblings: Siblings
    QP: Array
    Y: Array
    chunk: int

    def by_pieces(self, x: Array) -> Array:
        """See `pair_solves.Level`."""
        return self.siblings.by_pieces(x)

    def sums(self, x: Array) -> tuple[Array, Array]:
        """See `PairStep`, for x (pieces, rows, k)."""
        return self.siblings.sum_all(inner(self.QP, x, self.chunk))

    def even_sums(self, x: Array) -> Array:
        """See `PairStep`."""
        return self.sums(x)[0]

    def add(self, x: Array, even: Array, odd: Array | None = None) -> None:
        """See `PairStep`."""
        batched.matmul(self.QP, self.siblings.to_all(even, odd), add_to=x)

    def pieces(self) -> Array:
        """See `PairStep`."""
        return self.QP

    def inverse_cores(self) -> Array:
        """See `PairStep`, (pieces, r, r)."""
        return self.siblings.to_all(*_inverse_cores(self.Y))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return int(self.QP.nbytes + self.Y.nbytes)


def _inverse_cores(Y: Array) -> tuple[Array, Array]:
    """Y^-T Y^-1 - I and Y^-T Y^-1 for even and odd nodes, (pairs, r, r)."""
    unit = batched.identities(len(Y), Y.shape[1], Y)
    inverse = batched.solve_triangular(Y, unit)
    odd = batched.matmul(inverse, inverse, transpose_a=True)
    return odd - unit, odd


HODLRStep = PairStep | SpreadStep

"""The leaves' blocks with the rows to be eliminated uncoupled: what no damping changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from gpu_hodlr import batched
from gpu_hodlr.batched.quarters import quartered
from gpu_hodlr.devices import Array
from gpu_hodlr.factor.solver import add_to_diagonal
from gpu_hodlr.structures import Telescope

Parts = tuple[Array, Array, Array]


def uncoupled(D: Array, T: Array, added: Array | None, order: Array | None = None) -> Parts:
    """Blocks of V D V^T, V = [[I, 0], [-T, I]], for blocks with the skeleton first.

    D is left as it is, and its largest part is copied once. `added` (nodes, rows) goes to the
    diagonal of D; `order` (nodes, rows) puts the skeleton first, if D does not have it so.

    Returns:
        The skeleton's (nodes, r, r), what couples the others to it (nodes, rows - r, r), and the
        others' (nodes, rows - r, rows - r).
    """
    skeleton, coupling, across, own = quartered(D, T.shape[2], order, added)
    batched.matmul(T, skeleton, subtract_from=coupling)  # [-T I] D
    batched.matmul(T, across, subtract_from=own)
    batched.matmul(coupling, T, transpose_b=True, subtract_from=own)
    return skeleton, coupling, own


@dataclass(frozen=True)
class UncoupledLeaves:
    """`uncoupled` of the leaves without damping, and what a damping adds: V V^T times it.

    V V^T = [[I, -T^T], [-T, I + T T^T]]. Padding has a one on the diagonal and nothing in T.

    Attributes:
        parts: see `uncoupled`.
        T: of the leaves.
        square: (leaves, rows - r, rows - r) T T^T.
    """

    parts: Parts
    T: Array
    square: Array

    @classmethod
    def of(cls, telescope: Telescope) -> Self:
        """Of a telescope that has levels."""
        T = telescope.levels[0].T
        return cls(uncoupled(telescope.D, T, None), T, batched.matmul(T, T, transpose_b=True))

    @classmethod
    def memory(cls, telescope: Telescope) -> int:
        """Bytes of `of`."""
        leaves, rest, r = telescope.levels[0].T.shape
        return int(leaves * (r * r + rest * (r + 2 * rest)) * telescope.D.itemsize)

    def damped(self, damping: float, added: Array) -> Parts:
        """`uncoupled` with a damping.

        Args:
            damping: the number.
            added: (leaves, rows) the same, and one for padding.
        """
        number, r = self.T.dtype.type(damping), self.T.shape[2]
        skeleton, coupling, own = self.parts[0].copy(), -number * self.T, number * self.square
        coupling += self.parts[1]  # in place: the memory is most of the work
        own += self.parts[2]
        add_to_diagonal(skeleton, added[:, :r])
        add_to_diagonal(own, added[:, r:])
        return skeleton, coupling, own

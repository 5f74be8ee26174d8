"""The HODLR form of a symmetric matrix: low rank in every pair of siblings, bases not nested.

    K = blockdiag(D) + sum over levels and siblings (a, b) of L_a R_b^T + R_b L_a^T

(hierarchically off-diagonal low rank: Ambikasaran, Darve, J. Sci. Comput. 57 (2013)). All bases
are the columns of one array, so that a product takes two batched matrix products whatever the
number of levels (one array for all levels: Chen, Martinsson, SC22).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Self

from gpu_hodlr import batched
from gpu_hodlr.batched import nested
from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.structures.base import Map, Structure


def columns_of(widths: tuple[int, ...]) -> list[slice]:
    """The columns of each level in the array of all bases."""
    return [slice(*ends) for ends in pairwise(accumulate(widths, initial=0))]


def add_low_rank(U: Array, widths: tuple[int, ...], x: Array, y: Array) -> Array:
    """Add the product of the low-rank blocks of the levels 1 .. len(widths) with x to y.

    Per leaf all levels' U^T x at once; a level's W is the sum over the leaves of a node, and what
    a node gets is its sibling's.

    Args:
        U: (leaves * m, R) the bases.
        widths: columns of each level, top level first.
        x: (leaves, m, k).
        y: (leaves, m, k), overwritten and returned.
    """
    leaves, m, k = x.shape
    R = U.shape[1]
    if not R:
        return y
    blocks = U.reshape(leaves, m, R)
    up = batched.matmul(blocks, x, transpose_a=True)
    down = namespace(x).empty_like(up)
    for i, columns in enumerate(columns_of(widths)):
        pairs, each = 1 << i, leaves >> (i + 1)
        W = up.reshape(pairs, 2, each, R, k)[:, :, :, columns].sum(axis=2)
        Z = down.reshape(pairs, 2, each, R, k)[:, :, :, columns]
        Z[:, 0], Z[:, 1] = W[:, 1][:, None], W[:, 0][:, None]
    return batched.matmul(blocks, down, add_to=y)


@dataclass(frozen=True)
class HODLR(Structure):
    """A symmetric matrix in HODLR form.

    Attributes:
        leaves: (2^depth, m) the user's indices of each leaf, padding (-1) last.
        D: (2^depth, m, m) the diagonal blocks, zero on the padding.
        U: (2^depth m, R) rows in tree order, zero on the padding: for siblings a (the even one)
            and b of a level, L_a in the rows of a and R_b in those of b, K_ab = L_a R_b^T. The
            columns of L_a are well conditioned, or zero.
        widths: columns of each level in U, top level first.
        block_ranks: numerical ranks of the siblings' blocks, one tuple a level, top level first.
    """

    leaves: Array
    D: Array
    U: Array
    widths: tuple[int, ...]
    block_ranks: tuple[tuple[int, ...], ...]

    @cached_property
    def n(self) -> int:
        """N."""
        return int((self.leaves >= 0).sum())

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """See `Structure`; siblings share a block."""
        return tuple(tuple(r for r in level for _ in "ab") for level in self.block_ranks[::-1])

    def matmat(self, v: Array) -> Array:
        """K v for v (N, k)."""
        x, y = nested.leaf_product(self.D, v, self.leaves)
        return batched.scatter_rows(add_low_rank(self.U, self.widths, x, y), self.leaves, self.n)

    def diagonal(self) -> Array:
        """The diagonal, (N,), that of the leaf blocks."""
        blocks = self.D.diagonal(axis1=1, axis2=2)[:, :, None]
        diagonal: Array = batched.scatter_rows(blocks, self.leaves, self.n)[:, 0]
        return diagonal

    def arrays(self) -> list[Array]:
        """See `Structure`."""
        return [self.D, self.U]

    def index_arrays(self) -> list[Any]:
        """See `Structure`."""
        return [self.leaves]

    def scaled(self, factor: float) -> Self:
        """See `Structure`; of every block one side is scaled, R_b."""
        if factor == 1.0:
            return self
        number = self.D.dtype.type(factor)
        U = self.U.copy()
        for i, columns in enumerate(columns_of(self.widths)):
            rows = len(U) >> (i + 1)
            U.reshape(1 << i, 2, rows, U.shape[1])[:, 1, :, columns] *= number
        return replace(self, D=self.D * number, U=U)

    def _mapped(self, floats: Map, indices: Map) -> Self:
        return replace(self, leaves=indices(self.leaves), D=floats(self.D), U=floats(self.U))

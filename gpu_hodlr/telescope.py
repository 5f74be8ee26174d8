"""The telescoping (nested, HSS) form of a symmetric matrix as plain stacks of arrays.

    K_l = blockdiag(D_l) + blockdiag(U_l) K_(l-1) blockdiag(U_l)^T,   K_depth = K,   K_0 = D_0,

D_l = [[0, B], [B^T, 0]] above the leaves, U_l = P_l [I; T_l] an interpolative basis whose identity
rows are the node's skeleton (Martinsson, SIAM J. Matrix Anal. Appl. 32 (2011)).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import nested
from gpu_hodlr.devices import Array, move, to_host


@dataclass(frozen=True)
class Level:
    """The nodes of one level, all of the same padded rank r.

    Attributes:
        order: (nodes, rows) the rows of a node, its r skeleton rows first, padding last; None on
            the leaf level, where it is folded into the leaves themselves.
        T: (nodes, rows - r, r) interpolates the other rows from the skeleton.
        B: (nodes / 2, r, r) K(skeleton, skeleton) of the left and right child of a parent.
        ranks: numerical rank of every node, at most r.
    """

    order: Array | None
    T: Array
    B: Array
    ranks: tuple[int, ...]

    @property
    def rank(self) -> int:
        """r, the columns of every basis of the level."""
        return int(self.T.shape[2])


@dataclass(frozen=True)
class Telescope:
    """A symmetric matrix in telescoping form.

    Attributes:
        leaves: (2^depth, m) the user's indices of each leaf, padding (-1) last; D's library.
        D: (2^depth, m, m) the diagonal blocks, zero on the padding.
        levels: leaf level first; empty when the whole matrix is one leaf.
    """

    leaves: Array
    D: Array
    levels: tuple[Level, ...]

    @cached_property
    def n(self) -> int:
        """N."""
        return int((self.leaves >= 0).sum())

    def real_rows(self) -> list[Any]:
        """For every level, leaf level first, and at last the root: rows that are not padding.

        A level's entry has shape (nodes,): leaf sizes first, then sums over the two children of
        min(real rows, rank).
        """
        counts = [np.count_nonzero(to_host(self.leaves) >= 0, axis=1)]
        for level in self.levels:
            counts.append(np.minimum(counts[-1], level.rank).reshape(-1, 2).sum(axis=1))
        return counts

    def matmat(self, v: Array) -> Array:
        """K v for v (N, k): up W <- U^T W, across with B, down Y <- U Y + D W."""
        x, y = nested.leaf_product(self.D, v, self.leaves)
        up = []
        for level in self.levels:
            x = nested.restrict(level.T, level.order, x)
            up.append(x)
            x = x.reshape(len(x) // 2, 2 * level.rank, x.shape[2])
        down = None
        for level, w in zip(self.levels[::-1], up[::-1], strict=True):
            z = nested.couple(level.B, w, add_to=None if down is None else down.reshape(w.shape))
            target = y if level.order is None else None
            down = nested.prolong(level.T, level.order, z, add_to=target)
        return batched.scatter_rows(y, self.leaves, self.n)

    def diagonal(self) -> Array:
        """The diagonal, (N,), that of the leaf blocks."""
        blocks = self.D.diagonal(axis1=1, axis2=2)[:, :, None]
        diagonal: Array = batched.scatter_rows(blocks, self.leaves, self.n)[:, 0]
        return diagonal

    def arrays(self) -> list[Array]:
        """Every stored floating array."""
        return [self.D, *(a for level in self.levels for a in (level.T, level.B))]

    def scaled(self, factor: float) -> Telescope:
        """The form of factor * K."""
        if factor == 1.0:
            return self
        number = self.D.dtype.type(factor)
        levels = tuple(Level(a.order, a.T, a.B * number, a.ranks) for a in self.levels)
        return Telescope(self.leaves, self.D * number, levels)

    def to(self, device: str) -> Telescope:
        """The same form on another device."""
        levels = tuple(
            Level(None if a.order is None else move(a.order, device),
                  move(a.T, device), move(a.B, device), a.ranks)
            for a in self.levels
        )  # fmt: skip
        return Telescope(move(self.leaves, device), move(self.D, device), levels)

    def astype(self, dtype: Any) -> Telescope:
        """The same form in another precision."""
        if self.D.dtype == dtype:
            return self
        levels = tuple(
            Level(a.order, a.T.astype(dtype), a.B.astype(dtype), a.ranks) for a in self.levels
        )
        return Telescope(self.leaves, self.D.astype(dtype), levels)

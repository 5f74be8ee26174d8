"""The telescoping (nested, HSS) form of a symmetric matrix as plain stacks of arrays.

    K_l = blockdiag(D_l) + blockdiag(U_l) K_(l-1) blockdiag(U_l)^T,   K_depth = K,   K_0 = D_0,

D_l = [[0, B], [B^T, 0]] above the leaves, U_l = P_l [I; T_l] an interpolative basis whose identity
rows are the node's skeleton (Martinsson, SIAM J. Matrix Anal. Appl. 32 (2011)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import Array, namespace


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

    def basis(self, real: Array) -> Array:
        """U (nodes, rows, r) in full; skeleton rows that are padding are zero rows.

        Args:
            real: (nodes,) rows of each node that are not padding, at most `rows`.
        """
        xp = namespace(self.T)
        nodes, _, r = self.T.shape
        identity = xp.zeros((nodes, r, r), self.T.dtype)
        slots = np.arange(r)
        identity[:, slots, slots] = slots < real[:, None]
        full = xp.concatenate([identity, self.T], axis=1)
        return full if self.order is None else batched.unpermute_rows(full, self.order)


@dataclass(frozen=True)
class Telescope:
    """A symmetric matrix in telescoping form.

    Attributes:
        leaves: (2^depth, m) the user's indices of each leaf, padding (-1) last.
        D: (2^depth, m, m) the diagonal blocks, zero on the padding.
        levels: leaf level first; empty when the whole matrix is one leaf.
    """

    leaves: Any
    D: Array
    levels: tuple[Level, ...]

    @property
    def n(self) -> int:
        """N."""
        return int(np.count_nonzero(self.leaves >= 0))

    def real_rows(self) -> list[Any]:
        """For every level, leaf level first, and at last the root: rows that are not padding.

        A level's entry has shape (nodes,): leaf sizes first, then sums over the two children of
        min(real rows, rank).
        """
        counts = [np.count_nonzero(self.leaves >= 0, axis=1)]
        for level in self.levels:
            counts.append(np.minimum(counts[-1], level.rank).reshape(-1, 2).sum(axis=1))
        return counts

    def matmat(self, v: Array) -> Array:
        """K v for v (N, k): up W <- U^T W, across with B, down Y <- U Y + D W."""
        x = batched.gather_rows(v, self.leaves)
        y = batched.matmul(self.D, x)
        up = []
        for level in self.levels:
            if level.order is not None:
                x = batched.permute_rows(x, level.order)
            r = level.rank
            x = batched.matmul(level.T, x[:, r:], transpose_a=True, add_to=x[:, :r].copy())
            up.append(x)
            x = x.reshape(len(x) // 2, 2 * r, x.shape[2])
        down = None
        for level, c in zip(self.levels[::-1], up[::-1], strict=True):
            z = namespace(c).zeros_like(c) if down is None else down.reshape(c.shape)
            batched.matmul(level.B, c[1::2], add_to=z[0::2])
            batched.matmul(level.B, c[0::2], transpose_a=True, add_to=z[1::2])
            if level.order is None:
                y[:, : level.rank] += z
                batched.matmul(level.T, z, add_to=y[:, level.rank :])
            else:
                rows = namespace(c).concatenate([z, batched.matmul(level.T, z)], axis=1)
                down = batched.unpermute_rows(rows, level.order)
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

    def astype(self, dtype: Any) -> Telescope:
        """The same form in another precision."""
        if self.D.dtype == dtype:
            return self
        levels = tuple(
            Level(a.order, a.T.astype(dtype), a.B.astype(dtype), a.ranks) for a in self.levels
        )
        return Telescope(self.leaves, self.D.astype(dtype), levels)

"""Pairs of siblings whose rows may lie on several ranks."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.batched.threads import one_blas_thread
from gpu_hodlr.devices import Array, HostIndex, namespace
from gpu_hodlr.distributed.ownership import ALONE, Ownership


class Siblings:
    """The siblings of a level, their rows in pieces that lie on one rank each.

    Below the cut a piece is a node, and a rank works on pairs of its own. From the cut up a node
    may span ranks: a piece is a node of the cut's level, and every rank works on all pairs.

    Args:
        owners: which rank has what.
        level: of the siblings (root = 0), at least 1.

    Attributes:
        level: of the siblings.
        spread: whether nodes may span ranks.
        dealt: which rank has what of the pairs, by the nodes above them: where they are spread,
            every rank has all.
        pairs: those that this rank works on, a slice of all.
    """

    def __init__(self, owners: Ownership, level: int) -> None:
        self._owners, self.level = owners, level
        self.spread = level <= owners.cut
        self._piece_level = max(level, owners.cut)
        self.dealt = ALONE if self.spread else owners
        self.pairs = self.dealt.mine(level - 1)
        self._pieces = owners.mine(self._piece_level)
        self._count = self._pieces.stop - self._pieces.start
        if self.spread:
            self._node = np.arange(self._pieces.start, self._pieces.stop) >> self._shift
            self._even, self._odd = (np.nonzero(self._node % 2 == side)[0] for side in (0, 1))

    @property
    def _shift(self) -> int:
        return self._piece_level - self.level

    # --- rows ----------------------------------------------------------------------------------

    def index(self, nodes: HostIndex) -> HostIndex:
        """The indices of the rows of this rank's pieces, (pieces, rows), of leaves (2^depth, m)."""
        return nodes.reshape(1 << self._piece_level, -1)[self._pieces]

    def by_pieces(self, x: Array) -> Array:
        """X (leaves, m, k) of this rank's leaves by pieces, (pieces, rows, k), a view."""
        rows = x.shape[0] * x.shape[1] // self._count
        return x.reshape(self._count, rows, x.shape[2])

    def even(self, x: Array) -> Array:
        """The pieces of even nodes, of all pieces; a view where none are spread."""
        return x[namespace(x).asarray(self._even)] if self.spread else x[0::2]

    def odd(self, x: Array) -> Array:
        """The pieces of odd nodes, of all pieces; a view where none are spread."""
        return x[namespace(x).asarray(self._odd)] if self.spread else x[1::2]

    def merged(self, even: Array, odd: Array) -> Array:
        """All pieces from those of even and odd nodes."""
        xp = namespace(even)
        if not self.spread:
            return xp.stack([even, odd], axis=1).reshape(2 * len(even), *even.shape[1:])
        both = xp.empty((self._count, *even.shape[1:]), even.dtype)
        both[xp.asarray(self._even)], both[xp.asarray(self._odd)] = even, odd
        return both

    def whole_even(self, x: Array) -> Array:
        """The even nodes (pairs, rows, k) from all ranks' pieces of them."""
        if not self.spread:
            return x
        counts = []
        for rank in range(self._owners.comm.size):
            mine = self._owners.mine(self._piece_level, rank)
            nodes = np.arange(mine.start, mine.stop) >> self._shift
            counts.append(int(np.count_nonzero(nodes % 2 == 0)))
        whole = self._owners.comm.allgather(namespace(x).ascontiguousarray(x), counts)
        return whole.reshape(1 << (self.level - 1), x.shape[1] << self._shift, *x.shape[2:])

    def own_even(self, x: Array) -> Array:
        """The reverse of `whole_even`."""
        if not self.spread:
            return x
        pieces = x.reshape(len(x), 1 << self._shift, x.shape[1] >> self._shift, x.shape[2])
        first = self._pieces.start + self._even
        place = namespace(x).asarray(first & ((1 << self._shift) - 1))
        return pieces[namespace(x).asarray(self._node[self._even] // 2), place]

    def whole(self, x: Array) -> tuple[Array, Array]:
        """The even and the odd nodes (pairs, rows, k) from all ranks' pieces."""
        if self.spread:
            x = self._owners.gather(x, self._piece_level)
        nodes = len(x) >> self._shift
        x = x.reshape(nodes, x.shape[1] << self._shift, x.shape[2])
        return x[0::2], x[1::2]

    def own(self, even: Array, odd: Array) -> Array:
        """The reverse of `whole`."""
        xp = namespace(even)
        pairs, rows, k = even.shape
        x = xp.stack([even, odd], axis=1)
        return x.reshape(2 * pairs << self._shift, rows >> self._shift, k)[
            self._pieces if self.spread else slice(None)
        ]

    # --- one block a pair ----------------------------------------------------------------------

    def to_even(self, z: Array) -> Array:
        """What is of a pair, for every piece of its even node."""
        return z[namespace(z).asarray(self._node[self._even] // 2)] if self.spread else z

    def to_odd(self, z: Array) -> Array:
        """What is of a pair, for every piece of its odd node."""
        return z[namespace(z).asarray(self._node[self._odd] // 2)] if self.spread else z

    def to_all(self, even: Array, odd: Array | None) -> Array:
        """What is of a node of spread siblings, for all its pieces; None is zero."""
        z = namespace(even).zeros((2 * len(even), *even.shape[1:]), even.dtype)
        z[0::2] = even
        if odd is not None:
            z[1::2] = odd
        return z[namespace(even).asarray(self._node)]

    def sum_even(self, x: Array) -> Array:
        """Sums over all pieces of each pair's even node, of what there is for a piece."""
        return self._sum(x, self._node[self._even] // 2, 1) if self.spread else x

    def sum_odd(self, x: Array) -> Array:
        """Sums over all pieces of each pair's odd node."""
        return self._sum(x, self._node[self._odd] // 2, 1) if self.spread else x

    def sum_all(self, x: Array) -> tuple[Array, Array]:
        """Sums over all pieces of each pair's even and odd nodes, spread ones."""
        total = self._sum(x, self._node, 2)
        return total[0::2], total[1::2]

    def _sum(self, x: Array, target: HostIndex, each: int) -> Array:
        xp = namespace(x)
        targets = each << (self.level - 1)
        chosen = xp.asarray((np.arange(targets)[:, None] == target).astype(x.dtype))
        size = int(np.prod(x.shape[1:]))
        with one_blas_thread():
            mine = chosen @ x.reshape(len(x), size)
        return self._owners.sum(mine).reshape(targets, *x.shape[1:])

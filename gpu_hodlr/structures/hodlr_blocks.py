"""The HODLR form of a symmetric matrix: low rank in every pair of siblings, bases not nested.

    K = blockdiag(D) + sum over levels and siblings (a, b) of L_a R_b^T + R_b L_a^T

(hierarchically off-diagonal low rank: Ambikasaran, Darve, J. Sci. Comput. 57 (2013)). All bases
are the columns of one array, so that a product takes two batched matrix products whatever the
number of levels (one array for all levels: Chen, Martinsson, SC22).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Self

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched import level_products
from gpu_hodlr.batched.branches import branch
from gpu_hodlr.batched.stored import repacked, unpacked
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.structures.stored import Part, Ranks, Stack, check_far, diagonal_blocks
from gpu_hodlr.structures.structure import Map, Structure, add_to_diagonals


def columns_of(widths: tuple[int, ...]) -> list[slice]:
    """The columns of each level in the array of all bases."""
    return [slice(*ends) for ends in pairwise(accumulate(widths, initial=0))]


def add_low_rank(
    U: Array, widths: tuple[int, ...], x: Array, y: Array, owners: Ownership = ALONE
) -> Array:
    """Add the product of the low-rank blocks of the levels 1 .. len(widths) with x to y.

    Args:
        U: (leaves * m, R) the bases; as x and y of this rank's leaves.
        widths: columns of each level, top level first.
        x: (leaves, m, k).
        y: (leaves, m, k), overwritten and returned.
        owners: which rank has what.
    """
    return add_combined(U, siblings_coefficients(U, widths, x, owners), y)


def add_combined(U: Array, coefficients: Array, y: Array) -> Array:
    """Add U's columns times (leaves, R, k) coefficients to y (leaves, m, k), leaf by leaf."""
    leaves, R, _ = coefficients.shape
    return batched.matmul(U.reshape(leaves, -1, R), coefficients, add_to=y) if R else y


def siblings_coefficients(
    U: Array, widths: tuple[int, ...], x: Array, owners: Ownership = ALONE
) -> Array:
    """What U's columns are multiplied by in `add_low_rank`, (leaves, R, k).

    Per leaf all levels' U^T x at once; a level's W is the sum over the leaves of a node, and what
    a node gets is its sibling's. From the cut upwards siblings come from other ranks, in a message
    a level that has the sums for the levels above as well.
    """
    leaves, m, k = x.shape
    R = U.shape[1]
    up = batched.matmul(U.reshape(leaves, m, R), x, transpose_a=True)
    down = namespace(x).empty_like(up)
    columns, cut = columns_of(widths), len(owners.repeated_levels)
    nodes = owners.mine(cut)
    own = nodes.stop - nodes.start
    _swap_siblings(up, down, columns[cut:], own)
    above = columns[:cut]
    if above and above[-1].stop:
        last = above[-1].stop
        sums = up.reshape(own, leaves // own, R, k)[:, :, :last].sum(axis=1)
        got = _from_siblings(sums, above, cut, owners)
        down.reshape(own, leaves // own, R, k)[:, :, :last] = got[:, None]
    return down


def _from_siblings(x: Array, columns: list[slice], level: int, owners: Ownership) -> Array:
    """What nodes get from their siblings, and from those of the nodes above them, (nodes, R, k).

    Args:
        x: (nodes, R, k), the sums of this rank's nodes of a level from the cut up.
        columns: of the levels from the top to this one at most.
        level: of the nodes.
        owners: which rank has what.
    """
    [family] = owners.complete(level, x)
    got = namespace(x).empty_like(family)
    first = x.shape[1]  # of the columns of this level
    if level == len(columns):
        first = columns[-1].start
        got[0::2, first:], got[1::2, first:] = family[1::2, first:], family[0::2, first:]
        columns = columns[:-1]
    if first:
        sums = family[0::2, :first] + family[1::2, :first]
        above = _from_siblings(sums, columns, level - 1, owners)
        got[0::2, :first] = got[1::2, :first] = above
    return owners.own(got, level)


def _swap_siblings(up: Array, down: Array, levels: list[slice], pairs: int) -> None:
    """For levels downwards, the columns of each: what a node has, for all below its sibling.

    Args:
        up: (lowest nodes, R, k), summed over those of a node.
        down: (lowest nodes, R, k), written.
        levels: the columns of each.
        pairs: of siblings on the first of the levels.
    """
    leaves, R, k = up.shape
    for i, columns in enumerate(levels):
        each = leaves // (pairs << i) // 2
        shape = (pairs << i, 2, each, R, k)
        W = up.reshape(shape)[:, :, :, columns]
        if each > 1:
            W = W.sum(axis=2, keepdims=True)
        down.reshape(shape)[:, :, :, columns] = W[:, ::-1]


@dataclass(frozen=True, repr=False)
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
        owners: see `Structure`; leaves, D and U are of this rank's leaves.
    """

    leaves: Array
    D: Array
    U: Array
    widths: tuple[int, ...]
    block_ranks: tuple[tuple[int, ...], ...]
    owners: Ownership = field(default=ALONE, kw_only=True)

    @cached_property
    def num_rows(self) -> int:
        """Rows of vectors on this rank."""
        return int((self.leaves >= 0).sum())

    @property
    def n(self) -> int:
        """N."""
        return self.owners.total(self.num_rows)

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """See `Structure`; siblings share a block."""
        return tuple(tuple(r for r in level for _ in "ab") for level in self.block_ranks[::-1])

    def matmat(self, v: Array) -> Array:
        """K v for v (N, k)."""
        blocks = branch(v)
        x, y = level_products.leaf_product(self.D, v, self.leaves, blocks)
        coefficients = siblings_coefficients(self.U, self.widths, x, self.owners)
        blocks.join()
        y = add_combined(self.U, coefficients, y)
        return batched.scatter_rows(y, self.leaves, self.num_rows, every=True)

    def diagonal(self) -> Array:
        """The diagonal, (N,), that of the leaf blocks."""
        blocks = self.D.diagonal(axis1=1, axis2=2)[:, :, None]
        return batched.scatter_rows(blocks, self.leaves, self.num_rows)[:, 0]

    def arrays(self) -> list[Array]:
        """See `Structure`."""
        return [self.D, self.U]

    @property
    def num_stored(self) -> int:
        """See `Structure`."""
        leaves, m = self.leaves.shape
        return int(self.owners.num_leaves(leaves) * m * (m + self.U.shape[1]))

    def index_arrays(self) -> list[Any]:
        """See `Structure`."""
        return [self.leaves]

    def pack(self) -> dict[str, Any]:
        """See `Stored`."""
        arrays = {"leaves": self.all_leaves, "D": to_host(self.D), "U": to_host(self.U)}
        return arrays | {"widths": np.array(self.widths, int)}

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`."""
        depth = len(leaves).bit_length() - 1
        return {"D": Stack(depth), "U": Stack(depth, leaves.shape[1])}

    @classmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        leaves, D, U, widths = part.own_leaves(), diagonal_blocks(part), part["U"], part["widths"]
        nodes, depth = len(part.leaves), part.depth
        if widths.shape != (depth,) or not np.issubdtype(widths.dtype, np.integer):
            raise ValueError(f"widths of shape {widths.shape} do not fit {nodes} leaves")
        if U.shape != (leaves.size, widths.sum()) or (widths < 0).any():
            raise ValueError(f"the bases have shape {U.shape}")
        check_far({"U": U}, D.dtype)
        if unpacked(U[leaves.ravel() < 0], D.dtype).any():
            raise ValueError("the bases are not zero on the padding")
        if [len(level) for level in ranks] != [nodes >> i for i in range(depth)]:
            raise ValueError("the ranks do not fit the levels")
        blocks = tuple(level[::2] for level in ranks[::-1])
        if any(level[::2] != level[1::2] for level in ranks) or any(
            max(level) > width for level, width in zip(blocks, widths, strict=True)
        ):
            raise ValueError("the ranks do not fit the bases, or each other")
        return cls(leaves, D, U, tuple(int(r) for r in widths), blocks, owners=part.owners)

    def scaled(self, factor: float) -> Self:
        """See `Structure`; of every block one side is scaled, R_b."""
        if factor == 1.0:
            return self
        number = self.D.dtype.type(factor)
        xp = namespace(self.U)
        depth = len(self.widths)
        leaves = self.owners.mine(depth)
        index = np.arange(leaves.start, leaves.stop)
        U = unpacked(self.U, self.dtype).copy()
        blocks = U.reshape(*self.leaves.shape, U.shape[1])
        for level, columns in enumerate(columns_of(self.widths), 1):
            odd = xp.asarray((index >> (depth - level)) % 2 == 1)
            blocks[:, :, columns] *= xp.where(odd, number, number.dtype.type(1))[:, None, None]
        return replace(self, D=self.D * number, U=repacked(U, self.U.dtype, factor))

    def plus_diagonal(self, d: Array) -> Self:
        """See `Structure`: it enters the leaves."""
        return replace(self, D=add_to_diagonals(self.D, self.leaves, d))

    def _mapped(self, floats: Map, indices: Map, far: Map | None = None) -> Self:
        U = (far or floats)(self.U)
        return replace(self, leaves=indices(self.leaves), D=floats(self.D), U=U)

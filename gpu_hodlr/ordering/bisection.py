"""Recursive bisection, a level at a time: every node is split at the median of a key.

The ranks are dealt the nodes of one level, the cut, and split what is below their own alone. Above,
a rank follows the nodes that hold its own: numbers of their rows are computed by blocks of rows,
each by one rank, and gathered; the sorting is repeated. The blocks are the same for every number
of ranks, 1 included, and with them every bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from gpu_hodlr.batched import splits
from gpu_hodlr.devices import Array, HostIndex, namespace
from gpu_hodlr.distributed import ALONE, BisectionLayout, Communicator
from gpu_hodlr.tree import balanced_offsets

_BLOCK_ROWS = 1024  # of a block at least: larger ones are fewer calls, and serve fewer ranks


@dataclass(frozen=True)
class Level:
    """The nodes of a level that a rank splits, as blocks of rows.

    Attributes:
        index: (blocks, m) indices, -1 for padding; a node is `each` consecutive blocks.
        each: blocks a node.
        nodes: which nodes of the level they are.
        offsets: (nodes of the whole level + 1,) where each starts in tree order; a host array.
        permutation: (N,) in tree order; other nodes' parts of it may be stale.
        shared: the ranks that compute together; None below the cut.
    """

    index: Array
    each: int
    nodes: slice
    offsets: HostIndex
    permutation: Array
    shared: BisectionLayout | None

    def of_blocks(self, function: Callable[..., Array], *of_nodes: Array) -> Array:
        """What a function of rows gives for all blocks.

        Args:
            function: maps (blocks, m) indices and, for each of `of_nodes`, what the blocks' nodes
                have of it (blocks, ...), to (blocks, ...); padding may give anything.
            of_nodes: (nodes, ...) each.
        """
        xp = namespace(self.index)
        if self.each > 1:
            of_nodes = tuple(xp.repeat(x, self.each, axis=0) for x in of_nodes)
        arguments = [self.index, *of_nodes]
        if self.shared is None:
            return function(*arguments)
        first, nodes = self.nodes.start * self.each, len(self.offsets) - 1
        edges = np.arange(nodes * self.each + 1)  # every block is one thing
        own = self.shared.own(edges)
        values = function(*(x[own.start - first : own.stop - first] for x in arguments))
        every = self.shared.gather(values, edges)
        return every[first : first + len(self.index)]

    def of_nodes(self, of_blocks: Array) -> Array:
        """(nodes, each * m, ...) from (blocks, m, ...)."""
        rows = self.each * of_blocks.shape[1]
        return of_blocks.reshape(-1, rows, *of_blocks.shape[2:])

    def farthest(self, distance: Array) -> Array:
        """(nodes, 1) the members of largest distance (blocks, m), of equal ones the first."""
        return splits.farthest(self.of_nodes(self.index), self.of_nodes(distance))

    def random_members(self, count: int, rng: np.random.Generator) -> Array:
        """(nodes, count) random members; an empty node gets any index.

        Numbers are drawn for the whole level, so that all ranks see the same.
        """
        sizes = np.diff(self.offsets)[:, None]
        draw = (rng.random((len(sizes), count)) * sizes).astype(np.int64)
        place = np.minimum(self.offsets[:-1, None] + draw, self.offsets[-1] - 1)[self.nodes]
        return self.permutation[namespace(self.permutation).asarray(place)]


def bisect(
    n: int,
    parts: int,
    keys: Callable[[Level], Array],
    xp: ModuleType,
    comm: Communicator = ALONE.comm,
) -> Array:
    """The permutation whose balanced parts are the leaves of the bisection, an array of `xp`.

    On a GPU the host reads nothing.

    Args:
        n: N.
        parts: leaves, a power of two.
        keys: gives sorting keys (blocks, m) of the indices of a level.
        xp: the library that keys works with.
        comm: the ranks; they share the work and get the same permutation.
    """
    depth = parts.bit_length() - 1
    fine = min(depth, max(1, n // _BLOCK_ROWS).bit_length() - 1)  # nodes above are several blocks
    layout = BisectionLayout(comm, fine)
    offsets = balanced_offsets(n, parts)
    permutation, edges = xp.arange(n), xp.asarray(offsets)

    def split(level: int) -> None:
        nodes, each = layout.nodes(level), 1 << max(0, fine - level)
        step = (parts >> level) // each  # leaves of a block
        of_blocks = offsets[::step]
        mine = slice(nodes.start * each * step, nodes.stop * each * step + 1)
        index = splits.pad_segments(permutation, edges[mine], int(np.diff(of_blocks).max()), step)
        shared = layout if layout.shared(level) else None
        view = Level(index, each, nodes, of_blocks[::each], permutation, shared)
        key = view.of_nodes(keys(view))
        own = permutation[offsets[mine.start] : offsets[mine.stop - 1]]
        splits.sort_segments(view.of_nodes(index), key, edges[mine], own, each * step)

    for level in range(depth):
        split(level)
    return layout.gather(permutation[layout.own(offsets)], offsets)

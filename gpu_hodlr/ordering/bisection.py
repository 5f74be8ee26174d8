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

from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import ALONE, Communicator, Deal
from gpu_hodlr.tree import balanced_offsets, pad_segments

_BLOCK_ROWS = 1024  # of a block at least: larger ones are fewer calls, and serve fewer ranks


class Share:
    """What the ranks have of a bisection's nodes: those of a `Deal`, several ranks may have one's.

    Args:
        comm: the ranks.
        deepest: the lowest level that the cut may be; where it has fewer nodes than there are
            ranks, several ranks work on the same node, and the first of them sends.

    Attributes:
        comm: the ranks.
        cut: the level whose nodes are dealt out.
    """

    def __init__(self, comm: Communicator, deepest: int) -> None:
        workers = min(comm.size, 1 << deepest)
        self.comm, self._deal = comm, Deal(deepest, workers)
        self.cut = self._deal.cut
        self._worker = [rank * workers // comm.size for rank in range(comm.size)]

    def nodes(self, level: int) -> slice:
        """The nodes of a level that this rank works on: those below its own, or that hold them."""
        return self._deal.mine(level, self._worker[self.comm.rank])

    def gather(self, own: Array, offsets: HostIndex) -> Array:
        """The things of all nodes of the cut from the ranks' own.

        Args:
            own: (things, ...) of this rank's nodes.
            offsets: (2^cut + 1,) of the things of each node; a host array.
        """
        counts = [0] * self.comm.size
        for worker in range(self._worker[-1] + 1):
            nodes = self._deal.mine(self.cut, worker)
            counts[self._worker.index(worker)] = int(offsets[nodes.stop] - offsets[nodes.start])
        return self.comm.allgather(own[: counts[self.comm.rank]], counts)


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
    shared: Share | None

    def of_blocks(self, function: Callable[..., Array], *of_nodes: Array) -> Array:
        """What a function of rows gives for all blocks.

        Args:
            function: maps (blocks, m) indices and, for each of `of_nodes`, what the blocks' nodes
                have of it (blocks, ...), to (blocks, ...); padding may give anything.
            of_nodes: (nodes, ...) each.
        """
        xp = namespace(self.index)
        arguments = [self.index, *(xp.repeat(x, self.each, axis=0) for x in of_nodes)]
        if self.shared is None:
            return function(*arguments)
        share, first = self.shared, self.nodes.start * self.each
        a_node = self.each * (len(self.offsets) - 1) >> share.cut  # blocks
        own = share.nodes(share.cut)
        mine = slice(own.start * a_node - first, own.stop * a_node - first)
        with share.comm.agreed():
            values = function(*(x[mine] for x in arguments))
        every = share.gather(values, np.arange((1 << share.cut) + 1) * a_node)
        return every[first : first + len(self.index)]

    def of_nodes(self, of_blocks: Array) -> Array:
        """(nodes, each * m, ...) from (blocks, m, ...)."""
        rows = self.each * of_blocks.shape[1]
        return of_blocks.reshape(-1, rows, *of_blocks.shape[2:])

    def farthest(self, distance: Array) -> Array:
        """(nodes, 1) the members of largest distance (blocks, m), of equal ones the first."""
        xp = namespace(distance)
        index = self.of_nodes(self.index)
        slot = xp.where(index >= 0, self.of_nodes(distance), -xp.inf).argmax(axis=1)
        return xp.take_along_axis(index, slot[:, None], axis=1)

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
) -> HostIndex:
    """The permutation whose balanced parts are the leaves of the bisection.

    Args:
        n: N.
        parts: leaves, a power of two.
        keys: gives sorting keys (blocks, m) of the indices of a level.
        xp: the library that keys works with.
        comm: the ranks; they share the work and get the same permutation.
    """
    depth = parts.bit_length() - 1
    fine = min(depth, max(1, n // _BLOCK_ROWS).bit_length() - 1)  # nodes above are several blocks
    share = Share(comm, fine)
    offsets = balanced_offsets(n, parts)
    permutation = xp.arange(n)

    def split(level: int) -> None:
        nodes, each = share.nodes(level), 1 << max(0, fine - level)
        of_blocks = offsets[:: (parts >> level) // each]
        edges = of_blocks[nodes.start * each : nodes.stop * each + 1]
        index = pad_segments(permutation, edges, int(np.diff(of_blocks).max()))
        view = Level(
            index, each, nodes, of_blocks[::each], permutation, share if level < share.cut else None
        )
        key = view.of_nodes(xp.where(index >= 0, keys(view), xp.inf))
        order = xp.argsort(key, axis=1, kind="stable")
        ordered = xp.take_along_axis(view.of_nodes(index), order, axis=1)
        permutation[edges[0] : edges[-1]] = ordered[ordered >= 0]

    for level in range(share.cut):
        split(level)
    with comm.agreed():
        for level in range(share.cut, depth):
            split(level)
    of_cut = offsets[:: parts >> share.cut]
    own = share.nodes(share.cut)
    return to_host(share.gather(permutation[of_cut[own.start] : of_cut[own.stop]], of_cut))

"""The geometric order: a k-d tree of the points."""

from __future__ import annotations

from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.ordering.bisection import Level, bisect


def geometric_permutation(points: Array, parts: int, comm: Communicator = ALONE.comm) -> HostIndex:
    """Split every node at the median of its widest coordinate (Bentley, CACM 18 (1975)).

    Args:
        points: (N, d).
        parts: leaves.
        comm: the ranks; they share the work.
    """
    xp = namespace(points)

    def reach(index: Array) -> Array:
        """(blocks, 1, 2, d) the largest x and -x of every coordinate."""
        x = points[xp.where(index >= 0, index, index[:, :1])]
        return xp.stack([x.max(axis=1), -x.min(axis=1)], axis=1)[:, None]

    def along(index: Array, axis: Array) -> Array:
        return points[index, axis[:, None]]

    def widest_coordinate(level: Level) -> Array:
        extent = level.of_nodes(level.of_blocks(reach)).max(axis=1).sum(axis=1)
        return level.of_blocks(along, extent.argmax(axis=1))

    return to_host(bisect(len(points), parts, widest_coordinate, xp, comm))

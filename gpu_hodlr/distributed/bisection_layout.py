"""Which ranks work on which nodes of a recursive bisection, whose tree is not known before."""

from __future__ import annotations

from typing import Any

from gpu_hodlr.devices import Array
from gpu_hodlr.distributed.deal import Deal
from gpu_hodlr.distributed.messages import Communicator


class BisectionLayout:
    """What the ranks have of the nodes: those of a `Deal`, several ranks may have one's.

    Args:
        comm: the ranks.
        deepest: the lowest level that the cut may be; where it has fewer nodes than there are
            ranks, several ranks work on the same node, and the first of them sends.
    """

    def __init__(self, comm: Communicator, deepest: int) -> None:
        workers = min(comm.size, 1 << deepest)
        self._comm, self._deal = comm, Deal(deepest, workers)
        self._worker = [rank * workers // comm.size for rank in range(comm.size)]

    def nodes(self, level: int) -> slice:
        """The nodes of a level that this rank works on: those below its own, or that hold them."""
        return self._deal.mine(level, self._worker[self._comm.rank])

    def shared(self, level: int) -> bool:
        """Whether ranks compute together for nodes of a level, those above the ones dealt out."""
        return level < self._deal.cut

    def own(self, edges: Any) -> slice:
        """Of things in the order of nodes, those that this rank alone has, or sends.

        Args:
            edges: (2^level + 1,) where those of every node of a level start and end, of the level
                that is dealt out or one below; a host array.
        """
        return self._of_worker(edges, self._worker[self._comm.rank])

    def gather(self, own: Array, edges: Any) -> Array:
        """The things of all nodes from every rank's `own`, (things, ...)."""
        counts = [0] * self._comm.size
        for worker in range(self._worker[-1] + 1):
            things = self._of_worker(edges, worker)
            counts[self._worker.index(worker)] = things.stop - things.start
        return self._comm.allgather(own[: counts[self._comm.rank]], counts)

    def _of_worker(self, edges: Any, worker: int) -> slice:
        cut = self._deal.cut
        nodes, step = self._deal.mine(cut, worker), (len(edges) - 1) >> cut
        return slice(int(edges[nodes.start * step]), int(edges[nodes.stop * step]))

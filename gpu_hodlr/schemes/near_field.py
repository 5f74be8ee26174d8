"""The near field of the FMM form: neighbours, and the leaves they vote for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_hodlr.devices import Array, check_memory, namespace_on
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.interactions import (
    InteractionLists,
    check_budget,
    interaction_lists,
    near_leaves,
    nearest_neighbours,
)
from gpu_hodlr.operators import Operator
from gpu_hodlr.profiling import phase
from gpu_hodlr.tree import ClusterTree

_NEIGHBOURS = 16  # of every index: enough for the votes of a leaf


@dataclass(frozen=True)
class NearField:
    """Who is near whom.

    Attributes:
        lists: near and far pairs.
        neighbours: (N, k) of every index, where the matrix is, -1 for none; k = 0 with no budget.
        recall: of the neighbours, estimated; None where none were searched.
    """

    lists: InteractionLists
    neighbours: Array
    recall: float | None


def near_field(
    operator: Operator,
    tree: ClusterTree,
    ordering: str,
    budget: float,
    seed: int,
    comm: Communicator = ALONE.comm,
) -> NearField:
    """Search neighbours, and let them vote for pairs of leaves.

    Args:
        operator: with entries.
        tree: the cluster tree.
        ordering: the one the tree was made by; "angle" makes neighbours by angle too.
        budget: share of N^2 that the blocks may take.
        seed: of the neighbour search.
        comm: the ranks; they share the search.

    Raises:
        ArgumentError: the budget is too small to be of use.
        MemoryEstimateError: the blocks of the near pairs would not fit.
    """
    check_budget(budget, len(tree.leaves))
    n = tree.n
    near = np.empty((0, 2), np.int64)
    neighbours, recall = namespace_on(operator.device).empty((n, 0), np.int64), None
    if budget > 0 and tree.depth:
        needed = int(3 * budget * n**2) * operator.dtype.itemsize // comm.size
        check_memory(needed, "the near field", "budget", operator.device)
        with phase("neighbours"):
            distance = "angle" if ordering == "angle" else "gram"
            found = nearest_neighbours(operator, _NEIGHBOURS, seed, distance, comm)
            near = near_leaves(tree, found, budget)
        neighbours, recall = found.index, found.recall
    return NearField(interaction_lists(tree.depth, near), neighbours, recall)

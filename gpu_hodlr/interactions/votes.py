"""Near leaf pairs by the votes of nearest neighbours."""

from __future__ import annotations

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.checks import check_number
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.interactions.neighbours import Neighbours
from gpu_hodlr.tree import ClusterTree


def least_budget(leaves: int) -> float:
    """The smallest useful share of N^2 for near blocks.

    It holds a neighbour leaf for every leaf, a block shared by two leaves: leaves / 2 blocks of
    (N / leaves)^2 numbers.
    """
    return 0.5 / leaves if leaves > 1 else 0.0


def check_budget(budget: object, leaves: int | None = None) -> float:
    """A share of N^2 that near blocks may take.

    Args:
        budget: what the user gave.
        leaves: of the tree, once it is known.

    Raises:
        DtypeError: not a real number.
        ArgumentError: negative, NaN, > 1, or, `leaves` given, > 0 and too small to be of use.
    """
    share = check_number(budget, "budget")
    if share > 1:
        raise ArgumentError(f"budget must be <= 1 (a share of N^2), got {budget}")
    if leaves is not None and 0 < share < least_budget(leaves):
        raise ArgumentError(
            f"budget {budget} holds no neighbour leaf for every leaf: the smallest useful budget "
            f"of {leaves} leaves is {least_budget(leaves):.2g} (0 for none; a smaller leaf_size "
            "needs less)"
        )
    return share


def leaf_votes(tree: ClusterTree, neighbours: Neighbours) -> tuple[Array, Array]:
    """How much the indices of two leaves are neighbours.

    Every index votes for the leaf of each of its neighbours, with the weight of the entry: leaves
    of small entries gain nothing from being near.

    Args:
        tree: the cluster tree.
        neighbours: of every index.

    Returns:
        pairs (q, 2) of different leaves, the smaller first, and votes (q,) > 0; most votes first,
        equal ones in the order of the pairs. They are where the neighbours are.
    """
    xp = namespace(neighbours.index)
    leaf, slot = np.nonzero(tree.leaves >= 0)
    leaf_of_index = np.empty(tree.n, np.int64)
    leaf_of_index[tree.leaves[leaf, slot]] = leaf
    leaf_of = xp.asarray(leaf_of_index)
    voter, chosen = leaf_of[:, None], leaf_of[neighbours.index]
    counted = (neighbours.weight > 0) & (voter != chosen)
    count = len(tree.leaves)
    key = xp.where(counted, xp.minimum(voter, chosen) * count + xp.maximum(voter, chosen), -1)
    keys, votes = batched.sums_by_key(key.ravel(), neighbours.weight.ravel())
    order = xp.argsort(-votes, kind="stable")
    keys = keys[order]
    return xp.stack([keys // count, keys % count], axis=1), votes[order]


def near_leaves(tree: ClusterTree, neighbours: Neighbours, budget: float) -> HostIndex:
    """The pairs of leaves with most votes, (q, 2), as many as the budget holds.

    Args:
        tree: the cluster tree.
        neighbours: of every index.
        budget: the blocks of all pairs together, each stored once, may take budget * N^2 numbers.
    """
    pairs, _ = leaf_votes(tree, neighbours)
    m = tree.leaves.shape[1]
    return to_host(pairs[: int(budget * tree.n**2 / m**2)])

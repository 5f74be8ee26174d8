"""The bottom-up sweep of the FMM form: bases of the far field and couplings of all far pairs."""

from __future__ import annotations

from typing import Any

from gpu_hodlr import batched
from gpu_hodlr.bases.samplers import Sampler
from gpu_hodlr.bases.sweep import fold_leaf_order, sweep_levels
from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.distributed import ALONE, Halo, Ownership
from gpu_hodlr.interactions import InteractionLists
from gpu_hodlr.operators import Operator
from gpu_hodlr.profiling import PhaseTimer
from gpu_hodlr.structures import Multipole
from gpu_hodlr.tree import ClusterTree


def sweep_far(
    operator: Operator,
    tree: ClusterTree,
    lists: InteractionLists,
    D: Array,
    near: Array,
    sampler: Sampler,
    tolerance: float,
    max_rank: int,
    timer: PhaseTimer,
    tick: Any,
    owners: Ownership = ALONE,
) -> tuple[Multipole, tuple[int, ...]]:
    """Compress level by level, as `sweep` does, up to the last level with far pairs.

    Args:
        operator: gives the couplings' entries.
        tree: the cluster tree.
        lists: near and far pairs.
        D: diagonal blocks of its leaves.
        near: blocks of its near pairs of leaves.
        sampler: of far fields, at the leaves.
        tolerance: absolute Frobenius error aimed at.
        max_rank: cap of the rank.
        timer: gets the seconds by phase.
        tick: called once a level (a progress bar).
        owners: which rank has what; D, near and the sampler are of this rank.
    """
    halos = [Halo(owners, pairs, level) for level, pairs in enumerate(lists.far)]
    levels, capped = sweep_levels(
        operator, tree, halos, lists.top, sampler, tolerance, max_rank, timer, tick, owners=owners
    )
    folded = fold_leaf_order(tree.leaves, D, levels, owners)
    if levels:
        halo = Halo(owners, lists.near, tree.depth, siblings=False)
        order = levels[0].order
        assert order is not None
        near = _permute_sides(near, halo.extend(order)[0], halo.pairs)
    far = tuple(lists.far[tree.depth - i] for i in range(len(levels)))
    form = Multipole(
        folded.leaves, folded.D, folded.levels, near, lists.near, far, owners=folded.owners
    )
    return form, capped


def _permute_sides(blocks: Array, order: Array, pairs: Any) -> Array:
    """Rows of each block K[a, b] in the order of leaf a, columns in that of leaf b."""
    xp = namespace(blocks)
    row_order, column_order = (order[xp.asarray(side)] for side in pairs.T)
    rows = batched.permute_rows(blocks, row_order).swapaxes(1, 2)
    columns = batched.permute_rows(xp.ascontiguousarray(rows), column_order)
    return xp.ascontiguousarray(columns.swapaxes(1, 2))

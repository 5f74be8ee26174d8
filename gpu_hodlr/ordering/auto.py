"""Which ordering compresses best, from the ranks of a few leaves."""

from __future__ import annotations

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import namespace, to_host
from gpu_hodlr.operators import Operator, Sketch, half_even
from gpu_hodlr.tree import ClusterTree

_NODES = 4  # nodes looked at on the leaf level, half as many above
_BLOCK_ROWS = 512  # of the larger nodes looked at
_COLUMNS = 160  # of an entry sample
_TIE = 1.05  # a later tree must be this much better: the first is the natural order


def cheapest(
    operator: Operator,
    trees: dict[str, ClusterTree],
    seed: int,
    tolerance: float,
    sketch: Sketch | None,
) -> str:
    """The name of the tree with the least predicted storage (the first on near ties).

    On the leaf level and on the level with nodes of about 512 rows, the block rows K(t, outside t)
    of a few nodes are sampled, with the sketch where there is one (Y_t - K_tt Omega_t), else with
    columns drawn evenly; the common rank the level needs is estimated from them.
    """
    predicted = {
        name: _predicted_storage(operator, tree, seed, tolerance, sketch)
        for name, tree in trees.items()
    }
    best = next(iter(trees))
    for name in trees:
        if predicted[name] * _TIE < predicted[best]:
            best = name
    return best


def _predicted_storage(
    operator: Operator, tree: ClusterTree, seed: int, tolerance: float, sketch: Sketch | None
) -> float:
    """Stored numbers if every level above the leaves had the rank of the larger nodes."""
    leaves, m = tree.leaves.shape
    rank = _level_rank(operator, tree, tree.depth, _NODES, seed, tolerance, sketch)
    level = max(1, tree.depth - max(0, (_BLOCK_ROWS // m).bit_length() - 1))
    upper = rank
    if level < tree.depth:
        upper = _level_rank(operator, tree, level, _NODES // 2, seed, tolerance, sketch)
    return float(leaves * m * (m + rank) + 2.0 * leaves * upper**2)


def _level_rank(
    operator: Operator,
    tree: ClusterTree,
    level: int,
    count: int,
    seed: int,
    tolerance: float,
    sketch: Sketch | None,
) -> float:
    """Estimate of a level's common rank from `count` of its nodes.

    They are drawn half evenly, half by their energy, as a few heavy ones often decide.
    """
    rng = np.random.default_rng(seed)
    nodes = tree.nodes(level)
    if sketch is not None:
        energy = to_host(namespace(sketch.y).einsum("ij,ij->i", sketch.y, sketch.y))
    else:
        energy = np.abs(to_host(operator.diagonal()))
    of_node = np.where(nodes >= 0, energy[nodes], 0).sum(axis=1, dtype=np.float64)
    density = half_even(of_node)
    if len(nodes) <= count:
        chosen, weight = np.arange(len(nodes)), np.ones(len(nodes))
    else:
        chosen = rng.choice(len(nodes), size=count, p=density)
        weight = 1.0 / (count * density[chosen])
    rows = nodes[chosen]
    if sketch is not None:
        omega = batched.gather_rows(sketch.omega, rows)
        S = batched.gather_rows(sketch.y, rows)
        S = batched.matmul(operator._entries(rows, rows), omega, subtract_from=S)
        scale = 1.0 / S.shape[2]
    else:
        columns = rng.choice(tree.n, size=min(_COLUMNS, tree.n), replace=False)
        mine = (columns[None, :, None] == rows[:, None, :]).any(axis=2)
        S = operator._entries(rows, np.where(mine, -1, columns))
        scale = tree.n / len(columns)
    tails = weight @ to_host(batched.pivoted_qr(S).tails) * scale
    return float(np.argmax(tails <= tolerance**2 / tree.depth))

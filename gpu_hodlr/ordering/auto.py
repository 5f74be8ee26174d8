"""Which ordering compresses best, from the ranks of a few sampled blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import to_host
from gpu_hodlr.operators import Operator
from gpu_hodlr.tree import ClusterTree

NDArray = np.ndarray[Any, Any]
_ROWS, _COLS, _NODES = 128, 192, 2  # sample of a block; nodes looked at on a level


def cheapest(
    operator: Operator, trees: dict[str, ClusterTree], seed: int, tolerance: float
) -> str:
    """The name of the tree with the least predicted storage (the first on ties).

    On the leaf level, a middle level and level 1 a few blocks K(t, outside t) are sampled, and
    their ranks at each node's share of the squared tolerance counted. Cost: 2 * 3 * 128 * 192
    entries a tree.
    """
    predictions = {
        name: _predicted_storage(operator, tree, seed, tolerance) for name, tree in trees.items()
    }
    return min(predictions, key=lambda name: predictions[name])


def _predicted_storage(
    operator: Operator, tree: ClusterTree, seed: int, tolerance: float
) -> float:
    """Stored numbers if every level had the mean rank found on the sampled levels."""
    rng = np.random.default_rng(seed)
    depth = tree.depth
    storage = float(tree.leaves.size * tree.leaves.shape[1])
    for level in sorted({depth, (depth + 1) // 2, 1}):
        nodes = tree.nodes(level)
        chosen = rng.choice(len(nodes), size=min(_NODES, len(nodes)), replace=False)
        share = tolerance**2 / (depth * len(nodes))
        ranks = [_sampled_rank(operator, nodes, int(t), share, rng) for t in chosen]
        rank = float(np.mean(ranks))
        storage += len(nodes) * rank * (nodes.shape[1] if level == depth else 3 * rank)
    return storage


def _sampled_rank(
    operator: Operator, nodes: NDArray, t: int, share: float, rng: np.random.Generator
) -> int:
    inside = nodes[t][nodes[t] >= 0]
    outside = np.delete(nodes, t, axis=0).ravel()
    outside = outside[outside >= 0]
    if not inside.size or not outside.size:
        return 0
    rows = rng.choice(inside, size=min(_ROWS, inside.size), replace=False)
    cols = rng.choice(outside, size=min(_COLS, outside.size), replace=False)
    scale = (inside.size / rows.size) * (outside.size / cols.size)
    tails = to_host(batched.pivoted_qr(operator._entries(rows[None], cols[None])).tails)[0]
    return int(np.argmax(tails * scale <= share))

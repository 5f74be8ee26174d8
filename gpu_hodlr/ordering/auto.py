"""Which ordering compresses best, from the ranks of a few leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host, to_hosts
from gpu_hodlr.distributed import ALONE, Communicator, shares
from gpu_hodlr.operators import Operator, SketchColumns, half_even
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
    sketch: SketchColumns | None,
    comm: Communicator = ALONE.comm,
) -> str:
    """The name of the tree with the least predicted storage (the first on near ties).

    On the leaf level and on the level with nodes of about 512 rows, the block rows K(t, outside t)
    of a few nodes are sampled, with the sketch where there is one (Y_t - K_tt Omega_t), else with
    columns drawn evenly; the common rank the level needs is estimated from them. The ranks of
    `comm` read the blocks of some of the nodes each, and look at some of them.
    """
    draw = _DrawnNodes(operator, seed, sketch)
    levels = [
        (name, level, draw(tree, level, count))
        for name, tree in trees.items()
        for level, count in _levels_of(tree)
    ]
    blocks = [nodes.entries(operator, comm) for _, _, nodes in levels]
    mine = _tails([nodes for _, _, nodes in levels], blocks, comm)
    tails = {key: each for some in comm.share(mine) for key, each in some.items()}
    ranks: dict[str, list[float]] = {name: [] for name in trees}
    for i, (name, _, nodes) in enumerate(levels):
        every = np.stack([tails[i, t] for t in range(len(nodes.weight))])
        total = (nodes.weight[:, None] * every).sum(axis=0)
        allowed = tolerance**2 / trees[name].depth
        ranks[name].append(float(np.argmax(total * nodes.scale <= allowed)))
    predicted = {name: _storage(tree, ranks[name]) for name, tree in trees.items()}
    best = next(iter(trees))
    for name in trees:
        if predicted[name] * _TIE < predicted[best]:
            best = name
    return best


def _levels_of(tree: ClusterTree) -> list[tuple[int, int]]:
    """The levels looked at, the leaves first, and how many of their nodes."""
    m = tree.leaves.shape[1]
    upper = max(1, tree.depth - max(0, (_BLOCK_ROWS // m).bit_length() - 1))
    return [(tree.depth, _NODES), *([(upper, _NODES // 2)] if upper < tree.depth else [])]


def _storage(tree: ClusterTree, ranks: list[float]) -> float:
    """Stored numbers if every level above the leaves had the rank of the larger nodes."""
    leaves, m = tree.leaves.shape
    return float(leaves * m * (m + ranks[0]) + 2.0 * leaves * ranks[-1] ** 2)


@dataclass(frozen=True)
class _Nodes:
    """Some nodes of a level and what their block rows are sampled by.

    Attributes:
        rows: (t, m) indices of the nodes.
        weight: (t,) of their squared errors in an estimate of the level's.
        scale: of the squared errors in the samples.
        sketch: Omega and Y on the rows, (t, m, s) each; or None.
        columns: of the entries that are sampled where there is no sketch.
    """

    rows: HostIndex
    weight: NDArray[np.float64]
    scale: float
    sketch: tuple[Array, Array] | None
    columns: HostIndex | None

    def entries(self, operator: Operator, comm: Communicator) -> Array:
        """K_tt, or the columns of K(t, outside t) that are sampled, (t, m, columns)."""
        columns = self.rows
        if self.columns is not None:
            inside = (self.columns[None, :, None] == self.rows[:, None, :]).any(axis=2)
            columns = np.where(inside, -1, self.columns)
        # Whole nodes: a block has the same shape, and so the same bits, for any number of ranks.
        every = shares(len(self.rows), comm.size)
        mine = every[comm.rank]
        block = operator.reader.blocks(self.rows[mine], columns[mine])
        return comm.allgather(block, [part.stop - part.start for part in every])

    def samples(self, blocks: Array, nodes: slice) -> Array:
        """Samples of the block rows of some of the nodes, (nodes, m, s).

        Args:
            blocks: see `entries`.
            nodes: which.
        """
        if self.sketch is None:
            return blocks[nodes]
        omega, y = (a[nodes] for a in self.sketch)
        return batched.matmul(blocks[nodes], omega, subtract_from=y.copy())


def _tails(
    levels: list[_Nodes], blocks: list[Array], comm: Communicator
) -> dict[tuple[int, int], Any]:
    """(k + 1,) squared errors in the samples of nodes (level, node), of every rank.

    Of all nodes together every so many are this rank's. Those whose samples have the same shape are
    one stack, whichever tree and level they are of, and the host waits once for all of them.
    """
    by_shape: dict[tuple[int, ...], tuple[list[tuple[int, int]], list[Array]]] = {}
    before = 0
    for i, nodes in enumerate(levels):
        count = len(nodes.weight)
        mine = slice((comm.rank - before) % comm.size, count, comm.size)
        before += count
        S = nodes.samples(blocks[i], mine)
        keys, stack = by_shape.setdefault(S.shape[1:], ([], []))
        keys += [(i, t) for t in range(count)[mine]]
        stack.append(S)
    stacks = [namespace(stack[0]).concatenate(stack) for _, stack in by_shape.values()]
    found = to_hosts(*(batched.pivoted_qr(S).tails for S in stacks))
    every = [key for keys, _ in by_shape.values() for key in keys]
    return dict(zip(every, (tails for stack in found for tails in stack), strict=True))


class _DrawnNodes:
    """Draws nodes half evenly, half by their energy, as a few heavy ones often decide."""

    def __init__(self, operator: Operator, seed: int, sketch: SketchColumns | None) -> None:
        self._seed, self._sketch = seed, sketch
        self._energy = np.abs(to_host(operator.diagonal())) if sketch is None else sketch.energy()

    def __call__(self, tree: ClusterTree, level: int, count: int) -> _Nodes:
        """`count` nodes of a level."""
        rng = np.random.default_rng(self._seed)
        nodes = tree.nodes(level)
        of_node = np.where(nodes >= 0, self._energy[nodes], 0).sum(axis=1, dtype=np.float64)
        density = half_even(of_node)
        if len(nodes) <= count:
            chosen, weight = np.arange(len(nodes)), np.ones(len(nodes))
        else:
            chosen = rng.choice(len(nodes), size=count, p=density)
            weight = 1.0 / (count * density[chosen])
        rows = nodes[chosen]
        if self._sketch is not None:
            sampled = self._sketch.sampled_rows(rows)
            return _Nodes(rows, weight, 1.0 / sampled[0].shape[2], sampled, None)
        columns = rng.choice(tree.n, size=min(_COLUMNS, tree.n), replace=False)
        return _Nodes(rows, weight, tree.n / len(columns), None, columns)

"""Interaction lists: which pairs of nodes are near, and which are far, at every level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_hodlr.devices import HostIndex
from gpu_hodlr.tree import pad_segments


@dataclass(frozen=True)
class InteractionLists:
    """A partition of all index pairs into near leaf pairs and far node pairs.

    A pair of nodes is near if any pair of leaves below them is; a node is near itself. Far at
    level l are the pairs of children of near pairs of level l - 1 that are not near themselves.
    Every pair of leaves then lies in exactly one of: the diagonal, `near`, one pair of one level
    of `far` (Yu, Levitt, Reiz, Biros, SC17, section 2.2). Pairs are stored once, the smaller node
    first, sorted. They are host arrays, a few numbers a leaf: what is sent between ranks and how
    many blocks there are follows from them.

    Attributes:
        depth: level of the leaves.
        near: (q, 2) pairs of different leaves stored densely.
        far: far[l] (p_l, 2), pairs of level l, for l = 0 .. depth (far[0] is empty).
        near_nodes: near_nodes[l] (q_l, 2), pairs of different nodes of level l that are near;
            near_nodes[depth] is `near`.
    """

    depth: int
    near: HostIndex
    far: tuple[HostIndex, ...]
    near_nodes: tuple[HostIndex, ...]

    @property
    def top(self) -> int:
        """The smallest level with far pairs; depth + 1 when there are none at all."""
        levels = [level for level, pairs in enumerate(self.far) if len(pairs)]
        return levels[0] if levels else self.depth + 1


def interaction_lists(depth: int, near: HostIndex) -> InteractionLists:
    """The lists of a perfect binary tree whose near leaf pairs are given.

    Args:
        depth: level of the leaves.
        near: (q, 2) pairs of leaves, in any order and either way round, repeats allowed; a leaf is
            near itself without being listed. No pair at all gives the HSS structure: the far pairs
            are the siblings.
    """
    near_nodes = [_distinct(near, depth)]
    for level in range(depth - 1, -1, -1):
        near_nodes.insert(0, _distinct(near_nodes[0] // 2, level))
    far = [np.empty((0, 2), np.int64)]
    for level in range(1, depth + 1):
        children = _children(near_nodes[level - 1], level - 1)
        is_near = np.isin(_keys(children, level), _keys(near_nodes[level], level))
        far.append(children[~is_near])
    return InteractionLists(depth, near_nodes[-1], tuple(far), tuple(near_nodes))


def _keys(pairs: HostIndex, level: int) -> HostIndex:
    """One number a pair, in the order of the pairs."""
    return (pairs[:, 0] << level) + pairs[:, 1]


def _distinct(pairs: HostIndex, level: int) -> HostIndex:
    """The pairs of different nodes among `pairs`, each once, smaller node first, sorted."""
    pairs = np.sort(np.asarray(pairs, np.int64).reshape(-1, 2), axis=1)
    keys = np.unique(_keys(pairs[pairs[:, 0] < pairs[:, 1]], level))
    return np.stack([keys >> level, keys & ((1 << level) - 1)], axis=1)


def _children(near: HostIndex, level: int) -> HostIndex:
    """All pairs of different children of the near pairs of a level, a node with itself included."""
    itself = np.arange(1 << level)
    siblings = np.stack([2 * itself, 2 * itself + 1], axis=1)
    crossing = 2 * near[:, None, :] + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    return _distinct(np.concatenate([siblings, crossing.reshape(-1, 2)]), level + 1)


def partners(pairs: HostIndex, nodes: int) -> HostIndex:
    """(nodes, most) the nodes that each is paired with, ascending, padded with -1."""
    row = np.concatenate([pairs[:, 0], pairs[:, 1]])
    column = np.concatenate([pairs[:, 1], pairs[:, 0]])
    order = np.lexsort((column, row))
    return pad_segments(column[order], np.searchsorted(row[order], np.arange(nodes + 1)))

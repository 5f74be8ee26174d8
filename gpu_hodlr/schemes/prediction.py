"""What a scheme will store, predicted from the ranks of sampled blocks.

Rows and columns of a few blocks a level are drawn with probability half even, half by the
diagonal, and weighted by 1 / sqrt(expected draws), so that the squared norm of the sampled block
estimates that of the block. Its singular values tell what rank reaches the tolerance. All nodes of
a level have one rank, which leaves no more than the level may miss in all of them together, and
which a few may decide, of one layer of a network, say. The heaviest is followed from the top, where
few nodes are all: its children are sampled, and a few others at random for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.devices import HostArray, HostIndex, to_host
from gpu_hodlr.operators import half_even
from gpu_hodlr.schemes.job import Job
from gpu_hodlr.tree import ClusterTree

_NODES = 4  # sampled a level
_NEGLIGIBLE = 1e-3  # of the squared error allowed: how wrong a tail may be
SIDE = 384  # rows and columns of a sampled block


class BlockSampler:
    """Weighted entries of random rows and columns of a block."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._rng = np.random.default_rng((job.seed, streams.PREDICTION))
        diagonal = to_host(job.operator.diagonal()).astype(np.float64)
        self._weight = np.abs(diagonal)

    def nodes(self, level: int, below: int) -> tuple[HostIndex, HostArray]:
        """A few nodes of a level, and how many each stands for: the children of one, and others."""
        every = 1 << level
        if every <= _NODES:
            return np.arange(every), np.ones(every)
        children = np.arange(2 * below, 2 * below + 2)
        others = self._rng.permutation(every - 2)[: _NODES - 2]
        others += 2 * (others >= children[0])
        stand_for = (every - 2) / (_NODES - 2)
        return np.concatenate([children, others]), np.repeat([1.0, stand_for], [2, _NODES - 2])

    def tails(self, rows: Any, columns: Any, side: int = SIDE, negligible: float = 0.0) -> Any:
        """(k + 1,) squared error of the best rank-k approximation of a block, estimated.

        What k of s sampled dimensions leave is small by chance as well: (1 - k / s)^-2 makes up
        for both sides, up to half the dimensions; beyond, it is not known. Singular values are
        those of a Gram matrix where its rounding is below `negligible`.
        """
        (i, row_weight), (j, column_weight) = self._draw(rows, side), self._draw(columns, side)
        if not len(i) or not len(j):
            return np.zeros(1)
        block = to_host(self.job.operator.reader.blocks(i[None], j[None]))[0].astype(np.float64)
        with batched.one_blas_thread():
            weighted = row_weight[:, None] * block * column_weight
            squares = _squared_singular_values(weighted, negligible)
        tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        k = np.arange(len(tails))
        for drawn, every in ((len(i), len(rows)), (len(j), len(columns))):
            if drawn < every:
                tails = np.where(2 * k <= drawn, tails / np.maximum(1 - k / drawn, 0.5), np.inf)
        return tails

    def _draw(self, index: HostIndex, side: int) -> tuple[Any, Any]:
        if len(index) <= side:
            return index, np.ones(len(index))
        p = half_even(self._weight[index])
        chosen = self._rng.choice(len(index), side, replace=False, p=p)
        return index[chosen], 1.0 / np.sqrt(side * p[chosen])


def _squared_singular_values(a: HostArray, negligible: float) -> HostArray:
    """Descending, min(a.shape) of them; of the smaller Gram matrix where that does."""
    a = a if a.shape[0] <= a.shape[1] else a.T
    gram = a @ a.T
    if len(a) * float(np.finfo(a.dtype).eps) * float(gram.trace()) > negligible:
        return np.asarray(np.linalg.svd(a, compute_uv=False) ** 2)
    return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)


def rank_for(tails: HostArray, allowed: float, cap: int) -> int | None:
    """The least rank up to a cap that leaves no more than the squared error allowed."""
    enough = np.nonzero(tails <= allowed)[0]
    return int(enough[0]) if enough.size and enough[0] <= cap else None


def level_ranks(
    sampler: BlockSampler,
    tolerance: float,
    levels: range,
    blocks: Callable[[Any, int], tuple[Any, Any]],
) -> list[int] | None:
    """The common rank of every level, top level first; `blocks` gives rows and columns."""
    ranks: list[int] = []
    allowed, heaviest = tolerance**2 / max(len(levels), 1), 0
    for level in levels:
        nodes = sampler.job.tree.nodes(level)
        negligible = _NEGLIGIBLE * allowed / len(nodes)
        chosen, stand_for = sampler.nodes(level, heaviest)
        found = [sampler.tails(*blocks(nodes, t), negligible=negligible) for t in chosen]
        longest = max(map(len, found))
        tails = np.stack([np.pad(tail, (0, longest - len(tail)), "edge") for tail in found])
        rank = rank_for(stand_for @ tails, allowed, sampler.job.max_rank)
        if rank is None:
            return None
        ranks.append(rank)
        heaviest = int(chosen[np.argmax(tails[:, rank // 2])])
    return ranks


def real(index: HostIndex) -> HostIndex:
    """Without the padding."""
    return index[index >= 0]


def nested_storage(
    tree: ClusterTree, ranks: list[int] | None, couplings: list[int], near: int
) -> float | None:
    """Of leaves, near pairs, and levels with so many couplings, top level first."""
    if ranks is None:
        return None
    nodes, rows = tree.leaves.shape
    total = float((nodes + near) * rows**2)
    for rank, pairs in zip(ranks[::-1], couplings[::-1], strict=True):
        r = min(rank, rows)
        total += nodes * (rows - r) * r + pairs * r**2
        nodes, rows = nodes // 2, 2 * r
    return total / tree.n**2

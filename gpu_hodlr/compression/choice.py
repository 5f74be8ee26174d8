"""scheme="auto": the storage of every scheme, predicted from the ranks of sampled blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr.devices import to_host
from gpu_hodlr.interactions import partners
from gpu_hodlr.operators import half_even
from gpu_hodlr.schemes.job import Job
from gpu_hodlr.tree import ClusterTree

_NODES = 3  # sampled a level
_SIDE = 384  # rows and columns of a sampled block
_WHOLE = 1536  # of the whole matrix, whose rank may be larger


@dataclass(frozen=True)
class Choice:
    """What to build and why.

    Attributes:
        schemes: one; or more, of which the smallest is to be kept.
        reason: a sentence, with all predictions; None where there was no choice.
    """

    schemes: tuple[str, ...]
    reason: str | None


def choose(job: Job, tolerances: dict[str, float]) -> Choice:
    """Predict storage / N^2 of the schemes and take the least.

    Rows and columns of a few blocks a level are drawn with probability half even, half by the
    diagonal, and weighted by 1 / sqrt(expected draws), so that the squared norm of the sampled
    block estimates that of the block. Its singular values tell what rank reaches the tolerance:
    HSS needs the rank of K(t, outside t), FMM that of K(t, far field of t), HODLR that of
    K(t, sibling of t), the low-rank form that of K. A rank beyond half a sample's side is not seen.

    Args:
        job: the matrix and its tree; it must have entries.
        tolerances: absolute Frobenius error aimed at by each scheme to be considered.
    """
    sampler = _BlockSampler(job)
    stored = {scheme: _PREDICT[scheme](sampler, aim) for scheme, aim in tolerances.items()}
    known = {scheme: fraction for scheme, fraction in stored.items() if fraction is not None}
    if not known:
        first = next(iter(stored))
        return Choice((first,), f"{first}: no sampled rank reaches rtol within max_rank")
    best = min(known, key=lambda scheme: known[scheme])
    said = [
        f"{scheme} " + (f"{100 * known[scheme]:.3g} %" if scheme in known else "out of reach")
        for scheme in stored
    ]
    return Choice(
        (best,), f"{best}: least storage predicted from sampled ranks ({', '.join(said)})"
    )


class _BlockSampler:
    """Weighted entries of random rows and columns of a block."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._rng = np.random.default_rng((job.seed, 0xA0))
        diagonal = to_host(job.operator.diagonal()).astype(np.float64)
        self._weight = np.abs(diagonal)

    def nodes(self, level: int) -> Any:
        """A few nodes of a level."""
        return self._rng.permutation(1 << level)[:_NODES]

    def tails(self, rows: Any, columns: Any, side: int = _SIDE) -> Any:
        """(k + 1,) squared error of the best rank-k approximation of a block, estimated.

        What k of s sampled dimensions leave is small by chance as well: (1 - k / s)^-2 makes up
        for both sides, up to half the dimensions; beyond, it is not known.
        """
        (i, row_weight), (j, column_weight) = self._draw(rows, side), self._draw(columns, side)
        if not len(i) or not len(j):
            return np.zeros(1)
        block = to_host(self.job.operator.reader.blocks(i[None], j[None]))[0].astype(np.float64)
        squares = np.linalg.svd(row_weight[:, None] * block * column_weight, compute_uv=False) ** 2
        tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        k = np.arange(len(tails))
        for drawn, every in ((len(i), len(rows)), (len(j), len(columns))):
            if drawn < every:
                tails = np.where(2 * k <= drawn, tails / np.maximum(1 - k / drawn, 0.5), np.inf)
        return tails

    def _draw(self, index: Any, side: int) -> tuple[Any, Any]:
        if len(index) <= side:
            return index, np.ones(len(index))
        p = half_even(self._weight[index])
        chosen = self._rng.choice(len(index), side, replace=False, p=p)
        return index[chosen], 1.0 / np.sqrt(side * p[chosen])


def _rank(tails: Any, allowed: float, cap: int) -> int | None:
    enough = np.nonzero(tails <= allowed)[0]
    return int(enough[0]) if enough.size and enough[0] <= cap else None


def _level_ranks(
    sampler: _BlockSampler,
    tolerance: float,
    levels: range,
    blocks: Callable[[Any, int], tuple[Any, Any]],
) -> list[int] | None:
    """The common rank of every level, top level first; `blocks` gives rows and columns."""
    ranks = []
    for level in levels:
        nodes = sampler.job.tree.nodes(level)
        allowed = tolerance**2 / len(levels) / len(nodes)
        found = [
            _rank(sampler.tails(*blocks(nodes, t)), allowed, sampler.job.max_rank)
            for t in sampler.nodes(level)
        ]
        if None in found:
            return None
        ranks.append(max(r for r in found if r is not None))
    return ranks


def _real(index: Any) -> Any:
    return index[index >= 0]


def _hss(sampler: _BlockSampler, tolerance: float) -> float | None:
    def outside(nodes: Any, t: int) -> tuple[Any, Any]:
        return _real(nodes[t]), _real(np.delete(nodes, t, axis=0).ravel())

    tree = sampler.job.tree
    ranks = _level_ranks(sampler, tolerance, range(1, tree.depth + 1), outside)
    return _nested_storage(tree, ranks, [1 << level for level in range(tree.depth)], 0)


def _fmm(sampler: _BlockSampler, tolerance: float) -> float | None:
    tree, lists = sampler.job.tree, sampler.job.near_field.lists
    near = {level: partners(lists.near_nodes[level], 1 << level) for level in range(tree.depth + 1)}

    def far_field(nodes: Any, t: int) -> tuple[Any, Any]:
        beside = near[len(nodes).bit_length() - 1][t]
        far = np.delete(nodes, [t, *_real(beside)], axis=0)
        return _real(nodes[t]), _real(far.ravel())

    levels = range(lists.top, tree.depth + 1)
    ranks = _level_ranks(sampler, tolerance, levels, far_field)
    return _nested_storage(
        tree, ranks, [len(lists.far[level]) for level in levels], len(lists.near)
    )


def _nested_storage(
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


def _hodlr(sampler: _BlockSampler, tolerance: float) -> float | None:
    def siblings(nodes: Any, t: int) -> tuple[Any, Any]:
        return _real(nodes[t]), _real(nodes[t ^ 1])

    tree = sampler.job.tree
    ranks = _level_ranks(sampler, tolerance, range(1, tree.depth + 1), siblings)
    if ranks is None:
        return None
    return float(tree.leaves.size * (tree.leaves.shape[1] + sum(ranks))) / tree.n**2


def _low_rank(sampler: _BlockSampler, tolerance: float) -> float | None:
    n, cap = sampler.job.tree.n, sampler.job.max_rank
    side = min(max(_SIDE, 2 * cap), _WHOLE)
    rank = _rank(sampler.tails(np.arange(n), np.arange(n), side), tolerance**2, cap)
    return None if rank is None else (n + 1) * rank / n**2


_PREDICT = {"hss": _hss, "fmm": _fmm, "hodlr": _hodlr, "lowrank": _low_rank}

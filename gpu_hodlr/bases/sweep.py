"""The bottom-up sweep: bases, skeletons and couplings of every level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.bases.samplers import LevelSampler, Sample, Sampler, samples_for
from gpu_hodlr.batched import tall
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.operators import Operator
from gpu_hodlr.profiling import PhaseTimer, nvtx_range
from gpu_hodlr.structures import Level, Telescope
from gpu_hodlr.tree import ClusterTree

_SEEN_FACTOR = 2.0  # squared error seen on fresh columns, over the one allowed
_LARGEST_SCALE = 30.0  # of squared error estimates by what fresh columns show


def sweep(
    operator: Operator,
    tree: ClusterTree,
    D: Array,
    sampler: Sampler,
    tolerance: float,
    max_rank: int,
    timer: PhaseTimer,
    tick: Any,
    worst_node: bool = False,
) -> tuple[Telescope, tuple[int, ...]]:
    """Compress level by level (Martinsson, SIAM J. Matrix Anal. Appl. 32 (2011)).

    Returns the form, and the levels (root = 0) where `max_rank` stopped it short.

    A level may spend tolerance^2 / depth of squared Frobenius error over its nodes together; its
    common rank is the smallest that keeps to that, as the storage is the same for all its nodes.

    Args:
        operator: gives the couplings' entries.
        tree: the cluster tree.
        D: diagonal blocks of its leaves.
        sampler: at its leaves.
        tolerance: absolute Frobenius error aimed at.
        max_rank: cap of the rank.
        timer: gets the seconds by phase.
        tick: called once a level (a progress bar).
        worst_node: hold every node, not all nodes together, to a level's share: the spectral
            norm of the error follows the worst node.
    """
    levels, capped = sweep_levels(
        operator, tree, lambda depth: np.arange(1 << depth).reshape(-1, 2), 1,
        sampler, tolerance, max_rank, timer, tick, worst_node,
    )  # fmt: skip
    return fold_leaf_order(tree.leaves, D, levels), capped


def sweep_levels(
    operator: Operator,
    tree: ClusterTree,
    pairs: Callable[[int], Any],
    top: int,
    sampler: Sampler,
    tolerance: float,
    max_rank: int,
    timer: PhaseTimer,
    tick: Any,
    worst_node: bool = False,
) -> tuple[list[Level], tuple[int, ...]]:
    """The levels from the leaves up to `top`, and those where `max_rank` stopped them short.

    Args:
        operator: gives the couplings' entries.
        tree: the cluster tree.
        pairs: of a depth, the nodes (p, 2) that are coupled there.
        top: the last level, at least 1.
        sampler: at the leaves.
        tolerance: see `sweep`, as the rest.
        max_rank: cap of the rank.
        timer: gets the seconds by phase.
        tick: called once a level (a progress bar).
        worst_node: see `sweep`.
    """
    levels: list[Level] = []
    capped: list[int] = []
    rows = tree.leaves
    spent = tolerance**2 / max(tree.depth + 1 - top, 1)
    for depth in range(tree.depth, top - 1, -1):
        with nvtx_range(f"level of {len(rows)} nodes"):
            (order, T, ranks), reached = bases_of_level(
                sampler, rows < 0, spent, max_rank, timer, worst_node
            )
            if reached > spent:
                capped.append(depth)
                # The error of this level is noise in the samples of the next: do not fit it there.
                spent = reached
            rank = T.shape[2]
            skeleton = np.take_along_axis(rows, to_host(order[:, :rank]), axis=1)
            with timer.phase("couplings"):
                B = operator._entries(*skeleton[pairs(depth)].swapaxes(0, 1))
            level = Level(order, T, B, tuple(int(r) for r in to_host(ranks)))
            if depth > top:
                with timer.phase("sampling"):
                    sampler.advance(level, skeleton)
            levels.append(level)
            rows = skeleton.reshape(len(skeleton) // 2, 2 * rank)
            tick()
    return levels, tuple(capped)


def bases_of_level(
    sampler: LevelSampler,
    padding: Any,
    allowed: float,
    max_rank: int,
    timer: PhaseTimer,
    worst_node: bool = False,
) -> tuple[tuple[Array, Array, Array], float]:
    """Interpolative bases of a level, and their squared error.

    The sample grows until it can be trusted. Where fresh columns show a larger error than the
    sample does, the sample's estimate is scaled by what was seen; if that is too much, it grows.
    """
    while True:
        with timer.phase("sampling"):
            sample = sampler.sample()
        with timer.phase("pivoted QR"):
            qr = tall.pivoted_qr(sample.S, max_rank)
        scale = 1.0
        while scale <= _LARGEST_SCALE:
            rank, error, trusted = choose_rank(
                sample, qr.tails, allowed / scale, max_rank, worst_node
            )
            error *= scale
            with timer.phase("interpolation"):
                bases = batched.interpolation(qr, rank, padding)
            if not trusted:
                break
            with timer.phase("sampling"):
                seen = sampler.check(*bases[:2]) if error <= allowed else 0.0
            if seen <= _SEEN_FACTOR * allowed:
                return bases, error
            scale *= seen / max(error, 0.1 * allowed)
        with timer.phase("sampling"):
            if not sampler.grow():
                return bases, error


def choose_rank(
    sample: Sample, tails: Array, allowed: float, max_rank: int, worst_node: bool = False
) -> tuple[int, float, bool]:
    """The level's common rank, its estimated squared error, and whether to trust both.

    Not trusted: the sample has too few columns for the rank, or shows none that is good enough.
    """
    error = _estimated_errors(sample, tails, worst_node)
    enough = np.nonzero(error <= allowed)[0]
    needed = int(enough[0]) if enough.size else len(error) - 1
    rank = min(needed, max_rank)
    columns_suffice = sample.S.shape[2] >= samples_for(rank) or error[rank] == 0
    trusted = columns_suffice and (bool(enough.size) or needed >= max_rank)
    return rank, float(error[rank]), bool(trusted)


def _estimated_errors(sample: Sample, tails: Array, worst_node: bool) -> Any:
    """(k + 1,) squared error of all nodes, or the worst, when each keeps k skeleton rows."""
    host = to_host(tails)
    host = np.where(host <= sample.noise[:, None], 0.0, host)
    host = host.max(axis=0) if worst_node else host.sum(axis=0)
    inflation = sample.inflation[: len(host)]
    with np.errstate(invalid="ignore"):
        error = np.where(host > 0, host * inflation, 0.0)
    # As many skeleton rows as samples leave nothing to judge by, unless the rows are all there.
    unknown = np.isinf(inflation) & (np.arange(len(host)) < sample.S.shape[1])
    return np.where(unknown, np.inf, error)


def fold_leaf_order(leaves: Any, D: Array, levels: list[Level]) -> Telescope:
    """Sort every leaf skeleton first, so that the leaf level needs no order of its own."""
    xp = namespace(D)
    if not levels:
        return Telescope(xp.asarray(leaves), D, ())
    first = levels[0]
    D = batched.permute_both(D, first.order)
    leaves = np.take_along_axis(leaves, to_host(first.order), axis=1)
    leaf_level = Level(None, first.T, first.B, first.ranks)
    return Telescope(xp.asarray(leaves), D, (leaf_level, *levels[1:]))

"""The bottom-up sweep: bases, skeletons and couplings of every level."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gpu_hodlr import batched, progress
from gpu_hodlr.bases.regions import FarField, NestedRegion, Outside
from gpu_hodlr.bases.samplers import LevelSampler, Sample, Sampler, samples_for
from gpu_hodlr.batched import tall
from gpu_hodlr.devices import Array, HostArray, HostIndex, namespace, to_host, to_hosts
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.operators import Operator
from gpu_hodlr.profiling import nvtx_range, phase
from gpu_hodlr.structures import Level, Multipole, Telescope

_SEEN_FACTOR = 2.0  # squared error seen on fresh columns, over the one allowed
_NEGLIGIBLE = 1e-3  # of a node's share of the squared error: how wrong a tail may be
_LARGEST_SCALE = 30.0  # of squared error estimates by what fresh columns show


def sweep(
    operator: Operator,
    region: Outside,
    sampler: Sampler,
    tolerance: float,
    max_rank: int,
    worst_node: bool = False,
) -> tuple[Telescope, tuple[int, ...]]:
    """Compress level by level (Martinsson, SIAM J. Matrix Anal. Appl. 32 (2011)).

    Returns the form, and the levels (root = 0) where `max_rank` stopped it short.

    A level may spend tolerance^2 / depth of squared Frobenius error over its nodes together; its
    common rank is the smallest that keeps to that, as the storage is the same for all its nodes.
    Above the leaves the rows of a level are skeletons, each of which stands for all rows that are
    interpolated from it: where the sampler says that their errors are as large as its own, the
    rows may spend their share of N alone.

    Args:
        operator: gives the couplings' entries.
        region: the tree, and the diagonal blocks of its leaves.
        sampler: at the leaves.
        tolerance: absolute Frobenius error aimed at.
        max_rank: cap of the rank.
        worst_node: hold every node, not all nodes together, to a level's share: the spectral
            norm of the error follows the worst node.
    """
    levels, capped = sweep_levels(operator, region, sampler, tolerance, max_rank, worst_node)
    return fold_leaf_order(region.tree.leaves, region.D, levels, region.owners), capped


def sweep_far(
    operator: Operator, region: FarField, sampler: Sampler, tolerance: float, max_rank: int
) -> tuple[Multipole, tuple[int, ...]]:
    """Compress level by level, as `sweep` does, up to the last level with far pairs.

    Args:
        operator: gives the couplings' entries.
        region: the tree, its near and far pairs, and the blocks of leaves and near pairs.
        sampler: of far fields, at the leaves.
        tolerance: absolute Frobenius error aimed at.
        max_rank: cap of the rank.
    """
    levels, capped = sweep_levels(operator, region, sampler, tolerance, max_rank)
    tree, lists, near, halo = region.tree, region.lists, region.near_blocks, region.near_halo
    folded = fold_leaf_order(tree.leaves, region.D, levels, region.owners)
    if levels:
        order = levels[0].order
        assert order is not None
        near = _permute_sides(near, halo.extend(order)[0], halo.pairs)
    far = tuple(lists.far[tree.depth - i] for i in range(len(levels)))
    form = Multipole(
        folded.leaves, folded.D, folded.levels, near, lists.near, far, owners=folded.owners
    )
    return form, capped


def sweep_levels(
    operator: Operator,
    region: NestedRegion,
    sampler: Sampler,
    tolerance: float,
    max_rank: int,
    worst_node: bool = False,
) -> tuple[list[Level], tuple[int, ...]]:
    """The levels from the leaves up to the region's top, and those where `max_rank` stopped them.

    Args:
        operator: gives the couplings' entries.
        region: says which nodes are coupled.
        sampler: at the leaves.
        tolerance: see `sweep`, as the rest.
        max_rank: cap of the rank.
        worst_node: see `sweep`.
    """
    tree, owners, top = region.tree, region.owners, region.top
    levels: list[Level] = []
    capped: list[int] = []
    rows = tree.leaves[owners.mine(tree.depth)]
    share = tolerance**2 / max(tree.depth + 1 - top, 1)
    least = 0.0
    for depth in range(tree.depth, top - 1, -1):
        with nvtx_range(f"level of {len(rows)} nodes"):
            allowed = max(share, least)
            if sampler.rows_stand_for_all:
                sampled = rows.shape[1] << depth
                allowed = max(share * min(1.0, sampled / tree.n), least)
            (order, T, ranks), reached = bases_of_level(
                sampler, rows < 0, allowed, max_rank, worst_node, owners, depth
            )
            if reached > allowed:
                if T.shape[2] >= max_rank:
                    capped.append(depth)
                # The error of this level is noise in the samples of the next: do not fit it there.
                least = reached
            rank = T.shape[2]
            with phase("sampling"):
                kept, needed = sampler.carried(order, T) if depth > top else ((), ())
            kept_rows, numerical = to_hosts(order[:, :rank], ranks)
            skeleton: Array = np.take_along_axis(rows, kept_rows, axis=1)
            skeleton, *brought = region.coupled(depth, skeleton, *needed)
            sides = skeleton[region.pairs(depth)]
            with phase("couplings"):
                B = operator.reader.blocks(*sides.swapaxes(0, 1))
            level = Level(order, T, B, tuple(numerical.tolist()))
            skeleton = owners.of_family(skeleton, depth)
            if depth > top:
                with phase("sampling"):
                    sampler.advance(level, skeleton, [*kept, *brought])
            levels.append(level)
            rows = to_host(skeleton).reshape(len(skeleton) // 2, 2 * rank)
            progress.tick()
    return with_ranks_of_all(levels, tree.depth, owners), tuple(capped)


def with_ranks_of_all(levels: list[Level], depth: int, owners: Ownership) -> list[Level]:
    """The levels with the ranks of all nodes."""
    every = owners.comm.share(
        [owners.once(np.array(level.ranks, np.int64), depth - i) for i, level in enumerate(levels)]
    )
    return [
        replace(level, ranks=tuple(np.concatenate(ranks).tolist()))
        for level, ranks in zip(levels, zip(*every, strict=True), strict=True)
    ]


def bases_of_level(
    sampler: LevelSampler,
    padding: HostArray,
    allowed: float,
    max_rank: int,
    worst_node: bool = False,
    owners: Ownership = ALONE,
    depth: int = 0,
) -> tuple[tuple[Array, Array, Array], float]:
    """Interpolative bases of a level, and their squared error.

    Bases are of this rank's nodes, the error is of all nodes of the level, `depth` below the root.

    The sample grows until it can be trusted. Where fresh columns show a larger error than the
    sample does, the sample's estimate is scaled by what was seen; if that is too much, it grows.
    """
    nodes = 1 if worst_node else max(1 << depth, len(padding))
    while True:
        sample, qr, noise, seen = _decomposed(sampler, max_rank, _NEGLIGIBLE * allowed / nodes)
        with phase("pivoted QR"):
            tail = owners.max(seen.max(axis=0)) if worst_node else owners.sum_of_nodes(seen, depth)
        scale = 1.0
        while scale <= _LARGEST_SCALE:
            rank, error, trusted = choose_rank(sample, tail, allowed / scale, max_rank)
            error *= scale
            with phase("interpolation"):
                bases = batched.interpolation(qr, rank, padding, noise)
            if not trusted:
                break
            with phase("sampling"):
                missed = sampler.check(*bases[:2]) if error <= allowed else 0.0
            if missed <= _SEEN_FACTOR * allowed:
                return bases, error
            scale *= missed / max(error, 0.1 * allowed)
        with phase("sampling"):
            if not sampler.grow():
                return bases, error


def _decomposed(
    sampler: LevelSampler, max_rank: int, negligible: float
) -> tuple[Sample, batched.PivotedQR, Array, HostArray]:
    """The last of a level's samples; of all, pivoted QR, noise and `seen_tails`."""
    parts: list[batched.PivotedQR] = []
    noise: list[Array] = []
    seen: list[HostArray] = []
    samples = sampler.samples()
    with phase("sampling"):
        sample = next(samples)
    while True:
        with phase("pivoted QR"):
            parts.append(tall.pivoted_qr(sample.S, max_rank, negligible))
            noise.append(sample.noise)
            seen.append(seen_tails(sample, parts[-1].tails))
        with phase("sampling"):
            following = next(samples, None)
        if following is None:
            together = namespace(noise[0]).concatenate(noise)
            return sample, batched.joined(parts), together, np.concatenate(seen)
        sample = following


def choose_rank(
    sample: Sample, tail: Any, allowed: float, max_rank: int
) -> tuple[int, float, bool]:
    """The level's common rank, its estimated squared error, and whether to trust both.

    tail is the sum of `seen_tails` over all nodes, or the largest.

    Not trusted: the sample has too few columns for the rank, or shows none that is good enough.
    Few columns do where they show a matrix of that rank. Rounding, which `error` leaves out, must
    not stand for it: as many skeleton rows as columns always leave no more than that.
    """
    error, with_rounding = (_estimated_errors(sample, each) for each in tail)
    enough = np.nonzero(error <= allowed)[0]
    needed = int(enough[0]) if enough.size else len(error) - 1
    rank = min(needed, max_rank)
    columns_suffice = sample.S.shape[2] >= samples_for(rank) or with_rounding[rank] <= allowed
    trusted = columns_suffice and (bool(enough.size) or needed >= max_rank)
    return rank, float(error[rank]), bool(trusted)


def seen_tails(sample: Sample, tails: Array) -> HostArray:
    """(nodes, 2, k + 1) squared error in the samples, without and with rounding; a host array."""
    xp = namespace(tails)
    return to_host(xp.stack([xp.where(tails <= sample.noise[:, None], 0.0, tails), tails], axis=1))


def _estimated_errors(sample: Sample, tail: HostArray) -> HostArray:
    """(k + 1,) squared error of all nodes, or the worst, when each keeps k skeleton rows."""
    inflation = sample.inflation[: len(tail)]
    with np.errstate(invalid="ignore"):
        error = np.where(tail > 0, tail * inflation, 0.0)
    # As many skeleton rows as samples leave nothing to judge by, unless the rows are all there.
    unknown = np.isinf(inflation) & (np.arange(len(tail)) < sample.S.shape[1])
    return np.where(unknown, np.inf, error)


def fold_leaf_order(
    leaves: HostIndex, D: Array, levels: list[Level], owners: Ownership = ALONE
) -> Telescope:
    """Sort every leaf skeleton first, so that the leaf level needs no order of its own."""
    xp = namespace(D)
    if not levels:
        return Telescope(xp.asarray(leaves), D, ())
    first = levels[0]
    assert first.order is not None
    D = batched.permute_both(D, first.order)
    depth = (len(leaves) - 1).bit_length()
    leaves = np.take_along_axis(leaves[owners.mine(depth)], to_host(first.order), axis=1)
    owners = owners.respread(to_host(owners.gather(leaves, depth)))
    leaf_level = Level(None, first.T, first.B, first.ranks)
    leaves = xp.asarray(owners.local(leaves))
    return Telescope(leaves, D, (leaf_level, *levels[1:]), owners=owners)


def _permute_sides(blocks: Array, order: Array, pairs: HostIndex) -> Array:
    """Rows of each block K[a, b] in the order of leaf a, columns in that of leaf b."""
    xp = namespace(blocks)
    row_order, column_order = (order[xp.asarray(side)] for side in pairs.T)
    rows = batched.permute_rows(blocks, row_order).swapaxes(1, 2)
    columns = batched.permute_rows(xp.ascontiguousarray(rows), column_order)
    return xp.ascontiguousarray(columns.swapaxes(1, 2))

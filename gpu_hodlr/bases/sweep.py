"""The bottom-up sweep: bases, skeletons and couplings of every level."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpu_hodlr import batched, progress
from gpu_hodlr.bases.regions import FarField, NestedRegion, Outside
from gpu_hodlr.bases.samplers import LevelSampler, Sample, Sampler, samples_for, trusted_rank
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
            del kept, needed, brought  # the next level's samples take their place
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

    Samples grow until they can be trusted: those of the nodes that show more than a node's share of
    the error (`short_of`). Where fresh columns show a larger error than the
    samples do, the samples' estimate is scaled by what was seen; if that is too much, nodes grow
    that show more than their share of it.
    """
    share = allowed / (1 if worst_node else max(1 << depth, len(padding)))
    known: _Decomposed | None = None
    while True:
        known = _decomposed(sampler, padding.shape[1], max_rank, _NEGLIGIBLE * share, known)
        with phase("pivoted QR"):
            errors = (
                owners.max(known.errors.max(axis=0))
                if worst_node
                else owners.sum_of_nodes(known.errors, depth)
            )
        scale, seen = 1.0, np.zeros(len(padding))
        while scale <= _LARGEST_SCALE:
            rank, error, trusted = _rank_for(errors, sampler.num_samples, allowed / scale, max_rank)
            error *= scale
            with phase("interpolation"):
                bases = batched.interpolation(known.qr, rank, padding, known.noise)
            if not trusted:
                break
            with phase("sampling"):
                fresh = sampler.check(*bases[:2]) if error <= allowed else None
                seen = np.zeros(len(padding)) if fresh is None else fresh
                missed = 0.0 if fresh is None else float(owners.sum_of_nodes(fresh, depth))
            if missed <= _SEEN_FACTOR * allowed:
                return bases, error
            scale *= missed / max(error, 0.1 * allowed)
        short = known.short_of(share / scale, sampler.num_samples) | (seen > share)
        if not owners.sum_of_nodes(short.astype(np.float64), depth):
            short[:] = True  # each keeps its share, and together they do not: by rounding
        with phase("sampling"):
            columns = sampler.num_samples
            if sampler.together:
                known = None  # of all nodes anew: there is room for the columns
            if not sampler.grow(short):
                return bases, error
        if known is not None and sampler.sampled is not None:
            known.settle(~short, columns)


@dataclass
class _Decomposed:
    """Pivoted QR of a level's samples, of some nodes with fewer columns than of others.

    Attributes:
        qr: with rows of zeros in R where a node has fewer.
        noise: (nodes,) see `Sample`.
        errors: (nodes, 2, k + 1) estimated squared errors at every rank, without and with rounding.
    """

    qr: batched.PivotedQR
    noise: Array
    errors: HostArray

    def short_of(self, share: float, columns: int) -> HostArray:
        """(nodes,) which exceed a share of the squared error at half the rank columns are good for.

        At all of it, what regression estimates is several times the error: once columns are read,
        nodes that need about as many as the others have them too.
        """
        last = self.errors.shape[2] - 1
        found: HostArray = ~(self.errors[:, 0, min(trusted_rank(columns) // 2, last)] <= share)
        return found

    def settle(self, nodes: HostArray, columns: int) -> None:
        """Keep nodes at the rank that so many columns can be trusted for, whatever the level's."""
        most = trusted_rank(columns)
        [places] = np.nonzero(nodes)
        if most < self.errors.shape[2] - 1:
            self.errors[places, :, most:] = self.errors[places, :, most : most + 1]
            self.qr.r[namespace(self.qr.r).asarray(places), most:] = 0  # no pivot any more

    def widened(self, steps: int) -> _Decomposed:
        """With room for as many steps of QR as nodes of more columns take."""
        nodes, k, m = self.qr.r.shape
        xp = namespace(self.qr.r)
        r = xp.zeros((nodes, steps, m), self.qr.r.dtype)
        tails = xp.zeros((nodes, steps + 1), np.float64)
        r[:, :k], tails[:, : k + 1] = self.qr.r, self.qr.tails
        last = np.repeat(self.errors[:, :, -1:], steps - k, axis=2)
        errors = np.concatenate([self.errors, last], axis=2)
        return _Decomposed(batched.PivotedQR(self.qr.pivots, r, tails), self.noise, errors)

    def replace(self, grown: _Decomposed, sampled: HostIndex) -> None:
        """Take what is known anew of some nodes."""
        places = namespace(self.noise).asarray(sampled)
        qr, new = self.qr, grown.qr
        qr.pivots[places], qr.r[places], qr.tails[places] = new.pivots, new.r, new.tails
        self.noise[places], self.errors[sampled] = grown.noise, grown.errors


def _decomposed(
    sampler: LevelSampler,
    rows: int,
    max_rank: int,
    negligible: float,
    known: _Decomposed | None,
) -> _Decomposed:
    """Pivoted QR of the samples there are now, put into what is known of the other nodes."""
    parts: list[batched.PivotedQR] = []
    noise: list[Array] = []
    errors: list[HostArray] = []
    samples = sampler.samples()
    while True:
        with phase("sampling"):
            sample = next(samples, None)
        if sample is None:
            break
        with phase("pivoted QR"):
            in_sample = negligible / float(sample.inflation[0])
            parts.append(tall.pivoted_qr(sample.S, max_rank, in_sample))
            noise.append(sample.noise)
            errors.append(_estimated_errors(sample, seen_tails(sample, parts[-1].tails)))
    if not parts:  # no node of this rank grows; it has as many ranks to tell of as the others
        assert known is not None
        return known.widened(min(rows, sampler.num_samples))
    together = namespace(noise[0]).concatenate(noise)
    found = _Decomposed(batched.joined(parts), together, np.concatenate(errors))
    sampled = sampler.sampled
    if known is None or sampled is None:
        return found
    known = known.widened(found.qr.r.shape[1])
    known.replace(found, sampled)
    return known


def choose_rank(
    sample: Sample, tail: HostArray, allowed: float, max_rank: int
) -> tuple[int, float, bool]:
    """The level's common rank, its estimated squared error, and whether to trust both.

    tail is the sum of `seen_tails` over all nodes, or the largest.

    Not trusted: the sample has too few columns for the rank, or shows none that is good enough.
    Few columns do where they show a matrix of that rank. Rounding, which `error` leaves out, must
    not stand for it: as many skeleton rows as columns always leave no more than that.
    """
    return _rank_for(_estimated_errors(sample, tail), sample.S.shape[2], allowed, max_rank)


def _rank_for(errors: Any, columns: int, allowed: float, max_rank: int) -> tuple[int, float, bool]:
    """See `choose_rank`; of estimated errors (2, k + 1), without and with rounding."""
    error, with_rounding = errors
    enough = np.nonzero(error <= allowed)[0]
    needed = int(enough[0]) if enough.size else len(error) - 1
    rank = min(needed, max_rank)
    exact = error[rank] == 0 and with_rounding[rank] <= allowed
    columns_suffice = columns >= samples_for(rank) or exact
    trusted = columns_suffice and (bool(enough.size) or needed >= max_rank)
    return rank, float(error[rank]), bool(trusted)


def seen_tails(sample: Sample, tails: Array) -> HostArray:
    """(nodes, 2, k + 1) squared error in the samples, without and with rounding; a host array."""
    xp = namespace(tails)
    return to_host(xp.stack([xp.where(tails <= sample.noise[:, None], 0.0, tails), tails], axis=1))


def _estimated_errors(sample: Sample, tails: HostArray) -> HostArray:
    """(..., k + 1) squared errors where k skeleton rows are kept, of `seen_tails`."""
    inflation = sample.inflation[: tails.shape[-1]]
    with np.errstate(invalid="ignore"):
        error = np.where(tails > 0, tails * inflation, 0.0)
    # As many skeleton rows as samples leave nothing to judge by, unless the rows are all there.
    unknown = np.isinf(inflation) & (np.arange(len(inflation)) < sample.S.shape[1])
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

"""Building the HODLR form: top level first, all siblings of a level at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr import batched, progress, streams
from gpu_hodlr.bases import (
    ENTRY_LIMIT,
    EntrySampler,
    LevelSampler,
    ProductSampler,
    Sibling,
    bases_of_level,
    real_blocks,
    samples_for,
)
from gpu_hodlr.batched.tall import inner, orthonormal, pivoted_qr
from gpu_hodlr.compressed import HODLRMatrix
from gpu_hodlr.devices import (
    Array,
    HostIndex,
    check_memory,
    device_of,
    namespace,
    namespace_on,
    to_host,
    to_hosts,
)
from gpu_hodlr.distributed import Ownership, Siblings
from gpu_hodlr.operators import FreshSketch, ProductColumns, ProductRows
from gpu_hodlr.profiling import nvtx_range, phase
from gpu_hodlr.schemes.job import Job
from gpu_hodlr.schemes.prediction import BlockSampler, level_ranks, real
from gpu_hodlr.schemes.scheme import Scheme, Sizes
from gpu_hodlr.structures import HODLR
from gpu_hodlr.structures.hodlr_blocks import add_low_rank, columns_of

_SAMPLED = 0.1  # of the squared error is for interpolation, the rest for truncation
_SLACK = 2.0  # times the error of the levels above that a peeled sample shows


class HODLRBuild:
    """HODLR from products, entries, or both.

    K_ab ~= L_a R_b^T for siblings a (the even node) and b: L_a = P [I; T] interpolates the rows of
    a sample of K_ab, R_b = K(b, skeleton of a) are entries. Without entries L_a is made
    orthonormal and R_b = K_ba L_a is another product, peeled like the sample: projection onto
    orthonormal columns does not amplify the error of the levels above. Interpolation takes about
    half as many columns again as needed: at last every level is truncated.

    Where siblings span ranks, these gather what L_a and its rank are made of, and keep their rows.
    """

    neighbour_recall = None

    def __init__(self, job: Job) -> None:
        self._job = job
        self._num_samples = self._missed = 0
        self._entry_sampler: EntrySampler | None = None
        self._D: Array | None = None
        self._cap = samples_for(job.max_rank)  # of interpolation; truncation keeps to max_rank
        start = job.columns[0]
        self._limit = samples_for(min(self._cap, max(1, job.tree.n // 2)))
        if job.entries:
            with phase("diagonal blocks"):
                leaves = job.tree.leaves[job.owners.mine(job.tree.depth)]
                self._D = job.operator.reader.blocks(leaves, leaves)
        if job.sketch is None and job.tree.depth:
            with phase("sampling"):
                region = Sibling(job.tree, job.owners, job.points)
                self._entry_sampler = EntrySampler(
                    job.operator.reader, region, start, ENTRY_LIMIT * self._limit, job.seed
                )

    @property
    def num_samples(self) -> int:
        """Most columns of a level's sample."""
        return self._num_samples

    def run(self, tolerance: float, first: bool) -> tuple[HODLR, tuple[int, ...]]:
        """See `Build`.

        A level may spend tolerance^2 / depth of squared Frobenius error, half of it in K_ab and
        half in K_ba. A peeled sample shows the error of the levels above as well, of which the
        level's even rows and odd columns hold a quarter: it is not to be fitted.
        """
        job, sampler = self._job, self._entry_sampler
        tree, operator, owners = job.tree, job.operator, job.owners
        if sampler is not None:
            if not first:  # as of nested bases
                for _ in range(1 if self._missed == 0 else 3):
                    sampler.widen()
                self._missed += 1
            with phase("sampling"):
                sampler.reset()
        normal = batched.normal_source((job.seed, streams.HODLR_COLUMNS), operator.device)
        total = tolerance**2 / max(tree.depth, 1) / 2
        share = _SAMPLED * total
        leaves = owners.local(tree.leaves[owners.mine(tree.depth)])
        above = _Above(operator, leaves, owners)
        out_of_reach, seen = False, 0.0
        for level in range(1, tree.depth + 1):
            with nvtx_range(f"level of {1 << level} nodes"):
                siblings = Siblings(owners, level)
                left = tree.nodes(level)[0::2][siblings.pairs]
                with phase("sampling"):
                    current = self._sampler_of(level, above, normal)
                # After a cap the aim is out of reach: the lower levels do what the cap allows.
                allowed = share if out_of_reach else share + _SLACK * seen / 2
                (order, T, _), reached = bases_of_level(
                    current, left < 0, allowed, self._cap,
                    owners=siblings.dealt, depth=level - 1,
                )  # fmt: skip
                out_of_reach = out_of_reach or (reached > allowed and T.shape[2] >= self._cap)
                if job.sketch is not None:
                    seen += max(reached - seen / 2, 0.0)
                self._num_samples = max(self._num_samples, current.num_samples)
                with phase("couplings"):
                    above.append(self._bases(level, left, order, T, above))
                progress.tick()
        D = self._D
        if D is None:
            with phase("diagonal blocks"):
                D = self._diagonal_blocks(above)
        with phase("truncation"):
            U, widths, ranks, capped = _truncated(
                above, tree.leaves.shape[1], total - share, job.max_rank, owners
            )
        form = HODLR(namespace(D).asarray(leaves), D, U, widths, ranks, owners=owners)
        return form, capped

    def _sampler_of(self, level: int, above: _Above, normal: batched.NormalSource) -> LevelSampler:
        job, operator = self._job, self._job.operator
        if self._entry_sampler is not None:
            if level > 1:
                self._entry_sampler.begin(level)
            return self._entry_sampler
        region, start = Sibling(job.tree, job.owners, above=above), job.columns[0]
        mask = region.where(level, operator.dtype, operator.device)
        fresh = FreshSketch(operator, job.owners, normal, start, mask)
        return ProductSampler(fresh, region, self._limit, level)

    def _bases(self, level: int, left: Any, order: Array, T: Array, above: _Above) -> Array:
        """L and R of a level, (this rank's rows in tree order, r); `left` are the even nodes."""
        job = self._job
        operator, owners, r = job.operator, job.owners, T.shape[2]
        siblings = Siblings(owners, level)
        xp = namespace(T)
        unit = batched.identities(len(T), r, T)
        L = batched.unpermute_rows(batched.join_rows(unit, T), order)
        L *= xp.asarray(left >= 0)[:, :, None]  # where r exceeds the real rows
        index = siblings.index(job.tree.leaves)
        if job.entries:
            L = siblings.own_even(L)
            skeleton = siblings.to_odd(np.take_along_axis(left, to_host(order[:, :r]), axis=1))
            right = siblings.odd(index)
            R = operator.reader.blocks(right, skeleton) if len(right) else L[:0]
        else:
            L = siblings.own_even(orthonormal(L, job.tree.leaves.shape[1])[0])
            index = owners.local(index)
            v = batched.scatter_rows(L, siblings.even(index), len(owners.rows.mine))
            product = self._product(r, lambda part: owners.to_columns(v, part))
            R = batched.gather_rows(product.y, siblings.odd(index))
            R -= siblings.odd(siblings.by_pieces(above(product.v)))
        return siblings.merged(L, R).reshape(len(above.U), r)

    def _product(self, num: int, columns: Callable[[slice], Array]) -> ProductRows:
        """See `ProductColumns.shared`."""
        operator, owners = self._job.operator, self._job.owners
        return ProductColumns.shared(operator, num, columns, owners.comm).to_rows(owners)

    def _diagonal_blocks(self, above: _Above) -> Array:
        """The leaves' blocks from one product: column c holds the c-th unit vector of each leaf."""
        leaves, xp = self._job.tree.leaves, namespace(above.U)

        def units(part: slice) -> Array:
            v = xp.zeros((self._job.tree.n, part.stop - part.start), above.U.dtype)
            rows = leaves[:, part]
            leaf, column = np.nonzero(rows >= 0)
            v[xp.asarray(rows[leaf, column]), xp.asarray(column)] = 1
            return v

        product = self._product(leaves.shape[1], units)
        D = batched.gather_rows(product.y, above.leaves) - above(product.v)
        return (D + D.swapaxes(1, 2)) / 2 * real_blocks(above.leaves < 0, D)


class _Above:
    """The levels built so far: v (N, k) -> the product of their low-rank blocks, (leaves, m, k).

    On many ranks leaves are this rank's, with places in its rows for indices, and v these rows.
    """

    def __init__(self, operator: Any, leaves: HostIndex, owners: Ownership) -> None:
        self.leaves, self._owners = leaves, owners
        self.U = namespace_on(operator.device).zeros((leaves.size, 0), operator.dtype)
        self.widths: list[int] = []

    def append(self, bases: Array) -> None:
        """Add a level.

        Raises:
            MemoryEstimateError: copies of the bases, longer now and truncated at last, do not fit.
        """
        copies = 2 * (self.U.nbytes + bases.nbytes)
        check_memory(copies, "the bases of a HODLR form", "max_rank", device_of(bases))
        self.U = namespace(bases).concatenate([self.U, bases], axis=1)
        self.widths.append(bases.shape[1])

    def __call__(self, v: Array) -> Array:
        x = batched.gather_rows(v, self.leaves)
        y = namespace(x).zeros_like(x)
        return add_low_rank(self.U, tuple(self.widths), x, y, self._owners)


def _truncated(
    above: _Above, chunk: int, allowed: float, max_rank: int, owners: Ownership
) -> tuple[Array, tuple[int, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """The bases with as few columns as a squared error `allowed` in all K_ab of a level lets be.

    Returns them, their widths and the numerical ranks of the blocks, as `HODLR` has them, and the
    levels where `max_rank` columns do not suffice.
    """
    xp = namespace(above.U)
    kept, found, capped = [above.U[:, :0]], [], []
    blocks = above.U.reshape(*above.leaves.shape, above.U.shape[1])
    for level, columns in enumerate(columns_of(tuple(above.widths)), 1):
        siblings = Siblings(owners, level)
        both = siblings.whole(siblings.by_pieces(blocks)[:, :, columns])
        L, R, missed = _truncate(*both, chunk, allowed, max_rank, siblings)
        if missed > allowed:
            capped.append(level)
        kept.append(siblings.own(L, R).reshape(len(above.U), L.shape[2]))
        found.append(siblings.dealt.gather((R != 0).any(axis=1).sum(axis=1), level - 1))
    widths = tuple(a.shape[1] for a in kept[1:])
    ranks = tuple(tuple(of_level.tolist()) for of_level in to_hosts(*found))
    return xp.concatenate(kept, axis=1), widths, ranks, tuple(capped)


def _truncate(
    L: Array, R: Array, chunk: int, allowed: float, max_rank: int, siblings: Siblings
) -> tuple[Array, Array, float]:
    """L R^T ~= Q B (P B)^T for L = Q S^T, P = R S and the first columns of an orthogonal B.

    B comes from pivoted QR of P^T and a step of QR iteration on B^T P^T P B, which takes its
    leading columns close to the dominant right singular vectors of P; what they miss is the
    norm of the other columns of P B. Columns of Q B have norm 1, or 0 where Q has zero columns.
    Beyond a block's numerical rank they are 0 on both sides: the factor needs independent ones.
    The third is the squared error, which exceeds `allowed` where `max_rank` columns are too few.
    """
    r = L.shape[2]
    if not r:
        return L, R, 0.0
    xp = namespace(L)
    # Of a node with fewer rows L has columns of zeros: R there is what the levels above missed.
    R = R * (L != 0).any(axis=1)[:, None]
    Q, S, info = orthonormal(L, chunk)
    info = siblings.dealt.gather(info, siblings.level - 1)
    P = batched.matmul(R, S)
    best = batched.permute_rows(P, xp.ascontiguousarray(pivoted_qr(P).pivots[:, :r]))
    B, _ = batched.full_qr(xp.ascontiguousarray(best.swapaxes(1, 2)))
    V = batched.matmul(P, B)
    B = batched.matmul(B, batched.full_qr(inner(V, V, chunk))[0])
    V = batched.matmul(P, B)
    energy = (V * V).sum(axis=1, dtype=np.float64)  # (pairs, r)
    noise = batched.squared_rounding(energy.sum(axis=1, keepdims=True), V.dtype)
    QB = batched.matmul(Q, B)
    real = (energy > noise) & ((QB * QB).sum(axis=1) > 0.5)
    info, energy = to_hosts(info.astype(np.float64), energy * real)
    if info.any():  # nothing is lost but storage, up to the cap
        return L[:, :, :max_rank], R[:, :, :max_rank], math.inf if r > max_rank else 0.0
    total = siblings.dealt.sum_of_nodes(energy, siblings.level - 1)
    missed = np.append(np.cumsum(total[::-1])[::-1], 0.0)
    rank = min(int(np.argmax(missed <= allowed)), max_rank)
    real = real[:, None, :rank]
    return QB[:, :, :rank] * real, V[:, :, :rank] * real, float(missed[rank])


def _predict(sampler: BlockSampler, tolerance: float) -> float | None:
    def siblings(nodes: HostIndex, t: int) -> tuple[Any, Any]:
        return real(nodes[t]), real(nodes[t ^ 1])

    tree = sampler.job.tree
    ranks = level_ranks(sampler, tolerance, range(1, tree.depth + 1), siblings)
    if ranks is None:
        return None
    return float(tree.leaves.size * (tree.leaves.shape[1] + sum(ranks))) / tree.n**2


def _memory(sizes: Sizes) -> float:
    """Diagonal blocks, or products that show them; a level's sample; all bases, and copies."""
    blocks = sizes.leaf if sizes.sampling.entries else 3 * sizes.leaf
    samples = (6.0 if sizes.sampling.products else 2.0) * sizes.columns
    return blocks + samples + 6.0 * sizes.depth * sizes.typical_rank


SCHEME = Scheme(
    "hodlr", HODLR, HODLRMatrix, HODLRBuild, _predict, _memory,
    aim=0.8,  # truncated to what it may miss, which nothing amplifies
)  # fmt: skip

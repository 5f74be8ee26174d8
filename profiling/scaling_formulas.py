"""Work, messages and seconds of an HSS matrix spread over P ranks, by formula.

Seconds of a job on P ranks:

    max(flops / peak, bytes / bandwidth) / share + levels * launch
    + sent / P / network + collectives * log2(P) * latency

flops and bytes are those of the busiest rank: its nodes of the levels from the cut down (the level
whose nodes are dealt out), and above it those that hold its own. The floors of product, factor and
solve are those of roofline.py, of compress those of its primitives. `share` is the floor over the
measured seconds on one rank.

Bytes sent by all ranks together; on a level l of rank r from the cut up they lack b <= 2 P siblings
(`Deal.lacking`), v bytes a number:

    product, solve  sum b r k v                    k columns
    factor          sum b r^2 v
    compress        2 (s + p) N v (P - 1) / P      random columns and products with them, of sketch
                                                   and error probe (p): by columns at first, by rows
                                                   then; with entries alone p N v (P - 1) / P
                    + sum b r (2 s v + 8)          samples and skeletons of siblings
                    + sum b r p v                  the product with the error probe
                    + sum q (k + 1) v (P - 1)      squared errors by rank, k at most, of the cut's
                                                   nodes, or of a level's above it: q
                    + leaves m 8 (P - 1)           the rows in their final order

An operator of which only entries are read has no sketch and no samples to send. What compress sends
beyond this formula (orderings, further passes) is scaled by what was counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import roofline

from gpu_hodlr.distributed import Deal

JOBS = ("compress", "product", "factor", "solve")
PROBES, PROBED_ROWS = 10, 128  # columns of compress's error probe: products, or entries alone
DTYPE = np.dtype(np.float64)
V = DTYPE.itemsize
COLLECTIVES = {"compress": 60.0, "product": 5.0, "factor": 10.0, "solve": 5.0}


@dataclass(frozen=True)
class Matrix:
    """The shape of a compressed matrix, and what its entries and products cost.

    Attributes:
        n: N.
        leaf: rows of a leaf, padding included.
        ranks: padded rank of every level, leaf level first.
        samples: columns of the sample.
        max_rank: the cap.
        product_flops: operations of an exact product, a row and column; 0 where only entries are
            read.
        entry_flops: operations of an entry.
        dense: whether product_flops grow with N.
    """

    n: int
    leaf: int
    ranks: tuple[int, ...]
    samples: int
    max_rank: int
    product_flops: float
    entry_flops: float
    dense: bool = False

    @property
    def probes(self) -> int:
        """Columns of the error probe."""
        return PROBES if self.product_flops else min(PROBED_ROWS, self.n)

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return len(self.ranks)

    def grown(self, n: int) -> Matrix:
        """The same at another N: leaves as full as here, new levels of the largest rank."""
        leaves = max(2.0, n / self.n * 2**self.depth)
        depth = math.ceil(math.log2(leaves) - 1e-9)
        ranks = (self.ranks + (max(self.ranks),) * depth)[:depth]
        flops = self.product_flops * (n / self.n if self.dense else 1.0)
        return replace(self, n=n, ranks=ranks, product_flops=flops)

    def rank_at(self, level: int) -> int:
        """The padded rank of a level >= 1."""
        return self.ranks[self.depth - level]

    def part(self, ranks: int) -> Any:
        """What the busiest rank works on, as a telescope whose arrays take no memory."""
        deal = Deal(self.depth, ranks)

        def most(nodes: Callable[[int, int], slice], level: int) -> int:
            every = (nodes(level, rank) for rank in range(ranks))
            return max(part.stop - part.start for part in every)

        rows, levels = self.leaf, []
        for index, r in enumerate(self.ranks):
            level = self.depth - index
            q, pairs = most(deal.mine, level), most(deal.family, level) // 2
            levels.append(SimpleNamespace(
                order=_hollow((q, rows), np.int64) if index else None,
                T=_hollow((q, max(rows - r, 0), r)), B=_hollow((pairs, r, r)), rank=r,
            ))  # fmt: skip
            rows = 2 * r
        leaves = most(deal.mine, self.depth)
        D = _hollow((leaves, self.leaf, self.leaf))
        arrays = [D, *(a for level in levels for a in (level.T, level.B))]
        return SimpleNamespace(
            n=-(-self.n * leaves >> self.depth), D=D, levels=levels, arrays=lambda: arrays,
            leaves=_hollow((leaves, self.leaf), np.int64),
        )  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What a rank reaches, and the network between ranks.

    Attributes:
        flops: operations a second, at most.
        bandwidth: bytes a second of its memory, at most.
        network: bytes a second a rank sends.
        latency: seconds of a message.
        launch: seconds a level of the tree takes at least.
        share: by job, of the floor that is reached.
        collectives: by job, messages one after another.
        excess: what compress sends over the formula.
    """

    flops: float
    bandwidth: float
    network: float
    latency: float
    launch: float = 0.0
    share: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(JOBS, 1.0))
    collectives: Mapping[str, float] = field(default_factory=lambda: COLLECTIVES)
    excess: float = 1.0


def _hollow(shape: tuple[int, ...], dtype: Any = DTYPE) -> Any:
    """An array with a shape and a number of bytes, and one number in memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


# ---- Formulas -------------------------------------------------------------------------------


def compress_cost(matrix: Matrix, ranks: int) -> roofline.Cost:
    """Floors of the busiest rank: products, entries, lifted samples, QR and interpolation."""
    t, s = matrix.part(ranks), matrix.samples
    probed = -(-matrix.probes // ranks) * matrix.n
    flops = (-(-s // ranks) * matrix.n + probed) * matrix.product_flops
    entries = t.D.size + sum(level.B.size for level in t.levels)
    entries += 0 if matrix.product_flops else probed
    moved = float(matrix.n * -(-s // ranks) * V) if matrix.product_flops else 0.0  # drawn
    lifted = 2.0 * t.D.size * s
    for level in t.levels:
        q, e, r = level.T.shape
        m, k = e + r, min(r, s)
        if not matrix.product_flops:
            entries += q * m * s
        lifted += s * (2.0 * level.T.size + 4.0 * level.B.size)
        flops += q * (4.0 * s * m * k - 2.0 * (s + m) * k**2 + 4 * k**3 / 3 + e * r**2)
        moved += 2.0 * q * m * s * V
    if matrix.product_flops:
        flops += lifted
    stored = sum(a.nbytes for a in t.arrays())
    measuring = roofline.product_cost(t, matrix.probes, DTYPE)
    return measuring + roofline.Cost(stored + moved, flops + entries * matrix.entry_flops)


def costs(matrix: Matrix, ranks: int, columns: int) -> dict[str, roofline.Cost]:
    """By job, what the busiest rank has to do at least."""
    t = matrix.part(ranks)
    return {
        "compress": compress_cost(matrix, ranks),
        "product": roofline.product_cost(t, columns, DTYPE),
        "factor": roofline.factor_cost(t, DTYPE),
        "solve": roofline.solve_cost(t, columns, DTYPE),
    }


def sent_bytes(matrix: Matrix, ranks: int, columns: int) -> dict[str, float]:
    """By job, what all ranks send together."""
    if ranks == 1:
        return dict.fromkeys(JOBS, 0.0)
    deal, s = Deal(matrix.depth, ranks), matrix.samples
    sketched = s if matrix.product_flops else 0
    rows = squares = with_samples = 0.0
    for level in range(1, deal.cut + 1):
        r, lacking = matrix.rank_at(level), deal.lacking(level)
        rows += lacking * r
        squares += lacking * r**2
        with_samples += lacking * r * (2 * sketched * V + 8)
    compress = with_samples + rows * matrix.probes * V
    spread = 2.0 * (s + matrix.probes) if sketched else matrix.probes
    compress += spread * matrix.n * V * (ranks - 1) / ranks
    height = matrix.leaf
    for index, r in enumerate(matrix.ranks):
        nodes = 1 << min(matrix.depth - index, deal.cut)
        compress += nodes * (min(height, s, matrix.max_rank) + 1.0) * V * (ranks - 1)
        height = 2 * r
    compress += float(matrix.leaf << matrix.depth) * 8 * (ranks - 1)
    vectors = rows * columns * V
    return {"compress": compress, "product": vectors, "factor": squares * V, "solve": vectors}


def product_bound(matrix: Matrix, ranks: int, columns: int) -> float:
    """Bytes that a product may send at most: 4 r k v P log2(P)."""
    return 4.0 * max(matrix.ranks, default=0) * columns * V * ranks * math.log2(ranks)


def floor_seconds(cost: roofline.Cost, flops: float, bandwidth: float) -> float:
    return max(cost.flops / flops, cost.bytes / bandwidth)


def predicted(matrix: Matrix, machine: Machine, ranks: int, columns: int) -> dict[str, float]:
    """By job, seconds on so many ranks."""
    sent = sent_bytes(matrix, ranks, columns)
    sent["compress"] *= machine.excess
    seconds = {}
    for job, cost in costs(matrix, ranks, columns).items():
        work = floor_seconds(cost, machine.flops, machine.bandwidth)
        work = work / machine.share[job] + matrix.depth * machine.launch
        sending = sent[job] / ranks / machine.network
        waiting = machine.collectives[job] * math.ceil(math.log2(ranks)) * machine.latency
        seconds[job] = work + sending + waiting
    return seconds


def bytes_of_rank(matrix: Matrix, ranks: int) -> float:
    """Bytes of a rank during compress: blocks, samples, and the sketch by columns and by rows."""
    t, s = matrix.part(ranks), matrix.samples
    samples = (6.0 if matrix.product_flops else 1.0) * t.n * s * V
    return sum(a.nbytes for a in t.arrays()) + samples

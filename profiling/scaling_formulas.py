"""Work, messages and seconds of an HSS matrix spread over P ranks, by formula.

Seconds of a job on P ranks:

    max(flops / peak, bytes / bandwidth) / share + levels * launch
    + sent / P / network + collectives * log2(P) * latency

flops and bytes are those of the busiest rank: its nodes of the levels from the cut down (the level
whose nodes are dealt out), and all nodes above it, which every rank repeats. The floors of product,
factor and solve are those of roofline.py, of compress those of its primitives. `share` is the floor
over the measured seconds on one rank.

Bytes sent by all ranks together; the cut has c >= P nodes of rank r, v bytes a number:

    product, solve  c r k v (P - 1)                k columns
    factor          c r^2 v (P - 1)
    compress        (s + p) N v (P - 1) / P        sketch, p columns of the error probe: spread by
                                                   columns at first, by rows then
                    + 2 c r s v (P - 1)            samples at the cut
                    + leaves m 8 (P - 1)           the rows in their final order
                    + sum q (k + 1) v (P - 1)      errors of the levels' q nodes by rank, k at most
                    + c r (p v + 8) (P - 1)        error probe and skeletons at the cut

An operator of which only entries are read has no sketch and no samples to send. What compress sends
beyond this formula (orderings, further passes) is scaled by what was counted. A share of its
seconds on one rank, that of the ordering, is taken to be repeated on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import roofline

from gpu_hodlr.distributed.ownership import cut_level

JOBS = ("compress", "product", "factor", "solve")
PROBES, PROBED_ROWS = 10, 128  # columns of compress's error probe: products, or entries alone
DRAWN = 160  # columns of the sketch at most that a rank draws at once, all N rows of them
DTYPE = np.dtype(np.float64)
V = DTYPE.itemsize
COLLECTIVES = {"compress": 40.0, "product": 1.0, "factor": 3.0, "solve": 1.0}


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

    def cut(self, ranks: int) -> int:
        """The level whose nodes are dealt out."""
        return cut_level(self.depth, ranks)

    def rank_at_cut(self, ranks: int) -> int:
        """Its padded rank; 0 where the whole matrix is one leaf."""
        level = self.depth - max(self.cut(ranks), 1)
        return self.ranks[level] if self.ranks else 0

    def part(self, ranks: int) -> Any:
        """What the busiest rank works on, as a telescope whose arrays take no memory."""
        cut = self.cut(ranks)
        busiest = -(-(1 << cut) // ranks)

        def nodes(level: int) -> int:
            return busiest << (level - cut) if level >= cut else 1 << level

        rows, levels = self.leaf, []
        for index, r in enumerate(self.ranks):
            level = self.depth - index
            q = nodes(level)
            # couplings of the cut's own level are repeated, as those above
            pairs = (q if level > cut else 1 << level) // 2
            levels.append(SimpleNamespace(
                order=_hollow((q, rows), np.int64) if index else None,
                T=_hollow((q, max(rows - r, 0), r)), B=_hollow((pairs, r, r)), rank=r,
            ))  # fmt: skip
            rows = 2 * r
        leaves = nodes(self.depth)
        D = _hollow((leaves, self.leaf, self.leaf))
        arrays = [D, *(a for level in levels for a in (level.T, level.B))]
        return SimpleNamespace(
            n=-(-self.n * busiest >> cut), D=D, levels=levels, arrays=lambda: arrays,
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
        repeated: share of compress on one rank that every rank repeats.
    """

    flops: float
    bandwidth: float
    network: float
    latency: float
    launch: float = 0.0
    share: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(JOBS, 1.0))
    collectives: Mapping[str, float] = field(default_factory=lambda: COLLECTIVES)
    excess: float = 1.0
    repeated: float = 0.0


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
    moved = float(matrix.n * s * V) if matrix.product_flops else 0.0  # all of it drawn by each
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
    cut, r, s, others = matrix.cut(ranks), matrix.rank_at_cut(ranks), matrix.samples, ranks - 1
    at_cut = float(r << cut) * others
    compress = float(matrix.leaf << matrix.depth) * 8 * others + at_cut * (matrix.probes * V + 8)
    rows = matrix.leaf
    for index in range(matrix.depth - cut + 1):
        k = min(rows, s, matrix.max_rank)
        compress += float(k + 1) * (1 << (matrix.depth - index)) * V * others
        rows = 2 * matrix.ranks[index]
    spread = matrix.probes
    if matrix.product_flops:
        spread += s
        compress += 2 * at_cut * s * V
    compress += spread * matrix.n * V * others / ranks
    vectors = at_cut * columns * V
    return {"compress": compress, "product": vectors, "factor": at_cut * r * V, "solve": vectors}


def product_bound(matrix: Matrix, ranks: int, columns: int) -> float:
    """Bytes of a product that a tree of messages would need at most: 4 r k v P log2(P)."""
    return 4.0 * max(matrix.ranks, default=0) * columns * V * ranks * math.log2(ranks)


def floor_seconds(cost: roofline.Cost, flops: float, bandwidth: float) -> float:
    return max(cost.flops / flops, cost.bytes / bandwidth)


def predicted(matrix: Matrix, machine: Machine, ranks: int, columns: int) -> dict[str, float]:
    """By job, seconds on so many ranks."""
    sent = sent_bytes(matrix, ranks, columns)
    sent["compress"] *= machine.excess
    alone = floor_seconds(compress_cost(matrix, 1), machine.flops, machine.bandwidth)
    seconds = {}
    for job, cost in costs(matrix, ranks, columns).items():
        work = floor_seconds(cost, machine.flops, machine.bandwidth)
        if job == "compress":
            work = machine.repeated * alone + (1 - machine.repeated) * work
        work = work / machine.share[job] + matrix.depth * machine.launch
        sending = sent[job] / ranks / machine.network
        waiting = machine.collectives[job] * math.ceil(math.log2(ranks)) * machine.latency
        seconds[job] = work + sending + waiting
    return seconds


def bytes_of_rank(matrix: Matrix, ranks: int) -> float:
    """Bytes of a rank during compress: blocks, samples, and the sketch's columns drawn whole."""
    t, s = matrix.part(ranks), matrix.samples
    samples = (4.0 if matrix.product_flops else 1.0) * t.n * s * V
    whole = matrix.n * min(s, DRAWN) * V if matrix.product_flops else 0.0
    return sum(a.nbytes for a in t.arrays()) + samples + whole

"""HSS: nested bases, siblings coupled on every level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr.bases import (
    ENTRY_LIMIT,
    EntrySampler,
    NestedRegion,
    Outside,
    ProductSampler,
    Sampler,
    samples_for,
    sweep,
    sweep_products_only,
)
from gpu_hodlr.compressed import HSSMatrix
from gpu_hodlr.devices import HostIndex
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes.job import Build, Job
from gpu_hodlr.schemes.prediction import BlockSampler, level_ranks, nested_storage, real
from gpu_hodlr.schemes.scheme import Scheme, Sizes
from gpu_hodlr.structures import Multipole, Telescope

_KEPT = 1 << 30  # bytes of random columns and their products: of more none are kept beside samples


class ProductsOnlyBuild:
    """HSS from products alone."""

    neighbour_recall = None

    def __init__(self, job: Job) -> None:
        assert job.sketch is not None
        self._job, self._sketch = job, job.sketch
        self._sketch.kept = True  # every level is made of it

    @property
    def num_samples(self) -> int:
        """See `Build`."""
        return self._sketch.num

    def run(self, tolerance: float, first: bool) -> tuple[Telescope, tuple[int, ...]]:
        """See `Build`."""
        job = self._job
        return sweep_products_only(
            self._sketch, job.tree, tolerance, job.max_rank, job.seed,
            job.owners,
        )  # fmt: skip


class NestedBuild:
    """Nested bases from samples, products or entries, and couplings from entries.

    Args:
        job: the matrix.
        sampled: what of a node's block row is sampled.
        sweep: (sampler at the leaves, tolerance) -> what `run` gives.
        neighbour_recall: see `Build`.
    """

    def __init__(
        self,
        job: Job,
        sampled: NestedRegion,
        sweep: Callable[[Sampler, float], tuple[Telescope | Multipole, tuple[int, ...]]],
        neighbour_recall: float | None = None,
    ) -> None:
        self._sketch, self._sweep, self._missed = job.sketch, sweep, 0
        self.neighbour_recall = neighbour_recall
        start, limit = job.columns
        with phase("sampling"):
            self._sampler: Sampler
            if job.sketch is not None:
                numbers = 2 * job.tree.n * limit
                job.sketch.kept = numbers * job.operator.dtype.itemsize <= _KEPT
                self._sampler = ProductSampler(job.sketch, sampled, limit)
            else:
                self._sampler = EntrySampler(
                    job.operator.reader, sampled, start, ENTRY_LIMIT * limit, job.seed
                )

    @property
    def num_samples(self) -> int:
        """See `Build`."""
        sketch = self._sketch
        return self._sampler.num_samples if sketch is None else sketch.num

    def run(self, tolerance: float, first: bool) -> tuple[Telescope | Multipole, tuple[int, ...]]:
        """See `Build`."""
        if not first:
            with phase("sampling"):
                # What was missed twice, few columns hold: then 16 times as many are looked at.
                for _ in range(1 if self._missed == 0 else 3):
                    self._sampler.widen()
                self._missed += 1
                self._sampler.reset()
        return self._sweep(self._sampler, tolerance)


def outside(job: Job) -> Outside:
    """All of a block row, and the diagonal blocks, read."""
    with phase("diagonal blocks"):
        leaves = job.tree.leaves[job.owners.mine(job.tree.depth)]
        D = job.operator.reader.blocks(leaves, leaves)
    return Outside(job.tree, job.owners, D, job.points)


def _build(job: Job) -> Build:
    if not job.entries:
        return ProductsOnlyBuild(job)
    region = outside(job)

    def run(sampler: Sampler, tolerance: float) -> tuple[Telescope, tuple[int, ...]]:
        return sweep(job.operator, region, sampler, tolerance, job.max_rank)

    return NestedBuild(job, region, run)


def _predict(sampler: BlockSampler, tolerance: float) -> float | None:
    def blocks(nodes: HostIndex, t: int) -> tuple[Any, Any]:
        return real(nodes[t]), real(np.delete(nodes, t, axis=0).ravel())

    tree = sampler.job.tree
    ranks = level_ranks(sampler, tolerance, range(1, tree.depth + 1), blocks)
    return nested_storage(tree, ranks, [1 << level for level in range(tree.depth)], 0)


def _memory(sizes: Sizes) -> float:
    """Diagonal blocks; sketch, samples and their QR. From products alone also null spaces."""
    s = sizes.columns
    if sizes.sampling.entries:
        return sizes.leaf + 6.0 * s
    if s - sizes.leaf <= samples_for(0):
        s = int(sizes.leaf) + samples_for(min(sizes.max_rank, max(2, int(sizes.leaf) // 2)))
    return 12.0 * s


SCHEME = Scheme(
    "hss", Telescope, HSSMatrix, _build, _predict, _memory, cheap_without_entries=True,
)  # fmt: skip

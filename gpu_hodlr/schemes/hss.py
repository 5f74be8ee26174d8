"""HSS: nested bases, siblings coupled on every level."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr.bases import (
    ENTRY_LIMIT,
    EntrySampler,
    ProductSampler,
    Sampler,
    sweep,
    sweep_products_only,
)
from gpu_hodlr.compressed import HSSMatrix
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes.job import Build, Job
from gpu_hodlr.schemes.prediction import BlockSampler, level_ranks, nested_storage, real
from gpu_hodlr.schemes.scheme import Scheme
from gpu_hodlr.structures import Multipole, Telescope


class ProductsOnlyBuild:
    """HSS from products alone."""

    neighbour_recall = None

    def __init__(self, job: Job) -> None:
        assert job.sketch is not None
        self._job, self._sketch = job, job.sketch

    @property
    def num_samples(self) -> int:
        """See `Build`."""
        return int(self._sketch.omega.shape[1])

    def run(self, tolerance: float, first: bool) -> tuple[Telescope, tuple[int, ...]]:
        """See `Build`."""
        job = self._job
        return sweep_products_only(
            self._sketch, job.tree, tolerance, job.max_rank, job.seed,
            job.owners,
        )  # fmt: skip


class HSSBuild:
    """HSS from samples, products or entries, and entries."""

    neighbour_recall: float | None = None

    def __init__(self, job: Job) -> None:
        self._job = job
        with phase("diagonal blocks"):
            leaves = job.tree.leaves[job.owners.mine(job.tree.depth)]
            self._D = job.operator.reader.blocks(leaves, leaves)
        with phase("sampling"):
            self._sampler = self._make_sampler()

    def _make_sampler(self) -> Sampler:
        job = self._job
        start, limit = job.columns
        if job.sketch is None:
            return EntrySampler(
                job.operator, job.tree, start, ENTRY_LIMIT * limit, job.seed, job.owners
            )
        return ProductSampler(job.sketch, job.tree, self._D, limit, job.owners)

    def _restart(self, first: bool) -> None:
        if not first:
            with phase("sampling"):
                self._sampler.widen()
                self._sampler.reset()

    @property
    def num_samples(self) -> int:
        """See `Build`."""
        sketch = self._job.sketch
        return self._sampler.num_samples if sketch is None else int(sketch.omega.shape[1])

    def run(self, tolerance: float, first: bool) -> tuple[Telescope | Multipole, tuple[int, ...]]:
        """See `Build`."""
        self._restart(first)
        job = self._job
        return sweep(
            job.operator, job.tree, self._D, self._sampler,
            tolerance, job.max_rank, owners=job.owners,
        )  # fmt: skip


def _build(job: Job) -> Build:
    return HSSBuild(job) if job.entries else ProductsOnlyBuild(job)


def _predict(sampler: BlockSampler, tolerance: float) -> float | None:
    def outside(nodes: Any, t: int) -> tuple[Any, Any]:
        return real(nodes[t]), real(np.delete(nodes, t, axis=0).ravel())

    tree = sampler.job.tree
    ranks = level_ranks(sampler, tolerance, range(1, tree.depth + 1), outside)
    return nested_storage(tree, ranks, [1 << level for level in range(tree.depth)], 0)


SCHEME = Scheme(
    "hss", Telescope, HSSMatrix, _build, _predict, cheap_without_entries=True,
)  # fmt: skip

"""Building the structures with nested bases: HSS, and FMM with its near field."""

from __future__ import annotations

from gpu_hodlr.bases import (
    EntrySampler,
    FarEntrySampler,
    FarProductSampler,
    ProductSampler,
    Sampler,
    sweep,
    sweep_far,
    sweep_products_only,
)
from gpu_hodlr.distributed import Halo
from gpu_hodlr.schemes.job import Job
from gpu_hodlr.structures import Multipole, Telescope

_ENTRY_LIMIT = 3  # columns of the matrix itself may be so many times as many as Gaussian ones


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
            self._sketch, job.tree, tolerance, job.max_rank, job.seed, job.timer, job.tick,
            job.owners,
        )  # fmt: skip


class HSSBuild:
    """HSS from samples, products or entries, and entries."""

    neighbour_recall: float | None = None

    def __init__(self, job: Job) -> None:
        self._job = job
        with job.timer.phase("diagonal blocks"):
            leaves = job.tree.leaves[job.owners.mine(job.tree.depth)]
            self._D = job.operator.reader.blocks(leaves, leaves)
        with job.timer.phase("sampling"):
            self._sampler = self._make_sampler()

    def _make_sampler(self) -> Sampler:
        job = self._job
        start, limit = job.columns
        if job.sketch is None:
            return EntrySampler(
                job.operator, job.tree, start, _ENTRY_LIMIT * limit, job.seed, job.owners
            )
        return ProductSampler(job.sketch, job.tree, self._D, limit, job.owners)

    def _restart(self, first: bool) -> None:
        if not first:
            with self._job.timer.phase("sampling"):
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
            tolerance, job.max_rank, job.timer, job.tick, owners=job.owners,
        )  # fmt: skip


class FMMBuild(HSSBuild):
    """FMM: the near field is read as entries, and left out of the samples."""

    def __init__(self, job: Job) -> None:
        self._field = job.near_field
        self.neighbour_recall = self._field.recall
        with job.timer.phase("near blocks"):
            leaves, pairs = job.tree.leaves, self._field.lists.near
            pairs = pairs[Halo(job.owners, pairs, job.tree.depth, siblings=False).chosen]
            self._near = job.operator.reader.blocks(leaves[pairs[:, 0]], leaves[pairs[:, 1]])
        super().__init__(job)

    def _make_sampler(self) -> Sampler:
        job, field = self._job, self._field
        if not len(field.lists.near):  # the far field is all the rest
            return super()._make_sampler()
        start, limit = job.columns
        if job.sketch is None:
            return FarEntrySampler(
                job.operator, job.tree, field.lists, field.neighbours,
                start, _ENTRY_LIMIT * limit, job.seed, job.owners,
            )  # fmt: skip
        return FarProductSampler(
            job.sketch, job.tree, self._D, self._near, field.lists, limit, job.owners
        )

    def run(self, tolerance: float, first: bool) -> tuple[Telescope | Multipole, tuple[int, ...]]:
        """See `Build`."""
        self._restart(first)
        job, field = self._job, self._field
        return sweep_far(
            job.operator, job.tree, field.lists, self._D, self._near, self._sampler,
            tolerance, job.max_rank, job.timer, job.tick, job.owners,
        )  # fmt: skip

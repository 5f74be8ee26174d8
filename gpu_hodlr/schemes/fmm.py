"""FMM: nested bases of the far field, dense blocks between near leaves."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr.bases import ENTRY_LIMIT, FarEntrySampler, FarProductSampler, Sampler, sweep_far
from gpu_hodlr.compressed import FMMMatrix
from gpu_hodlr.distributed import Halo
from gpu_hodlr.interactions import partners
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes.hss import HSSBuild
from gpu_hodlr.schemes.job import Job
from gpu_hodlr.schemes.prediction import BlockSampler, level_ranks, nested_storage, real
from gpu_hodlr.schemes.scheme import Scheme
from gpu_hodlr.structures import Multipole, Telescope


class FMMBuild(HSSBuild):
    """FMM: the near field is read as entries, and left out of the samples."""

    def __init__(self, job: Job) -> None:
        self._field = job.near_field
        self.neighbour_recall = self._field.recall
        with phase("near blocks"):
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
                start, ENTRY_LIMIT * limit, job.seed, job.owners,
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
            tolerance, job.max_rank, job.owners,
        )  # fmt: skip


def _predict(sampler: BlockSampler, tolerance: float) -> float | None:
    tree, lists = sampler.job.tree, sampler.job.near_field.lists
    near = {level: partners(lists.near_nodes[level], 1 << level) for level in range(tree.depth + 1)}

    def far_field(nodes: Any, t: int) -> tuple[Any, Any]:
        beside = near[len(nodes).bit_length() - 1][t]
        far = np.delete(nodes, [t, *real(beside)], axis=0)
        return real(nodes[t]), real(far.ravel())

    levels = range(lists.top, tree.depth + 1)
    ranks = level_ranks(sampler, tolerance, levels, far_field)
    return nested_storage(tree, ranks, [len(lists.far[level]) for level in levels], len(lists.near))


SCHEME = Scheme(
    "fmm", Multipole, FMMMatrix, FMMBuild, _predict, needs_entries=True, near_field=True,
)  # fmt: skip

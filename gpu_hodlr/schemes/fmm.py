"""FMM: nested bases of the far field, dense blocks between near leaves."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr.bases import FarField, Sampler, sweep_far
from gpu_hodlr.compressed import FMMMatrix
from gpu_hodlr.devices import HostIndex
from gpu_hodlr.distributed import Halo
from gpu_hodlr.interactions import partners
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes.hss import NestedBuild, outside
from gpu_hodlr.schemes.job import Build, Job
from gpu_hodlr.schemes.prediction import BlockSampler, level_ranks, nested_storage, real
from gpu_hodlr.schemes.scheme import Scheme, Sizes
from gpu_hodlr.structures import Multipole


def _build(job: Job) -> Build:
    """The near field is read as entries, and left out of the samples."""
    lists, leaves = job.near_field.lists, job.tree.leaves
    with phase("near blocks"):
        pairs = lists.near
        pairs = pairs[Halo(job.owners, pairs, job.tree.depth, siblings=False).chosen]
        near = job.operator.reader.blocks(leaves[pairs[:, 0]], leaves[pairs[:, 1]])
    every = outside(job)
    far = FarField(
        job.tree, job.owners, every.D, near, lists, job.near_field.neighbours, job.points
    )

    def run(sampler: Sampler, tolerance: float) -> tuple[Multipole, tuple[int, ...]]:
        return sweep_far(job.operator, far, sampler, tolerance, job.max_rank)

    sampled = far if len(lists.near) else every  # without a near field it is the same, and quicker
    return NestedBuild(job, sampled, run, job.near_field.recall)


def _predict(sampler: BlockSampler, tolerance: float) -> float | None:
    tree, lists = sampler.job.tree, sampler.job.near_field.lists
    near = {level: partners(lists.near_nodes[level], 1 << level) for level in range(tree.depth + 1)}

    def far_field(nodes: HostIndex, t: int) -> tuple[Any, Any]:
        beside = near[len(nodes).bit_length() - 1][t]
        far = np.delete(nodes, [t, *real(beside)], axis=0)
        return real(nodes[t]), real(far.ravel())

    levels = range(lists.top, tree.depth + 1)
    ranks = level_ranks(sampler, tolerance, levels, far_field)
    return nested_storage(tree, ranks, [len(lists.far[level]) for level in levels], len(lists.near))


def _memory(sizes: Sizes) -> float:
    """Samples as of HSS; the near blocks, and a copy in the order of the skeletons on each side."""
    samples = (6.0 if sizes.sampling.products else 3.0) * sizes.columns
    return 2 * sizes.leaf + samples + 4 * sizes.budget * sizes.n


SCHEME = Scheme(
    "fmm", Multipole, FMMMatrix, _build, _predict, _memory, needs_entries=True, near_field=True,
)  # fmt: skip

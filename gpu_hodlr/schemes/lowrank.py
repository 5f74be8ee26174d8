"""Building the global low-rank structure: the randomized Nystrom approximation."""

from __future__ import annotations

import numpy as np

from gpu_hodlr import progress
from gpu_hodlr.bases import samples_for
from gpu_hodlr.compressed import LowRankMatrix
from gpu_hodlr.devices import namespace, to_host
from gpu_hodlr.operators import ProductColumns, SketchColumns, SketchRows
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes.job import Job
from gpu_hodlr.schemes.nystrom import nystrom
from gpu_hodlr.schemes.prediction import SIDE, BlockSampler, rank_for
from gpu_hodlr.schemes.scheme import Scheme, Sizes
from gpu_hodlr.structures import LowRank

_WHOLE = 1536  # rows and columns of a sample of the whole matrix, whose rank may be larger
_HELD_OUT = 10  # columns of the sketch that the others are judged by
_MOST = 0.75  # columns over rows: more random ones are nearly dependent, unit vectors are not


class NystromBuild:
    """K ~= Y (Omega^T Y)^+ Y^T from Y = K Omega, by eigenvalues, cut off at the tolerance.

    The shifted form of Tropp, Yurtsever, Udell, Cevher (NeurIPS 2017), Algorithm 3: K + nu I is
    approximated and nu taken off the eigenvalues, so that rounding cannot make Omega^T Y
    indefinite. Columns are doubled until the last ten, left out of the approximation, show an
    error within the tolerance.

    Attributes:
        neighbour_recall: None.
    """

    neighbour_recall = None

    def __init__(self, job: Job) -> None:
        self._job = job
        with phase("sampling"):
            self._sketch = job.sketch or self._new_sketch()

    def _new_sketch(self) -> SketchRows:
        job = self._job
        drawn = SketchColumns(job.operator, job.columns[0], job.seed, job.owners.comm)
        return drawn.to_rows(job.owners)

    @property
    def num_samples(self) -> int:
        """See `Build`."""
        return self._sketch.num

    def run(self, tolerance: float, first: bool) -> tuple[LowRank, tuple[int, ...]]:
        """See `Build`; a structure stopped short counts as level 0."""
        job, n = self._job, self._job.operator.shape[0]
        limit = min(samples_for(job.max_rank), n) + _HELD_OUT
        while True:
            with phase("eigenvectors"):
                form, missed = self._approximate(tolerance)
            if missed <= tolerance**2 or self.num_samples >= limit or len(form.eigenvalues) == n:
                break
            with phase("sampling"):
                self._sketch.grow(min(self.num_samples, limit - self.num_samples))
        progress.tick()
        squares = to_host(form.eigenvalues).astype(np.float64) ** 2
        tails = missed + np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        enough = np.nonzero(tails <= tolerance**2)[0]
        rank = min(int(enough[0]) if enough.size else len(squares), job.max_rank)
        xp = namespace(form.U)
        kept = LowRank(
            xp.ascontiguousarray(form.U[:, :rank]), form.eigenvalues[:rank], owners=job.owners
        )
        capped = rank == job.max_rank and tails[rank] > tolerance**2  # or else it is rounding
        return kept, (0,) if capped else ()

    def _approximate(self, tolerance: float) -> tuple[LowRank, float]:
        """From all columns but those held out, and the squared error these see.

        Raises:
            NotPositiveDefiniteError: see `nystrom`.
        """
        omega, y, owners = self._sketch.omega, self._sketch.y, self._job.owners
        n, columns = self._job.operator.shape[0], omega.shape[1]
        used = columns - min(_HELD_OUT, columns // 2)
        if used > _MOST * n:
            every = ProductColumns.shared(
                self._job.operator,
                n,
                lambda part: namespace(y).eye(n, part.stop - part.start, -part.start, y.dtype),
                owners.comm,
            ).to_rows(owners)
            form, used = nystrom(every.v, every.y, tolerance, owners), 0
        else:
            form = nystrom(omega[:, :used], y[:, :used], tolerance, owners)
        difference = y[:, used:] - form.matmat(omega[:, used:])
        squares = owners.comm.share(float((difference.astype(np.float64) ** 2).sum()))
        return form, sum(squares) / (columns - used)


def _predict(sampler: BlockSampler, tolerance: float) -> float | None:
    n, cap = sampler.job.tree.n, sampler.job.max_rank
    side = min(max(SIDE, 2 * cap), _WHOLE)
    rank = rank_for(sampler.tails(np.arange(n), np.arange(n), side), tolerance**2, cap)
    return None if rank is None else (n + 1) * rank / n**2


def _memory(sizes: Sizes) -> float:
    """Sketch, and what of its size the approximation is made of."""
    return 7.0 * sizes.columns


SCHEME = Scheme(
    "lowrank", LowRank, LowRankMatrix, NystromBuild, _predict, _memory,
    aim=0.9,  # truncated to what it may miss, which nothing amplifies
    products_only=True, needs_definite=True, whole=True, cheap_without_entries=True,
)  # fmt: skip

"""Building the global low-rank structure: the randomized Nystrom approximation."""

from __future__ import annotations

import math

import numpy as np

from gpu_hodlr import batched, progress
from gpu_hodlr.bases import samples_for
from gpu_hodlr.batched.tall import inner_of_one
from gpu_hodlr.compressed import LowRankMatrix
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.operators import ProductColumns, SketchColumns, SketchRows
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes.job import Job
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


@batched.one_blas_thread()
def nystrom(omega: Array, y: Array, negligible: float, owners: Ownership = ALONE) -> LowRank:
    """The shifted Nystrom approximation of K from Y = K Omega, both (N, s), s <= N.

    On many ranks both are this rank's rows; the Gram matrices are summed over the ranks.

    With Omega = Q R: nu = eps norm(Y R^-1)_F, Y_nu = (Y + nu Omega) R^-1, Q^T Y_nu = C C^T, and
    B = Y_nu C^-T: its squared singular values less nu are the eigenvalues, never negative, its
    left singular vectors the eigenvectors. All in products of tall matrices: R and the singular
    values come from Gram matrices, which costs eigenvalues no more than nu does; a Cholesky
    factorization of their own Gram matrix makes the vectors orthonormal again.

    Raises:
        NotPositiveDefiniteError: K has an eigenvalue below -negligible, which this cannot keep.
    """
    xp = namespace(y)
    R = _cholesky(owners.sum(inner_of_one(omega, omega)))  # of well-conditioned random columns
    core = _solve_left(R, _solve_left(R, owners.sum(inner_of_one(omega, y))).T)
    core = (core + core.T) / 2
    eps = y.dtype.type(np.finfo(y.dtype).eps)
    norms = owners.comm.share(float(xp.linalg.norm(_solve_left(R, y.T))))
    shift = eps * y.dtype.type(math.hypot(*norms))
    C, info = batched.cholesky(_shifted(core, shift))
    if to_host(info).any():  # K itself is not positive semidefinite
        values, vectors = xp.linalg.eigh(core)
        if -float(values[0]) > max(negligible, 10 * float(shift)):
            flipped = batched.solve_triangular(
                R[None], xp.ascontiguousarray(vectors[None, :, :1]), transpose=True
            )
            raise _not_positive_definite(float(values[0]), owners.whole(omega @ flipped[0])[:, 0])
        shift = 2 * shift + 1.1 * xp.maximum(-values[0], 0)
        C, info = batched.cholesky(_shifted(core, shift))
    if to_host(info).any():  # a zero matrix has no shift
        return LowRank(omega[:, :0], core[0, :0], owners=owners)
    B = _solve_left(C[0], _solve_left(R, (y + shift * omega).T)).T
    # Of equal eigenvalues every rank must have the same vectors.
    squares, vectors = owners.comm.bcast(xp.linalg.eigh(owners.sum(inner_of_one(B, B))), 0)
    kept = int((squares > 2 * shift).sum())  # the others are rounding, as are their vectors
    squares, vectors = squares[::-1][:kept], vectors[:, ::-1][:, :kept]
    U = B @ (vectors / xp.sqrt(squares))
    if kept:
        U = _solve_left(_cholesky(owners.sum(inner_of_one(U, U))), U.T).T
    return LowRank(xp.ascontiguousarray(U), squares - shift, owners=owners)


def _not_positive_definite(curvature: float, direction: Array) -> NotPositiveDefiniteError:
    return NotPositiveDefiniteError(
        f"K is not positive semi-definite: p^T K p / p^T p = {curvature:.3g} for the direction p "
        "of this error; scheme 'lowrank' cannot keep negative eigenvalues, and more rank would not "
        "help: take scheme 'hss' or 'hodlr', and declare definite = False",
        direction=direction,
        curvature=curvature,
    )


def _shifted(core: Array, shift: Array) -> Array:
    return (core + shift * namespace(core).eye(len(core), dtype=core.dtype))[None]


def _cholesky(gram: Array) -> Array:
    return batched.cholesky(gram[None])[0][0]


def _solve_left(lower: Array, b: Array) -> Array:
    """L^-1 b."""
    xp = namespace(b)
    return batched.solve_triangular(lower[None], xp.ascontiguousarray(b)[None])[0]


def _predict(sampler: BlockSampler, tolerance: float) -> float | None:
    n, cap = sampler.job.tree.n, sampler.job.max_rank
    side = min(max(SIDE, 2 * cap), _WHOLE)
    every, negligible = np.arange(n), 1e-3 * tolerance**2
    rank = rank_for(sampler.tails(every, every, side, negligible), tolerance**2, cap)
    return None if rank is None else (n + 1) * rank / n**2


def _memory(sizes: Sizes) -> float:
    """Sketch, and what of its size the approximation is made of."""
    return 7.0 * sizes.columns


SCHEME = Scheme(
    "lowrank", LowRank, LowRankMatrix, NystromBuild, _predict, _memory,
    aim=0.9,  # truncated to what it may miss, which nothing amplifies
    products_only=True, needs_definite=True, whole=True, cheap_without_entries=True,
)  # fmt: skip

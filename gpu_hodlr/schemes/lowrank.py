"""Building the global low-rank structure: of a definite matrix by Nystrom's approximation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from gpu_hodlr import progress
from gpu_hodlr.bases import samples_for
from gpu_hodlr.batched.tall import inner_of_one
from gpu_hodlr.compressed import LowRankMatrix
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.distributed import Ownership
from gpu_hodlr.operators import ProductColumns, ProductRows, SketchColumns, SketchRows
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes.job import Job
from gpu_hodlr.schemes.nystrom import nystrom, of_root
from gpu_hodlr.schemes.prediction import SIDE, BlockSampler, rank_for
from gpu_hodlr.schemes.scheme import Scheme, Sizes
from gpu_hodlr.schemes.signed import of_core, range_basis, range_error, signed
from gpu_hodlr.structures import LowRank

_WHOLE = 1536  # rows and columns of a sample of the whole matrix, whose rank may be larger
_HELD_OUT = 10  # columns of the sketch that the others are judged by
_STEP, _TRIED = 0.7, 16  # of the largest rank, tried with the diagonal of the rest
_NOISY = 0.5  # of the squared error, that taking the rest for a noise must leave at most
_ROOT = 4  # rows of a stored root, in columns of a sketch, up to which it is decomposed itself
_MOST = 0.75  # columns over rows: more random ones are nearly dependent, unit vectors are not


class LowRankBuild:
    """The eigenvalues largest in absolute value and their eigenvectors, cut off at the tolerance.

    Of a positive semi-definite K by `nystrom`, from products with random columns alone, or by the
    singular values of a stored root of few rows (`Operator.root`), which are exact; of another
    by `signed`, which multiplies by a basis of their range as well. Columns are doubled until the
    last ten, left out of the approximation, show an error within the tolerance.

    The diagonal of what is left out (`Job.tail`) is kept where those ten columns show that it
    helps; an entry < 0 counts as 0, so that any damping above 0 does for every row.

    Attributes:
        neighbour_recall: None.
    """

    neighbour_recall = None

    def __init__(self, job: Job) -> None:
        self._job = job
        with phase("sampling"):
            self._sketch = job.sketch or self._new_sketch()
            self._diagonal: Array | None = None
            if job.tail == "diagonal":
                self._diagonal = job.owners.take(job.operator.reader.diagonal())

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
        job = self._job
        limit = min(samples_for(job.max_rank), job.operator.shape[0]) + _HELD_OUT
        while True:
            with phase("eigenvectors"):
                found = self._attempt(tolerance, self.num_samples >= limit)
            if found is not None:
                progress.tick()
                kept, capped = found
                return kept, (0,) if capped else ()
            with phase("sampling"):
                self._sketch.grow(min(self.num_samples, limit - self.num_samples))

    def _attempt(self, tolerance: float, last: bool) -> tuple[LowRank, bool] | None:
        """A structure, and whether `max_rank` stopped it short; None: more columns are needed.

        Args:
            tolerance: wanted.
            last: whether there are no more.
        """
        held, form = self._approximate(tolerance, last)
        if form is None:
            return None
        allowed, missed = tolerance**2, held.missed(form)
        kept, error = self._cut_off(held, form, missed, allowed)
        if min(missed, error) > allowed and self._may_sharpen(held):
            form = self._sharper(held, tolerance)
            kept, error = self._cut_off(held, form, held.missed(form), allowed)
        if not (last or held.every or min(missed, error) <= allowed):
            return None
        # Below the cap it is rounding that the error is more.
        return kept, len(form.eigenvalues) >= self._job.max_rank and error > allowed

    def _approximate(self, tolerance: float, last: bool) -> tuple[_HeldOut, LowRank | None]:
        """From all columns but those held out; none where they show that more are needed.

        Args:
            tolerance: wanted.
            last: whether there are no more.

        Raises:
            NotPositiveDefiniteError: see `nystrom`.
        """
        omega, y, owners = self._sketch.omega, self._sketch.y, self._job.owners
        operator, columns = self._job.operator, omega.shape[1]
        n, definite = operator.shape[0], operator.definite
        used = columns - min(_HELD_OUT, columns // 2)
        root = operator.root() if definite else None
        if root is not None and root.shape[1] <= min(n, _ROOT * samples_for(self._job.max_rank)):
            return _HeldOut(omega, y, owners, every=True), of_root(owners.take(root), owners)
        if used > _MOST * n:
            every = self._products(
                n, lambda part: namespace(y).eye(n, part.stop - part.start, -part.start, y.dtype)
            )
            held = _HeldOut(omega, y, owners, every=True)
            if definite:
                return held, nystrom(every.v, every.y, tolerance, owners)
            core = owners.sum(inner_of_one(every.v, every.y))
            return held, of_core((core + core.T) / 2, every.v, tolerance, owners)
        held = _HeldOut(omega[:, used:], y[:, used:], owners)
        if definite:
            return held, nystrom(omega[:, :used], y[:, :used], tolerance, owners)
        Q = range_basis(y[:, :used] / used**0.5, tolerance, owners)
        if not last and range_error(held.y, Q, owners) > tolerance**2:
            return held, None
        return held, signed(self._multiply, Q, tolerance, owners)

    def _may_sharpen(self, held: _HeldOut) -> bool:
        """Whether `_sharper` is better than what `_approximate` gives, beside a diagonal."""
        return self._diagonal is not None and self._job.operator.definite and not held.every

    def _sharper(self, held: _HeldOut, tolerance: float) -> LowRank:
        """Eigenvectors that a flat tail does not blur: those of `signed`, of positive eigenvalues.

        Nystrom's are worth no power iteration.
        """
        y, owners = self._sketch.y, self._job.owners
        used = y.shape[1] - held.y.shape[1]
        form = signed(
            self._multiply,
            range_basis(y[:, :used] / used**0.5, tolerance, owners),
            tolerance,
            owners,
        )
        positive = form.eigenvalues > 0
        U = namespace(form.U).ascontiguousarray(form.U[:, positive])
        return replace(form, U=U, eigenvalues=form.eigenvalues[positive])

    def _multiply(self, v: Array) -> Array:
        """K v, by rows."""
        owners = self._job.owners
        return self._products(v.shape[1], lambda part: owners.to_columns(v, part)).y

    def _products(self, num: int, columns: Callable[[slice], Array]) -> ProductRows:
        """See `ProductColumns.shared`."""
        job = self._job
        shared = ProductColumns.shared(job.operator, num, columns, job.owners.comm)
        return shared.to_rows(job.owners)

    def _cut_off(
        self, held: _HeldOut, form: LowRank, missed: float, allowed: float
    ) -> tuple[LowRank, float]:
        """As few eigenvectors as a squared error allows, or as it takes to come near; the error.

        The diagonal mends what that rank leaves; it takes the place of eigenvectors only where no
        rank does without: of a tail of small rank it is no substitute (log-determinants would be
        too large).
        """
        most = min(len(form.eigenvalues), self._job.max_rank)
        squares = to_host(form.eigenvalues).astype(np.float64) ** 2
        tails = missed + np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        enough = np.nonzero(tails[: most + 1] <= allowed)[0]
        rank = int(enough[0]) if enough.size else most
        if self._diagonal is None:
            return _first(form, rank), float(tails[rank])
        if enough.size:
            return self._with_tail(held, form, rank)
        # The error may rise again with the rank.
        tried = sorted({0, *(int(most * _STEP**i) for i in range(_TRIED))})
        found = {rank: self._with_tail(held, form, rank) for rank in tried}
        kept = [rank for rank, (_, error) in found.items() if error <= allowed]
        if not kept:
            return min(found.values(), key=lambda pair: pair[1])
        best, low = found[kept[0]], max((r for r in tried if r < kept[0]), default=kept[0])
        rank = kept[0]
        while rank - low > 1:
            middle = (rank + low) // 2
            pair = self._with_tail(held, form, middle)
            rank, low, best = (middle, low, pair) if pair[1] <= allowed else (rank, middle, best)
        return best

    def _with_tail(self, held: _HeldOut, form: LowRank, rank: int) -> tuple[LowRank, float]:
        """So many eigenvectors and the diagonal of the rest, where that errs less; the error.

        A rest that is much like a multiple s of the identity, as of a noise, is so in the range of
        the eigenvectors too: where it shows, U (lambda - s) U^T stands beside the diagonal, s the
        mean of the eigenvalues left out.
        """
        assert self._diagonal is not None
        plain, share = _first(form, rank), self._job.owners.comm.share
        left = share(float((self._diagonal - plain.diagonal()).sum(dtype=np.float64)))
        mean = max(sum(left) / max(self._job.operator.shape[0] - rank, 1), 0.0)
        best, error = plain, held.missed(plain)
        for shift, gain in ((0.0, 1.0), (mean, _NOISY)):
            each = self._beside_diagonal(plain, shift)
            found = held.missed(each)
            if found < gain * error:
                best, error = each, found
        return best, error

    def _beside_diagonal(self, form: LowRank, shift: float) -> LowRank:
        """U (lambda - shift) U^T + D, with K's diagonal where that leaves D >= 0."""
        xp, zero = namespace(form.U), form.U.dtype.type(0)
        values = form.eigenvalues - form.U.dtype.type(shift)
        if self._job.operator.definite:
            values = xp.maximum(values, zero)
        core = replace(form, eigenvalues=values)
        return replace(core, D=xp.maximum(self._diagonal - core.diagonal(), zero))


@dataclass(frozen=True, eq=False)
class _HeldOut:
    """Columns that an approximation is judged by.

    Attributes:
        omega, y: Gaussian, and K times them, (rows, k).
        owners: which rank has which rows.
        every: whether the approximation is of all columns of K, and no more would help.
    """

    omega: Array
    y: Array
    owners: Ownership
    every: bool = False

    def missed(self, form: LowRank) -> float:
        """norm(K - form)_F^2, estimated."""
        difference = self.y - form.matmat(self.omega)
        squares = self.owners.comm.share(float((difference.astype(np.float64) ** 2).sum()))
        return sum(squares) / self.omega.shape[1]


def _first(form: LowRank, rank: int) -> LowRank:
    """So many eigenvectors of a form."""
    xp = namespace(form.U)
    return replace(
        form, U=xp.ascontiguousarray(form.U[:, :rank]), eigenvalues=form.eigenvalues[:rank]
    )


def _predict(sampler: BlockSampler, tolerance: float) -> float | None:
    n, cap = sampler.job.tree.n, sampler.job.max_rank
    side = min(max(SIDE, 2 * cap), _WHOLE)
    every, negligible = np.arange(n), 1e-3 * tolerance**2
    rank = rank_for(sampler.tails(every, every, side, negligible), tolerance**2, cap)
    return None if rank is None else (n + 1) * rank / n**2


def _memory(sizes: Sizes) -> float:
    """Sketch, and what of its size the approximation is made of."""
    return (12.0 if sizes.twice else 7.0) * sizes.columns


SCHEME = Scheme(
    "lowrank", LowRank, LowRankMatrix, LowRankBuild, _predict, _memory,
    aim=0.9,  # truncated to what it may miss, which nothing amplifies
    products_only=True, whole=True, has_tail=True, cheap_without_entries=True,
)  # fmt: skip

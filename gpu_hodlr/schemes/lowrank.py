"""Building the global low-rank structure: of a definite matrix by Nystrom's approximation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from gpu_hodlr import progress
from gpu_hodlr.bases import samples_for
from gpu_hodlr.batched.tall import inner_of_one
from gpu_hodlr.compressed import LowRankMatrix
from gpu_hodlr.devices import Array, HostArray, check_memory, namespace, to_host
from gpu_hodlr.distributed import Ownership
from gpu_hodlr.operators import (
    Dual,
    Operator,
    ProductColumns,
    ProductRows,
    SketchColumns,
    SketchRows,
    column_share,
)
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes.job import Job
from gpu_hodlr.schemes.nystrom import Grams, Nystrom, eigenvectors, leading, nystrom
from gpu_hodlr.schemes.prediction import SIDE, BlockSampler, rank_for
from gpu_hodlr.schemes.scheme import Scheme, Sizes
from gpu_hodlr.schemes.signed import of_core, range_basis, range_error, signed
from gpu_hodlr.structures import LowRank

_WHOLE = 1536  # rows and columns of a sample of the whole matrix, whose rank may be larger
_HELD_OUT = 10  # columns of the sketch that the others are judged by
_STEP, _TRIED = 0.7, 16  # of the largest rank, tried with the diagonal of the rest
_NOISY = 0.5  # of the squared error, that taking the rest for a noise must leave at most
_MOST = 0.75  # columns over rows: more random ones are nearly dependent, unit vectors are not
_AT_ONCE = 32  # eigenvectors of a root of few rows that are made together
_MEASURED = 60.0  # numbers a row: what the error is measured with


class LowRankBuild:
    """The eigenvalues largest in absolute value and their eigenvectors, cut off at the tolerance.

    Of a positive semi-definite K = A^T A by those of A A^T where A has few rows (`Operator.dual`),
    which are exact; else by `Nystrom`, from products with random columns alone; of another by
    `signed`, which multiplies by a basis of their range as well. Columns are doubled until the
    last ten, left out of the approximation, show an error within the tolerance. Eigenvectors are
    made last, and no more than are kept.

    The diagonal of what is left out (`Job.tail`) is kept where ten random columns show that it
    helps; an entry < 0 counts as 0, so that any damping above 0 does for every row.

    Attributes:
        neighbour_recall: None.
    """

    neighbour_recall = None

    def __init__(self, job: Job) -> None:
        self._job = job
        self._dual = few_rows(job.operator, job.max_rank)
        self._root: _Root | None = None
        self._sketch: SketchRows | None = None
        self._grams = Grams(job.owners)
        with phase("sampling"):
            if self._dual is None or job.tail == "diagonal":
                self._sketch = job.sketch or self._new_sketch()
                self._sketch.grows, self._sketch.kept = job.grows, True
            self._diagonal: Array | None = None
            if job.tail == "diagonal":
                self._diagonal = job.owners.take(job.operator.reader.diagonal())

    def _new_sketch(self) -> SketchRows:
        job = self._job
        columns = job.columns[0] if self._dual is None else _HELD_OUT
        drawn = SketchColumns(job.operator, columns, job.seed, job.owners.comm)
        return drawn.to_rows(job.owners)

    @property
    def num_samples(self) -> int:
        """See `Build`; 0 where nothing is random."""
        return 0 if self._sketch is None else self._sketch.num

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
            assert self._sketch is not None
            with phase("sampling"):
                self._sketch.grow(min(self.num_samples, limit - self.num_samples))

    def _attempt(self, tolerance: float, last: bool) -> tuple[LowRank, bool] | None:
        """A structure, and whether `max_rank` stopped it short; None: more columns are needed.

        Args:
            tolerance: wanted.
            last: whether there are no more.
        """
        held, found = self._approximate(tolerance, last)
        if found is None:
            return None
        allowed, missed = tolerance**2, found.missed
        enough = last or held.every or missed <= allowed
        if not enough and self._diagonal is None:
            return None
        kept, error = self._cut_off(held, found, allowed)
        if min(missed, error) > allowed and self._may_sharpen(held):
            form = self._sharper(held, tolerance)
            found = _Whole(form, held.missed(form))
            kept, error = self._cut_off(held, found, allowed)
        if not (enough or min(found.missed, error) <= allowed):
            return None
        # Below the cap it is rounding that the error is more.
        return kept, len(found.eigenvalues) >= self._job.max_rank and error > allowed

    def _approximate(self, tolerance: float, last: bool) -> tuple[_HeldOut, _Spectrum | None]:
        """From all columns but those held out; none where they show that more are needed.

        Args:
            tolerance: wanted.
            last: whether there are no more.

        Raises:
            NotPositiveDefiniteError: see `Nystrom`.
        """
        owners, operator = self._job.owners, self._job.operator
        if self._dual is not None:
            self._root = self._root or _Root(self._dual, operator, owners)
            return _HeldOut(self._sketch, 0, owners, every=True), self._root
        assert self._sketch is not None
        omega, y, n = self._sketch.omega, self._sketch.y, operator.shape[0]
        used = y.shape[1] - min(_HELD_OUT, y.shape[1] // 2)
        if used > _MOST * n:
            held = _HeldOut(self._sketch, 0, owners, every=True)
            return held, self._of_unit_vectors(held, tolerance)
        held = _HeldOut(self._sketch, used, owners)
        if operator.definite:
            self._grams.update(omega, y)
            approximation = Nystrom(omega, y, self._grams, used, tolerance, owners)
            return held, _Sketched(
                approximation, held.missed_by(approximation.products(held.columns))
            )
        Q = range_basis(y[:, :used] / used**0.5, tolerance, owners)
        if not last and range_error(held.y, Q, owners) > tolerance**2:
            return held, None
        form = signed(self._multiply, Q, tolerance, owners)
        return held, _Whole(form, held.missed(form))

    def _of_unit_vectors(self, held: _HeldOut, tolerance: float) -> _Spectrum:
        """Of all columns of a small K."""
        owners, operator = self._job.owners, self._job.operator
        n, dtype = operator.shape[0], operator.dtype
        xp = namespace(held.y)
        every = self._products(
            n, lambda part: xp.eye(n, part.stop - part.start, -part.start, dtype)
        )
        if operator.definite:
            found = nystrom(every.v, every.y, tolerance, owners)
            form = found.form(len(found.eigenvalues))
        else:
            core = owners.sum(inner_of_one(every.v, every.y))
            form = of_core((core + core.T) / 2, every.v, tolerance, owners)
        return _Whole(form, held.missed(form))

    def _may_sharpen(self, held: _HeldOut) -> bool:
        """Whether `_sharper` is better than what `_approximate` gives, beside a diagonal."""
        return self._diagonal is not None and self._job.operator.definite and not held.every

    def _sharper(self, held: _HeldOut, tolerance: float) -> LowRank:
        """Eigenvectors that a flat tail does not blur: those of `signed`, of positive eigenvalues.

        Nystrom's are worth no power iteration.
        """
        assert self._sketch is not None
        y, owners, used = self._sketch.y, self._job.owners, held.columns.start
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

    def _cut_off(self, held: _HeldOut, found: _Spectrum, allowed: float) -> tuple[LowRank, float]:
        """As few eigenvectors as a squared error allows, or as it takes to come near; the error.

        The diagonal mends what that rank leaves; it takes the place of eigenvectors only where no
        rank does without: of a tail of small rank it is no substitute (log-determinants would be
        too large).
        """
        most = min(len(found.eigenvalues), self._job.max_rank)
        squares = found.eigenvalues**2
        tails = found.missed + np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        enough = np.nonzero(tails[: most + 1] <= allowed)[0]
        rank = int(enough[0]) if enough.size else most
        form = found.form(rank)
        if self._diagonal is None:
            return form, float(tails[rank])
        if enough.size:
            return self._with_tail(held, form, rank)
        # The error may rise again with the rank.
        tried = sorted({0, *(int(most * _STEP**i) for i in range(_TRIED))})
        pairs = {rank: self._with_tail(held, form, rank) for rank in tried}
        kept = [rank for rank, (_, error) in pairs.items() if error <= allowed]
        if not kept:
            return min(pairs.values(), key=lambda pair: pair[1])
        best, low = pairs[kept[0]], max((r for r in tried if r < kept[0]), default=kept[0])
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
        plain, share = leading(form, rank), self._job.owners.comm.share
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


class _Spectrum(Protocol):
    """The eigenvalues of a low-rank approximation, whose eigenvectors are made on demand."""

    @property
    def missed(self) -> float:
        """norm(K - approximation)_F^2."""

    @property
    def eigenvalues(self) -> HostArray:
        """Descending by absolute value."""

    def form(self, rank: int) -> LowRank:
        """By the first of them."""


@dataclass(frozen=True, eq=False)
class _Whole:
    """A form that is there.

    Attributes:
        made: the form.
        missed: see `_Spectrum`.
    """

    made: LowRank
    missed: float

    @property
    def eigenvalues(self) -> HostArray:
        """See `_Spectrum`."""
        return to_host(self.made.eigenvalues).astype(np.float64)

    def form(self, rank: int) -> LowRank:
        """See `_Spectrum`."""
        return leading(self.made, rank)


@dataclass(frozen=True, eq=False)
class _Sketched:
    """Nystrom's approximation.

    Attributes:
        approximation: from random columns.
        missed: see `_Spectrum`; estimated.
    """

    approximation: Nystrom
    missed: float

    @property
    def eigenvalues(self) -> HostArray:
        """See `_Spectrum`."""
        return self.approximation.eigenvalues

    def form(self, rank: int) -> LowRank:
        """See `_Spectrum`."""
        return self.approximation.form(rank)


class _Root:
    """K = A^T A by the eigenvalues and vectors of A A^T: exact.

    Args:
        dual: A.
        operator: K.
        owners: which rank has which rows of K.
    """

    missed = 0.0

    def __init__(self, dual: Dual, operator: Operator, owners: Ownership) -> None:
        self._dual, self._operator, self._owners = dual, operator, owners
        gram = dual.gram(owners.comm)
        # Of equal eigenvalues every rank must have the same vectors.
        values, vectors = owners.comm.bcast(namespace(gram).linalg.eigh(gram), 0)
        self._rounding = float(np.finfo(operator.dtype).eps) * max(float(values[-1]), 0.0)
        kept = int((values > self._rounding).sum())  # the vectors of others are rounding
        self._vectors = vectors[:, ::-1][:, :kept]
        self.eigenvalues: HostArray = to_host(values)[::-1][:kept]

    def form(self, rank: int) -> LowRank:
        """See `_Spectrum`; the vectors are made some at a time, and in place."""
        operator, owners = self._operator, self._owners
        n, dtype = operator.shape[0], operator.dtype
        check_memory(
            (rank + 2 * _AT_ONCE) * owners.num_rows(n) * dtype.itemsize,
            f"{rank} eigenvectors of order {n}", "max_rank", operator.device,
        )  # fmt: skip
        xp = namespace(self._vectors)
        W = self._vectors[:, :rank].astype(dtype)
        B = xp.empty((owners.num_rows(n), rank), dtype)
        for start in range(0, rank, _AT_ONCE):
            to = B[:, start : start + _AT_ONCE]
            mine, widths = column_share(to.shape[1], owners.comm)
            owners.from_columns(
                (self._dual.combine(W[:, start : start + _AT_ONCE][:, mine]),), widths, (to,)
            )
        return eigenvectors(B, self._rounding, owners)


def few_rows(operator: Operator, max_rank: int) -> Dual | None:
    """A of K = A^T A where its rows are so few that A A^T is worth more than random columns."""
    dual = operator.dual() if operator.definite else None
    n = operator.shape[0]
    columns = min(samples_for(max_rank), n)
    return dual if dual is not None and dual.pays(n, columns, operator.product_cost) else None


class _HeldOut:
    """Columns that an approximation is judged by: Gaussian Omega, and K times them.

    Args:
        sketch: whose last columns they are.
        used: columns that the approximation is made of.
        owners: which rank has which rows.
        every: whether the approximation is of all of K, and no more columns would help.

    Attributes:
        columns: which they are.
    """

    def __init__(
        self, sketch: SketchRows | None, used: int, owners: Ownership, every: bool = False
    ) -> None:
        self._sketch, self._owners, self.every = sketch, owners, every
        self.columns = slice(used, 0 if sketch is None else sketch.num)

    @property
    def y(self) -> Array:
        """K times them."""
        assert self._sketch is not None
        return self._sketch.y[:, self.columns]

    def missed(self, form: LowRank) -> float:
        """norm(K - form)_F^2, estimated."""
        assert self._sketch is not None
        omega = namespace(self.y).ascontiguousarray(self._sketch.omega[:, self.columns])
        return self.missed_by(form.matmat(omega))

    def missed_by(self, products: Array) -> float:
        """The same of an approximation's products with the columns."""
        difference = (self.y - products).astype(np.float64)
        squares = self._owners.comm.share(float((difference * difference).sum()))
        return sum(squares) / difference.shape[1]


def _predict(sampler: BlockSampler, tolerance: float) -> float | None:
    n, cap = sampler.job.tree.n, sampler.job.max_rank
    side = min(max(SIDE, 2 * cap), _WHOLE)
    every, negligible = np.arange(n), 1e-3 * tolerance**2
    rank = rank_for(sampler.tails(every, every, side, negligible), tolerance**2, cap)
    return None if rank is None else (n + 1) * rank / n**2


def _memory(sizes: Sizes) -> float:
    """Sketch, and what of its size the approximation is made of.

    Of few rows of a root the vectors that errors are measured with: how many eigenvectors there
    will be is not known yet, and checked when it is.
    """
    if sizes.few_rows and not sizes.twice:
        return _MEASURED
    return (12.0 if sizes.twice else 5.0) * sizes.columns


SCHEME = Scheme(
    "lowrank", LowRank, LowRankMatrix, LowRankBuild, _predict, _memory,
    aim=0.9,  # truncated to what it may miss, which nothing amplifies
    products_only=True, whole=True, has_tail=True, cheap_without_entries=True,
)  # fmt: skip

"""From a matrix that may be compressed to the structure: probe, tree, samples, tolerances tried."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from gpu_hodlr.compression import memory
from gpu_hodlr.compression.choice import Choice, choose
from gpu_hodlr.compression.options import Options
from gpu_hodlr.compression.probe import ErrorProbe, SpreadProbe
from gpu_hodlr.compression.promise import Made, first_that_keeps, until_promise
from gpu_hodlr.compression.spectral import sampled_spectral_error, spectral_error
from gpu_hodlr.compression.tolerance import Tolerance
from gpu_hodlr.distributed import Communicator, Ownership
from gpu_hodlr.operators import NarrowedOperator, Operator, ScaledOperator, SketchColumns
from gpu_hodlr.ordering import build_tree
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes import SCHEMES, Job, Sampling
from gpu_hodlr.tree import rows_tree

_ATTEMPTS = 4  # tolerances tried, where the spectral error decides


@dataclass(frozen=True)
class Done:
    """What was built.

    Attributes:
        made: the structure.
        why: its scheme was chosen; None where there was no choice.
        rtol: that it was built with at last.
        spectral_error: of K, from below.
    """

    made: Made
    why: str | None
    rtol: float
    spectral_error: float


@dataclass(frozen=True)
class Ready:
    """A matrix with its tree and samples, to be built at any tolerance.

    Attributes:
        job: of factor * K, in the precision worked in.
        operator: the same in its own.
        options: of `compress`.
        sampling: what is read of it.
        exact: measures what is built.
        tolerance: asked for.
        norm: norm(K)_F, estimated.
        factor: the power of two that K is multiplied by.
        measured_by: what errors are, in words.
    """

    job: Job
    operator: Operator
    options: Options
    sampling: Sampling
    exact: SpreadProbe
    tolerance: Tolerance
    norm: float
    factor: float
    measured_by: str

    @property
    def spectral_by_products(self) -> bool:
        """Whether the spectral error is measured with products, else from columns."""
        return self.options.spectral_by_products(self.job.operator, self.sampling)

    def compressed(self) -> Done:
        """Build, and again where the spectral error exceeds what a damping allows."""
        rtol, tolerance = self.tolerance.rtol, self.tolerance
        for attempt in range(1, _ATTEMPTS + 1):
            choice = self._choice(rtol)
            made, why = first_that_keeps(choice, partial(self._build, choice, rtol), rtol)
            error = self._spectral_error(made)
            if tolerance.keeps(error) or made.capped or attempt == _ATTEMPTS:
                break
            rtol = tolerance.tighter(rtol, error)
        return Done(made, why, rtol, error)

    def _choice(self, rtol: float) -> Choice:
        """What to build."""
        if self.options.scheme != "auto":
            return Choice((self.options.scheme,), None)
        with phase("choice"):
            return choose(self.job, _aims(self.sampling, rtol, self.exact.norm))

    def _build(self, choice: Choice, rtol: float, name: str) -> Made:
        """A scheme of the choice."""
        options, operator, scheme = self.options, self.job.operator, SCHEMES[name]
        ranks, job = self.job.owners.comm, self.job
        if options.may_raise and name in choice.within_reach:
            cap = memory.largest_cap(operator, options, scheme, self.sampling, ranks)
            columns = replace(options, max_rank=cap).sample_sizes(job.tree.n)
            job = job.having(max_rank=cap, columns=columns)
        return until_promise(
            scheme, job, self.sampling, rtol, options.dtypes(self.operator)[2], self.exact,
            options.products_affordable(operator),
            memory.growth(operator, options, scheme, self.sampling, ranks.size),
        )  # fmt: skip

    def _spectral_error(self, made: Made) -> float:
        """Of K."""
        measure = spectral_error if self.spectral_by_products else sampled_spectral_error
        with phase("spectral error"):
            return measure(replace(self.job, operator=self.operator), made.structure) / self.factor


def prepared(
    operator: Operator, options: Options, sampling: Sampling, ranks: Communicator
) -> Ready:
    """Measure the matrix, order its rows, and draw the samples that no scheme can do without.

    Args:
        operator: K.
        options: of `compress`.
        sampling: what is read of K.
        ranks: among which it is dealt.
    """
    n, seed = operator.shape[0], options.seed
    columns = options.sample_sizes(n)
    with phase("probe"):
        multiplied = options.measured_by_products(operator, sampling)
        probe = ErrorProbe(operator, multiplied, seed, ranks, options.probe_rows(columns[0]))
        norm, factor = probe.norm, probe.scale_to_one(options.dtypes(operator)[1])
    scaled = operator if factor == 1.0 else ScaledOperator(operator, factor)
    narrow = options.working(scaled) != scaled.dtype
    worked = NarrowedOperator(scaled) if narrow else scaled
    tolerance = Tolerance.asked(options.rtol, options.atol, options.damping, norm)
    sketch: SketchColumns | None = None
    if sampling.products and options.sketched:
        with phase("sampling"):
            sketch = SketchColumns(worked, columns[0], seed, ranks)
    with phase("ordering"):
        if options.scheme in SCHEMES and SCHEMES[options.scheme].whole:
            tree, ordering = rows_tree(n, ranks.size), "natural"
        else:
            aim = _aims(sampling, tolerance.rtol, probe.norm)["hss"]
            tree, ordering = build_tree(
                worked, options.ordering, int(options.leaf_size), seed, aim, sketch, ranks
            )
    owners = Ownership(ranks, tree.leaves)
    with phase("sampling"):
        exact = probe.to_rows(owners)
        samples = None if sketch is None else sketch.to_rows(owners)
    job = Job(
        worked, tree, owners, ordering, samples, sampling.entries, columns, options.max_rank,
        options.budget, seed, options.tail,
    )  # fmt: skip
    return Ready(job, scaled, options, sampling, exact, tolerance, norm, factor, probe.how)


def _aims(sampling: Sampling, rtol: float, norm: float) -> dict[str, float]:
    """Absolute Frobenius error that every scheme aims at."""
    return {name: scheme.share(sampling) * rtol * norm for name, scheme in SCHEMES.items()}

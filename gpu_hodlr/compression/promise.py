"""Building until the measured error keeps the promise, and saying so where it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from gpu_hodlr.batched.stored import FLOAT32, WIDTHS
from gpu_hodlr.compressed import CompressionReport
from gpu_hodlr.compression.choice import Choice
from gpu_hodlr.compression.probe import Measured, SpreadProbe
from gpu_hodlr.compression.tolerance import SHARE
from gpu_hodlr.errors import AccuracyWarning, NotPositiveDefiniteError, RankCapWarning
from gpu_hodlr.operators import SketchColumns
from gpu_hodlr.profiling import phase
from gpu_hodlr.schemes import SCHEMES, Build, Job, Sampling, Scheme
from gpu_hodlr.structures import Structure

_PASSES = 3
_PASSES_OF_ENTRIES = 2  # where products can be taken after them
_SAFE = 0.95  # of what is accepted, at most, is aimed at by a pass that corrects another
_ROUNDING = 2000.0  # times eps: an error of this size that no pass lowers
_REDUCED = 4.0  # the same of a far field kept in less than float32, times its rounding
_FINER = {
    "bfloat16": "use storage_dtype float32", "tfloat32": "use storage_dtype float32",
    "float32": "use dtype float64",
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A structure, how it was made and what error it was measured to have."""

    scheme: Scheme
    build: Build
    structure: Structure
    capped: tuple[int, ...]
    measured: Measured
    passes: int
    sampling: Sampling
    max_rank: int

    def keeps(self, rtol: float) -> bool:
        """Whether the user need not be warned."""
        return self.scheme.keeps(self.measured.error, bool(self.capped), rtol)


def _rounding(kept_in: str) -> float:
    """An error that may be rounding alone, of what is kept so: see `Structure`."""
    if kept_in in WIDTHS:
        return _REDUCED * 2.0 ** -WIDTHS[kept_in]
    return _ROUNDING * float(np.finfo(kept_in).eps)


def until_promise(
    scheme: Scheme,
    job: Job,
    sampling: Sampling,
    rtol: float,
    kept_in: str,
    exact: SpreadProbe,
    by_products: bool,
    grows: Callable[[int, int], None] | None = None,
) -> Made:
    """Build, measure, and build again with a tighter tolerance while the promise is missed.

    Sampled columns may miss entries that few columns hold. Where products can be made instead,
    they are after two passes: they miss none.

    Args:
        scheme: what to build.
        job: the matrix.
        sampling: how `job` samples it.
        rtol: the promise.
        kept_in: see `Structure`.
        exact: measures.
        by_products: whether products are affordable.
        grows: asked before a sketch gets more columns, (columns now, columns then).
    """
    if job is not None:
        job = job.having(grows=grows)
        if job.sketch is not None:
            job.sketch.grows = grows
    may_change = by_products and not sampling.products and not scheme.products_only
    may_change = may_change and not scheme.needs_eigenbasis  # which takes no sample
    most = _PASSES_OF_ENTRIES if may_change else _PASSES
    made = _passes(scheme, job, sampling, rtol, kept_in, exact, most)
    error = made.measured.error
    if error <= max(scheme.accepted * rtol, _rounding(kept_in)) or made.capped or not may_change:
        return made
    with phase("sampling"):
        drawn = SketchColumns(job.operator, job.columns[0], job.seed, job.owners.comm)
        job = replace(job, sketch=drawn.to_rows(job.owners))
    sampling = Sampling.PRODUCTS_AND_ENTRIES
    again = _passes(scheme, job, sampling, rtol, kept_in, exact, _PASSES)
    return replace(_better(made, again, rtol), passes=made.passes + again.passes)


def _passes(
    scheme: Scheme,
    job: Job,
    sampling: Sampling,
    rtol: float,
    kept_in: str,
    exact: SpreadProbe,
    most: int,
) -> Made:
    """See `until_promise`; with one kind of sample."""
    aim = scheme.share(sampling) * rtol * exact.norm
    build, passes = scheme.build(job), 0
    while True:
        built, capped = build.run(aim, passes == 0)
        passes += 1
        structure = built.astype(kept_in)
        with phase("measuring"):
            measured = exact.measure(structure)
            last = measured.error <= scheme.accepted * rtol or bool(capped) or passes == most
            if not last and kept_in in WIDTHS:  # what rounding alone is missing no rank mends
                last = exact.measure(built.astype(FLOAT32)).error <= scheme.accepted * rtol
        if last:
            return Made(
                scheme, build, structure, capped, measured, passes, sampling, job.max_rank
            )  # fmt: skip
        aim *= min(1.0, _SAFE * scheme.accepted) * rtol / measured.error


def first_that_keeps(
    choice: Choice, build: Callable[[str], Made], rtol: float
) -> tuple[Made, str | None]:
    """Build the schemes of a choice in turn until one keeps the promise; and why it was taken.

    Raises:
        NotPositiveDefiniteError: no scheme but "lowrank" was left, see there.
    """
    best: Made | None = None
    tried: list[str] = []
    refused: NotPositiveDefiniteError | None = None
    for built, name in enumerate(choice.schemes):
        if best is not None and best.keeps(rtol) and built >= choice.every:
            break
        try:
            made = build(name)
        except NotPositiveDefiniteError as e:
            tried.append(f"{name}: not positive semi-definite")
            refused = e
            continue
        best = made if best is None else _better(best, made, rtol)
        hit = f", max_rank hit, {'' if made.keeps(rtol) else 'not '}kept" if made.capped else ""
        tried.append(f"{name}: error {made.measured.error:.2g}{hit}")
    if best is None:
        assert refused is not None
        raise refused
    if choice.reason is None or len(choice.schemes) == 1:
        return best, choice.reason
    verdict = "kept" if best.keeps(rtol) else "none keeps rtol, the least error is kept"
    return best, f"{choice.reason}; built: {', '.join(tried)}; {verdict}: {best.scheme.name}"


def _better(one: Made, other: Made, rtol: float) -> Made:
    """The one that stores least of those that keep the promise, or else errs least."""

    def rank(made: Made) -> tuple[bool, float]:
        kept = made.keeps(rtol)
        return not kept, made.structure.num_stored if kept else made.measured.error

    return min(one, other, key=rank)


def warn(report: CompressionReport, max_rank: int, kept_in: str, rtol_asked: bool = True) -> None:
    """Tell of a promise that was missed, and of the cause.

    Args:
        report: of the matrix.
        max_rank: the cap.
        kept_in: see `Structure`.
        rtol_asked: whether the user gave an error; else report.rtol is what a damping came to, and
            only the spectral error, which is compared with that damping, is of interest.

    Warns:
        RankCapWarning, AccuracyWarning: see `compress`.
    """
    levels = ", ".join(map(str, report.capped_levels))
    hit = f"max_rank {max_rank} was hit on level {levels} (root = 0)"
    other = ", or try scheme='auto'" if report.choice is None else ""
    kind = RankCapWarning if report.rank_cap_hit else AccuracyWarning
    floor = ""
    if report.error <= _rounding(kept_in):
        finer = _FINER.get(kept_in, "no dtype is finer")
        floor = f": rounding of {kept_in}, not the rank, is the floor; {finer}, or raise "
    error, damping = report.spectral_error, report.damping
    if damping is not None and error is not None and error > SHARE * damping:
        missed = f"spectral error {error:.2g} exceeds a tenth of damping {damping:.2g}"
        why = f": {hit}; raise max_rank{other}" if report.rank_cap_hit else floor and f"{floor}it"
        warnings.warn(missed + why, kind, stacklevel=3)
    if not rtol_asked or SCHEMES[report.scheme].keeps(
        report.error, report.rank_cap_hit, report.rtol
    ):
        return
    missed = f"measured error {report.error:.2g}"
    if report.rank_cap_hit:
        said = f"{hit}: {missed}, rtol {report.rtol:.2g}; raise max_rank or rtol{other}"
    else:
        missed += f" exceeds rtol {report.rtol:.2g} after {report.passes} passes"
        said = missed + (floor and f"{floor}rtol")
    warnings.warn(said, kind, stacklevel=3)

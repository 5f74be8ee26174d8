"""Everything that is promised, checked for cases drawn from the zoo.

A case is its number: `python tests/promises.py 17 903` draws two of them again, says what they are
and what is broken.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import dense_oracles
import numpy as np
from promise_cases import Case, Matrix, Verdict, draw, warned
from promise_factors import check_cg, check_direction, check_factor

import gpu_hodlr as gh
from gpu_hodlr.errors import AccuracyWarning, NotPositiveDefiniteError, RankCapWarning

# What ten Gaussian vectors may be wrong by: a quotient of two roots of chi^2 / 10, one of them
# with ten degrees of freedom where the error has rank one.
ESTIMATE = 4.0
PROMISED = 3.0


def check(case: Case) -> list[str]:
    """Every promise of one case; what is broken."""
    verdict = Verdict()
    try:
        K, caught = warned(gh.compress, case.operator, **case.options)
    except NotPositiveDefiniteError as error:
        verdict.holds(case.options["scheme"] in ("lowrank", "auto"), f"refused: {error}")
        check_direction(case, 0.0, error.direction, error.curvature, verdict)
        return verdict.broken
    dense = np.asarray(K.to_dense(), np.float64)
    _check_error(case, K, dense, verdict)
    _check_warnings(case, K, caught, verdict)
    _check_products(case, K, dense, verdict)
    if case.rng.random() < 0.2:
        _check_arithmetic(case, K, dense, verdict)
    if case.rng.random() < 0.15:
        _check_again(case, K, verdict)
    F = check_factor(case, K, dense, verdict)
    if case.operator.has_products and case.rng.random() < 0.2 and not np.ndim(case.damping):
        check_cg(case, F, verdict)
    if case.rng.random() < 0.15:
        _check_files(case, K, F, verdict)
    return verdict.broken


# --- the compression


def _check_error(case: Case, K: gh.CompressedMatrix, dense: Matrix, verdict: Verdict) -> None:
    """The error reported is the error there is."""
    report = K.report
    true = dense_oracles.frobenius_error(dense, case.exact)
    rounding = 30 * case.eps
    claimed = max(ESTIMATE * report.error, getattr(report, "error_bound", None) or 0.0)
    verdict.at_most(true, claimed + rounding, f"real error against {report.error:.3g} reported")
    verdict.at_most(report.error, ESTIMATE * true + rounding, "error reported, against real")
    norm = float(np.linalg.norm(case.exact))
    if report.sampler != "entries" or len(case.exact) <= 128:
        verdict.at_most(norm, ESTIMATE * report.frobenius_norm, "norm, against that reported")
        verdict.at_most(report.frobenius_norm, ESTIMATE * norm * (1 + rounding), "norm reported")
    cap = case.options.get("max_rank", 256)
    verdict.holds(
        all(rank <= cap for ranks in K.ranks for rank in ranks), f"ranks {K.ranks} exceed the cap"
    )
    verdict.holds(all(np.isfinite(dense).ravel()), "K has NaN or infinity")
    if hasattr(K, "near_fraction"):
        verdict.at_most(K.near_fraction, case.options["budget"], "near field against budget")


def _check_warnings(case: Case, K: gh.CompressedMatrix, caught: list[Any], verdict: Verdict):
    """A warning exactly where one is promised, and the cap blamed only for what it did."""
    report, rtol = K.report, case.options["rtol"]
    got = sorted(w.category.__name__ for w in caught)
    capped = report.rank_cap_hit and report.error > rtol
    missed = not capped and report.error > PROMISED * rtol
    want = [RankCapWarning.__name__] * capped + [AccuracyWarning.__name__] * missed
    verdict.holds(got == want, f"warnings {[str(w.message) for w in caught]}, should be {want}")
    if missed:  # there must be a reason: rounding
        verdict.holds(
            rtol < 50 * case.eps,
            f"AccuracyWarning: error {report.error:.3g} at rtol {rtol:.0e} in {case.eps:.1g}",
        )
    verdict.holds(
        report.rank_cap_hit == bool(report.capped_levels), f"capped levels {report.capped_levels}"
    )
    if report.rank_cap_hit:
        largest = max((rank for ranks in K.ranks for rank in ranks), default=0)
        cap = case.options.get("max_rank", 256)
        verdict.holds(largest == cap, f"cap {cap} hit, and the largest rank is {largest}")
    if capped:
        free = {**case.options, "max_rank": max(256, len(case.exact))}
        try:
            better, _ = warned(gh.compress, case.operator, **free)
        except NotPositiveDefiniteError:  # more rank shows negative eigenvalues to "lowrank"
            better = None
        verdict.holds(
            report.error < 10 * case.eps  # what is left is rounding, and none can be told
            or better is None
            or better.report.error < 0.9 * report.error
            or better.ranks != K.ranks,
            f"the cap is blamed for error {report.error:.3g} at ranks {K.ranks}",
        )
    if case.options["scheme"] == "auto" and (capped or missed):
        for scheme in ("hss", "hodlr", *["lowrank"] * bool(case.operator.definite)):
            options = {**case.options, "scheme": scheme}
            options.pop("budget", None)
            if scheme == "lowrank" and (
                options["sampler"] == "entries" or not case.operator.has_products
            ):
                continue
            try:
                _, others = warned(gh.compress, case.operator, **options)
            except NotPositiveDefiniteError:
                continue
            verdict.holds(others, f"auto took {report.scheme} and warns, {scheme} does not")


def _check_products(case: Case, K: gh.CompressedMatrix, dense: Matrix, verdict: Verdict) -> None:
    """Products, diagonal, trace, symmetry."""
    size = max(float(np.abs(dense).max()), float(np.abs(case.exact).max()))
    rounding = 100 * case.eps * size
    verdict.at_most(float(np.abs(dense - dense.T).max()), rounding, "not symmetric")
    diagonal = np.asarray(K.diagonal(), np.float64)
    verdict.at_most(float(np.abs(diagonal - dense.diagonal()).max()), rounding, "diagonal")
    trace = float(dense.trace())
    verdict.at_most(abs(K.trace() - trace), len(dense) * rounding, "trace")
    v = case.rng.standard_normal((len(dense), 3)).astype(K.dtype)
    got, want = K @ v, dense @ v.astype(np.float64)
    limit = 100 * case.eps * float(np.linalg.norm(dense)) * float(np.linalg.norm(v))
    verdict.at_most(float(np.linalg.norm(got - want)), limit, "product")
    verdict.holds(got.dtype == K.dtype and got.shape == v.shape, "type or shape of a product")
    verdict.at_most(float(np.linalg.norm(K @ v[:, 0] - want[:, 0])), limit, "product, a vector")


def _check_arithmetic(case: Case, K: gh.CompressedMatrix, dense: Matrix, verdict: Verdict) -> None:
    """3 K, K / 4 and K + D."""
    size = float(np.abs(dense).max())
    rounding = 200 * case.eps
    for name, got, want in (
        ("3 K", 3 * K, 3 * dense),
        ("K / 4", K / 4, dense / 4),
    ):
        verdict.at_most(
            float(np.abs(np.asarray(got.to_dense(), float) - want).max()),
            3 * rounding * size, name,
        )  # fmt: skip
    d = ((size or 1.0) * case.rng.random(len(dense))).astype(K.dtype)
    got = np.asarray((K + gh.Diagonal(d)).to_dense(), float)
    verdict.at_most(
        float(np.abs(got - dense - np.diag(d.astype(float))).max()), 2 * rounding * (size or 1.0),
        "K + D",
    )  # fmt: skip


def _check_again(case: Case, K: gh.CompressedMatrix, verdict: Verdict) -> None:
    """The same seed gives the same bits."""
    again, _ = warned(gh.compress, case.operator, **case.options)
    same = np.array_equal(again.to_dense(), K.to_dense(), equal_nan=True)
    verdict.holds(same, "the same seed gives other bits")
    verdict.holds(again.report.error == K.report.error, "the same seed reports another error")


# --- files


def _check_files(case: Case, K: gh.CompressedMatrix, F: Any, verdict: Verdict) -> None:
    """What is loaded has the same bits."""
    v = np.ones(len(case.exact), K.dtype)
    with tempfile.TemporaryDirectory() as folder:
        K.save(Path(folder) / "K.npz")
        loaded = gh.load(Path(folder) / "K.npz")
        verdict.holds(type(loaded) is type(K), f"loaded a {type(loaded).__name__}")
        verdict.holds(np.array_equal(loaded.to_dense(), K.to_dense()), "K loaded has other bits")
        verdict.holds(loaded.report == K.report, "the report loaded is another")
        if F is None:
            return
        F.save(Path(folder) / "F.npz")
        again = gh.load(Path(folder) / "F.npz")
        try:
            want, _ = warned(copy.copy(F).solve, v)
        except NotPositiveDefiniteError:
            return
        got, _ = warned(again.solve, v)
        verdict.holds(np.array_equal(got, want), "a factor loaded has other bits")


def failures(indices: Any) -> list[str]:
    """What is broken in cases, and how to draw them again."""
    found = []
    for index in indices:
        case = draw(index)
        try:
            broken = check(case)
        except Exception as error:
            trace = traceback.extract_tb(error.__traceback__)[:-6:-1]
            where = " <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in trace)
            broken = [f"{type(error).__name__}: {error} ({where})"]
        if broken:
            found.append("\n    ".join([str(case), *broken]))
    return found


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        print(draw(number), *failures([number]), sep="\n")

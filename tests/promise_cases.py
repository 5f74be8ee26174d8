"""Cases drawn from the zoo, each checked against everything that is promised.

A case is its number: `python tests/promise_cases.py 17 903` draws two of them again, says what
they are and what is broken.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dense_oracles
import numpy as np
from numpy.random import Generator
from zoo import FLOAT64_ONLY, ZOO

import gpu_hodlr as gh
from gpu_hodlr.errors import AccuracyWarning, NotPositiveDefiniteError, RankCapWarning

SEED = 20_261_129
SMALL, SIZES = (2, 3, 5, 17, 40, 64), (97, 127, 128, 129, 200, 255, 256, 257, 300, 400, 510, 600)
RTOLS = (1e-2, 1e-5, 1e-9)
SCHEMES = ("hss", "hss", "fmm", "hodlr", "lowrank", "auto")
DAMPINGS = (0.0, 1e-8, 1e-4, 1e-2, 0.1, 1.0)  # times the spectral norm
# What ten Gaussian vectors may be wrong by: a quotient of two roots of chi^2 / 10, one of them
# with ten degrees of freedom where the error has rank one.
ESTIMATE = 4.0
PROMISED = 3.0
ROUNDING = 1e3  # times the precision: backward errors of factors

Matrix = np.ndarray[Any, Any]


@dataclass
class Case:
    """What is compressed, how, and what it should be."""

    index: int
    name: str
    operator: gh.Operator
    exact: Matrix
    eigenvalues: Matrix
    options: dict[str, Any]
    damping: float | Matrix
    rng: Generator

    @property
    def norm(self) -> float:
        """Of the exact matrix, spectral."""
        return float(np.abs(self.eigenvalues).max())

    @property
    def eps(self) -> float:
        """Of what is stored."""
        kept = self.options.get("storage_dtype") or self.operator.dtype
        return float(np.finfo(kept).eps)

    def __str__(self) -> str:
        said = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        damping = "of every row" if np.ndim(self.damping) else f"{self.damping:.3g}"
        return (
            f"case {self.index}: {self.name}, N = {len(self.exact)}, {self.operator.dtype}, "
            f"definite={self.operator.definite}, {said}, damping {damping}"
        )


def draw(index: int) -> Case:
    """The case of a number; every matrix of the zoo in turn."""
    name = list(ZOO)[index % len(ZOO)]
    rng = np.random.default_rng((SEED, index))
    n = int(rng.choice(SMALL if rng.random() < 0.2 else SIZES))
    dtype = np.float32 if rng.random() < 0.3 and name not in FLOAT64_ONLY else np.float64
    specimen = ZOO[name](rng, n)
    exact = specimen.exact(dtype)
    eigenvalues = np.linalg.eigvalsh(exact)
    rounding = len(exact) * float(np.finfo(dtype).eps) * np.abs(eigenvalues).max()
    # users declare nothing, and bring indefinite matrices as well
    definite = bool(eigenvalues[0] >= -rounding) or rng.random() < 0.3
    operator = specimen.operator(dtype, definite)
    options = _options(operator, rng)
    if dtype == np.float64 and rng.random() < 0.2:
        options["storage_dtype"] = "float32"
    size = float(np.abs(eigenvalues).max()) or 1.0
    damping: Any = float(rng.choice(DAMPINGS)) * size
    if rng.random() < 0.15 and damping:
        damping = (damping * (0.5 + rng.random(len(exact)))).astype(dtype)
    return Case(index, name, operator, exact, eigenvalues, options, damping, rng)


def _options(operator: gh.Operator, rng: Generator) -> dict[str, Any]:
    """Arguments of `compress` that this operator can be compressed with."""
    n, entries, products = operator.shape[0], operator.has_entries, operator.has_products
    schemes = [
        scheme
        for scheme in SCHEMES
        if (scheme != "lowrank" or (operator.definite and products))
        and (scheme != "fmm" or entries)
    ]
    scheme = str(rng.choice(schemes))
    orderings = ["auto", "natural", "random"]
    if operator.definite and entries:
        orderings += ["gram", "angle"]
    if operator.points is not None:
        orderings += ["geometric"]
    samplers = ["auto"]
    if entries and scheme != "lowrank":
        samplers += ["entries"] + ["products+entries"] * products
    if products and scheme != "fmm":
        samplers += ["products"]
    options: dict[str, Any] = {
        "scheme": scheme,
        "rtol": float(rng.choice(RTOLS)),
        "leaf_size": int(rng.choice([1, 4, 16, 25, 32, 64, 300], p=[0.03, 0.07, *[0.18] * 5])),
        "ordering": str(rng.choice(orderings)),
        "sampler": str(rng.choice(samplers)),
        "seed": int(rng.integers(1000)),
    }
    if scheme == "fmm" or (scheme == "auto" and rng.random() < 0.5 and entries):
        # a budget must hold a neighbour for every leaf: half of the leaves in pairs
        leaves = 1 << max(0, int(np.ceil(np.log2(n / options["leaf_size"]))))
        options["budget"] = min(1.0, float(rng.choice([0.0, 0.7, 1.5, 3.0])) / leaves)
    if rng.random() < 0.3:
        options["max_rank"] = int(rng.choice([1, 2, 8, 20, max(1, n // 4)]))
    return options


class Verdict:
    """What of a case is broken.

    Attributes:
        broken: one sentence each.
    """

    def __init__(self) -> None:
        self.broken: list[str] = []

    def holds(self, condition: Any, promise: str) -> bool:
        """Note the promise if it is not kept."""
        if not condition:
            self.broken.append(promise)
        return bool(condition)

    def at_most(self, value: float, limit: float, what: str) -> bool:
        """The same, with numbers; NaN is more than any limit."""
        return self.holds(value <= limit, f"{what}: {value:.3g} > {limit:.3g}")


def warned(function: Any, *arguments: Any, **options: Any) -> tuple[Any, list[Any]]:
    """What a function gives, and the warnings in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*arguments, **options)
    return result, caught


def check(case: Case) -> list[str]:
    """Every promise of one case; what is broken."""
    verdict = Verdict()
    try:
        K, caught = warned(gh.compress, case.operator, **case.options)
    except NotPositiveDefiniteError as error:
        verdict.holds(case.options["scheme"] in ("lowrank", "auto"), f"refused: {error}")
        _check_direction(case, 0.0, error.direction, error.curvature, verdict)
        return verdict.broken
    dense = np.asarray(K.to_dense(), np.float64)
    _check_error(case, K, dense, verdict)
    _check_warnings(case, K, caught, verdict)
    _check_products(case, K, dense, verdict)
    if case.rng.random() < 0.2:
        _check_arithmetic(case, K, dense, verdict)
    if case.rng.random() < 0.15:
        _check_again(case, K, verdict)
    F = _check_factor(case, K, dense, verdict)
    if case.operator.has_products and case.rng.random() < 0.2 and not np.ndim(case.damping):
        _check_cg(case, F, verdict)
    if case.rng.random() < 0.15:
        _check_files(case, K, F, verdict)
    return verdict.broken


# --- the compression


def _check_error(case: Case, K: gh.CompressedMatrix, dense: Matrix, verdict: Verdict) -> None:
    """The error reported is the error there is."""
    report = K.report
    true = dense_oracles.frobenius_error(dense, case.exact)
    rounding = 30 * case.eps
    bound = getattr(report, "error_bound", None)
    claimed = ESTIMATE * report.error if bound is None else max(bound, report.error)
    verdict.at_most(true, claimed + rounding, f"real error against {report.error:.3g} reported")
    if bound is None:
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
            rtol < 100 * case.eps,
            f"AccuracyWarning: error {report.error:.3g} at rtol {rtol:.0e} in {case.eps:.1g}",
        )
    verdict.holds(
        report.rank_cap_hit == bool(report.capped_levels), f"capped levels {report.capped_levels}"
    )
    if capped:
        free = {**case.options, "max_rank": max(256, len(case.exact))}
        better, _ = warned(gh.compress, case.operator, **free)
        verdict.holds(
            better.report.error < 0.9 * report.error or better.ranks != K.ranks,
            f"the cap is blamed for error {report.error:.3g} at ranks {K.ranks}; without one "
            f"{better.report.error:.3g} at {better.ranks}",
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


# --- the factor


def _check_factor(case: Case, K: gh.CompressedMatrix, dense: Matrix, verdict: Verdict) -> Any:
    """The factor, or the refusal and what it advises; the factor in the end, or None."""
    d = np.asarray(case.damping, np.float64)
    A = dense + np.diag(np.broadcast_to(d, len(dense)))
    if not np.isfinite(A).all():
        return None
    try:
        F, caught = warned(K.factorize, case.damping)
    except NotPositiveDefiniteError as error:
        return _check_refusal(case, K, A, error, verdict)
    return _check_solver(case, K, F, A, caught, verdict)


def _tolerance(case: Case, A: Matrix) -> float:
    """Of an eigenvalue that may count as zero."""
    return len(A) * 10 * case.eps * float(np.linalg.norm(A, 2))


def _check_refusal(
    case: Case, K: gh.CompressedMatrix, A: Matrix, error: Any, verdict: Verdict
) -> Any:
    """There is a negative eigenvalue, the damping advised does, and is not much too large."""
    smallest = float(np.linalg.eigvalsh(A)[0])
    rounding = _tolerance(case, A)
    # Woodbury with a diagonal needs E > 0, and without damping full rank
    verdict.at_most(smallest, rounding, "refused as indefinite, though the smallest eigenvalue is")
    if not verdict.holds(error.damping is not None, "no damping is advised"):
        return None
    rows = bool(np.ndim(case.damping))
    more = case.damping + K.dtype.type(error.damping) if rows else error.damping
    have = 0.0 if rows else float(case.damping)
    least = max(have - smallest, 1.02 * have)
    if A.any():  # of a zero matrix any does
        limit = 1.3 * least + 2 * rounding
        verdict.at_most(error.damping, limit, "the damping advised is too large")
    try:
        F, caught = warned(K.factorize, more)
    except NotPositiveDefiniteError as again:
        verdict.holds(
            False,
            f"the damping advised, {error.damping:.4g}, does not do (needed {have - smallest:.4g})"
            f"; the next advised is {again.damping:.4g}",
        )
        return None
    A = A + np.diag(np.broadcast_to(np.asarray(more, float) - case.damping, len(A)))
    return _check_solver(case, K, F, A, caught, verdict)


def _check_solver(
    case: Case, K: gh.CompressedMatrix, F: Any, A: Matrix, caught: list[Any], verdict: Verdict
) -> Any:
    """Solve, and of a factor the determinant and the square root."""
    eigenvalues = np.linalg.eigvalsh(A)
    rounding = _tolerance(case, A)
    verdict.holds(
        all(w.category is AccuracyWarning for w in caught),
        f"warnings of factorize: {[str(w.message) for w in caught]}",
    )
    rows = len(A)
    b = case.rng.standard_normal((rows, 2)).astype(K.dtype)
    iterative = not hasattr(F, "logdet")
    try:
        x, more = warned(F.solve, b)
    except NotPositiveDefiniteError as error:
        verdict.holds(
            iterative and eigenvalues[0] <= rounding,
            f"solve refuses as indefinite, smallest eigenvalue {eigenvalues[0]:.3g}: {error}",
        )
        return F
    if not iterative:
        verdict.holds(not more, f"warnings of solve: {[str(w.message) for w in more]}")
        _check_square_root(case, F, A, eigenvalues, verdict)
        verdict.at_most(-float(eigenvalues[0]), rounding, "factorized with a negative eigenvalue")
        limit = ROUNDING * case.eps
        verdict.at_most(dense_oracles.backward_error(A, x, b), limit, "backward error of a solve")
        return F
    wanted = 1e-10 if K.dtype == np.float64 else 1e-5
    verdict.holds(
        [w.category for w in more] == [AccuracyWarning] * (F.residual > 10 * wanted),
        f"warnings of solve: {[str(w.message) for w in more]}, residual {F.residual:.3g}",
    )
    residual = np.linalg.norm(A @ x.astype(float) - b, axis=0) / np.linalg.norm(b, axis=0)
    lost = ROUNDING * case.eps * float(np.linalg.norm(A) * np.linalg.norm(x) / np.linalg.norm(b))
    verdict.at_most(float(residual.max()), 2 * F.residual + lost, "residual, against reported")
    return F


def _check_square_root(
    case: Case, F: Any, A: Matrix, eigenvalues: Matrix, verdict: Verdict
) -> None:
    """log det, W W^T, W^-1, both transposed, and samples that are W times white noise."""
    n, dtype = len(A), F.dtype
    eye = np.eye(n, dtype=dtype)
    W = np.asarray(F.sqrt_matmat(eye), float)
    size = float(np.linalg.norm(A)) or 1.0
    limit = ROUNDING * case.eps
    verdict.at_most(float(np.linalg.norm(W @ W.T - A)) / size, limit, "W W^T")
    turned = np.asarray(F.sqrt_matmat(eye, transpose=True), float)
    verdict.at_most(float(np.linalg.norm(turned - W.T)) / size**0.5, limit, "W^T")
    if not eigenvalues[0] > 0:
        return
    condition = float(eigenvalues[-1] / eigenvalues[0])
    if condition * case.eps > 0.01:  # eigenvalues are rounding
        return
    want = float(np.log(eigenvalues).sum())
    lost = limit * float(eigenvalues[-1] * (1 / eigenvalues).sum())
    verdict.at_most(abs(F.logdet() - want), lost + case.eps * abs(want), "logdet")
    root = limit * condition**0.5
    z = case.rng.standard_normal((n, 2)).astype(dtype)
    scale = float(np.linalg.norm(z))
    for transpose in (False, True):
        back = F.sqrt_solve(F.sqrt_matmat(z, transpose=transpose), transpose=transpose)
        verdict.at_most(float(np.linalg.norm(back - z)) / scale, root, f"W^-1 W, {transpose=}")
    samples, white = F.sample(3, seed=case.index), F.sample(3, seed=case.index, inverse=True)
    # W z and W^-T z of one z: W^T W^-T z = W^-1 W z
    lost = root * float(np.linalg.norm(samples)) / max(float(eigenvalues[0]), 1e-300) ** 0.5
    verdict.at_most(
        float(np.linalg.norm(F.sqrt_matmat(white, transpose=True) - F.sqrt_solve(samples))),
        max(lost, root * scale), "samples of K and of its inverse",
    )  # fmt: skip


def _check_direction(
    case: Case, damping: float, p: Any, curvature: float | None, verdict: Verdict
) -> None:
    """p^T A p <= 0 for the exact A, and its Rayleigh quotient."""
    if not verdict.holds(p is not None and curvature is not None, "no direction is given"):
        return
    p = np.asarray(p, np.float64) / np.linalg.norm(p)
    found = float(p @ case.exact @ p) + damping
    rounding = len(p) * 10 * case.eps * (case.norm + damping)
    verdict.at_most(found, rounding, "p^T A p of the direction given")
    verdict.at_most(abs(found - curvature), rounding, "Rayleigh quotient, against that given")


def _check_cg(case: Case, F: Any, verdict: Verdict) -> None:
    """A solution of the exact matrix to the tolerance, or why not; F preconditions."""
    b = case.rng.standard_normal(len(case.exact)).astype(case.operator.dtype)
    rtol = 1e-8 if case.operator.dtype == np.float64 else 1e-4
    damping = float(case.damping)
    try:
        (x, info), caught = warned(
            gh.cg, case.operator, b, damping=damping, M=F, rtol=rtol, maxiter=100
        )
    except NotPositiveDefiniteError as error:
        _check_direction(case, damping, error.direction, error.curvature, verdict)
        return
    verdict.holds(
        all(w.category is AccuracyWarning for w in caught),
        f"warnings of cg: {[str(w.message) for w in caught]}",
    )
    x = np.asarray(x, np.float64)
    residual = float(np.linalg.norm(b - case.exact @ x - damping * x))
    size = float(np.linalg.norm(b))
    lost = ROUNDING * case.eps * (case.norm + damping) * float(np.linalg.norm(x))
    if info.converged:
        verdict.at_most(residual, 2 * rtol * size + lost, "residual of cg, converged")


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
            broken = [f"{type(error).__name__}: {error}"]
        found += [f"{case}\n    {promise}" for promise in broken]
    return found


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        drawn = draw(number)
        print(drawn, *check(drawn), sep="\n    ")

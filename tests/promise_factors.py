"""What is promised of factors, solves and refusals, checked for a case of the zoo."""

from __future__ import annotations

from typing import Any

import dense_oracles
import numpy as np
from promise_cases import ROUNDING, Case, Matrix, Verdict, warned

import gpu_hodlr as gh
from gpu_hodlr.errors import AccuracyWarning, NotPositiveDefiniteError


def check_factor(case: Case, K: gh.CompressedMatrix, dense: Matrix, verdict: Verdict) -> Any:
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
        # An FMM form has no factor: CG, in other roundings, is all that tells.
        verdict.holds(
            hasattr(K, "near_fraction") and abs(have - smallest - error.damping) <= rounding,
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
    iterative = hasattr(F, "residual")
    try:
        x, more = warned(F.solve, b)
    except NotPositiveDefiniteError as error:
        verdict.holds(
            iterative and eigenvalues[0] <= rounding,
            f"solve refuses as indefinite, smallest eigenvalue {eigenvalues[0]:.3g}: {error}",
        )
        return F
    if not np.isfinite(x).all():  # entries of the inverse beyond the range of numbers
        verdict.at_most(float(eigenvalues[0]), rounding, "infinite, though the smallest eigenvalue")
        return None
    if hasattr(F, "logdet"):
        _check_square_root(case, F, A, eigenvalues, verdict)
        verdict.at_most(-float(eigenvalues[0]), rounding, "factorized with a negative eigenvalue")
        _check_accuracy(case, K, F, A, (x, b), caught, verdict)
    if iterative:
        _check_iterations(F, A, (x, b), more, case, verdict)
    else:
        verdict.holds(not more, f"warnings of solve: {[str(w.message) for w in more]}")
        limit = ROUNDING * case.eps
        verdict.at_most(dense_oracles.backward_error(A, x, b), limit, "backward error of a solve")
    return F


def _reached(F: Any) -> float:
    """What iterations in the factor's type are meant to reach."""
    return 1e-10 if F.dtype == np.float64 else 1e-5


def _check_iterations(
    F: Any, A: Matrix, solved: Any, more: list[Any], case: Case, verdict: Verdict
) -> None:
    """A solve by CG: its residual is the one reported, and a warning where it is too large."""
    x, b = (np.asarray(part, np.float64) for part in solved)
    wanted = _reached(F)
    verdict.holds(
        [w.category for w in more] == [AccuracyWarning] * (F.residual > 10 * wanted),
        f"warnings of solve: {[str(w.message) for w in more]}, residual {F.residual:.3g}",
    )
    residual = np.linalg.norm(A @ x - b, axis=0) / np.linalg.norm(b, axis=0)
    lost = ROUNDING * case.eps * float(np.linalg.norm(A) * np.linalg.norm(x) / np.linalg.norm(b))
    verdict.at_most(float(residual.max()), 2 * F.residual + lost, "residual, against reported")


def _check_accuracy(
    case: Case, K: Any, F: Any, A: Matrix, solved: Any, caught: list[Any], verdict: Verdict
) -> None:
    """The compression's spectral error, the warning where it matters, the bound of a residual."""
    if not hasattr(K.report, "spectral_error"):
        return
    dense = np.asarray(K.to_dense(), np.float64)
    added = (A - dense).diagonal()
    missed = float(np.abs(np.linalg.eigvalsh(dense - case.exact)).max())
    spectral, rounding = K.report.spectral_error, _tolerance(case, A)
    if spectral is not None and not getattr(K.report, "spectral_sampled", False):
        verdict.at_most(spectral, 1.02 * missed + rounding, "spectral error reported")
        verdict.at_most(missed, 1.5 * spectral + rounding, "spectral error, against reported")
        nugget = K.report.nugget  # None: no eigenvalue is known to be as large as the damping
        least = 0.0 if nugget is None else float(added.min()) + nugget
        enough = max(least, float(np.linalg.eigvalsh(A)[0]))
        if missed > 0.8 * enough + rounding:
            verdict.holds(caught, f"no warning: error {missed:.3g}, damping and more {enough:.3g}")
        if missed < 0.3 * enough - rounding:
            verdict.holds(not caught, f"warned: error {missed:.3g}, damping and more {enough:.3g}")
    if F.residual_bound is not None:
        x, b = (np.asarray(part, np.float64) for part in solved)
        for i in range(b.shape[1]):
            residual = float(np.linalg.norm(b[:, i] - case.exact @ x[:, i] - added * x[:, i]))
            size = (case.norm + float(added.max())) * float(np.linalg.norm(x[:, i]))
            lost = ROUNDING * case.eps * size
            solved_to = getattr(F, "residual", 0.0)
            limit = (1.1 * F.residual_bound + solved_to) * float(np.linalg.norm(b[:, i])) + lost
            verdict.at_most(residual, limit, "residual against the exact matrix, bound")


def _check_square_root(
    case: Case, F: Any, A: Matrix, eigenvalues: Matrix, verdict: Verdict
) -> None:
    """log det, W W^T, W^-1, both transposed, and samples that are W times white noise."""
    n, dtype = len(A), F.dtype
    eye = np.eye(n, dtype=dtype)
    estimated = hasattr(F, "logdet_error")
    try:
        W, caught = warned(F.sqrt_matmat, eye)
    except NotPositiveDefiniteError:
        verdict.holds(estimated, "a factor without a square root")
        verdict.at_most(float(eigenvalues[0]), _tolerance(case, A), "no square root, though")
        return
    if caught:  # that iterations did not reach it
        verdict.holds(estimated, f"warnings of W: {[str(w.message) for w in caught]}")
        return
    W = np.asarray(W, float)
    size = float(np.linalg.norm(A)) or 1.0
    limit = max(ROUNDING * case.eps, 10 * _reached(F) if estimated else 0.0)
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
    found = F.logdet()
    if estimated:  # of 16 probes: beyond six standard errors once in 40,000 cases
        lost += 6 * F.logdet_error
    verdict.at_most(abs(found - want), lost + case.eps * abs(want), "logdet")
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


def check_direction(
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


def check_cg(case: Case, F: Any, verdict: Verdict) -> None:
    """A solution of the exact matrix to the tolerance, or why not; F preconditions."""
    b = case.rng.standard_normal(len(case.exact)).astype(case.operator.dtype)
    rtol = 1e-8 if case.operator.dtype == np.float64 else 1e-4
    damping = float(case.damping)
    try:
        (x, info), caught = warned(
            gh.cg, case.operator, b, damping=damping, M=F, rtol=rtol, maxiter=100
        )
    except NotPositiveDefiniteError as error:
        if error.direction is not None or not hasattr(F, "residual"):  # else CG inside M met it
            check_direction(case, damping, error.direction, error.curvature, verdict)
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

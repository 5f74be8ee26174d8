"""The error of a compression against a damping: measured, warned of, bounded, and asked for."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix_cases import entries_only, toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.compression.tolerance import Tolerance
from gpu_hodlr.errors import AccuracyWarning, ArgumentError

N = 500
OPTIONS: dict[str, dict[str, Any]] = {
    "hss": {"scheme": "hss"},
    "hodlr": {"scheme": "hodlr"},
    "lowrank": {"scheme": "lowrank", "max_rank": N},
    "fmm": {"scheme": "fmm", "budget": 0.15},
}


def plane(kernel: str = "gaussian", nugget: float = 0.0, n: int = N) -> gh.KernelOperator:
    points = np.random.default_rng(0).random((n, 2))
    return gh.KernelOperator(points, kernel, 0.2, nugget)


def missed(op: gh.Operator, K: gh.CompressedMatrix) -> float:
    return float(np.linalg.norm(op.to_dense().astype(float) - K.to_dense(), 2))


def quietly(K: gh.CompressedMatrix, damping: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        return K.factorize(damping, **options)


def test_older_files_say_nothing_of_the_error(tmp_path: Path):
    for name, options in OPTIONS.items():
        K = gh.compress(plane(nugget=0.1), rtol=1e-5, leaf_size=50, **options)
        K.factorize(0.1).save(tmp_path / "F.npz")
        K.save(tmp_path / "K.npz")
        for path, new in (
            ("F.npz", ("accuracy", "shifted", "residual_bound")),
            ("K.npz", ("spectral_error", "spectral_sampled", "nugget", "atol", "damping")),
        ):
            with np.load(tmp_path / path) as f:
                arrays = dict(f)
            header = json.loads(arrays["header"].tobytes())
            for key in new:
                (header if path == "F.npz" else header["report"]).pop(key)
            arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
            np.savez(tmp_path / path, **arrays)
        F, old = gh.load(tmp_path / "F.npz"), gh.load(tmp_path / "K.npz")
        assert F.shifted == 0
        assert name == "fmm" or F.residual_bound is None
        assert old.report.spectral_error is None
        assert old.factorize(1e-4 if name == "lowrank" else 0.1).residual_bound > 0


# --- the spectral error ----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", OPTIONS)
@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_spectral_error(kernel: str, scheme: str):
    op = plane(kernel, 1e-3)
    K = gh.compress(op, rtol=1e-3, leaf_size=50, **OPTIONS[scheme])
    found, exact = K.report.spectral_error, missed(op, K)
    assert 0.8 * exact <= found <= 1.0001 * exact
    assert not K.report.spectral_sampled
    twice = 2 * K
    assert twice.report.spectral_error == 2 * found
    assert twice.report.nugget == 2e-3
    more = K + gh.Diagonal(np.full(N, 0.5))
    assert more.report.spectral_error == pytest.approx(found, rel=1e-6)
    assert more.report.nugget == pytest.approx(0.501)


@pytest.mark.parametrize("sampler", ["products", "products+entries", "entries"])
def test_spectral_error_of_every_sampler(sampler: str, xp: Any, dtype: Any):
    exact = plane("matern32", 1e-2).to_dense().astype(dtype)
    K = gh.compress(gh.DenseOperator(xp.asarray(exact)), rtol=1e-2, leaf_size=50, sampler=sampler)
    dense = K.to_dense() if xp is np else K.to_dense().get()
    norm = np.linalg.norm(exact.astype(float) - dense, 2)
    low, high = (0.5, 3.0) if sampler == "entries" else (0.8, 1.001)
    assert low * norm <= K.report.spectral_error <= high * norm
    assert K.report.spectral_sampled == (sampler == "entries")


def test_nothing_is_missed_of_what_is_stored_whole():
    for matrix in (toeplitz(60), np.zeros((60, 60))):
        assert gh.compress(matrix, leaf_size=64).report.spectral_error <= 1e-14


@pytest.mark.parametrize("make", [plane, lambda: entries_only(toeplitz(N))])
def test_the_same_bits_on_any_number_of_ranks(make: Any):
    def job(comm: Any) -> tuple[float | None, bool]:
        report = gh.compress(make(), rtol=1e-3, leaf_size=50, comm=comm).report
        return report.spectral_error, report.spectral_sampled

    (alone,) = on_threads(1, job)
    assert alone[0] > 0
    for size in (2, 3, 4):
        assert on_threads(size, job) == [alone] * size


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_spectral_error_scales_with_the_matrix(scale: float):
    one = gh.compress(toeplitz(N), rtol=1e-3, leaf_size=50).report
    other = gh.compress(scale * toeplitz(N), rtol=1e-3, leaf_size=50).report
    assert other.spectral_error == pytest.approx(scale * one.spectral_error, rel=1e-3)


# --- the warning and the bound ---------------------------------------------------------------


@pytest.mark.parametrize("scheme", OPTIONS)
def test_a_damping_below_the_error_is_warned_of(scheme: str):
    K = gh.compress(plane("matern32", 1e-4), rtol=1e-3, leaf_size=50, **OPTIONS[scheme])
    error = K.report.spectral_error
    with pytest.warns(AccuracyWarning) as caught:
        K.factorize(1.2 * error)
    [text] = [str(w.message) for w in caught]
    assert f"error is {error:.3g} in the spectral norm" in text
    assert f"damping + nugget {1.2 * error + (K.report.nugget or 0):.3g}" in text
    assert "rtol about" in text
    assert f"raise the damping to {10 * error:.2g}" in text
    K.factorize(2.1 * error)


def test_low_rank_with_a_small_prior():
    """The log-determinant was 7 % off in silence."""
    A = np.random.default_rng(0).standard_normal((300, 60)) * 0.8 ** np.arange(60)
    K = gh.compress(A @ A.T, "lowrank", rtol=1e-3)
    with pytest.warns(AccuracyWarning, match="solutions and log-determinants"):
        K.factorize(1e-4)


def test_a_matrix_far_from_singular_needs_no_damping():
    """Neither damping nor nugget is known of it; its smallest eigenvalue is."""
    K = gh.compress(toeplitz(300), rtol=1e-3, leaf_size=30)
    assert K.report.nugget == 0
    K.factorize()


@pytest.mark.parametrize("scheme", OPTIONS)
@pytest.mark.parametrize("rows", [False, True], ids=["one damping", "of every row"])
def test_residual_bound(scheme: str, rows: bool, tmp_path: Path):
    """It holds for the worst right-hand side, and is not far above it."""
    op = plane("matern32", 1e-2)
    K = gh.compress(op, rtol=1e-4, leaf_size=50, **OPTIONS[scheme])
    damping = 0.05 + 0.01 * np.sin(np.arange(N)) if rows else 0.05
    F = quietly(K, damping)
    A = op.to_dense() + np.diag(np.broadcast_to(damping, N))
    residual = np.linalg.norm(np.eye(N) - A @ F.solve(np.eye(N)), 2)
    assert residual <= F.residual_bound <= 10 * residual
    F.save(tmp_path / "F")
    G = gh.load(tmp_path / "F")
    assert G._residual_bound == F.residual_bound
    assert G.accuracy == F.accuracy


# --- tolerances ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "rtol"),
    [
        ((None, None, None, 5.0), 1e-4),
        ((1e-2, None, None, 5.0), 1e-2),
        ((None, 0.5, None, 5.0), 0.1),
        ((None, 0.5, None, 0.0), 0.5),  # the zero matrix
        ((1e-3, 0.5, None, 5.0), 0.1),
        ((0.2, 0.5, None, 5.0), 0.2),
        ((None, None, 1.0, 5.0), 0.06),
        ((None, None, 100.0, 5.0), 0.3),
        ((1e-3, None, 1.0, 5.0), 1e-3),
        ((0.5, None, 1.0, 5.0), 0.06),
        ((1e-3, 0.1, 1.0, 5.0), 0.02),
    ],
)
def test_what_is_aimed_at(asked: tuple[Any, ...], rtol: float):
    """The larger of rtol and atol; no more than three tenths of a damping, nor of the norm."""
    tolerance = Tolerance.asked(*asked)
    assert tolerance.rtol == pytest.approx(rtol, rel=1e-14)
    damping = asked[2]
    if damping is None:
        assert tolerance.spectral is None
        assert tolerance.keeps(1e300)
        return
    assert tolerance.spectral == pytest.approx(0.1 * damping)
    assert tolerance.keeps(tolerance.spectral)
    assert not tolerance.keeps(1.001 * tolerance.spectral)
    assert tolerance.tighter(rtol, 4 * tolerance.spectral) == pytest.approx(0.2 * rtol)


def test_an_absolute_tolerance():
    op = plane("laplace")
    K = gh.compress(op, atol=0.5, leaf_size=50)
    exact = np.linalg.norm(op.to_dense() - K.to_dense())
    assert 0.02 < exact <= 1.5
    assert K.report.rtol == pytest.approx(0.5 / K.report.frobenius_norm)
    assert K.report.atol == 0.5
    # with a relative one the larger counts
    for atol, rtol in ((1e-9, 1e-2), (K.report.frobenius_norm * 1e-2, 1e-9)):
        both = gh.compress(op, atol=atol, rtol=rtol, leaf_size=50)
        assert both.report.rtol == pytest.approx(1e-2)
    with pytest.raises(ArgumentError, match="atol must be >= 0"):
        gh.compress(op, atol=-1.0)


@pytest.mark.parametrize("scheme", OPTIONS)
@pytest.mark.parametrize("damping", [1.0, 1e-2])
def test_a_damping_for_which_it_is_compressed(scheme: str, damping: float):
    op = plane("gaussian")
    K = gh.compress(op, damping=damping, leaf_size=50, **OPTIONS[scheme])
    assert K.report.damping == damping
    assert missed(op, K) <= 1.25 * 0.1 * damping
    F = K.factorize(damping)
    b = np.sin(np.arange(N))
    A = op.to_dense() + damping * np.eye(N)
    x = np.linalg.solve(A, b)
    assert np.linalg.norm(F.solve(b) - x) <= 0.15 * np.linalg.norm(x)
    tighter = gh.compress(op, damping=damping, rtol=1e-6, leaf_size=50, **OPTIONS[scheme])
    assert tighter.report.error <= 3e-6


def test_a_damping_that_a_cap_forbids_is_warned_of():
    with pytest.warns(gh.errors.RankCapWarning) as caught:
        gh.compress(plane("laplace"), damping=1e-6, max_rank=5, leaf_size=50)
    [said] = [str(w.message) for w in caught]  # nothing of an rtol, for which nobody asked
    assert "exceeds a tenth of damping 1e-06: max_rank 5 was hit on level 4 (root = 0)" in said
    assert said.endswith("raise max_rank, or try scheme='auto'")
    for wrong in (0.0, -1.0, np.nan):
        with pytest.raises(ArgumentError, match="damping must be > 0"):
            gh.compress(plane(), damping=wrong)


def test_predictive_variances_of_a_gaussian_process():
    """At rtol 1e-3 some were negative in silence."""
    n, noise = 1000, 0.01
    op = plane("matern32", noise, n)
    points, new = op.points, np.random.default_rng(1).random((100, 2))
    r = 3**0.5 * np.linalg.norm(points[:, None] - new, axis=2) / 0.2
    k = (1 + r) * np.exp(-r)
    exact = 1 - np.einsum("ij,ij->j", k, np.linalg.solve(op.to_dense(), k))
    K = gh.compress(op, damping=noise)
    got = 1 - np.einsum("ij,ij->j", k, K.factorize().solve(k))
    np.testing.assert_allclose(got, exact, rtol=0.05)
    with pytest.warns(AccuracyWarning):
        gh.compress(op, rtol=1e-3).factorize(0.002)


# --- a shifted factor ------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", OPTIONS)
def test_a_shifted_factor_preconditions_the_smaller_damping(scheme: str, tmp_path: Path):
    op = plane("gaussian", n=300)
    K = gh.compress(op, rtol=1e-3, leaf_size=30, **OPTIONS[scheme])
    damping = 0.0 if scheme == "lowrank" else 1e-3
    F = K.factorize(damping, shift="auto")
    assert F.shifted > 0
    assert F.damping == pytest.approx(damping + F.shifted)
    F.save(tmp_path / "F")
    G = gh.load(tmp_path / "F")
    assert (G.shifted, G.damping) == (F.shifted, F.damping)
    b = np.random.default_rng(3).standard_normal(300)
    M = getattr(F, "preconditioner", F)
    if scheme != "lowrank":  # whose shift of 1e-14 is no preconditioner for 1e-3
        plain = gh.cg(op, b, damping=1e-3, maxiter=2000)[1]
        info = gh.cg(op, b, damping=1e-3, M=M, maxiter=2000)[1]
        assert info.converged
        assert info.iterations < plain.iterations
        again = gh.cg(op, b, damping=1e-3, M=F, maxiter=2000)[1]
        assert again.converged
        assert again.iterations < plain.iterations
    assert K.factorize(1.0, shift="auto").shifted == 0


def test_a_shift_of_every_row_and_bad_ones():
    K = gh.compress(plane(), rtol=1e-3, leaf_size=50)
    d = np.linspace(0.0, 1e-5, N)
    F = K.factorize(d, shift="auto")
    np.testing.assert_array_equal(F.damping, d + F.shifted)
    np.testing.assert_array_equal(F.row_damping, d + F.shifted)
    with pytest.raises(ArgumentError, match="shift must be None or 'auto', got 'more'"):
        K.factorize(1.0, shift="more")

"""The damping and the tolerance that an error advises where a matrix is not positive definite."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from test_tolerance import OPTIONS, N, plane, quietly

import gpu_hodlr as gh
from gpu_hodlr.compressed.damped import Damped
from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.factor.accuracy import Accuracy
from gpu_hodlr.factor.advice import _bracket, _tolerance, not_positive_definite, rounded_up

SURVEY = [(400, 2, "gaussian", 0.1), (400, 2, "matern52", 0.3), (400, 3, "gaussian", 0.3)]


@pytest.mark.parametrize("scheme", ["hss", "hodlr"])
@pytest.mark.parametrize(("n", "d", "kernel", "lengthscale"), SURVEY)
def test_the_damping_advised_does_and_little_less_does_not(
    n: int, d: int, kernel: str, lengthscale: float, scheme: str
):
    """Negative eigenvalues of 1e-6 of the norm, which Lanczos does not see in 60 steps."""
    points = np.random.default_rng(0).random((n, d))
    op = gh.KernelOperator(points, kernel, lengthscale, 1e-6)
    K = gh.compress(op, scheme, rtol=1e-3, leaf_size=50)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        K.factorize()
    smallest = np.linalg.eigvalsh(K.to_dense())[0]
    assert -smallest < caught.value.damping <= -1.05 * smallest
    quietly(K, caught.value.damping)
    [said] = re.findall(r"damping (\S+) would do", str(caught.value))
    assert float(said) == caught.value.damping
    assert caught.value.curvature == pytest.approx(smallest, rel=0.05)


def test_of_float32_rounding_is_not_taken_for_it():
    """N times rounding is far above the damping that does."""
    op = plane(nugget=1e-4).to_dense().astype(np.float32) * 100
    K = gh.compress(gh.DenseOperator(op), rtol=3e-4, leaf_size=50)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        K.factorize()
    quietly(K, caught.value.damping)
    with pytest.raises(NotPositiveDefiniteError):
        K.factorize(0.94 * caught.value.damping)


def test_the_tolerance_advised_is_a_guess_and_does():
    op = plane("matern52", 1e-6)
    with pytest.raises(NotPositiveDefiniteError, match="a guess") as caught:
        gh.compress(op, rtol=1e-2, leaf_size=50).factorize(1e-3)
    assert caught.value.rtol_is_guess
    gh.compress(op, rtol=caught.value.rtol, leaf_size=50).factorize(1e-3)
    gh.compress(op, damping=1e-3, leaf_size=50).factorize(1e-3)


def test_in_float32_no_tolerance_is_advised_that_rounding_forbids():
    op = gh.DenseOperator(plane().to_dense().astype(np.float32))
    with pytest.raises(NotPositiveDefiniteError, match="compress in float64") as caught:
        gh.compress(op, rtol=1e-2, leaf_size=50).factorize(1e-6)
    assert caught.value.rtol is None
    assert not caught.value.rtol_is_guess


@pytest.mark.parametrize("scheme", ["hss", "hodlr", "fmm"])
def test_what_is_advised_is_added_to_the_damping_of_every_row(scheme: str):
    K = gh.compress(plane(), rtol=1e-3, leaf_size=50, **OPTIONS[scheme])
    d = np.linspace(1e-5, 2e-5, N)
    with pytest.raises(NotPositiveDefiniteError, match="every row, at least 1e-05") as caught:
        K.factorize(d).solve(np.ones(N))
    assert f"that is {caught.value.damping:.3g} added to all of them" in str(caught.value)
    quietly(K, d + caught.value.damping).solve(np.ones(N))


def test_where_no_damping_does(monkeypatch: pytest.MonkeyPatch):
    """The search ends, and says so."""
    K = gh.compress(-np.eye(40), leaf_size=10)
    monkeypatch.setattr(Damped, "factor", lambda self: None)
    with pytest.raises(NotPositiveDefiniteError, match="no damping was found") as caught:
        K.factorize()
    assert caught.value.damping is None


@pytest.mark.parametrize(
    ("known", "frobenius", "bound"),
    [
        ((1e-3,), None, None),
        ((1e-3, 0.5, 8.0), 4.0, 4.0),
        ((1e-3, None, 8.0, 2.0), None, 2.6),
        ((1e-3, 0.5, 8.0, 2.0), 4.0, 2.6),
        ((1e-3, 0.5, 8.0, 2.0, True), 4.0, 4.0),
        ((1e-3, 0.5, None), None, None),
    ],
)
def test_what_is_known_of_an_error(
    known: tuple[Any, ...], frobenius: float | None, bound: float | None
):
    """A spectral norm that was measured bounds it, else the Frobenius norm does."""
    accuracy = Accuracy(*known)
    assert accuracy.frobenius == frobenius
    assert accuracy.bound == pytest.approx(bound)
    assert Accuracy.read(asdict(accuracy)) == accuracy


LARGEST = float(np.finfo(np.float64).max)


@pytest.mark.parametrize("needed", [1.01, 1.2, 3.7, 480.0, 1e9])
@pytest.mark.parametrize("likely", [None, 4.0])
def test_a_damping_that_does_is_bracketed(needed: float, likely: float | None):
    """Doubling digits, not steps; what is likely to do is tried second."""
    tried: list[float] = []

    def would_do(damping: float) -> bool:
        tried.append(damping)
        return damping >= needed

    failed, enough = _bracket(1.0, 1e-16, likely, would_do, LARGEST)
    assert enough is not None
    assert failed < needed <= enough
    assert enough <= (1.03 * failed if len(tried) > 1 else 1.02)
    assert tried[0] == 1.02
    assert len(tried) == 1 or tried[1] == rounded_up(max(1.1 * 1.02, likely or 0.0))
    assert all(damping == rounded_up(damping) for damping in tried)
    assert len(tried) <= 20
    assert failed in (1.0, *tried)


@pytest.mark.parametrize(
    ("lowest", "rounding", "first"), [(0.0, 0.0, 1.0), (0.0, 2.5e-3, 2.5e-3), (1e-9, 1e-3, 1e-3)]
)
def test_where_a_search_for_a_damping_begins(lowest: float, rounding: float, first: float):
    assert _bracket(lowest, rounding, None, lambda damping: True, LARGEST) == (lowest, first)


def test_a_search_for_a_damping_ends():
    tried: list[float] = []
    failed, enough = _bracket(1.0, 0.0, None, lambda damping: bool(tried.append(damping)), 1e9)
    assert enough is None
    assert failed == tried[-1] == max(tried) < 1e9
    growth = np.array(tried[2:]) / tried[1:-1]
    np.testing.assert_allclose(growth[:4], 1.1 ** (2.0 ** np.arange(1, 5)), rtol=6e-3)
    assert 50 < growth.max() <= 101


def test_the_tolerance_advised_scales_the_error_to_a_quarter_of_the_damping():
    for accuracy, reached in (
        (Accuracy(1e-3), 1e-3), (Accuracy(1e-3, 4e-4), 4e-4), (Accuracy(1e-3, 2e-3), 1e-3),
    ):  # fmt: skip
        rtol, said = _tolerance(accuracy, 0.1, 0.5)
        assert rtol == pytest.approx(reached * 0.25 * 0.1 / 0.5)
        assert "damping=0.1)" in said
        assert _tolerance(accuracy, 0.1, 1e-9)[0] == reached * 0.5
    rtol, said = _tolerance(Accuracy(1e-3), 0.0, 0.5)
    assert rtol is None
    assert "no tolerance makes damping 0 safe" in said


def refused(accuracy: Accuracy, needed: float = 1.0, **options: Any) -> Any:
    """What is said of a matrix of eigenvalues from -1 to 10 plus damping 1/4."""
    K = gh.compress(np.diag(np.linspace(-1.0, 10.0, 40)), leaf_size=40)
    return not_positive_definite(
        K.structure, 0.25, accuracy, lambda damping: damping >= needed, **options
    )


def test_what_is_said_of_a_matrix_that_is_not_positive_definite():
    """K itself is not, by Weyl, where its eigenvalue is below 0 by three times the error."""
    for spectral, itself in ((0.3, False), (0.24, True)):
        error = refused(Accuracy(1e-3, 1e-4, 40.0, spectral))
        assert error.damping == 1.02
        assert error.curvature == pytest.approx(-0.75, rel=1e-6)
        assert "smallest eigenvalue about -1)" in str(error)
        assert "damping 1.02 would do" in str(error)
        assert ("itself is not positive definite" in str(error)) == itself
        if itself:
            assert error.rtol is None
            assert f"error is about {spectral}," in str(error)
        else:
            assert error.rtol == pytest.approx(1e-4 * 0.25 * 0.25 / 1.02)
    error = refused(Accuracy(1e-3), needed=1.5)  # more than a Ritz value says
    assert 1.5 <= error.damping <= 1.55
    assert -1.5 < error.curvature - 0.25 <= -error.damping / 1.03
    for accuracy in (Accuracy(1e-3), Accuracy(1e-3, 0.0, 40.0, 0.0)):  # of which nothing is known
        error = refused(accuracy, needed=np.inf)
        assert (error.damping, error.rtol) == (None, None)
        assert "no damping was found" in str(error)
    assert "for damping 0.1 compress" in str(refused(Accuracy(1e-3), least=0.1))


def test_no_tolerance_below_ten_roundings_is_advised():
    eps = float(np.finfo(np.float64).eps)
    for roundings in (9.5, 10.5):
        error = refused(Accuracy(roundings * eps * 1.02 / (0.25 * 0.25)))
        assert (error.rtol is None) == (roundings < 10)
        assert ("rounding of float64 is too coarse" in str(error)) == (roundings < 10)


@pytest.mark.parametrize("number", [1.0, 1.234, 9.999, 1.2341e-7, 3.3333e20])
def test_rounded_up(number: float):
    assert number <= rounded_up(number) <= 1.01 * number
    assert float(f"{rounded_up(number):.3g}") == rounded_up(number)


def test_an_fmm_solver_knows_that_the_matrix_itself_is_indefinite(tmp_path: Path):
    exact = toeplitz(300) - 0.5 * np.eye(300)
    K = gh.compress(exact, "fmm", rtol=1e-8, leaf_size=20, budget=0.1)
    F = K.factorize(1.0)
    F._added = 0.01
    F.save(tmp_path / "F")
    for solver in (F, gh.load(tmp_path / "F")):
        with pytest.raises(NotPositiveDefiniteError, match="itself is not positive") as caught:
            solver.solve(np.ones(300))
        assert caught.value.rtol is None
        K.factorize(caught.value.damping).solve(np.ones(300))

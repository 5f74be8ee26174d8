"""A factor of a matrix that is not positive definite: the error, and the advice it carries."""

import re
import warnings

import dense_oracles
import numpy as np
import pytest
from matrix_cases import MATRICES, oscillating, toeplitz

import gpu_hodlr as gh
from gpu_hodlr.errors import AccuracyWarning, GpuHodlrError, NotPositiveDefiniteError
from gpu_hodlr.krylov import extreme_eigenvalues


def shifted(n: int, shift: float) -> np.ndarray:
    """A Toeplitz matrix less `shift` on the diagonal."""
    return toeplitz(n) - shift * np.eye(n)


INDEFINITE = {
    "oscillating": lambda: oscillating(300),
    "shifted": lambda: shifted(300, 0.8),
    "negative": lambda: -toeplitz(200),
    "two rows": lambda: np.array([[1.0, 2.0], [2.0, 1.0]]),
    "one bad row": lambda: toeplitz(150) - 3.0 * np.diag(np.arange(150) == 40),
}


def refusal(K: gh.HSSMatrix, damping: float = 0.0) -> NotPositiveDefiniteError:
    with pytest.raises(NotPositiveDefiniteError, match="is not positive definite") as caught:
        K.factorize(damping)
    return caught.value


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", INDEFINITE)
def test_the_damping_that_would_do(name: str, dtype: type):
    """It does, and it is at most 25 % too large."""
    exact = INDEFINITE[name]().astype(dtype)
    K = gh.compress(exact, rtol=1e-4, leaf_size=20)
    error = refusal(K)
    smallest = np.linalg.eigvalsh(K.to_dense().astype(np.float64))[0]
    assert smallest < 0
    assert -smallest < error.damping <= -1.25 * smallest
    K.factorize(error.damping)
    refusal(K, 0.8 * error.damping)
    b = np.ones(len(exact), dtype)
    x = K.factorize(error.damping).solve(b)
    assert np.isfinite(x).all()


def coarse() -> gh.HSSMatrix:
    """A semidefinite kernel, whose negative eigenvalues are the compression's error."""
    points = np.random.default_rng(0).random((300, 2))
    return gh.compress(gh.KernelOperator(points, "gaussian"), rtol=1e-2, leaf_size=40)


def test_the_error_is_also_numpys_and_says_everything():
    error = refusal(coarse(), 1e-4)
    assert isinstance(error, np.linalg.LinAlgError)
    assert isinstance(error, GpuHodlrError)
    assert error.rtol is not None
    text = str(error)
    assert "damping 0.0001 is not positive definite" in text
    assert f"damping {error.damping:.3g} would do" in text
    assert f"compress with rtol about {error.rtol:.1e}" in text


def test_no_tolerance_is_advised_without_damping():
    error = refusal(coarse())
    assert error.rtol is None
    assert re.search("no tolerance", str(error))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_where_the_matrix_itself_is_not_positive_definite(damping: float):
    """No tolerance is advised, and the Rayleigh quotient that shows it is told."""
    exact = shifted(100, 0.9)
    error = refusal(gh.compress(exact, rtol=1e-4, leaf_size=20), damping)
    assert error.rtol is None
    assert f"K plus damping {damping:.3g} itself is not positive definite" in str(error)
    assert "declare definite = False" in str(error)
    smallest = np.linalg.eigvalsh(exact)[0]
    assert error.curvature == pytest.approx(smallest + damping, rel=1e-2)


def test_the_advised_tolerance_is_enough():
    """A semidefinite kernel, compressed too coarsely for the damping wanted."""
    points = np.random.default_rng(0).random((600, 3))
    op = gh.KernelOperator(points, "gaussian", 0.5)
    damping = 1e-3
    error = refusal(gh.compress(op, rtol=1e-2, leaf_size=40), damping)
    assert error.damping > damping
    assert 1e-9 < error.rtol < 1e-2
    K = gh.compress(op, rtol=error.rtol, leaf_size=40, max_rank=600)
    A = K.to_dense() + damping * np.eye(600)
    b = np.ones(600)
    assert dense_oracles.backward_error(A, K.factorize(damping).solve(b), b) < 1e-13


@pytest.mark.parametrize("name", ["rank 1", "zero blocks"])
def test_singular_matrices(name: str):
    """Damping 0 cannot do; the damping advised is of the size of rounding."""
    exact = MATRICES[name](120)
    K = gh.compress(exact, rtol=1e-10, leaf_size=10)
    error = refusal(K)
    assert 0 < error.damping <= 1e-9 * np.linalg.norm(exact)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)  # rounding is as large
        K.factorize(error.damping)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_zero_matrix(dtype: type):
    """Any damping does."""
    K = gh.compress(np.zeros((50, 50), dtype), leaf_size=10)
    assert refusal(K).damping > 0
    F = K.factorize(refusal(K).damping)
    b = np.ones(50, dtype)
    np.testing.assert_allclose(F.solve(b), b / dtype(F.damping), rtol=1e-6)
    assert K.factorize(2.0).logdet() == pytest.approx(50 * np.log(2.0), rel=1e-6)


def test_a_matrix_of_one_leaf():
    error = refusal(gh.compress(oscillating(50), leaf_size=50))
    assert error.damping == pytest.approx(-np.linalg.eigvalsh(oscillating(50))[0], rel=0.2)


@pytest.mark.parametrize("n", [2, 3, 40, 300])
def test_extreme_eigenvalues(n: int):
    """Inside the spectrum, and near its ends where these stand alone."""
    exact = oscillating(n)
    spectrum = np.linalg.eigvalsh(exact)
    low, high = extreme_eigenvalues(gh.DenseOperator(exact))
    rounding = 1e-12 * np.abs(spectrum).max()
    assert spectrum[0] - rounding <= low <= high <= spectrum[-1] + rounding
    assert high == pytest.approx(spectrum[-1], rel=1e-6)
    assert low == pytest.approx(spectrum[0], rel=0.05)


def test_extreme_eigenvalues_of_invariant_subspaces():
    """Lanczos breaks down after as many steps as there are distinct eigenvalues."""
    for exact in (np.zeros((9, 9)), np.eye(9), np.diag([1.0, 1, -2, -2, -2, 1, 1, 1, -2])):
        spectrum = np.linalg.eigvalsh(exact)
        found = extreme_eigenvalues(gh.DenseOperator(exact))
        np.testing.assert_allclose(found, spectrum[[0, -1]], rtol=0, atol=1e-12)

"""Functions of a matrix by Lanczos, against eigenvectors."""

import numpy as np
import pytest

from gpu_hodlr.errors import AccuracyWarning, NotPositiveDefiniteError
from gpu_hodlr.matrix_functions import function_of_tridiagonals, inverse_square_root, lanczos


def matrix(condition: float, n: int = 40) -> np.ndarray:
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (Q * np.geomspace(1 / condition, 1, n)) @ Q.T


def root(A: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(A)
    return (vectors * values**-0.5) @ vectors.T


@pytest.mark.parametrize(("condition", "accurate"), [(1, 1e-12), (10, 1e-9), (1e4, 1e-7)])
def test_the_inverse_square_root(condition: float, accurate: float):
    """Of a large condition only after more steps than rows: rounding has its way."""
    A = matrix(condition)
    z = np.random.default_rng(1).standard_normal((len(A), 3))
    z[:, 1] = 0
    want = root(A) @ z
    got = inverse_square_root(lambda v: A @ v, z, 1e-10)
    assert np.linalg.norm(got - want) <= accurate * np.linalg.norm(want)


def test_steps_that_do_not_do_are_said():
    A = matrix(1e8)
    with pytest.warns(AccuracyWarning, match="after 9 Lanczos steps"):
        inverse_square_root(lambda v: A @ v, np.ones((len(A), 1)), 1e-10, steps=9)


def test_a_negative_eigenvalue_is_met():
    A = matrix(10) - 0.5 * np.eye(40)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        inverse_square_root(lambda v: A @ v, np.ones((len(A), 1)), 1e-10)
    assert caught.value.curvature < 0


def test_an_invariant_subspace_ends_the_run():
    """Of an eigenvector there is one step, and it is exact."""
    A = np.diag(np.arange(1.0, 31.0))
    z = np.eye(30)[:, [3, 8]]
    vectors, alpha, beta, norms = lanczos(lambda v: A @ v, z, lambda *_: False, 100)
    assert len(vectors) == 1
    np.testing.assert_array_equal(alpha, [[4.0, 9.0]])
    np.testing.assert_array_equal(norms, [1.0, 1.0])
    np.testing.assert_allclose(function_of_tridiagonals(alpha, beta, np.sqrt), [[2.0, 3.0]])
    np.testing.assert_allclose(inverse_square_root(lambda v: A @ v, z, 1e-10), z / [2, 3])

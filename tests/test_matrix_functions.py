"""Lanczos and functions of a symmetric matrix, against dense linear algebra."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gpu_hodlr import matrix_functions
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import AccuracyWarning, NotPositiveDefiniteError
from gpu_hodlr.matrix_functions import function_of_tridiagonals, inverse_square_root, lanczos

N = 30
ROUNDING = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 2e-5}


def symmetric(low: float = 1.0, high: float = 3.0) -> np.ndarray:
    """A matrix of eigenvalues evenly between the two."""
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
    A = (Q * np.linspace(low, high, N)) @ Q.T
    return (A + A.T) / 2


def never(alpha: Any, beta: Any) -> bool:
    return False


def test_vectors_are_orthonormal_and_tridiagonalize(xp: ModuleType, dtype: Any):
    """A Q = Q T + beta q_next e^T, of every column on its own."""
    A, steps = symmetric(), 6
    z = 5 * np.random.default_rng(1).standard_normal((N, 3))
    given = xp.asarray(A.astype(dtype))
    vectors, alpha, beta, norms = lanczos(
        lambda v: given @ v, xp.asarray(z.astype(dtype)), never, steps
    )
    assert len(vectors) == steps
    assert alpha.shape == beta.shape == (steps, 3)
    tight = ROUNDING[np.dtype(dtype)]
    np.testing.assert_allclose(norms, np.linalg.norm(z, axis=0), rtol=tight)
    every = np.stack([to_host(v) for v in vectors], axis=1).astype(float)
    for j in range(3):
        Q = every[:, :, j]
        T = np.diag(alpha[:, j]) + np.diag(beta[:-1, j], 1) + np.diag(beta[:-1, j], -1)
        np.testing.assert_allclose(Q[:, 0], z[:, j] / np.linalg.norm(z[:, j]), rtol=0, atol=tight)
        np.testing.assert_allclose(Q.T @ Q, np.eye(steps), rtol=0, atol=tight)
        left = A @ Q - Q @ T
        np.testing.assert_allclose(left[:, :-1], 0, rtol=0, atol=tight)
        assert np.linalg.norm(left[:, -1]) == pytest.approx(beta[-1, j], rel=tight)
        assert beta[-1, j] > 0.1


def test_columns_that_end_early_stay_as_they_are():
    """An invariant subspace of two vectors, of none, and a column that goes on."""
    A = symmetric()
    _, vectors = np.linalg.eigh(A)
    values = np.linspace(1, 3, N)
    z = np.stack(
        [vectors[:, 3] + vectors[:, 20], np.zeros(N), np.ones(N), -2 * vectors[:, 7]], axis=1
    )
    found, alpha, beta, norms = lanczos(lambda v: A @ v, z, never, 5)
    np.testing.assert_allclose(norms, [2**0.5, 0, N**0.5, 2], rtol=1e-12)
    half = (values[20] - values[3]) / 2
    np.testing.assert_allclose(alpha[:2, 0], values[3] + half, rtol=1e-12)
    np.testing.assert_allclose(beta[:, 0], [half, 0, 0, 0, 0], rtol=1e-12, atol=1e-300)
    np.testing.assert_array_equal(alpha[2:, 0], 1)
    np.testing.assert_array_equal((alpha[:, 1], beta[:, 1]), ([1] * 5, [0] * 5))
    np.testing.assert_allclose(alpha[:, 3], [values[7], 1, 1, 1, 1], rtol=1e-12)
    assert not beta[:, 3].any()
    assert (beta[:, 2] > 0.1).all()
    for q in found[2:]:
        assert not q[:, [0, 1, 3]].any()
        assert np.linalg.norm(q[:, 2]) == pytest.approx(1)


def test_it_ends_where_it_is_told_to_or_nothing_goes_on():
    A, seen = symmetric(), []

    def done(alpha: Any, beta: Any) -> bool:
        seen.append((len(alpha), beta.shape))
        return len(alpha) == 3

    z = np.random.default_rng(2).standard_normal((N, 2))
    assert len(lanczos(lambda v: A @ v, z, done, 10)[0]) == 3
    assert seen == [(1, (1, 2)), (2, (2, 2)), (3, (3, 2))]
    seen.clear()
    lanczos(lambda v: A @ v, z, lambda alpha, beta: bool(seen.append(len(beta))), 26)
    assert seen == [*range(1, 8), 8, 10, 12, 14, 16, 19, 22, 25]  # ever more seldom
    assert len(lanczos(lambda v: A @ v, np.zeros((N, 2)), never, 10)[0]) == 1
    assert len(lanczos(lambda v: A[:4, :4] @ v, z[:4], never, 10)[0]) == 4  # no more than rows


@pytest.mark.parametrize("rows", [N, 11], ids=["goes on", "ends between two reads"])
def test_a_device_is_seldom_read(stand_in: Any, rows: int):
    """And gives what it would if it were read at every step."""
    path = np.eye(N, k=1) + np.eye(N, k=-1)  # of the first row: one row more in every step
    path[rows:] = path[:, rows:] = 0
    z = np.random.default_rng(2).standard_normal((N, 2)) if rows == N else np.eye(N, 1)
    A, given = (stand_in.cupy.asarray(a) for a in (path, z))
    stand_in.counters.reset()
    found = lanczos(lambda v: A @ v, given, never, 25)
    assert stand_in.counters.synchronizations <= 16  # 15 of 25 steps, and the norms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_functions, "steps_between_reads", lambda device, done: 1)
        want = lanczos(lambda v: A @ v, given, never, 25)
    assert len(found[0]) == len(want[0]) == len(found[1]) == min(rows, 25)
    for one, other in zip(found[0], want[0], strict=True):
        np.testing.assert_array_equal(to_host(one), to_host(other))
    for one, other in zip(found[1:], want[1:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_functions_of_tridiagonals():
    """Of each column's own: the first column of exp(T)."""
    rng = np.random.default_rng(3)
    alpha, beta = rng.standard_normal((2, 5, 3))
    found = function_of_tridiagonals(alpha, beta, np.exp)
    for j in range(3):
        T = np.diag(alpha[:, j]) + np.diag(beta[:-1, j], 1) + np.diag(beta[:-1, j], -1)
        values, vectors = np.linalg.eigh(T)
        np.testing.assert_allclose(
            found[:, j], vectors @ (np.exp(values) * vectors[0]), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_inverse_square_root(scale: float, xp: ModuleType, dtype: Any):
    A = scale * symmetric()
    z = np.random.default_rng(4).standard_normal((N, 3)).astype(dtype)
    z[:, 1] = 0
    given = xp.asarray(A.astype(dtype))
    x = inverse_square_root(lambda v: given @ v, xp.asarray(z), 1e-4)
    assert isinstance(x, xp.ndarray)
    assert x.dtype == dtype
    values, vectors = np.linalg.eigh(A)
    want = vectors @ (values[:, None] ** -0.5 * (vectors.T @ z))
    missed = np.linalg.norm(to_host(x) - want, axis=0)
    assert (missed <= 1e-3 * np.linalg.norm(want, axis=0)).all()
    assert not to_host(x)[:, 1].any()


@pytest.mark.parametrize(("condition", "accurate"), [(1, 1e-12), (10, 1e-9), (1e4, 1e-7)])
def test_of_a_large_condition_more_steps_than_rows_are_made(condition: float, accurate: float):
    """Rounding has its way. Of a multiple of the identity one step is all there is."""
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))[0]
    values = np.geomspace(1 / condition, 1, 40)
    A = (Q * values) @ Q.T
    z = np.random.default_rng(1).standard_normal((40, 3))
    z[:, 1] = 0
    want = (Q * values**-0.5) @ Q.T @ z
    products: list[int] = []

    def multiply(v: Any) -> Any:
        products.append(1)
        return A @ v

    got = inverse_square_root(multiply, z, 1e-10)
    assert np.linalg.norm(got - want) <= accurate * np.linalg.norm(want)
    assert (len(products) == 1, len(products) > 40) == (condition == 1, condition == 1e4)


def test_it_multiplies_no_more_than_rtol_needs():
    A, products = symmetric(), []

    def multiply(v: Any) -> Any:
        products.append(v.shape)
        return A @ v

    z = np.random.default_rng(5).standard_normal((N, 2))
    values, vectors = np.linalg.eigh(A)
    want = vectors @ (values[:, None] ** -0.5 * (vectors.T @ z))
    used = []
    for rtol in (1e-2, 1e-5, 1e-10):
        products.clear()
        x = inverse_square_root(multiply, z, rtol)
        missed = np.linalg.norm(x - want) / np.linalg.norm(want)
        assert 1e-3 * rtol <= missed <= rtol
        used.append(len(products))
    assert used[0] < used[1] < used[2] < N
    products.clear()
    with pytest.warns(AccuracyWarning, match="after 2 Lanczos steps") as caught:
        inverse_square_root(multiply, z, 1e-10, steps=2)
    assert len(products) == 2
    assert caught[0].filename == __file__


def test_a_matrix_that_is_not_positive_definite_is_refused():
    with pytest.raises(NotPositiveDefiniteError, match="Ritz value") as caught:
        inverse_square_root(lambda v: -2 * v, np.ones((N, 1)), 1e-3)
    assert caught.value.curvature == pytest.approx(-2)
    with pytest.raises(NotPositiveDefiniteError):
        inverse_square_root(lambda v: 0 * v, np.ones((N, 1)), 1e-3)
    A = symmetric(-0.5, 3)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        inverse_square_root(lambda v: A @ v, np.ones((N, 1)), 1e-8)
    assert -0.5 <= caught.value.curvature <= 0

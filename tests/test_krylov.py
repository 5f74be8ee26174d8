"""Conjugate gradients: against dense solutions, and preconditioned by a factor."""

from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import toeplitz

import gpu_hodlr as gh


class Counted(gh.DenseOperator):
    """Counts its products."""

    products = 0

    def _matmat(self, v: np.ndarray) -> np.ndarray:
        self.products += 1
        return super()._matmat(v)


def rhs(n: int, k: int, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(n + k).standard_normal((n, k)).astype(dtype)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_plain(damping: float):
    exact = dense_oracles.random_spd(150, smallest=0.05)
    A = exact + damping * np.eye(150)
    b = rhs(150, 4)
    x, info = gh.cg(gh.DenseOperator(exact), b, damping=damping, rtol=1e-12)
    assert info.converged
    want = np.linalg.solve(A, b)
    np.testing.assert_allclose(x, want, rtol=0, atol=1e-10 * np.abs(want).max())
    one, _ = gh.cg(gh.DenseOperator(exact), b[:, 1], damping=damping, rtol=1e-12)
    assert one.shape == (150,)
    np.testing.assert_allclose(one, want[:, 1], rtol=0, atol=1e-10 * np.abs(want).max())


def test_info():
    op = Counted(toeplitz(200))
    b = rhs(200, 2)
    x, info = gh.cg(op, b, rtol=1e-8)
    assert info.converged
    assert info.iterations == op.products == len(info.residuals) - 1
    assert info.residuals[0] == pytest.approx(1.0, rel=1e-14)
    assert info.residuals[-1] <= 1e-8 < info.residuals[-2]
    true = np.linalg.norm(b - op @ x, axis=0) / np.linalg.norm(b, axis=0)
    assert true.max() == pytest.approx(info.residuals[-1], rel=1e-3)


def test_too_few_iterations():
    op = gh.DenseOperator(dense_oracles.random_spd(150, smallest=1e-4))
    _, info = gh.cg(op, rhs(150, 1), maxiter=5)
    assert not info.converged
    assert info.iterations == 5
    assert len(info.residuals) == 6
    assert info.residuals[-1] > 1e-8


def test_factor_as_preconditioner_of_the_exact_matrix():
    """A coarse factor makes CG on the exact kernel matrix converge in a few steps."""
    points = np.random.default_rng(0).random((800, 2))
    op = gh.KernelOperator(points, "matern32", 0.3)
    damping = 1e-2
    F = gh.compress(op, rtol=1e-5, leaf_size=50).factorize(damping)
    b = rhs(800, 3)
    x, info = gh.cg(op, b, damping=damping, M=F, rtol=1e-8)
    assert info.converged
    assert info.iterations <= 6
    A = op.to_dense() + damping * np.eye(800)
    residual = np.linalg.norm(A @ x - b, axis=0) / np.linalg.norm(b, axis=0)
    assert residual.max() <= 2e-8
    _, plain = gh.cg(op, b, damping=damping, rtol=1e-8)
    assert plain.iterations > 20 * info.iterations


def test_factor_as_preconditioner_of_a_network():
    pytest.importorskip("torch")
    from network_cases import data, image_network, images

    inputs, model = images(8, n=25, border=1), image_network(64, 6, 10)
    targets = data((64,), 10, "cross_entropy", n=25)[1]
    op = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    damping = 1e-2 * float(op.diagonal().mean())
    F = gh.compress(op, rtol=1e-6, leaf_size=40).factorize(damping)
    b = rhs(op.shape[0], 2)
    _, info = gh.cg(op, b, damping=damping, M=F, rtol=1e-8)
    assert info.converged
    assert info.iterations <= 4


def test_the_factor_of_the_matrix_itself_converges_at_once():
    K = gh.compress(toeplitz(300), rtol=1e-4, leaf_size=30)
    x, info = gh.cg(K, rhs(300, 2), damping=0.1, M=K.factorize(0.1), rtol=1e-10)
    assert info.converged
    assert info.iterations == 1
    assert x.shape == (300, 2)


def test_any_object_that_solves_is_a_preconditioner():
    exact = toeplitz(100) * np.linspace(1, 30, 100)[:, None] * np.linspace(1, 30, 100)

    class Jacobi:
        def solve(self, b: np.ndarray) -> np.ndarray:
            return b / np.diagonal(exact)[:, None]

    b = rhs(100, 2)
    x, info = gh.cg(gh.DenseOperator(exact), b, M=Jacobi(), rtol=1e-12)
    _, plain = gh.cg(gh.DenseOperator(exact), b, rtol=1e-12)
    assert info.iterations < plain.iterations
    np.testing.assert_allclose(exact @ x, b, rtol=0, atol=1e-10)


def test_columns_are_independent():
    """Also a zero column, an easy and a hard one."""
    exact = dense_oracles.random_spd(120, smallest=0.01)
    vectors = np.linalg.eigh(exact)[1]
    b = np.stack([np.zeros(120), vectors[:, 5], rhs(120, 1)[:, 0]], axis=1)
    op = gh.DenseOperator(exact)
    x, info = gh.cg(op, b, rtol=1e-10)
    assert info.converged
    np.testing.assert_array_equal(x[:, 0], 0)
    np.testing.assert_allclose(x, np.linalg.solve(exact, b), rtol=0, atol=1e-7)


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_zero_right_hand_side(columns: int):
    op = Counted(toeplitz(50))
    x, info = gh.cg(op, np.zeros((50, columns)), rtol=0.0)
    assert x.shape == (50, columns)
    assert not x.any()
    assert info.converged
    assert info.iterations == op.products == 0


def test_an_exact_solution_is_not_divided_by():
    """Iterating beyond convergence gives no NaN."""
    x, info = gh.cg(gh.DenseOperator(np.eye(20)), rhs(20, 3), rtol=0.0)
    np.testing.assert_allclose(x, rhs(20, 3), rtol=1e-15)
    assert info.iterations <= 200
    x, info = gh.cg(gh.DenseOperator(toeplitz(20)), rhs(20, 3), rtol=0.0, maxiter=100)
    assert np.isfinite(x).all()
    assert np.isfinite(info.residuals).all()


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float64, 1e-200), (np.float64, 1e200), (np.float32, 1e-25), (np.float32, 1e25)],
)
def test_the_scale_of_b_does_not_matter(dtype: Any, scale: float):
    """Squares of b's entries may leave the range of the dtype."""
    exact = toeplitz(60).astype(dtype)
    b = rhs(60, 1, dtype)
    rtol = 1e-5
    x, info = gh.cg(gh.DenseOperator(exact), b * dtype(scale), rtol=rtol)
    assert info.converged
    assert info.iterations > 0
    assert np.linalg.norm(exact @ (x / dtype(scale)) - b) < 2 * rtol * np.linalg.norm(b)


def test_float32():
    op = gh.DenseOperator(toeplitz(100).astype(np.float32))
    x, info = gh.cg(op, rhs(100, 2), rtol=1e-5)
    assert info.converged
    assert x.dtype == np.float32
    np.testing.assert_allclose(toeplitz(100) @ x, rhs(100, 2), rtol=0, atol=1e-3)


def test_an_indefinite_matrix_does_not_converge_silently():
    exact = np.diag(np.linspace(-1, 1, 40))
    x, info = gh.cg(gh.DenseOperator(exact), rhs(40, 1))
    assert np.isfinite(x).all()
    true = np.linalg.norm(exact @ x - rhs(40, 1)) / np.linalg.norm(rhs(40, 1))
    assert info.converged == (true <= 1e-7)


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    op = gh.DenseOperator(toeplitz(60))
    b = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = b.clone()
    F = gh.compress(op, leaf_size=10).factorize()
    for M in (None, F):
        x, info = gh.cg(op, b, M=M)
        assert isinstance(x, torch.Tensor)
        assert info.converged
        np.testing.assert_allclose(toeplitz(60) @ x.numpy(), kept.numpy(), rtol=0, atol=1e-6)
    assert torch.equal(b, kept)

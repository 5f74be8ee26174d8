"""Conjugate gradients: against dense solutions, and preconditioned by a factor."""

from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import NotPositiveDefiniteError


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


def bowl(lowest: float = -1.0, n: int = 40) -> np.ndarray:
    return np.diag(np.linspace(lowest, 1, n))


def test_an_indefinite_matrix_is_an_error_with_the_evidence(xp: ModuleType):
    exact = bowl()
    b = rhs(40, 3)
    with pytest.raises(NotPositiveDefiniteError, match=r"p\^T A p / p\^T p = -0") as caught:
        gh.cg(gh.DenseOperator(xp.asarray(exact)), xp.asarray(b))
    p, curvature = to_host(caught.value.direction), caught.value.curvature
    assert p.shape == (40,)
    assert curvature is not None
    assert curvature < 0
    assert p @ exact @ p / (p @ p) == pytest.approx(curvature, rel=1e-10)
    damped = gh.cg(gh.DenseOperator(xp.asarray(exact)), xp.asarray(b), damping=1.1, maxiter=300)
    assert damped[1].converged


def test_a_declared_indefinite_matrix_ends_the_run(xp: ModuleType):
    """The solution so far, the direction and its curvature, the same whoever reads how often."""
    exact, b = bowl(), rhs(40, 2)
    op = gh.DenseOperator(xp.asarray(exact), definite=False)
    x, info = gh.cg(op, xp.asarray(b))
    assert not info.converged
    assert len(info.residuals) == info.iterations + 1
    p = to_host(info.direction)
    assert p @ exact @ p / (p @ p) == pytest.approx(info.curvature, rel=1e-10)
    assert "direction" in str(info)
    if info.iterations:
        again, before = gh.cg(op, xp.asarray(b), maxiter=info.iterations)
        np.testing.assert_array_equal(to_host(again), to_host(x))
        assert before.direction is None


def test_a_matrix_that_is_declared_indefinite_may_be_definite():
    exact = dense_oracles.random_spd(60, smallest=0.1)
    x, info = gh.cg(gh.DenseOperator(exact, definite=False), rhs(60, 1))
    assert info.converged
    assert info.direction is None
    np.testing.assert_allclose(exact @ x, rhs(60, 1), rtol=0, atol=1e-6)


def test_a_singular_matrix_with_a_solution_and_without():
    """Positive semi-definite: b in the range is solved, b outside is told."""
    exact = np.diag(np.r_[np.zeros(5), np.linspace(1, 2, 35)])
    b = exact @ rhs(40, 2)
    x, info = gh.cg(gh.DenseOperator(exact), b, rtol=1e-10)
    assert info.converged
    np.testing.assert_allclose(exact @ x, b, rtol=0, atol=1e-8)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        gh.cg(gh.DenseOperator(exact), np.r_[np.ones(5), np.zeros(35)])
    assert caught.value.curvature == 0


def test_preconditioners_that_multiply():
    """As SciPy means it; what solves is told from it by its method."""
    exact = toeplitz(100) * np.linspace(1, 30, 100)[:, None] * np.linspace(1, 30, 100)
    b, op = rhs(100, 2), gh.DenseOperator(exact)
    inverse = np.diag(1 / np.diagonal(exact))
    counts = set()
    for M in (
        inverse,
        gh.DenseOperator(inverse),
        gh.Diagonal(1 / np.diagonal(exact)),
        scipy.sparse.linalg.aslinearoperator(inverse),
        scipy.sparse.csr_array(inverse),
        gh.compress(inverse, leaf_size=20, rtol=1e-12),
    ):
        x, info = gh.cg(op, b, M=M, rtol=1e-12)
        np.testing.assert_allclose(exact @ x, b, rtol=0, atol=1e-10)
        counts.add(info.iterations)
    assert max(counts) - min(counts) <= 1
    assert max(counts) < gh.cg(op, b, rtol=1e-12)[1].iterations
    lu = scipy.sparse.linalg.splu(scipy.sparse.csc_array(exact))
    assert gh.cg(op, b, M=lu, rtol=1e-8)[1].iterations <= 2


def test_matrices_of_others():
    exact, b = dense_oracles.random_spd(60, smallest=0.1), rhs(60, 1)
    for A in (exact, scipy.sparse.csr_array(exact), scipy.sparse.linalg.aslinearoperator(exact)):
        x, info = gh.cg(A, b)
        assert info.converged
        np.testing.assert_allclose(exact @ x, b, rtol=0, atol=1e-6)


def test_where_to_start(xp: ModuleType):
    exact = dense_oracles.random_spd(80, smallest=0.05)
    op, b = gh.DenseOperator(xp.asarray(exact)), xp.asarray(rhs(80, 2))
    whole, plain = gh.cg(op, b, rtol=1e-10)
    half, info = gh.cg(op, b, rtol=1e-4)
    x, rest = gh.cg(op, b, x0=half, rtol=1e-10)
    assert rest.iterations < plain.iterations
    assert rest.residuals[0] == pytest.approx(info.residuals[-1], rel=1e-6)
    np.testing.assert_allclose(to_host(x), to_host(whole), rtol=0, atol=1e-8)
    done, none = gh.cg(op, b, x0=x, rtol=1e-8)
    assert none.iterations == 0
    np.testing.assert_allclose(to_host(done), to_host(x), rtol=1e-14)


def test_the_callback_sees_every_iterate():
    exact, b = dense_oracles.random_spd(80, smallest=0.05), rhs(80, 1)[:, 0]
    seen: list[np.ndarray] = []
    x, info = gh.cg(gh.DenseOperator(exact), b, callback=seen.append)
    assert len(seen) == info.iterations
    np.testing.assert_array_equal(seen[-1], x)
    for iterate, residual in zip(seen, info.residuals[1:], strict=True):
        true = np.linalg.norm(b - exact @ iterate) / np.linalg.norm(b)
        assert true == pytest.approx(residual, rel=1e-4, abs=1e-12)


def test_arguments_by_position_still_work():
    exact, b = dense_oracles.random_spd(60, smallest=0.1), rhs(60, 1)
    op = gh.DenseOperator(exact)
    with pytest.warns(DeprecationWarning, match="to be given by name") as caught:
        x, info = gh.cg(op, b, 0.5, None, 1e-6, 100)
    assert caught[0].filename == __file__
    y, same = gh.cg(op, b, damping=0.5, rtol=1e-6, maxiter=100)
    np.testing.assert_array_equal(x, y)
    assert info == same


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


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_singular_matrix_ends_before_anything_overflows(preconditioned: bool):
    """b is not in its range: the iterates grew until the operator was given NaN."""
    exact = toeplitz(20)
    exact[:5] = exact[:, :5] = 0
    b = np.random.default_rng(20).standard_normal(20)
    M = np.linalg.inv(exact + 1e-17 * np.linalg.norm(exact) * np.eye(20))
    x, info = gh.cg(
        gh.DenseOperator(exact), b, M=(M + M.T) / 2 if preconditioned else None, maxiter=2000
    )
    assert not info.converged
    assert np.isfinite(x).all()
    assert np.isfinite(info.residuals).all()
    assert info.iterations < 100


def test_runs_that_met_a_direction_compare():
    """By their numbers: the direction is an array."""
    op, b = gh.DenseOperator(np.diag([1.0, -2.0, 3.0]), definite=False), np.ones(3)
    first, second = (gh.cg(op, b)[1] for _ in range(2))
    assert first.direction is not None
    assert first == second


def test_a_start_far_away():
    """The residual it begins with may be anything: only its growth is limited."""
    exact, b = dense_oracles.random_spd(60), np.ones(60)
    _, info = gh.cg(gh.DenseOperator(exact), b, x0=np.full(60, 1e20), maxiter=400)
    assert info.residuals[0] > 1e18
    assert info.residuals[-1] < 1e-12 * info.residuals[0]


def test_a_zero_column_does_not_end_the_others():
    exact = dense_oracles.random_spd(60, smallest=0.1)
    b = np.stack([np.zeros(60), np.ones(60)], axis=1)
    x, info = gh.cg(gh.DenseOperator(exact), b, rtol=1e-10)
    assert info.converged
    np.testing.assert_allclose(exact @ x, b, rtol=0, atol=1e-8)


def test_a_converged_column_meets_no_direction():
    """Below rtol its direction is rounding, and may well be one without curvature."""
    op = gh.DenseOperator(np.diag(np.arange(5.0)))
    b = np.array([[1e-6, 1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0, 1.0]]).T
    assert gh.cg(op, b, rtol=1e-4)[1].converged

"""Minimal residuals: against dense solutions and SciPy's minres, definite or not; bad input."""

from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
import scipy.sparse.linalg
from matrix_cases import products_only, toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    NotPositiveDefiniteError,
    ShapeError,
)
from gpu_hodlr.krylov import residuals


def rhs(n: int, k: int, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(n + k).standard_normal((n, k)).astype(dtype)


def indefinite(n: int = 120, seed: int = 0) -> np.ndarray:
    """Eigenvalues in [-2, -0.2] and [0.1, 3]."""
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    exact = (Q * np.r_[np.linspace(-2, -0.2, n // 3), np.linspace(0.1, 3, n - n // 3)]) @ Q.T
    return (exact + exact.T) / 2


def saddle(n: int = 60, m: int = 20) -> np.ndarray:
    """[[A, B^T], [B, 0]], as of a constrained minimum."""
    A = dense_oracles.random_spd(n, smallest=0.2)
    B = np.random.default_rng(1).standard_normal((m, n)) / 4
    return np.block([[A, B.T], [B, np.zeros((m, m))]])


def relative(exact: np.ndarray, x: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(b - exact @ x, axis=0) / np.linalg.norm(b, axis=0)


@pytest.mark.parametrize("exact", [indefinite(), saddle(), -toeplitz(80), toeplitz(80)])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_against_dense_solutions(exact: np.ndarray, damping: float):
    n = len(exact)
    A, b = exact + damping * np.eye(n), rhs(n, 3)
    x, info = gh.minres(
        gh.DenseOperator(exact, definite=False), b, damping=damping, rtol=1e-11, maxiter=2000
    )
    assert info.converged
    assert relative(A, x, b).max() <= 1e-11
    want = np.linalg.solve(A, b)
    np.testing.assert_allclose(x, want, rtol=0, atol=1e-8 * np.abs(want).max())
    one, _ = gh.minres(exact, b[:, 1], damping=damping, rtol=1e-11, maxiter=2000)
    assert one.shape == (n,)
    np.testing.assert_allclose(one, want[:, 1], rtol=0, atol=1e-8 * np.abs(want).max())


def test_every_residual_is_the_least_of_the_krylov_space(xp: ModuleType):
    """And is the one that the info tells."""
    exact, b = indefinite(60), rhs(60, 1)
    op = gh.DenseOperator(xp.asarray(exact), definite=False)
    space = b / np.linalg.norm(b)
    for steps in range(1, 9):
        x, info = gh.minres(op, xp.asarray(b), maxiter=steps)
        assert info.iterations == steps
        coefficients = np.linalg.lstsq(exact @ space, b, rcond=None)[0]
        least = np.linalg.norm(b - exact @ space @ coefficients) / np.linalg.norm(b)
        assert relative(exact, to_host(x), b)[0] == pytest.approx(least, rel=1e-8)
        assert info.residuals[-1] == pytest.approx(least, rel=1e-8)
        following = exact @ space[:, -1:]
        following -= space @ (space.T @ following)
        following -= space @ (space.T @ following)
        space = np.c_[space, following / np.linalg.norm(following)]
    assert list(info.residuals) == sorted(info.residuals, reverse=True)


def test_as_many_iterations_as_scipy():
    exact, b = indefinite(), rhs(120, 1)[:, 0]
    seen: list[int] = []
    scipy.sparse.linalg.minres(exact, b, rtol=1e-9, callback=lambda x: seen.append(1))
    _, info = gh.minres(exact, b, rtol=1e-9)
    assert abs(info.iterations - len(seen)) <= 0.2 * len(seen)


@pytest.mark.parametrize("kind", ["factor", "solve", "array"])
def test_preconditioners(kind: str):
    """|A|^-1, the best there is, needs two steps; the factor of a shifted A helps."""
    exact, b = indefinite(), rhs(120, 2)
    values, vectors = np.linalg.eigh(exact)
    best = (vectors / abs(values)) @ vectors.T
    K = gh.compress(gh.DenseOperator(exact @ exact), rtol=1e-10, leaf_size=30)

    class Solves:
        def solve(self, r: np.ndarray) -> np.ndarray:
            return best @ r

    M = {"factor": K.factorize(1e-3), "solve": Solves(), "array": (best + best.T) / 2}[kind]
    x, info = gh.minres(exact, b, M=M, rtol=1e-10)
    plain = gh.minres(exact, b, rtol=1e-10, maxiter=1000)[1]
    assert info.converged
    assert info.iterations < plain.iterations
    assert kind == "factor" or info.iterations <= 3
    assert relative(exact, x, b).max() <= 1e-10


def test_a_space_that_ends_is_no_fault_of_the_preconditioner():
    """Its next vector is zero, of a zero column the first: r^T M r = 0 there."""
    b = np.stack([np.eye(20)[3], np.zeros(20)], axis=1)
    x, info = gh.minres(2 * np.eye(20), b, M=np.eye(20))
    assert (info.converged, info.iterations) == (True, 1)
    np.testing.assert_allclose(x, b / 2, rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_an_indefinite_preconditioner_is_refused(scale: float, xp: ModuleType):
    exact = indefinite(40)
    op, b = gh.DenseOperator(xp.asarray(exact), definite=False), xp.asarray(rhs(40, 2))
    with pytest.raises(NotPositiveDefiniteError, match="M is not positive definite"):
        gh.minres(op, b, M=gh.DenseOperator(xp.asarray(scale * exact), definite=False))


def test_singular_matrices():
    """b in the range is solved; else the least-squares solution is reached, and said to be none."""
    exact = np.diag(np.r_[np.zeros(5), np.linspace(-2, -1, 10), np.linspace(1, 2, 25)])
    b = exact @ rhs(40, 2)
    x, info = gh.minres(exact, b, rtol=1e-10)
    assert info.converged
    np.testing.assert_allclose(exact @ x, b, rtol=0, atol=1e-8)
    off = b.copy()
    off[:3] += 1.0
    x, info = gh.minres(exact, off, maxiter=400)
    assert not info.converged
    assert info.iterations < 100
    np.testing.assert_allclose(exact @ x, np.r_[np.zeros((5, 2)), off[5:]], rtol=0, atol=1e-6)
    assert np.abs(x).max() < 100
    least = np.linalg.norm(off[:5], axis=0) / np.linalg.norm(off, axis=0)
    assert info.residuals[-1] == pytest.approx(least.max(), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_whatever_the_null_space(seed: int):
    """x stays of the size that it should have, and an ill-conditioned rest is still solved."""
    rng = np.random.default_rng(seed)
    Q, zeros = np.linalg.qr(rng.standard_normal((60, 60)))[0], int(rng.integers(1, 20))
    values = rng.choice([-1, 1], 60 - zeros) * np.geomspace(1e-3, 1, 60 - zeros)
    exact = (Q * np.r_[np.zeros(zeros), values]) @ Q.T
    exact, b = (exact + exact.T) / 2, rng.standard_normal(60)
    x, info = gh.minres(exact, b, maxiter=3000)
    least = np.linalg.norm(Q[:, :zeros].T @ b) / np.linalg.norm(b)
    assert not info.converged
    assert info.residuals[-1] == pytest.approx(least, rel=1e-4)
    assert np.linalg.norm(x) < 1e6
    assert gh.minres(exact, exact @ b, maxiter=3000)[1].converged


def test_an_ill_conditioned_matrix_is_not_given_up():
    Q = np.linalg.qr(np.random.default_rng(3).standard_normal((80, 80)))[0]
    exact = (Q * np.r_[-np.geomspace(1e-7, 1, 40), np.geomspace(1e-7, 1, 40)]) @ Q.T
    _, info = gh.minres((exact + exact.T) / 2, rhs(80, 1), rtol=1e-6, maxiter=5000)
    assert info.converged


@pytest.mark.parametrize("exact", [np.zeros((30, 30)), np.diag(np.r_[np.zeros(29), 1e-9])])
def test_what_no_matrix_can_reach(exact: np.ndarray):
    b = np.r_[np.ones(29), 0.0]
    x, info = gh.minres(exact, b)
    assert not info.converged
    assert np.isfinite(x).all()
    assert info.residuals[-1] == pytest.approx(1.0)
    assert not x.any()


def test_columns_are_independent():
    exact = indefinite()
    vectors = np.linalg.eigh(exact)[1]
    b = np.stack([np.zeros(120), vectors[:, 5], rhs(120, 1)[:, 0]], axis=1)
    x, info = gh.minres(exact, b, rtol=1e-10, maxiter=1000)
    assert info.converged
    np.testing.assert_array_equal(x[:, 0], 0)
    np.testing.assert_allclose(x, np.linalg.solve(exact, b), rtol=0, atol=1e-7)
    none, info = gh.minres(exact, np.zeros((120, 2)), rtol=0.0)
    assert not none.any()
    assert (info.converged, info.iterations) == (True, 0)
    assert gh.minres(exact, np.zeros((120, 0)))[0].shape == (120, 0)


def test_float32(xp: ModuleType):
    exact = indefinite().astype(np.float32)
    b = rhs(120, 2, np.float32)
    op = gh.DenseOperator(xp.asarray(exact), definite=False)
    x, info = gh.minres(op, xp.asarray(b), rtol=1e-4, maxiter=1000)
    assert info.converged
    assert x.dtype == np.float32
    assert relative(exact.astype(np.float64), to_host(x), b).max() <= 2e-4


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_scale_of_b_does_not_matter(scale: float):
    exact, b = indefinite(60), rhs(60, 1)
    x, info = gh.minres(exact, b * scale, maxiter=500)
    assert info.converged
    assert relative(exact, x / scale, b).max() <= 2e-8


def test_rounding_is_seen_by_a_product():
    """Condition 1e7: what the recurrence believes is not what is reached."""
    Q = np.linalg.qr(np.random.default_rng(3).standard_normal((80, 80)))[0]
    exact = (Q * np.r_[-np.geomspace(1e-7, 1, 40), np.geomspace(1e-7, 1, 40)]) @ Q.T
    exact, b = (exact + exact.T) / 2, rhs(80, 1)
    x, info = gh.minres(exact, b, rtol=1e-9, maxiter=8000)
    assert info.residuals[-1] == pytest.approx(relative(exact, x, b)[0], rel=0.05)
    assert info.converged == (info.residuals[-1] <= 1e-9)


def test_where_to_start_and_the_callback():
    exact, b = indefinite(), rhs(120, 1)[:, 0]
    half, first = gh.minres(exact, b, rtol=1e-3, maxiter=500)
    seen: list[np.ndarray] = []
    x, info = gh.minres(exact, b, x0=half, rtol=1e-9, maxiter=500, callback=seen.append)
    assert info.converged
    assert info.residuals[0] == pytest.approx(first.residuals[-1], rel=1e-6)
    assert len(seen) == info.iterations
    np.testing.assert_allclose(seen[-1], x, rtol=0, atol=1e-12)
    assert gh.minres(exact, b, x0=x, rtol=1e-8)[1].iterations == 0


def test_iterations_beyond_the_end_change_nothing(
    cupy: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    exact, b = indefinite(), rhs(120, 2)
    op = gh.DenseOperator(cupy.asarray(exact), definite=False)
    x, info = gh.minres(op, cupy.asarray(b), rtol=1e-6)
    monkeypatch.setattr(residuals, "steps_between_reads", lambda device, done: 1)
    y, again = gh.minres(op, cupy.asarray(b), rtol=1e-6)
    np.testing.assert_array_equal(to_host(x), to_host(y))
    assert again.residuals == info.residuals


@pytest.mark.parametrize("method", [gh.minres, gh.cg])
def test_no_more_iterations_than_asked_for(method: Any, cupy: ModuleType):
    """A GPU looks after several."""
    exact = cupy.asarray(toeplitz(120))
    _, info = method(gh.DenseOperator(exact), cupy.asarray(rhs(120, 1)), rtol=1e-15, maxiter=21)
    assert (info.converged, info.iterations, len(info.residuals)) == (False, 21, 22)


def test_ranks():
    exact, b = indefinite(), rhs(120, 2)
    op = gh.DenseOperator(exact, definite=False)
    alone, info = gh.minres(op, b, rtol=1e-10)

    def spread(comm: Any) -> Any:
        K = gh.compress(op, leaf_size=20, max_rank=60, rtol=1e-12, comm=comm)
        return gh.minres(K, b, rtol=1e-10, maxiter=400)

    for size in (2, 3):
        for x, told in on_threads(size, lambda comm: gh.minres(op, b, rtol=1e-10, comm=comm)):
            np.testing.assert_allclose(x, alone, rtol=0, atol=1e-8)
            assert told.converged
            assert abs(told.iterations - info.iterations) <= 2
        results = on_threads(size, spread)
        for x, told in results:
            assert told.converged
            np.testing.assert_array_equal(x, results[0][0])
            assert relative(exact, x, b).max() <= 1e-9


def test_gradients():
    torch = pytest.importorskip("torch")
    exact = indefinite(30)
    b = torch.from_numpy(rhs(30, 1)[:, 0]).requires_grad_()
    x, _ = gh.minres(exact, b, rtol=1e-12, maxiter=500)
    weights = torch.linspace(0, 1, 30, dtype=torch.float64)
    (weights @ x).backward()
    np.testing.assert_allclose(b.grad, np.linalg.solve(exact, weights), rtol=0, atol=1e-8)
    b.grad = None
    with pytest.warns(gh.errors.AccuracyWarning, match="minres: the residual of a gradient"):
        (weights @ gh.minres(exact, b, maxiter=3)[0]).backward()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"damping": -1.0}, ArgumentError, "damping"),
        ({"rtol": np.nan}, ArgumentError, "rtol"),
        ({"maxiter": 0}, ArgumentError, "maxiter"),
        ({"M": np.eye(3)}, ShapeError, "M must have shape"),
        ({"M": object()}, DtypeError, "M must have a method"),
        ({"x0": np.ones((20, 2))}, ShapeError, "x0"),
        ({"callback": 3}, DtypeError, "callback"),
        ({"b": np.ones(19)}, ShapeError, "b must have shape"),
        ({"b": np.full(20, np.inf)}, ArgumentError, "b has 20 entries"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type, said: str):
    with pytest.raises(error, match=said):
        gh.minres(np.eye(20), **{"b": np.ones(20), **options})


def test_another_device(cupy: ModuleType):
    with pytest.raises(DeviceError):
        gh.minres(np.eye(20), cupy.ones(20))


def test_cg_ends_where_minres_goes_on():
    """A saddle: CG meets a direction of negative curvature and hands it out."""
    exact = saddle()
    b = rhs(80, 1)[:, 0]
    op = gh.DenseOperator(exact, definite=False)
    _, info = gh.cg(op, b)
    assert not info.converged
    p = info.direction
    assert p @ exact @ p / (p @ p) == pytest.approx(info.curvature, rel=1e-8)
    assert info.curvature < 0
    x, info = gh.minres(products_only(exact), b, maxiter=400)
    assert info.converged
    assert (info.direction, info.curvature) == (None, None)
    np.testing.assert_allclose(exact @ x, b, rtol=0, atol=1e-6)

"""Eigenvalues at the ends of a spectrum: against SciPy's eigsh and dense matrices; bad input."""

import pickle
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
from matrix_cases import products_only, toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import device_of, to_host
from gpu_hodlr.errors import ArgumentError, DtypeError, NoConvergenceError
from gpu_hodlr.krylov import extreme_eigenvalues
from gpu_hodlr.krylov.lanczos import KrylovBasis


def with_spectrum(values: np.ndarray, seed: int = 0) -> np.ndarray:
    n = len(values)
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    exact = (Q * values) @ Q.T
    return (exact + exact.T) / 2


def indefinite(n: int = 200) -> np.ndarray:
    """Both ends stand apart from the middle, the lower one further."""
    rng = np.random.default_rng(n)
    middle = rng.uniform(-1, 1, n - 12)
    return with_spectrum(np.r_[-3.0 * 1.3 ** np.arange(6), 2.0 * 1.2 ** np.arange(6), middle])


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("k", [1, 4, 5])
def test_the_values_are_those_of_scipy(which: str, k: int):
    exact = indefinite()
    w, v = gh.eigsh(exact, k, which)
    start = np.random.default_rng(0).standard_normal(len(exact))
    ends = "LA" if (k, which) == (1, "BE") else which  # which ARPACK does not know
    want = scipy.sparse.linalg.eigsh(exact, k, which=ends, v0=start, return_eigenvectors=False)
    np.testing.assert_allclose(w, np.sort(want), rtol=1e-12)
    assert v.shape == (200, k)
    assert (w.dtype, v.dtype) == (np.float64, np.float64)
    residuals = np.linalg.norm(exact @ v - v * w, axis=0)
    assert residuals.max() <= 1e-8 * np.abs(np.linalg.eigvalsh(exact)).max()
    np.testing.assert_allclose(v.T @ v, np.eye(k), rtol=0, atol=1e-12)


def test_both_types_and_libraries(xp: ModuleType, dtype: Any):
    exact = indefinite(120).astype(dtype)
    w, v = gh.eigsh(gh.DenseOperator(xp.asarray(exact), definite=False), 3, "BE")
    want = np.linalg.eigvalsh(exact.astype(np.float64))[[0, -2, -1]]
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(w, want, rtol=100 * eps)
    assert v.dtype == dtype
    assert device_of(v) == ("cpu" if xp is np else "cuda")
    missed = np.linalg.norm(exact @ to_host(v) - to_host(v) * w, axis=0)
    assert missed.max() <= max(1e-8, 100 * eps) * np.abs(want).max()


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_an_eigenvalue_comes_as_often_as_it_is_there(copies: int):
    """One random vector sees each once: SciPy's tolerance of 0 finds the others by rounding."""
    values = np.r_[np.full(copies, 10.0), 9.0, 8.0, np.linspace(-1, 1, 150)]
    w, v = gh.eigsh(with_spectrum(values), copies + 1, "LA", rtol=1e-6)
    np.testing.assert_allclose(w, np.r_[9.0, np.full(copies, 10.0)], rtol=1e-8)
    np.testing.assert_allclose(v.T @ v, np.eye(copies + 1), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("exact", "k", "want"),
    [
        (np.eye(50), 3, [1.0, 1.0, 1.0]),
        (np.zeros((50, 50)), 2, [0.0, 0.0]),
        (np.diag(np.r_[5.0, 5.0, 5.0, np.ones(60)]), 4, [1.0, 5.0, 5.0, 5.0]),
        (np.diag([1.0, 2.0]), 2, [1.0, 2.0]),
        (np.diag(np.arange(1.0, 8.0)), 7, np.arange(1.0, 8.0)),
        (np.diag(np.r_[np.zeros(99), 3.0]), 2, [0.0, 3.0]),
    ],
)
def test_few_different_eigenvalues(exact: np.ndarray, k: int, want: Any):
    """The Krylov space of one vector ends before there are k."""
    w, v = gh.eigsh(exact, k, "LA")
    np.testing.assert_allclose(w, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(exact @ v, v * w, rtol=0, atol=1e-12)
    np.testing.assert_allclose(v.T @ v, np.eye(k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_opposite_eigenvalues(k: int):
    """Of two of the same size either is the largest in absolute value."""
    half = 2.0 * 0.8 ** np.arange(40)
    w, _ = gh.eigsh(with_spectrum(np.r_[half, -half]), k, "LM")
    np.testing.assert_allclose(np.sort(abs(w))[::-1], np.repeat(half, 2)[:k], rtol=1e-10)


def test_a_missing_check_is_no_result():
    """Products that change from one to the next never agree."""
    rng, exact = np.random.default_rng(0), indefinite(60)
    op = gh.FunctionOperator(
        60, matmat=lambda v: exact @ v * (1 + 1e-3 * rng.random()), definite=False
    )
    with pytest.raises(NoConvergenceError):
        gh.eigsh(op, 3, maxiter=200)


def test_each_pair_is_checked_by_a_product():
    """One whose product says otherwise is no result, and the others are handed out."""
    exact = indefinite(60)

    def multiply(v: np.ndarray) -> np.ndarray:
        product = exact @ v
        product[:, 1:2] *= 1.001  # of one vector there is no second
        return product

    op = gh.FunctionOperator(60, matmat=multiply, definite=False)
    with pytest.raises(NoConvergenceError, match="2 of 3 eigenvalues") as caught:
        gh.eigsh(op, 3, "LA")
    want = np.linalg.eigvalsh(exact)[[-3, -1]]
    np.testing.assert_allclose(caught.value.eigenvalues, want, rtol=1e-10)


def test_a_wide_spectrum_needs_restarts():
    """The smallest eigenvalues of a discrete Laplacian, many of which are close."""
    n = 300
    exact = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    want = 2 - 2 * np.cos(np.arange(1, 5) * np.pi / (n + 1))
    w, _ = gh.eigsh(products_only(exact), 4, "SA", maxiter=4000)
    np.testing.assert_allclose(w, want, rtol=1e-6)
    largest, _ = gh.eigsh(exact, 4, "LA", maxiter=4000)
    np.testing.assert_allclose(largest, 4 - want[::-1], rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e300])
def test_any_scale(scale: float):
    exact = indefinite(60)
    w, v = gh.eigsh(exact * scale, 2, "SA")
    np.testing.assert_allclose(w / scale, np.linalg.eigvalsh(exact)[:2], rtol=1e-10)
    assert np.isfinite(v).all()


def test_compressed_matrices_factors_and_matrices_of_others():
    exact = toeplitz(300)
    values = np.linalg.eigvalsh(exact)
    K = gh.compress(exact, rtol=1e-10, leaf_size=40)
    np.testing.assert_allclose(gh.eigsh(K, 3, "LA")[0], values[-3:], rtol=1e-8)
    inverse, v = gh.eigsh(K.factorize(0.1), 3, "LA")
    np.testing.assert_allclose(1 / inverse[::-1], values[:3] + 0.1, rtol=1e-8)
    np.testing.assert_allclose(exact @ v, v * (1 / inverse - 0.1), rtol=0, atol=1e-7)
    sparse = scipy.sparse.diags_array(np.arange(1.0, 41.0))
    np.testing.assert_allclose(gh.eigsh(sparse, 2, "LM")[0], [39.0, 40.0], rtol=1e-12)
    torch = pytest.importorskip("torch")
    w, _ = gh.eigsh(torch.diag(torch.arange(1.0, 9.0)), 2, "SA")
    np.testing.assert_allclose(w, [1.0, 2.0], rtol=1e-5)


def test_same_seed_same_bits():
    exact = indefinite()
    one, again, other = (gh.eigsh(exact, 3, seed=seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_what_has_not_converged_is_told():
    """With what has: the isolated lower end, not the crowded upper one."""
    exact = with_spectrum(np.r_[-9.0, -7.0, np.linspace(0, 1, 400) ** 0.1])
    with pytest.raises(NoConvergenceError, match="of 6 eigenvalues") as caught:
        gh.eigsh(exact, 6, "BE", maxiter=40)
    error = caught.value
    assert isinstance(error, np.linalg.LinAlgError)
    found, v = error.eigenvalues, error.eigenvectors
    assert 1 <= len(found) == v.shape[1] < 6
    np.testing.assert_allclose(found[0], -9.0, rtol=1e-10)
    missed = np.linalg.norm(exact @ v - v * found, axis=0)
    assert missed.max() <= 1e-8 * 9
    assert error.residuals.max() > 1e-8
    again = pickle.loads(pickle.dumps(error))
    np.testing.assert_array_equal(again.eigenvalues, found)
    np.testing.assert_array_equal(again.residuals, error.residuals)


def test_a_matrix_that_is_not_symmetric_does_not_converge():
    """Checked by a product, whatever the recurrence says."""
    exact = np.triu(np.random.default_rng(0).standard_normal((80, 80)))
    op = gh.FunctionOperator(80, matmat=lambda v: exact @ v, definite=False)
    with pytest.raises(NoConvergenceError):
        gh.eigsh(op, 2, maxiter=300)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"which": "SM"}, "which must be one of LM, LA, SA, BE, got 'SM'"),
        ({"k": 0}, "k must be >= 1"),
        ({"k": 21}, "k must be in 1 .. 20, the order of A, got 21"),
        ({"rtol": -1.0}, "rtol"),
        ({"maxiter": 0}, "maxiter"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input(options: dict[str, Any], said: str):
    with pytest.raises(ArgumentError, match=said):
        gh.eigsh(np.eye(20), **options)
    with pytest.raises(DtypeError):
        gh.eigsh(np.eye(20), 2.0)  # type: ignore[arg-type]
    with pytest.raises(DtypeError):
        gh.eigsh("matrix", 2)


def test_products_that_are_no_numbers(cupy: ModuleType):
    """On a GPU nobody looks at products: then it is seen here."""
    exact = cupy.asarray(np.eye(20))

    def multiply(v: Any) -> Any:
        return exact @ v * np.nan

    op = gh.FunctionOperator(20, matmat=multiply, device="cuda", definite=False)
    with pytest.raises(ArgumentError, match="NaN"):
        gh.eigsh(op, 2)


def test_ranks():
    """An operator's products are formed together; a compressed matrix has its vectors spread."""
    exact = indefinite(160)
    op = gh.DenseOperator(exact, definite=False)
    alone = gh.eigsh(op, 4, "BE")
    for size in (2, 3):
        for w, v in on_threads(size, lambda comm: gh.eigsh(op, 4, "BE", comm=comm)):
            np.testing.assert_array_equal(w, alone[0])
            np.testing.assert_array_equal(v, alone[1])

        def spread(comm: Any) -> Any:
            K = gh.compress(exact, leaf_size=20, max_rank=80, rtol=1e-10, comm=comm)
            return gh.eigsh(K, 4, "BE")

        results = on_threads(size, spread)
        for w, v in results:
            np.testing.assert_allclose(w, alone[0], rtol=1e-8)
            np.testing.assert_array_equal(w, results[0][0])
            np.testing.assert_array_equal(v, results[0][1])
            np.testing.assert_allclose(exact @ v, v * w, rtol=0, atol=1e-6)
    for error in on_threads(2, lambda comm: gh.eigsh(op, 4 + comm.rank, comm=comm)):
        assert isinstance(error, ArgumentError)
        assert "k differs between ranks" in str(error)


def test_the_basis_is_orthonormal_and_holds_the_matrix():
    exact = indefinite(90)
    basis = KrylovBasis(gh.DenseOperator(exact, definite=False), 30)
    basis.extend(30)
    Q = basis.vectors(np.eye(30)).T
    np.testing.assert_allclose(Q.T @ Q, np.eye(30), rtol=0, atol=1e-13)
    values, S = basis.ritz()
    np.testing.assert_allclose(
        Q.T @ exact @ Q, (S * values) @ S.T * basis.scale, rtol=0, atol=1e-12 * abs(exact).max()
    )
    assert basis.products == 30
    outside = exact @ Q - Q @ (Q.T @ exact @ Q)
    assert np.linalg.norm(outside) == pytest.approx(basis.beta * basis.scale, rel=1e-8)


def test_the_basis_ends_with_an_invariant_subspace():
    """Nothing is multiplied that means nothing; another start is orthogonal to it."""
    basis = KrylovBasis(gh.DenseOperator(np.diag(np.r_[1.0, 2.0, 3.0, np.zeros(50)])), 20)
    basis.extend(20)
    assert (basis.size, basis.products, basis.invariant, basis.beta) == (4, 4, True, 0.0)
    values, _ = basis.ritz()
    np.testing.assert_allclose(values * basis.scale, [0, 1, 2, 3], rtol=0, atol=1e-12)
    basis.begin()
    assert not basis.invariant
    basis.extend(20)
    assert (basis.size, basis.invariant) == (5, True)
    Q = basis.vectors(np.eye(5)).T
    np.testing.assert_allclose(Q.T @ Q, np.eye(5), rtol=0, atol=1e-13)


class Overflows(gh.DenseOperator):
    """Whose third product leaves the range of numbers in one entry."""

    products = 0

    def matmat(self, v: Any) -> Any:
        self.products += 1
        product = super().matmat(v)
        if self.products == 3:
            product[0, 0] = np.inf
        return product


def test_the_basis_ends_where_a_product_is_no_number():
    """What came before is kept; of the ends of the spectrum nothing is said."""
    exact = indefinite(40)
    with np.errstate(invalid="ignore"):
        basis = KrylovBasis(Overflows(exact, definite=False), 20)
        basis.extend(20)
        ends = extreme_eigenvalues(Overflows(exact, definite=False), 20)
    assert (basis.size, basis.products, basis.finite) == (2, 3, False)
    before = KrylovBasis(gh.DenseOperator(exact, definite=False), 2)
    before.extend(2)
    np.testing.assert_array_equal(basis.ritz()[0], before.ritz()[0])
    assert ends == (-np.inf, np.inf)


def test_extreme_eigenvalues_lie_inside(xp: ModuleType):
    exact = indefinite(90)
    values = np.linalg.eigvalsh(exact)
    op = gh.DenseOperator(xp.asarray(exact), definite=False)
    low, high = extreme_eigenvalues(op, 25)
    assert values[0] * (1 + 1e-12) <= low <= 0.99 * values[0]
    assert 0.99 * values[-1] <= high <= values[-1] * (1 + 1e-12)
    assert extreme_eigenvalues(gh.DenseOperator(xp.zeros((9, 9)))) == (0.0, 0.0)

"""Low rank with eigenvalues of both signs: promise, rank, factor, files, ranks, bad input."""

from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import products_only
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import AccuracyWarning, NotPositiveDefiniteError, RankCapWarning
from gpu_hodlr.schemes.signed import range_basis, signed


def with_eigenvalues(values: np.ndarray, seed: int = 0) -> np.ndarray:
    n = len(values)
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    exact = (Q * values) @ Q.T
    return (exact + exact.T) / 2


def decaying(n: int = 300, decay: float = 0.9, seed: int = 0) -> np.ndarray:
    """Eigenvalues decay^k, every third negative."""
    signs = np.where(np.arange(n) % 3 == 1, -1.0, 1.0)
    return with_eigenvalues(signs * decay ** np.arange(n), seed)


def operator(exact: Any) -> gh.DenseOperator:
    return gh.DenseOperator(exact, definite=False)


def lowest_rank(exact: np.ndarray, rtol: float) -> int:
    """The smallest rank any matrix within rtol has (Eckart, Young)."""
    squares = np.sort(np.linalg.eigvalsh(exact) ** 2)
    tails = np.sqrt(np.append(np.cumsum(squares)[::-1], 0.0) / squares.sum())
    return int(np.argmax(tails <= rtol))


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-5])
def test_promise(rtol: float, xp: ModuleType, dtype: Any):
    """The measured error is true, and the rank is little above the smallest there is."""
    exact = decaying()
    K = gh.compress(operator(xp.asarray(exact.astype(dtype))), "lowrank", rtol=rtol)
    assert isinstance(K, gh.LowRankMatrix)
    error = dense_oracles.frobenius_error(to_host(K.to_dense()), exact)
    assert error <= rtol
    assert 0.5 * error <= K.report.error <= 2 * error
    ((rank,),) = K.ranks
    least = lowest_rank(exact, rtol)
    assert least <= rank <= least + 3
    kept = to_host(K.structure.eigenvalues)
    assert (kept > 0).any()
    assert (kept < 0).any()
    U = to_host(K.structure.U)
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(U.T @ U, np.eye(rank), rtol=0, atol=100 * eps)
    want = np.sort(np.linalg.eigvalsh(exact))
    np.testing.assert_allclose(np.sort(kept)[:2], want[:2], rtol=1e-4 * rtol + 1e3 * eps)


@pytest.mark.parametrize(
    "values",
    [
        -(0.8 ** np.arange(100.0)),
        np.r_[np.full(6, -3.0), np.full(6, 3.0), np.zeros(88)],
        np.r_[1.0, -1e-6 * 0.8 ** np.arange(99.0)],
        np.r_[-1.0, 0.5, np.zeros(98)],
        np.zeros(100),
    ],
    ids=["negative", "equal sizes", "one large", "two", "none"],
)
@pytest.mark.parametrize("rtol", [1e-2, 1e-10])
def test_spectra(values: np.ndarray, rtol: float):
    exact = with_eigenvalues(values)
    K = gh.compress(operator(exact), "lowrank", rtol=rtol, max_rank=100)
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 3 * rtol
    assert K.ranks[0][0] <= lowest_rank(exact, rtol) + 4 if values.any() else K.ranks == ((0,),)


@pytest.mark.parametrize("n", [2, 3, 17, 161])
def test_small_sizes(n: int):
    """Fewer rows than columns of the first sample: K is multiplied by all unit vectors."""
    exact = decaying(n, 0.8)
    for op in (operator(exact), products_only(exact, definite=False)):
        K = gh.compress(op, "lowrank", rtol=1e-10, max_rank=n)
        assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 1e-10


@pytest.mark.parametrize("power", [-400, 400])
def test_extreme_scales(power: int):
    exact = decaying(250, 0.85)
    K = gh.compress(operator(np.ldexp(exact, power)), "lowrank", rtol=1e-6)
    assert dense_oracles.frobenius_error(np.ldexp(K.to_dense(), -power), exact) <= 1e-6


def test_a_sketch_grows_before_its_range_is_multiplied_by():
    """Products: the columns of the sketch, and once the basis."""
    exact, counted = decaying(800, 0.97), []

    def multiply(v: np.ndarray) -> np.ndarray:
        counted.append(v.shape[1])
        return exact @ v

    op = gh.FunctionOperator(800, matmat=multiply, definite=False)
    K = gh.compress(op, "lowrank", rtol=1e-3, max_rank=400)
    assert K.report.num_samples == 320
    measured = sum(counted) - 320  # probe, checks, spectral error; and the basis of 310
    assert 310 <= measured <= 310 + 60
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 1e-3


def test_cap_is_reported():
    with pytest.warns(RankCapWarning, match="max_rank 20 was hit on level 0"):
        K = gh.compress(operator(decaying(decay=0.99)), "lowrank", rtol=1e-3, max_rank=20)
    assert K.report.rank_cap_hit
    assert K.ranks == ((20,),)
    squares = np.sort(np.linalg.eigvalsh(decaying(decay=0.99)) ** 2)
    assert K.report.error <= 1.2 * np.sqrt(squares[:-20].sum() / squares.sum())


def test_auto_considers_it():
    K = gh.compress(operator(decaying(400, 0.5)), "auto", rtol=1e-3)
    assert K.report.scheme == "lowrank"
    assert "lowrank" in K.report.choice


@pytest.mark.parametrize("every_row", [False, True])
def test_factor_above_the_smallest_eigenvalue(every_row: bool, xp: ModuleType, dtype: Any):
    """Solve, log-determinant and square root against the dense matrix."""
    exact = decaying(120, 0.7)
    K = gh.compress(operator(xp.asarray(exact.astype(dtype))), "lowrank", rtol=1e-5, max_rank=60)
    d = 1.0 + np.random.default_rng(4).random(120) * every_row
    F = K.factorize(xp.asarray(d.astype(dtype)) if every_row else 1.0)
    damped = to_host(K.to_dense()).astype(np.float64) + np.diag(d)
    assert np.linalg.eigvalsh(damped)[0] > 0
    eps, size = float(np.finfo(dtype).eps), np.linalg.cond(damped)
    b = np.random.default_rng(2).standard_normal((120, 4)).astype(dtype)
    want = np.linalg.solve(damped, b)
    np.testing.assert_allclose(
        to_host(F.solve(xp.asarray(b))), want, rtol=0, atol=1e3 * eps * size * np.abs(want).max()
    )
    assert F.logdet() == pytest.approx(np.linalg.slogdet(damped)[1], abs=1e4 * eps * 120)
    unit = xp.eye(120, dtype=dtype)
    W, back = to_host(F.sqrt_matmat(unit)), to_host(F.sqrt_matmat(unit, transpose=True))
    np.testing.assert_allclose(W @ back, damped, rtol=0, atol=1e3 * eps * np.linalg.norm(damped, 2))
    for transpose in (False, True):
        there = F.sqrt_matmat(xp.asarray(b), transpose=transpose)
        again = to_host(F.sqrt_solve(there, transpose=transpose))
        np.testing.assert_allclose(again, b, rtol=0, atol=1e3 * eps * size)


def test_below_the_smallest_eigenvalue_it_is_refused_and_named():
    """-0.7; the damping named does, and is a few per cent more."""
    K = gh.compress(operator(decaying(120, 0.7)), "lowrank", rtol=1e-6)
    smallest = np.linalg.eigvalsh(K.to_dense())[0]
    for damping in (0.0, 0.3, np.full(120, 0.3)):
        with pytest.raises(
            NotPositiveDefiniteError, match="smallest eigenvalue about -0"
        ) as caught:
            K.factorize(damping)
        error = caught.value
        assert error.damping is not None
        total = error.damping + (0.3 if np.ndim(damping) else 0.0)
        assert -smallest < total <= 1.06 * -smallest
        assert "declare definite = False" not in str(error)
        K.factorize(damping + error.damping if np.ndim(damping) else error.damping)
    F = K.factorize(0.0, shift="auto")
    assert F.damping == F.shifted > -smallest
    with pytest.raises(NotPositiveDefiniteError):
        K.factorize(0.99 * -smallest)
    assert K.factorize(1.01 * -smallest).inverse_norm > 50


def test_arithmetic_and_files(tmp_path: Path):
    exact = decaying(100, 0.8)
    K = gh.compress(operator(exact), "lowrank", rtol=1e-6)
    d = np.linspace(0, 1, 100)
    for got, want in ((-K, -exact), (3 * K, 3 * exact), (K + gh.Diagonal(d), exact + np.diag(d))):
        assert dense_oracles.frobenius_error(got.to_dense(), want) <= 1e-5
        assert got.trace() == pytest.approx(np.trace(want), abs=1e-5)
        got.save(tmp_path / "K.npz")
        again = gh.load(tmp_path / "K.npz")
        np.testing.assert_array_equal(again.to_dense(), got.to_dense())
    for damping in (1.0, 1.0 + d):
        F = K.factorize(damping)
        F.save(tmp_path / "F.npz")
        np.testing.assert_array_equal(gh.load(tmp_path / "F.npz").solve(d), F.solve(d))


def test_a_form_of_lower_precision():
    K = gh.compress(operator(decaying()), "lowrank", rtol=1e-3, storage_dtype=np.float32)
    assert K.structure.signed
    assert (K @ np.ones(300)).dtype == np.float64
    assert dense_oracles.frobenius_error(K.to_dense(), decaying()) <= 1e-3


def test_ranks():
    exact = decaying(300, 0.85)
    for op in (operator(exact), products_only(exact, definite=False)):
        alone = gh.compress(op, "lowrank", rtol=1e-5)
        b = np.random.default_rng(0).standard_normal((300, 2))
        want, solved = alone @ b, alone.factorize(1.2).solve(b)

        def spread(comm: Any, op: gh.Operator = op, b: np.ndarray = b) -> Any:
            K = gh.compress(op, "lowrank", rtol=1e-5, comm=comm)
            F, G = K.factorize(1.2), K.factorize(np.linspace(1.2, 1.3, 300))
            return K @ b, F.solve(b), G.logdet(), K.ranks, K.report.error

        logdet = alone.factorize(np.linspace(1.2, 1.3, 300)).logdet()
        for size in (2, 3):
            results = on_threads(size, spread)
            for got in results:
                np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-9)
                np.testing.assert_allclose(got[1], solved, rtol=0, atol=1e-9)
                assert got[2] == pytest.approx(logdet)
                assert got[3] == alone.ranks
                np.testing.assert_array_equal(got[0], results[0][0])


def test_a_declared_definite_matrix_that_is_not_is_told_what_to_declare():
    with pytest.raises(NotPositiveDefiniteError, match="declare definite = False"):
        gh.compress(decaying(), "lowrank", rtol=1e-4)


def test_same_seed_same_bits():
    first, again, other = (
        gh.compress(operator(decaying()), "lowrank", rtol=1e-3, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.structure.U, again.structure.U)
    assert not np.array_equal(first.structure.U, other.structure.U[:, : first.ranks[0][0]])


# --- the steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.3, 0.8])
def test_a_basis_of_what_falls_below_the_root_of_the_rounding(decay: float, dtype: Any):
    """Columns of twelve orders of magnitude: each round sees some of them."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((m, 30)))[0] for m in (200, 30))
    x = ((left * decay ** np.arange(30)) @ right.T).astype(dtype)
    tolerance = 1e-10 if dtype == np.float64 else 1e-5
    Q = range_basis(x, tolerance)
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(Q.T @ Q, np.eye(Q.shape[1]), rtol=0, atol=100 * eps)
    assert np.linalg.norm(x - Q @ (Q.T @ x)) <= max(tolerance, 100 * eps)
    assert Q.shape[1] <= 30
    more = range_basis(x, tolerance, known=Q[:, :3].copy())
    np.testing.assert_allclose(Q[:, :3].T @ more, 0, rtol=0, atol=100 * eps)
    assert not range_basis(np.zeros((50, 4)), 0.0).shape[1]


def test_all_that_the_basis_sees_is_exact():
    """K - P K P with P = I - Q Q^T: products with Q are those of K."""
    exact = decaying(90, 0.9)
    Q = np.linalg.qr(np.random.default_rng(1).standard_normal((90, 20)))[0]
    form = signed(lambda v: exact @ v, Q, 0.0)
    np.testing.assert_allclose(form.matmat(Q), exact @ Q, rtol=0, atol=1e-12)
    P = np.eye(90) - Q @ Q.T
    np.testing.assert_allclose(form.matmat(np.eye(90)), exact - P @ exact @ P, rtol=0, atol=1e-12)


def test_warnings_of_accuracy_count_the_smallest_eigenvalue():
    """The error decides what the solutions are where damping is near -lambda_min."""
    exact = decaying(120, 0.7)
    K = gh.compress(operator(exact), "lowrank", rtol=1e-1)
    smallest = -np.linalg.eigvalsh(K.to_dense())[0]
    with pytest.warns(AccuracyWarning, match="smallest eigenvalue"):
        K.factorize(1.001 * smallest)

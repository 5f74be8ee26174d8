"""Matrices made of others: scaled, plus a diagonal, and a damping for every row."""

from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import (
    ArgumentError,
    DtypeError,
    NotPositiveDefiniteError,
    ShapeError,
)
from gpu_hodlr.factor import MultipoleSolver
from gpu_hodlr.testing import check_operator

N = 126  # leaves are padded
SCHEMES = ("hss", "hodlr", "fmm", "lowrank")
EXACT = ("hss", "hodlr", "lowrank")


def low_rank(n: int, rank: int = 20) -> np.ndarray:
    factor = np.random.default_rng(0).standard_normal((n, rank)) * 0.8 ** np.arange(rank)
    return factor @ factor.T


def exact_matrix(scheme: str) -> np.ndarray:
    return low_rank(N) if scheme == "lowrank" else toeplitz(N) + 0.1 * np.eye(N)


def compressed(scheme: str, matrix: Any = None, **options: Any) -> gh.CompressedMatrix:
    if scheme == "fmm":
        options["budget"] = 0.2
    matrix = exact_matrix(scheme) if matrix is None else matrix
    return gh.compress(matrix, scheme, rtol=1e-9, max_rank=N, leaf_size=20, **options)


def diagonal(n: int = N) -> np.ndarray:
    return np.random.default_rng(3).uniform(0.5, 30.0, n)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scaled_and_shifted(scheme: str):
    A, K, d = exact_matrix(scheme), compressed(scheme), diagonal()
    for got, want in (
        (2 * K, 2 * A),
        (K * np.float32(0.5), 0.5 * A),
        (K / 4, A / 4),
        (K + gh.Diagonal(d), A + np.diag(d)),
        (gh.Diagonal(d) + K, A + np.diag(d)),
        (3 * (K + gh.Diagonal(d)) + gh.Diagonal(-d), 3 * A + np.diag(2 * d)),
    ):
        assert type(got) is type(K)
        assert dense_oracles.frobenius_error(got.to_dense(), want) <= 1e-8
        np.testing.assert_allclose(got.diagonal(), np.diagonal(want), rtol=1e-7)
        assert got.trace() == pytest.approx(np.trace(want), rel=1e-7)
        # estimated from ten vectors when it was compressed
        assert got.report.frobenius_norm == pytest.approx(np.linalg.norm(want), rel=0.3)
    np.testing.assert_allclose(K.to_dense(), A, rtol=0, atol=1e-7 * np.abs(A).max())  # as before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_negative(scheme: str):
    K = compressed(scheme)
    np.testing.assert_array_equal((-K).to_dense(), -K.to_dense())


def test_the_error_reported_is_that_of_the_sum():
    K = gh.compress(toeplitz(N), rtol=1e-2, leaf_size=20)
    d = 10 * diagonal()
    exact = toeplitz(N) + np.diag(d)
    S = K + gh.Diagonal(d)
    error = dense_oracles.frobenius_error(S.to_dense(), exact)
    assert error / 3 <= S.report.error <= 3 * error
    assert S.report.error < K.report.error / 5


def test_the_rounding_of_the_stored_type_is_part_of_the_error():
    K = gh.compress(exact_matrix("hss"), rtol=1e-6, leaf_size=20, storage_dtype="float32")
    d = np.full(N, 1e3) + 1e-6
    S = K + gh.Diagonal(d)
    error = dense_oracles.frobenius_error(S.to_dense(), toeplitz(N) + 0.1 * np.eye(N) + np.diag(d))
    assert error / 3 <= S.report.error <= 3 * error


@pytest.mark.parametrize("scheme", EXACT)
def test_a_damping_for_every_row(scheme: str):
    A, d = exact_matrix(scheme), diagonal()
    F = compressed(scheme).factorize(damping=d)
    assert F.damping is d
    assert "damping of every row" in repr(F)
    damped = A + np.diag(d)
    b = np.random.default_rng(0).standard_normal((N, 3))
    np.testing.assert_allclose(F.solve(b), np.linalg.solve(damped, b), rtol=0, atol=1e-8)
    assert F.logdet() == pytest.approx(np.linalg.slogdet(damped)[1], abs=1e-6)
    W = F.sqrt_matmat(np.eye(N))
    np.testing.assert_allclose(W @ W.T, damped, rtol=0, atol=1e-6)
    np.testing.assert_allclose(F.sqrt_matmat(b, transpose=True), W.T @ b, rtol=0, atol=1e-10)
    np.testing.assert_allclose(F.sqrt_solve(W @ b), b, rtol=0, atol=1e-9)
    np.testing.assert_allclose(F.sqrt_solve(W.T @ b, transpose=True), b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_a_damping_for_every_row_of_fmm(k: int):
    """There is a near field, so that CG solves."""
    A, d = exact_matrix("fmm"), diagonal()
    F = compressed("fmm").factorize(damping=d)
    assert isinstance(F, MultipoleSolver)
    assert F.damping is d
    assert "damping of every row" in repr(F)
    b = np.random.default_rng(0).standard_normal((N, k))
    np.testing.assert_allclose(F.solve(b), np.linalg.solve(A + np.diag(d), b), rtol=0, atol=1e-8)
    assert F.preconditioner.damping == d.min()
    assert F.info.iterations < 30


def test_more_damping_for_every_row_of_fmm():
    """What the error says is added to that of every row would do, and half of it would not."""
    A, d = exact_matrix("fmm") - 3.0 * np.eye(N), diagonal()
    K = compressed("fmm", A)
    b = np.random.default_rng(0).standard_normal(N)
    with pytest.raises(NotPositiveDefiniteError, match="damping of every row, at least") as caught:
        K.factorize(d).solve(b)
    more = caught.value.damping
    assert more > 0
    x = K.factorize(d + more).solve(b, rtol=1e-6)
    assert np.linalg.norm(A @ x + (d + more) * x - b) < 1e-4 * np.linalg.norm(b)
    with pytest.raises(NotPositiveDefiniteError):
        K.factorize(d + 0.5 * more).solve(b)


@pytest.mark.parametrize("scheme", EXACT)
def test_equal_dampings_are_one(scheme: str):
    K, b = compressed(scheme), np.random.default_rng(0).standard_normal(N)
    one, many = K.factorize(0.7), K.factorize(np.full(N, 0.7))
    np.testing.assert_allclose(many.solve(b), one.solve(b), rtol=0, atol=1e-9)
    assert many.logdet() == pytest.approx(one.logdet(), abs=1e-8)


@pytest.mark.parametrize("spread", [1e3, 1e8])
def test_low_rank_with_dampings_far_apart(spread: float):
    A = low_rank(N)
    d = np.where(np.arange(N) % 2, 1e-3, 1e-3 * spread)
    F = compressed("lowrank").factorize(d)
    b = np.random.default_rng(0).standard_normal(N)
    damped = A + np.diag(d)
    x = F.solve(b)
    residual = np.linalg.norm(damped @ x - b) / (np.linalg.norm(damped, 2) * np.linalg.norm(x))
    assert residual <= 1e-8  # 1e-9 is the compression's own
    assert F.logdet() == pytest.approx(np.linalg.slogdet(damped)[1], rel=1e-6)


def test_no_rank_at_all():
    K = gh.compress(np.zeros((N, N)), "lowrank")
    F, d = K.factorize(diagonal()), diagonal()
    np.testing.assert_allclose(F.solve(np.ones(N)), 1 / d, rtol=1e-12)
    assert F.logdet() == pytest.approx(np.log(d).sum())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_files_keep_the_diagonal(scheme: str, tmp_path: Path):
    S = 2 * compressed(scheme) + gh.Diagonal(diagonal())
    S.save(tmp_path / "S.npz")
    again = gh.load(tmp_path / "S.npz")
    np.testing.assert_array_equal(again.to_dense(), S.to_dense())
    assert again.report == S.report


@pytest.mark.parametrize("scheme", EXACT)
def test_on_the_device(scheme: str, cupy: ModuleType):
    K = compressed(scheme, cupy.asarray(exact_matrix(scheme)))
    d = cupy.asarray(diagonal())
    S = 2 * K + gh.Diagonal(d)
    b = cupy.asarray(np.random.default_rng(0).standard_normal((N, 2)))
    want = 2 * exact_matrix(scheme) + np.diag(diagonal())
    np.testing.assert_allclose(to_host(S @ b), want @ to_host(b), rtol=0, atol=1e-6)
    for x in (S.factorize().solve(b), (2 * K).factorize(d).solve(b)):
        np.testing.assert_allclose(to_host(x), np.linalg.solve(want, to_host(b)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("scheme", EXACT)
@pytest.mark.parametrize("whole", [True, False])
def test_on_many_ranks(scheme: str, whole: bool):
    d, b = diagonal(), np.random.default_rng(0).standard_normal(N)
    damped = exact_matrix(scheme) + np.diag(d)

    def run(comm: Any) -> Any:
        K = compressed(scheme, comm=comm)
        given = d if whole else d[K.rows]
        F = K.factorize(given)
        return F.solve(b), F.logdet(), (K + gh.Diagonal(given)) @ b

    for x, logdet, product in on_threads(3, run):
        np.testing.assert_allclose(x, np.linalg.solve(damped, b), rtol=0, atol=1e-8)
        assert logdet == pytest.approx(np.linalg.slogdet(damped)[1], abs=1e-6)
        np.testing.assert_allclose(product, damped @ b, rtol=0, atol=1e-6)


def test_dampings_that_differ_between_ranks_are_refused():
    def run(comm: Any) -> Any:
        K = compressed("hss", comm=comm)
        with pytest.raises(ArgumentError, match="damping differs between ranks"):
            K.factorize(diagonal() + (comm.rank == 1))

    assert on_threads(2, run) == [None, None]


K = compressed("hss")


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        (lambda: K.factorize(np.ones(N - 1)), ShapeError, rf"damping must have shape \({N},\)"),
        (lambda: K.factorize(np.ones((N, 1))), ShapeError, "damping must be a number or have"),
        (lambda: K.factorize(np.ones(N, int)), DtypeError, "int64"),
        (lambda: K.factorize([1.0] * N), DtypeError, "list"),
        (lambda: K.factorize(-np.ones(N)), ArgumentError, "damping must be >= 0 everywhere"),
        (lambda: K.factorize(np.full(N, np.nan)), ArgumentError, "NaN"),
        (lambda: K * np.inf, ArgumentError, "must be finite"),
        (lambda: K * "2", TypeError, "unsupported operand|can't multiply"),
        (lambda: K * np.ones(N), TypeError, "does not support ufuncs"),
        (lambda: K + 1, TypeError, "unsupported operand"),
        (lambda: K + K, TypeError, "unsupported operand"),
        (lambda: K + gh.Diagonal(np.ones(N + 1)), ShapeError, "must have shape"),
        (lambda: gh.Diagonal(np.eye(3)), ShapeError, r"d must have shape \(N,\), got \(3, 3\)"),
        (lambda: gh.Diagonal(np.array([1.0, np.nan])), ArgumentError, "NaN"),
        (lambda: gh.Diagonal([1.0, 2.0]), DtypeError, "list"),
    ],
)
def test_what_cannot_be(what: Any, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        what()


@pytest.mark.parametrize("scheme", EXACT)
def test_not_positive_definite_with_a_damping_for_every_row(scheme: str):
    shift = np.where(np.arange(N) == 40, 50.0, 0.0)
    S = compressed(scheme) + gh.Diagonal(-shift)
    with pytest.raises(NotPositiveDefiniteError, match="with the damping of every row") as caught:
        S.factorize(np.full(N, 0.5))
    S.factorize(0.5 + caught.value.damping)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_diagonal_operator(dtype: Any):
    d = diagonal().astype(dtype)
    op = gh.Diagonal(d)
    check_operator(op, np.diag(d))
    assert op.definite
    assert not gh.Diagonal(-d).definite
    check_operator(gh.Diagonal(-d), np.diag(-d))


def test_the_diagonal_operator_on_the_device(cupy: ModuleType):
    check_operator(gh.Diagonal(cupy.asarray(diagonal())), np.diag(diagonal()))
    check_operator(gh.Diagonal(diagonal()).to("cuda"), np.diag(diagonal()))


class Rotated(gh.CompressedMatrix):
    """Q K Q^T of a compressed K: a matrix made of another writes what is abstract, no more."""

    def __init__(self, Q: np.ndarray, inner: gh.CompressedMatrix) -> None:
        n = inner.shape[0]
        super().__init__(n, inner.dtype, inner.device, inner.report, inner.owners)
        self._Q, self._inner = Q, inner

    def _matmat(self, v: Any) -> Any:
        return self._Q @ (self._inner @ (self._Q.T @ v))

    def _diagonal(self) -> Any:
        return np.einsum("ij,ji->i", self._Q, self._inner @ self._Q.T)

    def _times(self, number: float) -> Any:
        return Rotated(self._Q, self._inner * number)

    def _plus(self, rows: Any) -> Any:
        raise ArgumentError("a diagonal is none in another basis")

    def factorize(self, damping: Any = 0.0) -> Any:
        return self._inner.factorize(damping)

    def save(self, path: Any) -> None:
        self._inner.save(path)

    ranks = property(lambda self: self._inner.ranks)
    num_stored = property(lambda self: self._inner.num_stored + self._Q.size)
    nbytes = property(lambda self: self._inner.nbytes + self._Q.nbytes)


def test_a_matrix_made_of_another():
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
    R = 2 * Rotated(Q, compressed("hss"))
    want = 2 * Q @ exact_matrix("hss") @ Q.T
    v = np.random.default_rng(1).standard_normal((N, 2))
    for got, exact in (
        (R @ v, want @ v),
        (v.T @ R, v.T @ want),
        (R.to_dense(), want),
        (R.diagonal(), np.diagonal(want)),
    ):
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-6)
    assert R.trace() == pytest.approx(np.trace(want))
    assert R.storage_fraction > 1
    assert repr(R).startswith(f"Rotated({N} x {N}, float64, cpu, ")
    x, info = gh.cg(R, v, damping=1.0)
    assert info.converged
    np.testing.assert_allclose(want @ x + x, v, rtol=0, atol=1e-5)
    with pytest.raises(ArgumentError, match="another basis"):
        R + gh.Diagonal(diagonal())

"""Any matrix, any size, any tree: the whole way checked against dense linear algebra."""

import threading
import warnings
from typing import Any

import dense_oracles
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr.errors import AccuracyWarning
from gpu_hodlr.operators.operator import Runs

SAMPLERS = ("entries", "products+entries", "products")


class InRuns(gh.DenseOperator):
    """A dense matrix with given natural runs."""

    def __init__(self, array: np.ndarray, lengths: list[int]) -> None:
        super().__init__(array)
        permutation = np.random.default_rng(len(array)).permutation(len(array))
        self._runs = Runs(permutation, np.cumsum([0, *lengths[:-1]]))

    def runs(self) -> Runs:
        return self._runs


def spd(n: int, rank: int, zeros: int) -> np.ndarray:
    """Rank `rank` plus 0.1 I, the first `zeros` rows and columns diagonal."""
    rng = np.random.default_rng((n, rank))
    factor = rng.standard_normal((n, rank))
    factor[:zeros] = 0
    return factor @ factor.T + 0.1 * np.eye(n)


def check(K: gh.HSSMatrix, exact: np.ndarray, rtol: float) -> None:
    """The promise, the product, the solution, the determinant and the square root."""
    n = len(exact)
    dense = K.to_dense()
    assert dense_oracles.frobenius_error(dense, exact) <= 3 * rtol + 1e-13
    assert sorted(K.tree.permutation) == list(range(n))
    b = np.random.default_rng(n).standard_normal((n, 2))
    np.testing.assert_allclose(K @ b, dense @ b, rtol=0, atol=1e-11 * np.abs(exact).max())
    F = K.factorize(0.2)
    A = dense + 0.2 * np.eye(n)
    assert dense_oracles.backward_error(A, F.solve(b), b) <= 1e-13
    assert F.logdet() == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-9, abs=1e-9)
    back = F.sqrt_matmat(F.sqrt_matmat(b, transpose=True))
    np.testing.assert_allclose(back, A @ b, rtol=0, atol=1e-11 * np.abs(A).max())
    np.testing.assert_allclose(F.sqrt_solve(F.sqrt_matmat(b)), b, rtol=0, atol=1e-9)


@given(
    n=st.integers(2, 70),
    leaf_size=st.integers(1, 20),
    rank=st.integers(0, 12),
    zeros=st.integers(0, 30),
    sampler=st.sampled_from(SAMPLERS),
    ordering=st.sampled_from(["natural", "random", "gram", "angle"]),
)
@settings(max_examples=150)
@example(n=2, leaf_size=1, rank=0, zeros=0, sampler="entries", ordering="natural")
@example(n=3, leaf_size=1, rank=12, zeros=1, sampler="products", ordering="random")
@example(n=65, leaf_size=1, rank=12, zeros=30, sampler="products", ordering="natural")
def test_any_shape(n: int, leaf_size: int, rank: int, zeros: int, sampler: str, ordering: str):
    exact = spd(n, rank, min(zeros, n))
    options: dict[str, Any] = {"leaf_size": leaf_size, "sampler": sampler, "ordering": ordering}
    check(gh.compress(exact, rtol=1e-9, **options), exact, 1e-9)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=14),
    leaf_size=st.integers(1, 20),
    rank=st.integers(0, 6),
    sampler=st.sampled_from(SAMPLERS),
)
@settings(max_examples=100)
def test_leaves_of_any_size(lengths: list[int], leaf_size: int, rank: int, sampler: str):
    """Unequal and empty leaves: padding everywhere."""
    exact = spd(sum(lengths), rank, 3)
    op = InRuns(exact, lengths)
    K = gh.compress(op, rtol=1e-9, leaf_size=leaf_size, sampler=sampler, ordering="natural")
    check(K, exact, 1e-9)


@given(n=st.integers(2, 60), leaf_size=st.integers(1, 20), max_rank=st.integers(1, 5))
@settings(max_examples=40)
def test_any_cap(n: int, leaf_size: int, max_rank: int):
    """A capped matrix is still a symmetric matrix whose error is reported."""
    exact = dense_oracles.random_spd(n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gh.errors.RankCapWarning)
        K = gh.compress(exact, rtol=1e-6, leaf_size=leaf_size, max_rank=max_rank)
    assert all(max(ranks) <= max_rank for ranks in K.ranks)
    error = dense_oracles.frobenius_error(K.to_dense(), exact)
    assert error <= 3e-6 or K.report.rank_cap_hit
    assert error / 3 - 1e-14 <= K.report.error <= 3 * error + 1e-14
    assert np.abs(K.to_dense() - K.to_dense().T).max() < 1e-13


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tolerance_zero_gives_all_there_is(sampler: str):
    exact = toeplitz(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)  # rounding exceeds 0
        K = gh.compress(exact, rtol=0.0, leaf_size=10, sampler=sampler)
    assert dense_oracles.frobenius_error(K.to_dense(), exact) < 1e-12


def test_from_many_threads():
    """Products and solves of one matrix from several threads at once."""
    K = gh.compress(toeplitz(300), rtol=1e-6, leaf_size=20)
    F = K.factorize(0.1)
    vectors = np.random.default_rng(0).standard_normal((6, 300, 2))
    want = [(K @ v, F.solve(v)) for v in vectors]
    got: dict[int, Any] = {}

    def work(i: int) -> None:
        got[i] = [(K @ vectors[i], F.solve(vectors[i])) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for i, pair in enumerate(want):
        for product, solution in got[i]:
            np.testing.assert_array_equal(product, pair[0])
            np.testing.assert_array_equal(solution, pair[1])

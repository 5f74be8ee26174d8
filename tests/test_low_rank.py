"""The global low-rank form against dense matrices: promise, product, factor, files, bad input."""

from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import entries_only, products_only

import gpu_hodlr as gh
from gpu_hodlr.devices import device_of, to_host
from gpu_hodlr.errors import (
    AccuracyWarning,
    ArgumentError,
    FileFormatError,
    NotPositiveDefiniteError,
    RankCapWarning,
)

FLOOR = {np.dtype(np.float64): 1e-13, np.dtype(np.float32): 2e-6}


def decaying(n: int = 300, decay: float = 0.9, seed: int = 0) -> np.ndarray:
    """Eigenvalues decay^k, random eigenvectors."""
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    exact = (Q * decay ** np.arange(n)) @ Q.T
    return (exact + exact.T) / 2


def lowest_rank(exact: np.ndarray, rtol: float) -> int:
    """The smallest rank any matrix within rtol has (Eckart, Young)."""
    squares = np.linalg.eigvalsh(exact)[::-1] ** 2
    tails = np.sqrt(np.cumsum(squares[::-1])[::-1] / squares.sum())
    return int(np.argmax(tails <= rtol))


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-5])
def test_promise(rtol: float, xp: ModuleType, dtype: Any):
    """The measured error is true, and the rank is little above the smallest there is."""
    exact = decaying()
    op = gh.DenseOperator(xp.asarray(exact.astype(dtype)))
    K = gh.compress(op, "lowrank", rtol=rtol)
    assert isinstance(K, gh.LowRankMatrix)
    assert (K.report.scheme, K.report.sampler) == ("lowrank", "products")
    error = dense_oracles.frobenius_error(to_host(K.to_dense()), exact)
    assert error <= rtol
    assert 0.5 * error <= K.report.error <= 2 * error
    ((rank,),) = K.ranks
    least = lowest_rank(exact, rtol)
    assert least <= rank <= least + 3
    assert K.num_stored == rank * 301
    assert K.tree.depth == 0


def test_product_and_diagonal(xp: ModuleType, dtype: Any):
    exact = decaying(120)
    K = gh.compress(gh.DenseOperator(xp.asarray(exact.astype(dtype))), "lowrank", rtol=1e-5)
    assert K.device == device_of(K.diagonal())
    dense = to_host(K.to_dense())
    v = np.random.default_rng(1).standard_normal((120, 3)).astype(dtype)
    atol = 100 * FLOOR[np.dtype(dtype)]
    np.testing.assert_allclose(to_host(K @ xp.asarray(v)), dense @ v, rtol=0, atol=atol)
    np.testing.assert_allclose(to_host(K.diagonal()), np.diagonal(dense), rtol=0, atol=atol)
    assert K.trace() == pytest.approx(np.trace(dense), rel=1e-5)


@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_factor(damping: float, xp: ModuleType, dtype: Any):
    """Solve, log-determinant and square root against the dense matrix it approximates."""
    exact = decaying(150)
    K = gh.compress(gh.DenseOperator(xp.asarray(exact.astype(dtype))), "lowrank", rtol=1e-4)
    F = K.factorize(damping)
    damped = to_host(K.to_dense()).astype(np.float64) + damping * np.eye(150)
    eps = float(np.finfo(dtype).eps)
    b = np.random.default_rng(2).standard_normal((150, 4)).astype(dtype)
    want = np.linalg.solve(damped, b)
    atol = 1e3 * eps * np.linalg.cond(damped) * np.abs(want).max()
    np.testing.assert_allclose(to_host(F.solve(xp.asarray(b))), want, rtol=0, atol=atol)
    assert F.logdet() == pytest.approx(np.linalg.slogdet(damped)[1], rel=1e4 * eps)
    unit = xp.eye(150, dtype=dtype)
    W, back = to_host(F.sqrt_matmat(unit)), to_host(F.sqrt_matmat(unit, transpose=True))
    np.testing.assert_allclose(W @ back, damped, rtol=0, atol=1e3 * eps * np.linalg.norm(damped, 2))
    for transpose in (False, True):
        there = F.sqrt_matmat(xp.asarray(b), transpose=transpose)
        again = to_host(F.sqrt_solve(there, transpose=transpose))
        np.testing.assert_allclose(again, b, rtol=0, atol=1e3 * eps * np.linalg.cond(damped))
    assert F.sample(3, 1).shape == F.sample(3, 1, inverse=True).shape == (150, 3)
    assert F.nbytes == K.ranks[0][0] * np.dtype(dtype).itemsize


def test_samples_have_the_covariance():
    K = gh.compress(decaying(20, 0.7), "lowrank", rtol=1e-2)
    F = K.factorize(0.1)
    for inverse in (False, True):
        x = F.sample(60_000, 3, inverse=inverse)
        damped = K.to_dense() + 0.1 * np.eye(20)
        want = np.linalg.inv(damped) if inverse else damped
        np.testing.assert_allclose(x @ x.T / 60_000, want, rtol=0, atol=0.05 * np.abs(want).max())


def test_damping_zero_needs_full_rank():
    """A matrix whose every eigenvalue is kept can be solved as it is."""
    exact = decaying(40, 0.8)
    full = gh.compress(exact, "lowrank", rtol=1e-12, max_rank=40)
    assert full.ranks == ((40,),)
    b = np.arange(40.0)
    np.testing.assert_allclose(full.factorize().solve(b), np.linalg.solve(exact, b), rtol=1e-6)
    assert full.factorize().logdet() == pytest.approx(np.linalg.slogdet(exact)[1])
    short = gh.compress(exact, "lowrank", rtol=1e-2)
    with pytest.raises(NotPositiveDefiniteError) as failure:
        short.factorize()
    with pytest.warns(AccuracyWarning, match="more than half of damping"):  # it has lost more
        short.factorize(failure.value.damping)
    with pytest.raises(ArgumentError, match="damping"):
        short.factorize(-1.0)


@pytest.mark.parametrize("n", [2, 3, 17, 161])
def test_small_sizes(n: int):
    """Fewer rows than columns of the first sample."""
    exact = decaying(n, 0.8)
    K = gh.compress(exact, "lowrank", rtol=1e-10, max_rank=n)
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 1e-10


def test_zero_matrix_and_exact_low_rank():
    assert gh.compress(np.zeros((30, 30)), "lowrank").ranks == ((0,),)
    V = np.random.default_rng(0).standard_normal((200, 7))
    K = gh.compress(V @ V.T, "lowrank", rtol=1e-12)
    assert K.ranks == ((7,),)
    assert dense_oracles.frobenius_error(K.to_dense(), V @ V.T) <= 1e-12


@pytest.mark.parametrize("power", [-400, 400])
def test_extreme_scales(power: int):
    exact = decaying(60)
    K = gh.compress(np.ldexp(exact, power), "lowrank", rtol=1e-4)
    assert dense_oracles.frobenius_error(np.ldexp(K.to_dense(), -power), exact) <= 1e-4


def test_same_seed_same_bits():
    first, again, other = (
        gh.compress(decaying(), "lowrank", rtol=1e-3, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.structure.U, again.structure.U)
    assert not np.array_equal(first.structure.U, other.structure.U[:, : first.ranks[0][0]])


def test_cap_is_reported():
    with pytest.warns(RankCapWarning, match="max_rank 20 was hit on level 0"):
        K = gh.compress(decaying(decay=0.99), "lowrank", rtol=1e-3, max_rank=20)
    assert K.report.rank_cap_hit
    assert K.ranks == ((20,),)


def test_an_indefinite_matrix_is_refused_with_the_evidence():
    """A direction of negative curvature, from the sketch and from all unit vectors."""
    exact = decaying(80, 0.5) - 0.6 * decaying(80, 0.5, seed=1)
    for max_rank in (30, 60):
        with pytest.raises(NotPositiveDefiniteError, match="not positive semi-definite") as caught:
            gh.compress(exact, "lowrank", rtol=1e-8, max_rank=max_rank)
        p = caught.value.direction
        assert p @ exact @ p / (p @ p) == pytest.approx(caught.value.curvature)
        assert caught.value.curvature < 0


def test_products_only_and_entries_only():
    exact = decaying(64)
    products = gh.compress(products_only(exact), "lowrank", rtol=1e-3)
    assert dense_oracles.frobenius_error(products.to_dense(), exact) <= 1e-3
    with pytest.raises(ArgumentError, match="needs products"):
        gh.compress(entries_only(exact), "lowrank")
    with pytest.raises(ArgumentError, match="needs products"):
        gh.compress(exact, "lowrank", sampler="entries")


def test_storage_dtype_and_astype():
    K = gh.compress(decaying(), "lowrank", rtol=1e-3, storage_dtype=np.float32)
    assert {a.dtype for a in K.structure.arrays()} == {np.dtype(np.float32)}
    assert (K @ np.ones(300)).dtype == np.float64
    assert K.factorize(0.1).solve(np.ones(300)).dtype == np.float64


def test_file(tmp_path: Path):
    K = gh.compress(decaying(), "lowrank", rtol=1e-3)
    K.save(tmp_path / "m.npz")
    again = gh.load(tmp_path / "m.npz")
    assert isinstance(again, gh.LowRankMatrix)
    assert again.report == K.report
    np.testing.assert_array_equal(again.to_dense(), K.to_dense())


CHANGES: dict[str, Any] = {
    "eigenvalues lost": lambda a: a.update(eigenvalues=a["eigenvalues"][1:]),
    "a negative eigenvalue": lambda a: a.update(eigenvalues=-a["eigenvalues"]),
    "no eigenvalue": lambda a: a.update(eigenvalues=np.full_like(a["eigenvalues"], np.nan)),
    "integers": lambda a: a.update(U=a["U"].astype(int)),
    "a stack": lambda a: a.update(U=a["U"][None]),
    "columns lost": lambda a: a.update(U=a["U"][:, 1:], eigenvalues=a["eigenvalues"][1:]),
    "another precision": lambda a: a.update(U=a["U"].astype(np.float32)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_inconsistent_files(change: Any, tmp_path: Path):
    gh.compress(decaying(), "lowrank", rtol=1e-3).save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as f:
        arrays = dict(f)
    change(arrays)
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(FileFormatError):
        gh.load(tmp_path / "m.npz")


def test_every_row_needs_damping():
    """Of a matrix of low rank a row without any is refused, not divided by."""
    factor = np.random.default_rng(0).standard_normal((40, 3))
    K = gh.compress(factor @ factor.T, "lowrank", rtol=1e-8)
    d = np.ones(40)
    d[7] = 0.0
    with pytest.raises(NotPositiveDefiniteError):
        K.factorize(d)
    assert K.factorize(d + 0.1).logdet() < K.factorize(d + 0.2).logdet()


def test_a_diagonal_is_stored_as_well():
    K = gh.compress(np.ones((40, 40)), "lowrank", rtol=1e-8)
    assert (K + gh.Diagonal(np.ones(40))).num_stored == K.num_stored + 40


def test_eigenvalues_of_zero_count_for_nothing(xp: ModuleType):
    """Of 0 K plus a diagonal, whose log-determinant had log(2) for each."""
    K = gh.compress(xp.asarray(decaying(60)), "lowrank", rtol=1e-2)
    d = np.random.default_rng(1).uniform(1, 2, 60)
    F = (0 * K).factorize(xp.asarray(d))
    assert F.logdet() == pytest.approx(np.log(d).sum(), rel=1e-14)
    np.testing.assert_allclose(to_host(F.solve(xp.ones(60))), 1 / d, rtol=1e-14)


def test_the_factor_of_what_is_stored_in_float32(xp: ModuleType):
    """Its eigenvectors are orthonormal to float32 alone: solutions erred as much."""
    K = gh.compress(
        xp.asarray(decaying(200)), "lowrank", rtol=1e-4, max_rank=200, storage_dtype="float32"
    )
    A = K.scale * to_host(K.structure.matmat(xp.eye(200))) + 1e-3 * np.eye(200)
    b = np.random.default_rng(0).standard_normal((200, 2))
    x = to_host(K.factorize(1e-3).solve(xp.asarray(b)))
    assert dense_oracles.backward_error((A + A.T) / 2, x, b) <= 1e-14

"""The whole way on every array library: operator, compression, product, factor, CG, file."""

from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr.devices import device_of, to_host


def vectors(n: int, k: int, dtype: Any) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, k)).astype(dtype)


def rtol_of(dtype: Any) -> float:
    return 1e-6 if dtype == np.float64 else 1e-3


def lives_in(x: Any, xp: ModuleType) -> bool:
    return isinstance(x, xp.ndarray)


def operator(kind: str, n: int, xp: ModuleType, dtype: Any) -> tuple[gh.Operator, np.ndarray]:
    """An operator made of arrays of xp, and its dense float64 form."""
    if kind == "dense":
        exact = toeplitz(n)
        return gh.DenseOperator(xp.asarray(exact.astype(dtype))), exact
    points = np.random.default_rng(3).random((n, 2)).astype(dtype)
    exact = dense_oracles.kernel_matrix(points, "matern52", 0.4, 0.5)
    return gh.KernelOperator(xp.asarray(points), "matern52", 0.4, 0.5), exact


@pytest.mark.parametrize("kind", ["dense", "kernel"])
def test_operators(kind: str, xp: ModuleType, dtype: Any):
    op, exact = operator(kind, 200, xp, dtype)
    v = vectors(200, 3, dtype)
    product = op @ xp.asarray(v)
    assert lives_in(product, xp)
    accuracy = 100 * float(np.finfo(dtype).eps)
    want = exact @ v
    np.testing.assert_allclose(to_host(product), want, rtol=0, atol=accuracy * np.abs(want).max())
    np.testing.assert_allclose(to_host(op.diagonal()), np.diagonal(exact), rtol=accuracy)
    block = op.entries(np.arange(5), np.arange(100, 107))
    np.testing.assert_allclose(to_host(block), exact[:5, 100:107], rtol=0, atol=accuracy)
    np.testing.assert_allclose(to_host(op.to_dense()), exact, rtol=0, atol=accuracy)


@pytest.mark.parametrize("sampler", ["entries", "products+entries", "products"])
@pytest.mark.parametrize("kind", ["dense", "kernel"])
def test_from_operator_to_solution(kind: str, sampler: str, xp: ModuleType, dtype: Any):
    op, exact = operator(kind, 301, xp, dtype)
    rtol = rtol_of(dtype)
    K = gh.compress(op, rtol=rtol, leaf_size=30, sampler=sampler, max_rank=301)
    b = vectors(301, 2, dtype)
    assert K.device == op.device == device_of(K @ xp.asarray(b))
    assert all(lives_in(a, xp) for a in K.structure.arrays())
    dense = to_host(K.to_dense()).astype(np.float64)
    assert dense_oracles.frobenius_error(dense, exact) <= 3 * rtol
    product = K @ xp.asarray(b)
    assert lives_in(product, xp)
    accuracy = 1e-12 if dtype == np.float64 else 1e-4
    want = dense @ b
    np.testing.assert_allclose(to_host(product), want, rtol=0, atol=accuracy * np.abs(want).max())
    damping = 0.25
    F = K.factorize(damping)
    A = dense + damping * np.eye(301)
    x = F.solve(xp.asarray(b))
    assert lives_in(x, xp)
    allowed = 1e-13 if dtype == np.float64 else 1e-6
    assert dense_oracles.backward_error(A, to_host(x), b) <= allowed
    accuracy = 1e-10 if dtype == np.float64 else 1e-3
    assert F.logdet() == pytest.approx(np.linalg.slogdet(A)[1], rel=accuracy, abs=accuracy)
    back = F.sqrt_matmat(F.sqrt_matmat(xp.asarray(b), transpose=True))
    np.testing.assert_allclose(to_host(back), A @ b, rtol=0, atol=accuracy * np.abs(want).max())
    assert lives_in(F.sample(2), xp)
    solution, info = gh.cg(op, xp.asarray(b), damping=damping, M=F, rtol=100 * rtol)
    assert lives_in(solution, xp)
    assert info.converged
    assert info.iterations <= 4


def test_files_do_not_depend_on_the_device(xp: ModuleType, tmp_path: Path):
    K = gh.compress(xp.asarray(toeplitz(100)), leaf_size=10)
    K.save(tmp_path / "m")
    again = gh.load(tmp_path / "m")
    v = vectors(100, 2, np.float64)
    product = to_host(again @ xp.asarray(v)) if again.device == K.device else again @ v
    np.testing.assert_allclose(product, to_host(K @ xp.asarray(v)), rtol=0, atol=1e-13)

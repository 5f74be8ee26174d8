"""The factor in a network's eigenbasis against dense matrices."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from eigenbasis_cases import CASES, operator
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import AccuracyWarning, InexactError, NotPositiveDefiniteError
from gpu_hodlr.factor.vecchia import vecchia

RELATIVE = 0.1  # damping, of the mean diagonal


def compressed(name: str, rtol: float = 1e-4, **options: Any) -> tuple[Any, np.ndarray, float]:
    """A matrix, it and its damping as a dense matrix, and the damping."""
    K = gh.compress(operator(name, **options), "kfe", rtol=rtol)
    damping = RELATIVE * K.trace() / K.shape[0]
    return K, to_host(K.to_dense()).astype(np.float64) + damping * np.eye(K.shape[0]), damping


@pytest.mark.parametrize("name", CASES)
def test_solve_determinant_and_square_root(name: str):
    """W W^T is the matrix, and all else follows from it."""
    K, A, damping = compressed(name)
    F = K.factorize(damping)
    n = len(A)
    eye = np.eye(n)
    b = np.random.default_rng(0).standard_normal((n, 3))
    x = F.solve(b)
    assert F.info.converged
    assert F.residual <= 1e-9
    np.testing.assert_allclose(x, np.linalg.solve(A, b), rtol=0, atol=1e-8 * abs(x).max())
    W = F.sqrt_matmat(eye)
    np.testing.assert_allclose(W @ W.T, A, rtol=0, atol=1e-9 * abs(A).max())
    np.testing.assert_allclose(F.sqrt_matmat(eye, transpose=True), W.T, rtol=0, atol=1e-8)
    inverse = F.sqrt_solve(eye)
    np.testing.assert_allclose(inverse @ W, eye, rtol=0, atol=1e-7)
    turned = F.sqrt_solve(eye, transpose=True)
    np.testing.assert_allclose(turned, inverse.T, rtol=0, atol=1e-7 * abs(inverse).max())
    exact = np.linalg.slogdet(A)[1]
    assert abs(F.logdet() - exact) <= 4 * F.logdet_error + 1e-8 * abs(exact)
    assert F.logdet_error <= 0.05 * n


def test_on_every_library(xp: ModuleType, dtype: Any):
    K, A, damping = compressed(
        "classifier", 1e-3, dtype=dtype, device="cpu" if xp is np else "cuda"
    )
    F = K.factorize(damping)
    b = np.random.default_rng(0).standard_normal((len(A), 2)).astype(dtype)
    x = F.solve(xp.asarray(b))
    assert isinstance(x, xp.ndarray)
    assert x.dtype == dtype
    atol = (1e-8 if dtype == np.float64 else 1e-3) * abs(to_host(x)).max()
    np.testing.assert_allclose(to_host(x), np.linalg.solve(A, b), rtol=0, atol=atol)
    samples = F.sample(5, seed=1)
    assert samples.shape == (len(A), 5)
    assert abs(F.logdet() - np.linalg.slogdet(A)[1]) <= 4 * F.logdet_error + 1e-2


@pytest.mark.parametrize("inverse", [False, True])
def test_samples_have_the_covariance(inverse: bool):
    K, A, damping = compressed("few outputs")
    samples = K.factorize(damping).sample(20_000, seed=3, inverse=inverse)
    want = np.linalg.inv(A) if inverse else A
    got = samples @ samples.T / samples.shape[1]
    assert np.linalg.norm(got - want) <= 0.2 * np.linalg.norm(want)


@pytest.mark.parametrize("name", ["autoencoder", "classifier"])
def test_it_preconditions_the_exact_matrix(name: str):
    """With the exact operator, in far fewer iterations than plain CG."""
    op = operator(name)
    K, _, damping = compressed(name, 1e-3)
    F = K.factorize(damping)
    b = np.random.default_rng(1).standard_normal(op.shape[0])
    plain = gh.cg(op, b, damping=damping, maxiter=1000)[1].iterations
    x, info = gh.cg(op, b, damping=damping, M=F, maxiter=1000)
    assert info.converged
    assert 3 * info.iterations <= plain
    np.testing.assert_allclose(op @ x + damping * x, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("neighbours", "head"), [(0, 0), (3, 0), (3, 20), (40, 0), (5, 10_000)])
def test_the_inverse_is_positive_definite_by_construction(neighbours: int, head: int):
    """For every pattern and damping, exact with all neighbours or the whole head."""
    for name in ("autoencoder", "classifier"):
        form = gh.compress(operator(name), "kfe", rtol=1e-3).structure
        M = form.basis.size
        for damping in (1e-6, 1e-2, 10.0):
            N = vecchia(form, damping, neighbours, head).half(np.eye(M))
            factor = vecchia(form, damping, neighbours, head)
            np.testing.assert_allclose(factor.half_transposed(np.eye(M)), N.T, rtol=0, atol=1e-12)
            assert np.linalg.eigvalsh(N.T @ N)[0] > 0
            logdet = -2 * np.linalg.slogdet(N)[1]
            assert factor.logdet == pytest.approx(logdet, rel=1e-9)
            exact = form.core(np.eye(M)) + damping * np.eye(M)
            if head >= M and np.linalg.eigvalsh(exact)[0] > 0:
                np.testing.assert_allclose(N @ exact @ N.T, np.eye(M), rtol=0, atol=1e-9)


def test_more_neighbours_are_nearer_to_the_inverse():
    form = gh.compress(operator("classifier"), "kfe", rtol=1e-3, max_rank=1).structure
    exact = form.core(np.eye(form.basis.size))
    damping = 0.1 * np.trace(exact) / len(exact)
    exact += damping * np.eye(len(exact))
    conditions = []
    for neighbours in (0, 5, 20, 60):
        N = vecchia(form, damping, neighbours, 0).half(np.eye(len(exact)))
        conditions.append(np.linalg.cond(N @ exact @ N.T))
    assert all(b < 0.9 * a for a, b in pairwise(conditions))


def test_a_low_rank_part_is_inverted_exactly(monkeypatch: pytest.MonkeyPatch):
    """Woodbury: what is low rank costs no iterations."""
    from gpu_hodlr.schemes import kfe

    monkeypatch.setattr(kfe, "_SPARSE", 0)
    K = gh.compress(operator("classifier"), "kfe", rtol=1e-3, max_rank=60)
    assert K.ranks[0][0] > 5
    damping = 0.1 * K.trace() / K.shape[0]
    A = K.to_dense() + damping * np.eye(K.shape[0])
    F = K.factorize(damping)
    b = np.ones(len(A))
    np.testing.assert_allclose(F.solve(b), np.linalg.solve(A, b), rtol=0, atol=1e-7)
    assert abs(F.logdet() - np.linalg.slogdet(A)[1]) <= 4 * F.logdet_error + 1e-7


def test_a_damping_below_what_the_matrix_bears_is_refused():
    """At rtol 0.1 the compressed matrix has negative eigenvalues; a larger damping does."""
    K = gh.compress(operator("classifier"), "kfe", rtol=1e-1)
    lowest = np.linalg.eigvalsh(K.to_dense())[0]
    assert lowest < 0
    with pytest.raises(NotPositiveDefiniteError) as error:
        K.factorize(-0.5 * lowest)
    F = K.factorize(-0.5 * lowest, shift="auto")
    assert F.damping == error.value.damping
    assert F.shifted == F.damping + 0.5 * lowest
    assert np.linalg.eigvalsh(K.to_dense())[0] + F.damping > 0


def test_without_damping_a_singular_matrix_is_refused():
    with pytest.raises(NotPositiveDefiniteError):
        gh.compress(operator("autoencoder"), "kfe", rtol=1e-6).factorize(0.0)


def test_a_damping_of_every_row_is_refused_by_name():
    K, _, damping = compressed("classifier")
    with pytest.raises(InexactError, match="user's order"):
        K.factorize(np.full(K.shape[0], damping))


def test_too_few_iterations_are_warned_of():
    K, _, damping = compressed("classifier", 1e-6)
    F = K.factorize(damping, neighbours=2, head=0)
    with pytest.warns(AccuracyWarning, match="iterations"):
        F.solve(np.ones(K.shape[0]), maxiter=2)


def test_a_matrix_stored_in_float32_is_solved_in_float64():
    """The basis was orthonormal to float32 alone."""
    K = gh.compress(operator("classifier"), "kfe", rtol=1e-5, storage_dtype="float32")
    damping = RELATIVE * K.trace() / K.shape[0]
    F = K.factorize(damping)
    b = np.ones(K.shape[0])
    x = F.solve(b)
    assert F.residual <= 1e-9
    assert np.linalg.norm(K @ x + damping * x - b) <= 1e-4 * np.linalg.norm(b)


def test_right_hand_sides_of_any_size():
    """Squares of which leave the range of float64: the residual is that of others."""
    K, _, damping = compressed("classifier")
    F, b = K.factorize(damping), np.ones((K.shape[0], 2))
    for size in (1e-200, 1e200):
        x = F.solve(size * b)
        assert 0 < F.residual <= 1e-9
        np.testing.assert_allclose(x / size, F.solve(b), rtol=1e-7)


def test_files(tmp_path: Path):
    """A loaded factor solves to the same bits, and says the same."""
    K, _, damping = compressed("classifier")
    F = K.factorize(damping)
    F.save(tmp_path / "F.npz")
    again = gh.load(tmp_path / "F.npz")
    b = np.random.default_rng(0).standard_normal((K.shape[0], 2))
    np.testing.assert_array_equal(again.solve(b), F.solve(b))
    np.testing.assert_array_equal(again.precondition(b), F.precondition(b))
    assert again.logdet() == F.logdet()
    assert again.damping == damping


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_have_the_same_bits(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from gpu_hodlr.schemes import kfe

    monkeypatch.setattr(kfe, "_A_PART", 40)
    op = operator("autoencoder")  # which has no low-rank part: its sums depend on the ranks
    b = np.random.default_rng(0).standard_normal((op.shape[0], 2))

    def job(comm: Any) -> Any:
        K = gh.compress(op, "kfe", rtol=1e-4, comm=comm)
        F = K.factorize(0.01)
        F.save(tmp_path / "F.npz")
        again = gh.load(tmp_path / "F.npz", comm=comm)
        return F.solve(b), again.solve(b), F.logdet(), F.sample(2, seed=1), F.residual

    one = job(None)
    for result in on_threads(size, job):
        assert isinstance(result, tuple), result
        for mine, alone in zip(result[:4], one[:4], strict=True):
            np.testing.assert_array_equal(mine, alone)
        assert result[4] == pytest.approx(one[4], rel=1e-3)

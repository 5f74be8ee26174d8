"""The factor in a network's eigenbasis against dense matrices."""

from __future__ import annotations

import importlib
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
from gpu_hodlr.errors import (
    AccuracyWarning,
    ArgumentError,
    DtypeError,
    NotPositiveDefiniteError,
    ShapeError,
)
from gpu_hodlr.factor import vecchia_entries
from gpu_hodlr.factor.eigenbasis_frame import Everywhere, Inside
from gpu_hodlr.factor.vecchia import vecchia
from gpu_hodlr.factor.vecchia_pattern import Pattern
from gpu_hodlr.structures import dealt_rows

module = importlib.import_module("gpu_hodlr.factor.vecchia")
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
    samples = K.factorize(damping).sample(5_000, seed=3, inverse=inverse)
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
            N = vecchia(form, damping, Pattern(0, neighbours, head)).half(np.eye(M))
            factor = vecchia(form, damping, Pattern(0, neighbours, head))
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
        N = vecchia(form, damping, Pattern(0, neighbours, 0)).half(np.eye(len(exact)))
        conditions.append(np.linalg.cond(N @ exact @ N.T))
    assert all(b < 0.9 * a for a, b in pairwise(conditions))


# --- what it stores ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["autoencoder", "classifier"])
def test_a_larger_budget_takes_fewer_iterations(name: str):
    """What is stored stays within it, and head and neighbours grow with it."""
    op = operator(name)
    K, _, damping = compressed(name, 1e-3)
    N, b = K.shape[0], np.ones(K.shape[0])
    iterations, sizes = [], []
    for share in (0.02, 0.05, 0.15, 0.5):
        F = K.factorize(damping, storage_fraction=share)
        assert F.num_stored <= share * N**2
        sizes.append(F._vecchia.head)
        iterations.append(gh.cg(op, b, damping=damping, M=F, maxiter=500)[1].iterations)
    assert iterations[0] > iterations[-1]
    assert all(b <= a + 1 for a, b in pairwise(iterations))
    assert sizes == sorted(sizes)
    assert K.factorize(damping).num_stored <= K.num_stored


def test_a_budget_too_small_for_anything_leaves_the_diagonal():
    K, _, damping = compressed("classifier", 1e-3)
    F = K.factorize(damping, storage_fraction=0.0)
    assert (F._vecchia.head, F._vecchia.L.entries()) == (0, F._vecchia.L.size)
    x = F.solve(np.ones(K.shape[0]))
    np.testing.assert_allclose(K @ x + damping * x, 1.0, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["storage_fraction", "neighbours", "head"])
def test_bad_sizes_are_named(name: str):
    K, _, damping = compressed("classifier", 1e-1)
    with pytest.raises(ArgumentError, match=name):
        K.factorize(damping, **{name: -1})


def low_rank_form(**options: Any) -> Any:
    """A matrix with a low-rank part."""
    K = gh.compress(operator("larger classifier", **options), "kfe", rtol=1e-4, max_rank=200)
    assert K.ranks[0][0] > 5
    return K


def test_a_damping_of_every_row_on_every_library(xp: ModuleType, dtype: Any):
    """With a low-rank part for which there is no room."""
    device = "cpu" if xp is np else "cuda"
    K = low_rank_form(dtype=dtype, device=device)
    d = np.random.default_rng(1).uniform(0.2, 0.6, K.shape[0]).astype(dtype)
    F = K.factorize(xp.asarray(d), storage_fraction=0.1)
    A = to_host(K.to_dense()).astype(np.float64) + np.diag(d)
    x, want = F.solve(xp.ones(len(d), dtype)), np.linalg.solve(A, np.ones(len(d)))
    assert isinstance(x, xp.ndarray)
    atol = (1e-8 if dtype == np.float64 else 1e-3) * abs(want).max()
    np.testing.assert_allclose(to_host(x), want, rtol=0, atol=atol)
    assert abs(F.logdet() - np.linalg.slogdet(A)[1]) <= 4 * F.logdet_error + 1e-2


@pytest.mark.slow
def test_what_there_is_no_room_for_of_a_low_rank_part_is_in_the_entries(
    monkeypatch: pytest.MonkeyPatch,
):
    """With all neighbours the inverse is exact; those of a sparse rest are its entries alone."""
    monkeypatch.setattr(vecchia_entries, "_WEAK", 0.0)
    form = low_rank_form().structure
    M, damping = form.basis.size, 0.1
    exact = form.core(np.eye(M)) + damping * np.eye(M)
    rank = len(form.C)
    for kept in (0, 3, rank):
        pattern = Pattern(4 * kept * M, neighbours=M, head=5, whole=kept == rank)
        factor = vecchia(form, damping, pattern)
        assert len(factor.w) == kept
        tolerance = 1e-3 if kept == rank else 1e-8
        N = factor.half(np.eye(M))
        np.testing.assert_allclose(N @ exact @ N.T, np.eye(M), rtol=0, atol=tolerance)
        assert factor.logdet == pytest.approx(np.linalg.slogdet(exact)[1], rel=tolerance)


def test_a_negative_low_rank_part():
    """Of -K, whose square roots there are none of."""
    K = -low_rank_form()
    damping = -1.5 * np.linalg.eigvalsh(K.to_dense())[0]
    check_against_dense(K.factorize(damping), K.to_dense() + damping * np.eye(K.shape[0]))


def test_a_low_rank_part_is_inverted_exactly():
    """Woodbury: what is low rank costs no iterations."""
    K = low_rank_form()
    damping = 0.1 * K.trace() / K.shape[0]
    A = K.to_dense() + damping * np.eye(K.shape[0])
    F = K.factorize(damping)
    b = np.ones(len(A))
    want = np.linalg.solve(A, b)
    np.testing.assert_allclose(F.solve(b), want, rtol=0, atol=1e-9 * abs(want).max())
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


def by_layers(op: Any, numbers: Any) -> np.ndarray:
    """One number for the parameters of every layer, in the user's order."""
    sizes = [layer.size for layer in gh.compress(op, "kfe", rtol=0.5).structure.basis.layers]
    return np.repeat(np.resize(np.array(numbers), len(sizes)), sizes)


def check_against_dense(F: Any, A: np.ndarray) -> None:
    """Solve, square root and determinant of a factor of A."""
    n = len(A)
    b = np.random.default_rng(0).standard_normal((n, 3))
    want = np.linalg.solve(A, b)
    np.testing.assert_allclose(F.solve(b), want, rtol=0, atol=1e-8 * abs(want).max())
    assert F.info.converged
    assert F.residual <= 1e-9
    W = F.sqrt_matmat(np.eye(n))
    np.testing.assert_allclose(W @ W.T, A, rtol=0, atol=1e-8 * abs(A).max())
    np.testing.assert_allclose(F.sqrt_matmat(np.eye(n), transpose=True), W.T, rtol=0, atol=1e-8)
    np.testing.assert_allclose(F.sqrt_solve(W), np.eye(n), rtol=0, atol=1e-7)
    exact = np.linalg.slogdet(A)[1]
    assert abs(F.logdet() - exact) <= 4 * F.logdet_error + 1e-8 * abs(exact)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("added", [False, True])
def test_a_damping_of_every_row(name: str, added: bool):
    """Also where it is a diagonal of the matrix: all is of K + diag(d), whatever N leaves out."""
    op = operator(name)
    K, _, damping = compressed(name)
    d = damping * np.random.default_rng(3).uniform(0.3, 3.0, K.shape[0])
    F = (K + gh.Diagonal(d)).factorize() if added else K.factorize(d)
    check_against_dense(F, K.to_dense() + np.diag(d))
    exact = gh.DenseOperator(op.to_dense() + np.diag(d))
    plain = gh.cg(exact, np.ones(len(d)), maxiter=2000)[1].iterations
    info = gh.cg(exact, np.ones(len(d)), M=F, maxiter=2000)[1]
    assert info.converged
    assert info.iterations <= plain / 2 or info.iterations <= 10


@pytest.mark.parametrize("name", ["autoencoder", "few outputs", "one layer"])
def test_a_number_beside_a_diagonal(name: str):
    """All is of K + E + damping I, and what is left of the eigenbasis is inverted at once."""
    K, _, damping = compressed(name)
    d = damping * np.random.default_rng(3).uniform(0.3, 3.0, K.shape[0])
    F = (K + gh.Diagonal(d)).factorize(damping)
    check_against_dense(F, K.to_dense() + np.diag(d + damping))
    frame, eye = F._frame, np.eye(K.shape[0])
    assert isinstance(frame, Everywhere)
    N = frame.half(eye)
    np.testing.assert_allclose(frame.half_transposed(eye), N.T, rtol=0, atol=1e-10 * abs(N).max())
    want = N.T @ N
    np.testing.assert_allclose(frame.precondition(eye), want, rtol=0, atol=1e-10 * abs(want).max())
    near = K.to_dense() + np.diag(d + damping)
    assert np.linalg.cond(N @ near @ N.T) < 4  # d is from 1.3 to 4 times the damping


@pytest.mark.parametrize("name", CASES)
def test_a_damping_of_every_layer_is_as_good_as_a_number(name: str):
    """It is diagonal in the eigenbasis: the iterations stay there, and are as few."""
    op = operator(name)
    K, _, damping = compressed(name)
    d = by_layers(op, [damping, 3 * damping, 2 * damping])
    F = K.factorize(d)
    check_against_dense(F, K.to_dense() + np.diag(d))
    assert isinstance(F._frame, Inside)
    assert F.info.iterations <= number_of_iterations(K, damping) + 2
    np.testing.assert_array_equal(F.damping, d)


def number_of_iterations(K: Any, damping: float) -> int:
    F = K.factorize(damping)
    F.solve(np.random.default_rng(0).standard_normal((K.shape[0], 3)))
    iterations: int = F.info.iterations
    return iterations


def test_one_number_for_every_row_is_that_number():
    K, _, damping = compressed("frozen outputs")
    d, b = np.full(K.shape[0], damping), np.ones(K.shape[0])
    np.testing.assert_allclose(K.factorize(d).solve(b), K.factorize(damping).solve(b), rtol=1e-9)
    assert K.factorize(d).logdet() == pytest.approx(K.factorize(damping).logdet(), rel=1e-9)


def test_a_damping_of_every_row_that_does_not_do():
    """A row without damping in the null space is refused; shift="auto" raises all rows."""
    K, _, damping = compressed("autoencoder", 1e-6)
    d = np.full(K.shape[0], damping)
    d[: K.shape[0] // 2] = 0.0
    with pytest.raises(NotPositiveDefiniteError):
        K.factorize(d)
    F = K.factorize(d, shift="auto")
    assert F.shifted > 0
    np.testing.assert_allclose(F.damping, d + F.shifted, rtol=1e-12)
    assert np.linalg.eigvalsh(K.to_dense() + np.diag(F.damping))[0] > 0


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


@pytest.mark.parametrize(("name", "steps"), [("autoencoder", 7), ("classifier", 2)])
def test_a_determinant_takes_few_products_of_random_signs(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch
):
    """As many of the one as of the other; no more products once the logarithms stay."""
    K, _, damping = compressed(name)
    F = K.factorize(damping)
    seen, multiply = [], F._near_identity
    monkeypatch.setattr(F, "_near_identity", lambda c: seen.append(c) or multiply(c))
    F.logdet(probes=16)
    M = K.structure.basis.size
    np.testing.assert_allclose(abs(seen[0]), np.full((M, 16), M**-0.5), rtol=1e-12)
    assert abs(np.sign(seen[0]).sum()) < 4 * (16 * M) ** 0.5
    assert len(seen) <= steps + 2
    F.logdet(probes=2)
    assert 0 < F.logdet_error < np.inf


def test_bad_options_are_refused():
    K, _, damping = compressed("few outputs")
    F, b = K.factorize(damping), np.ones(K.shape[0])
    for options, error, said in (
        ({"maxiter": 0}, ArgumentError, "maxiter"),
        ({"maxiter": 2.5}, DtypeError, "maxiter"),
        ({"rtol": -1.0}, ArgumentError, "rtol"),
        ({"rtol": np.nan}, ArgumentError, "rtol"),
    ):
        with pytest.raises(error, match=said):
            F.solve(b, **options)
    for options, said in (({"probes": 1}, "probes"), ({"seed": -1}, "seed")):
        with pytest.raises(ArgumentError, match=said):
            F.logdet(**options)
    with pytest.raises(ShapeError):
        F.solve(b[1:])


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
@pytest.mark.parametrize("damping", ["a number", "by layers", "by rows"])
@pytest.mark.parametrize("parts", ["one", "many"])
def test_ranks_have_the_same_bits(
    size: int, damping: str, parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The rows of L are dealt out, where they are many; no rank has all of them."""
    if parts == "many":
        monkeypatch.setattr(dealt_rows, "A_PART", 40)
    op = operator("autoencoder")  # which has no low-rank part: its sums depend on the ranks
    b = np.random.default_rng(0).standard_normal((op.shape[0], 2))
    added = {
        "a number": 0.01,
        "by layers": by_layers(op, [0.01, 0.03]),
        "by rows": np.random.default_rng(2).uniform(0.01, 0.02, op.shape[0]),
    }[damping]

    def job(comm: Any) -> Any:
        K = gh.compress(op, "kfe", rtol=1e-4, comm=comm)
        F = K.factorize(added)
        L = F._vecchia.L
        assert L.entries() > len(L.values) or comm is None or parts == "one"
        F.save(tmp_path / "F.npz")
        again = gh.load(tmp_path / "F.npz", comm=comm)
        return F.solve(b), again.solve(b), F.logdet(), F.sample(2, seed=1), F.residual

    one = job(None)
    for result in on_threads(size, job):
        assert isinstance(result, tuple), result
        for mine, alone in zip(result[:4], one[:4], strict=True):
            np.testing.assert_array_equal(mine, alone)
        assert result[4] == pytest.approx(one[4], rel=1e-3)

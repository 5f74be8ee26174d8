"""The factor in a network's eigenbasis against dense matrices."""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
    InexactError,
    NotPositiveDefiniteError,
    ShapeError,
)
from gpu_hodlr.factor.vecchia import vecchia

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


def sparse_part() -> tuple[Any, np.ndarray, float]:
    """A form of few entries, its D + S + S^T as a dense matrix, and a damping that it bears."""
    form = gh.compress(operator("classifier"), "kfe", rtol=1e-3, max_rank=1).structure
    lengths, columns, values = form.all_rows()
    S = np.zeros((form.basis.size,) * 2)
    S[np.repeat(np.arange(len(S)), lengths), columns] = values
    R = np.diag(form.D) + S + S.T
    return form, R, 1e-3 * float(R.max()) - float(np.linalg.eigvalsh(R)[0])


def test_blocks_are_principal_submatrices():
    form, R, damping = sparse_part()
    entries = module._Entries(form, damping)
    index = np.random.default_rng(0).permuted(np.tile(np.arange(len(R)), (7, 1)), axis=1)[:, :9]
    index[2, 4:] = index[3] = -1
    A = R + damping * np.eye(len(R))
    for got, rows in zip(entries.blocks(index), index, strict=True):
        real = rows >= 0
        want = np.eye(9)
        want[np.ix_(real, real)] = A[np.ix_(rows[real], rows[real])]
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("head", [0, 12])
def test_neighbours_are_the_most_correlated_of_larger_diagonal(
    head: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_TOGETHER", 100)  # entries, as of a large matrix
    form, R, damping = sparse_part()
    entries, count = module._Entries(form, damping), 4
    scale = np.sqrt(np.diagonal(R) + damping)
    order = np.argsort(-entries.diagonal)
    place = np.argsort(order)
    found = module._neighbours(entries, place, count, head)
    assert found.shape == (len(R) - head, count)
    strength = abs(R) / np.outer(scale, scale)
    used = 0
    for row, neighbours in zip(order[head:], found, strict=True):
        earlier = order[: place[row]]
        earlier = earlier[strength[row, earlier] > 3e-3]
        want = earlier[np.argsort(-strength[row, earlier])][:count].tolist()
        assert neighbours.tolist() == want + [-1] * (count - len(want))
        used += len(want)
    assert used > 2 * len(R)


def test_a_block_that_is_not_positive_definite_is_damped_off_its_diagonal():
    """The largest share of 1, 3/4, 1/2, 1/4 and 0 of it that makes it so."""
    off = np.array([0.9, 1.2, 1.9, 3.9, 50.0])
    blocks = np.stack([np.array([[1.0, x], [x, 1.0]]) for x in off])
    entries = SimpleNamespace(blocks=lambda index: blocks[index[:, 0]])
    got = module._inverse_cholesky(entries, np.arange(5)[:, None])
    for x, share, inverse in zip(off, (1.0, 0.75, 0.5, 0.25, 0.0), got, strict=True):
        scaled = np.array([[1.0, share * x], [share * x, 1.0]])
        np.testing.assert_allclose(inverse @ scaled @ inverse.T, np.eye(2), rtol=0, atol=1e-12)
        assert inverse[0, 1] == 0


@pytest.mark.parametrize("rank", [0, 3])
def test_the_whole_head_is_the_inverse_and_its_determinant(rank: int):
    """With a low-rank part too, which takes half the square root of its own."""
    form, R, damping = sparse_part()
    M = len(R)
    P = np.linalg.qr(np.random.default_rng(0).standard_normal((M, rank)))[0]
    C = np.array([5.0, 2.0, 1.0])[:rank]
    factor = vecchia(replace(form, P=P, C=C), damping, 0, M)
    A = R + damping * np.eye(M) + (P * C) @ P.T
    N = factor.half(np.eye(M))
    np.testing.assert_allclose(N @ A @ N.T, np.eye(M), rtol=0, atol=1e-9)
    np.testing.assert_allclose(factor.apply(A), np.eye(M), rtol=0, atol=1e-8)
    assert factor.logdet == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-10)
    assert factor.X.shape == (M, rank)
    assert len(factor.values) == 0


def without_low_rank() -> tuple[Any, Any]:
    """A form without one, and its factor of 12 rows in the head and 4 neighbours of others."""
    form, _, damping = sparse_part()
    M = form.basis.size
    form = replace(form, P=np.zeros((M, 0)), C=np.zeros(0))
    return form, vecchia(form, damping, 4, 12)


def test_rows_condition_on_those_of_larger_diagonal():
    form, factor = without_low_rank()
    order = np.argsort(-form.D)
    np.testing.assert_array_equal(factor.head, order[:12])
    N = factor.half(np.eye(len(order)))[np.ix_(order, order)]
    np.testing.assert_array_equal(N, np.tril(N))
    assert (np.diagonal(N) > 0).all()
    count = np.count_nonzero(np.tril(N, -1), axis=1)
    assert count[:12].max() == 11
    assert count[12:].max() == 4
    assert factor.nbytes == sum(a.nbytes for a in factor.arrays().values())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("values", lambda a: a.astype(np.float32), "not of type float64"),
        ("values", lambda a: a[:-1], "columns has shape"),
        ("starts", lambda a: a[:-1], "starts has shape"),
        ("starts", lambda a: a + 1, "do not fit its entries"),
        ("starts", lambda a: np.minimum(a, a[-1] - 1), "do not fit its entries"),
        ("starts", lambda a: np.concatenate([a[:1], a[-2:0:-1], a[-1:]]), "do not fit"),
        ("columns", lambda a: np.where(np.arange(len(a)) == 3, -1, a), "outside"),
        ("columns", lambda a: np.where(np.arange(len(a)) == 3, 10**6, a), "outside"),
        ("head", lambda a: a[:-1], "head_rows has shape"),
        ("head", lambda a: np.where(np.arange(len(a)) == 3, -1, a), "outside"),
        ("X", lambda a: a[:-1], "X has shape"),
        ("w", lambda a: np.ones(1), "X has shape"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(name: str, change: Any, said: str):
    form, factor = without_low_rank()
    M = form.basis.size
    factor.check(M, form.dtype)
    broken = replace(factor, **{name: change(getattr(factor, name))})
    with pytest.raises(ValueError, match=said):
        broken.check(M, form.dtype)


@pytest.mark.parametrize("name", ["columns", "head"])
def test_the_first_coordinate_there_is_not_is_refused(name: str):
    form, factor = without_low_rank()
    M, index = form.basis.size, getattr(factor, name).copy()
    for last in (M - 1, M):
        index[0] = last
        broken = replace(factor, **{name: index})
        if last < M:
            broken.check(M, form.dtype)
            continue
        with pytest.raises(ValueError, match="outside"):
            broken.check(M, form.dtype)


@pytest.mark.parametrize(("name", "neighbours"), [("autoencoder", 10), ("classifier", 40)])
def test_what_the_inverse_takes(name: str, neighbours: int):
    """Few neighbours where not all outputs are coupled; a head of a quarter of K at most."""
    K, _, damping = compressed(name, 1e-8)
    F = K.factorize(damping)
    inverse = F._vecchia
    assert np.diff(inverse.starts).max() == neighbours + 1
    head = len(inverse.head)
    assert head**2 / 2 <= K.num_stored / 4 < (head + 1) ** 2 / 2
    assert head < 400
    assert F.nbytes == inverse.nbytes
    assert "head" in repr(F)


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

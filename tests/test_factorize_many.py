"""Many dampings in one call, and the eigenpairs of low rank."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from dense_oracles import backward_error
from inverse_cases import CASES, ON_EVERY, POINTS, N, both_signs, compressed, dense_of
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr import devices
from gpu_hodlr.compressed import fmm_matrix
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import (
    AccuracyWarning,
    ArgumentError,
    DtypeError,
    GpuHodlrError,
    InexactError,
    MemoryEstimateError,
    NotPositiveDefiniteError,
)
from gpu_hodlr.factor import probing, ulv
from gpu_hodlr.factor.ulv_leaves import UncoupledLeaves

DAMPINGS = (2.0, 0.3, 0.7)
quiet = pytest.mark.filterwarnings("ignore::gpu_hodlr.errors.AccuracyWarning")


def same(F: Any, G: Any, dtype: Any = np.float64) -> None:
    """Two factors are equal to rounding, or to what they iterate to."""
    assert type(F) is type(G)
    n, xp = F.shape[0], devices.namespace_on(F.device)
    estimated = isinstance(F, probing.ProbedInverse)
    accuracy = 1e-8 if estimated else 1e-11
    accuracy = accuracy if dtype == np.float64 else 1e-3
    b = xp.asarray(np.random.default_rng(0).standard_normal((n, 2)).astype(dtype))
    pairs = [(F.solve(b), G.solve(b))]
    if hasattr(F, "sqrt_solve"):
        pairs += [(F.sqrt_solve(b), G.sqrt_solve(b)), (F.sqrt_matmat(b), G.sqrt_matmat(b))]
        assert F.logdet() == pytest.approx(G.logdet(), rel=accuracy, abs=accuracy * n)
    if not estimated:
        pairs.append((F.inverse_diagonal(), G.inverse_diagonal()))
    for got, want in pairs:
        got, want = to_host(got), to_host(want)
        np.testing.assert_allclose(got, want, rtol=0, atol=accuracy * np.abs(want).max())
    assert F.nbytes == G.nbytes or estimated
    assert F.residual_bound == pytest.approx(G.residual_bound, rel=0.01)


@quiet
@pytest.mark.parametrize("name", CASES)
def test_each_is_what_factorize_gives(name: str):
    """In the order of the dampings, those of every row among them."""
    K = compressed(name)
    dampings = [*DAMPINGS, np.linspace(0.3, 0.5, K.shape[0])]
    before = [a.copy() for a in K.structure.arrays()]
    factors = K.factorize_many(dampings)
    assert isinstance(factors, list)
    for F, damping in zip(factors, dampings, strict=True):
        same(F, K.factorize(damping))
        np.testing.assert_array_equal(F.damping, damping)
        assert F.shifted == 0.0
    for a, kept in zip(K.structure.arrays(), before, strict=True):
        np.testing.assert_array_equal(a, kept)


@quiet
@pytest.mark.parametrize("name", ["hss", "hodlr", "lowrank, tail"])
def test_on_every_library(name: str, xp: ModuleType, dtype: Any):
    K = compressed(name, xp, dtype)
    for F, damping in zip(K.factorize_many(xp.asarray(DAMPINGS)), DAMPINGS, strict=True):
        same(F, K.factorize(damping), dtype)


@quiet
@pytest.mark.parametrize("name", ON_EVERY)
def test_ranks(name: str):
    """Of every damping the solution of one rank."""
    b = np.random.default_rng(0).standard_normal((compressed(name).shape[0], 2))
    alone = [F.solve(b) for F in compressed(name).factorize_many(DAMPINGS)]

    def job(comm: Any) -> Any:
        return [F.solve(b) for F in compressed(name, comm=comm).factorize_many(DAMPINGS)]

    for size in (2, 3):
        for got in on_threads(size, job):
            assert isinstance(got, list), got
            for x, want in zip(got, alone, strict=True):
                np.testing.assert_allclose(x, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("name", ["hss", "hodlr", "lowrank"])
def test_factors_in_float32_that_are_refined(name: str):
    K = compressed(name)
    for F, damping in zip(K.factorize_many(DAMPINGS, dtype="float32"), DAMPINGS, strict=True):
        G = K.factorize(damping, dtype="float32")
        assert type(F) is type(G)
        assert F.factor.dtype == np.float32
        b = np.ones(N)
        np.testing.assert_allclose(F.solve(b), G.solve(b), rtol=0, atol=1e-12)
    with pytest.raises(DtypeError, match="dtype"):
        K.factorize_many([0.1], dtype="int8")


def test_none_and_one_and_kinds_of_lists():
    K = compressed("hss")
    assert K.factorize_many([]) == []
    (one,) = K.factorize_many(iter([0.3]))
    np.testing.assert_array_equal(one.solve(np.ones(N)), K.factorize(0.3).solve(np.ones(N)))
    torch = pytest.importorskip("torch")
    for F in K.factorize_many(torch.tensor([0.5, 0.5], dtype=torch.float64)):
        same(F, K.factorize(0.5))
    rows = np.random.default_rng(0).uniform(0.2, 0.5, (2, N))
    for F, d in zip(K.factorize_many(rows), rows, strict=True):
        assert backward_error(dense_of(K, d), F.solve(np.ones(N)), np.ones(N)) < 1e-13


@pytest.mark.parametrize("rtol", [1e-2, 1e-12])
def test_wide_and_narrow_bases(rtol: float):
    """Also skeletons wider than a leaf has rows."""
    K = gh.compress(compressed("hss").to_dense(), rtol=rtol, leaf_size=4, ordering="random")
    for F, damping in zip(K.factorize_many(DAMPINGS), DAMPINGS, strict=True):
        same(F, K.factorize(damping))


def test_leaves_are_uncoupled_once(monkeypatch: pytest.MonkeyPatch):
    """And every level above them for every damping."""
    blocks: list[int] = []
    original = ulv.uncoupled

    def counted(D: Any, *others: Any) -> Any:
        blocks.append(len(D))
        return original(D, *others)

    K = compressed("hss")
    leaves = len(K.structure.D)
    monkeypatch.setattr(ulv, "uncoupled", counted)
    K.factorize_many(DAMPINGS)
    assert leaves not in blocks
    assert blocks.count(leaves // 2) == len(DAMPINGS)
    K.factorize(0.3)
    assert blocks.count(leaves) == 1


def test_what_leaves_share_takes_as_much_as_is_said():
    structure = compressed("hss").structure
    shared = UncoupledLeaves.of(structure)
    arrays = *shared.parts, shared.square
    assert UncoupledLeaves.memory(structure) == sum(a.nbytes for a in arrays)


@pytest.mark.parametrize("scheme", ["hss", "hodlr", "lowrank"])
def test_the_smallest_eigenvalue_is_looked_for_once(scheme: str, monkeypatch: pytest.MonkeyPatch):
    """The error is compared with each all the same."""
    op = gh.KernelOperator(POINTS, "laplace", 0.3, nugget=1e-3)
    K = gh.compress(op, scheme, rtol=5e-2, leaf_size=20)
    kind = K.factors[0]
    dampings = [factor * K.report.spectral_error for factor in (1.4, 1.2, 50.0)]
    asked: list[float] = []
    norm = kind.inverse_norm

    def counted(F: Any) -> float:
        asked.append(F.damping)
        return norm.fget(F)

    monkeypatch.setattr(kind, "inverse_norm", property(counted))
    with pytest.warns(AccuracyWarning, match="spectral norm") as caught:
        K.factorize_many(dampings)
    assert asked == dampings[1:2]
    with pytest.warns(AccuracyWarning, match="spectral norm") as each:
        _ = [K.factorize(damping) for damping in sorted(dampings)]
    said, want = (
        [float(re.findall("eigenvalue, about ([^:]*):", str(w.message))[0]) for w in warned]
        for warned in (caught, each)
    )
    np.testing.assert_allclose(said, want, rtol=0.05)
    assert len(said) == 2


@quiet
def test_an_fmm_form_has_one_form_that_preconditions(monkeypatch: pytest.MonkeyPatch):
    made: list[float] = []
    original = fmm_matrix.weak_form

    def counted(structure: Any, error: float, most: int) -> Any:
        made.append(error)
        return original(structure, error, most)

    monkeypatch.setattr(fmm_matrix, "weak_form", counted)
    K = compressed("fmm")
    K.factorize_many(DAMPINGS)
    assert len(made) == 1


def test_the_smallest_that_does_not_do_is_named():
    K = gh.compress(gh.DenseOperator(both_signs(), definite=False), "hss", rtol=1e-6, leaf_size=20)
    with pytest.raises(NotPositiveDefiniteError) as error:
        K.factorize_many([1.0, 0.0, 0.1])
    assert error.value.damping == pytest.approx(0.2, rel=0.1)
    factors = K.factorize_many([1.0, 0.0, 0.1], shift="auto")
    assert [F.shifted > 0 for F in factors] == [False, True, True]
    assert factors[1].damping == K.factorize(0.0, shift="auto").damping


@pytest.mark.parametrize("name", ["hss", "fmm", "kfe"])
def test_a_warning_points_to_who_calls(name: str):
    K = compressed(name, rtol=2e-2)
    damping = 1.5 * K.report.spectral_error - (K.report.nugget or 0.0)
    for work in (lambda: K.factorize(damping), lambda: K.factorize_many([damping])):
        with pytest.warns(AccuracyWarning, match="in the spectral norm") as caught:
            work()
        assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize(
    ("dampings", "error"),
    [
        (0.1, DtypeError),
        (None, DtypeError),
        ([0.1, -1.0], ArgumentError),
        ([0.1, np.nan], ArgumentError),
        ([0.1, "a"], DtypeError),
        ([0.1, np.ones(3)], GpuHodlrError),
        ([0.1, np.ones((N, 2))], GpuHodlrError),
    ],
)
def test_bad_dampings_are_refused_before_the_work(
    dampings: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    K = compressed("hss")
    monkeypatch.setattr(gh.HSSMatrix, "_factor", None)
    with pytest.raises(error, match="damping"):
        K.factorize_many(dampings)
    with pytest.raises(ArgumentError, match="shift"):
        K.factorize_many([0.1], shift="more")


def test_factors_that_do_not_fit_together_are_refused(monkeypatch: pytest.MonkeyPatch):
    K = compressed("hodlr")
    one = K.factorize(1.0).nbytes
    monkeypatch.setattr(devices, "free_bytes", lambda device="cpu": 10 * one)
    assert len(K.factorize_many([1.0] * 3)) == 3
    with pytest.raises(MemoryEstimateError, match="number of dampings"):
        K.factorize_many([1.0] * 20)


def test_kfe_takes_the_options_of_factorize():
    K = compressed("kfe")
    for F in K.factorize_many([1.0, 0.5], neighbours=2, head=3):
        assert F._vecchia.head == 3
        assert F.num_stored == K.factorize(F.damping, neighbours=2, head=3).num_stored
    with pytest.raises(ArgumentError, match="head"):
        K.factorize_many([1.0], head=-1)


# --- eigenpairs ----------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("name", ["lowrank", "lowrank of full rank", "lowrank, both signs"])
def test_eigenpairs(name: str, xp: ModuleType, dtype: Any):
    """Descending, orthonormal, of K~; of -K and of 2 K those of these."""
    if name == "lowrank of full rank" and dtype == np.float32:
        pytest.skip("1e-5 is near the rounding")
    K = compressed(name, xp, dtype)
    for matrix in (K, -K, 2 * K):
        values, vectors = matrix.eigenpairs
        assert isinstance(vectors, xp.ndarray)
        assert (values.dtype, vectors.dtype) == (np.float64, dtype)
        assert vectors.shape == (N, len(values)) == (N, K.ranks[0][0])
        assert (np.diff(values) <= 0).all()
        v = to_host(vectors).astype(np.float64)
        eps = 100 * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(v.T @ v, np.eye(len(values)), rtol=0, atol=eps)
        dense = to_host(matrix.to_dense()).astype(np.float64)
        np.testing.assert_allclose((v * values) @ v.T, dense, atol=eps * np.abs(values).max())
    assert to_host(K.structure.U).shape == vectors.shape  # the matrix has kept its own order


def test_eigenpairs_of_a_matrix_that_is_stored_in_float32():
    K = compressed("lowrank", storage_dtype="float32")
    values, vectors = K.eigenpairs
    assert vectors.dtype == np.float64
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), rtol=0, atol=1e-12)
    residual = K @ vectors - vectors * values
    assert np.abs(residual).max() < 1e-5 * values[0]


def test_eigenpairs_of_a_matrix_with_a_diagonal_are_not_known():
    K = compressed("lowrank")
    for other in (compressed("lowrank, tail"), K + gh.Diagonal(np.ones(N))):
        with pytest.raises(InexactError, match="eigsh"):
            _ = other.eigenpairs
        assert not hasattr(other, "eigenpairs")
    assert not hasattr(compressed("hss"), "eigenpairs")


def test_eigenpairs_on_ranks(monkeypatch: pytest.MonkeyPatch):
    def job(comm: Any = None) -> Any:
        return compressed("lowrank, both signs", comm=comm).eigenpairs

    for size in (2, 3):
        results = on_threads(size, job)
        for values, vectors in results:
            np.testing.assert_array_equal(values, results[0][0])
            np.testing.assert_array_equal(vectors, results[0][1])
            np.testing.assert_allclose(values, job()[0], rtol=0, atol=1e-10)
            exact = (vectors * values) @ vectors.T
            assert np.linalg.norm(exact - both_signs()) <= 2e-3 * np.linalg.norm(both_signs())
    K = compressed("lowrank")
    monkeypatch.setattr(devices, "free_bytes", lambda device="cpu": 10)
    with pytest.raises(MemoryEstimateError, match="eigenvectors"):
        _ = K.eigenpairs

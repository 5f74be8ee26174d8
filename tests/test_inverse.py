"""Diagonals, blocks, quadratic forms and traces of inverses against dense ones, of every scheme."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from dense_oracles import kernel_matrix
from inverse_cases import CASES, DAMPING, ON_EVERY, POINTS, N, compressed, dense_of
from test_memory import estimates, peak
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr import devices, streams
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError, DtypeError, MemoryEstimateError, ShapeError
from gpu_hodlr.factor import inverse, probing

pytestmark = pytest.mark.filterwarnings("ignore::gpu_hodlr.errors.AccuracyWarning")


def check(F: Any, A: np.ndarray, xp: ModuleType = np) -> None:
    """All that is known of the inverse, against LAPACK's."""
    n, exact = len(A), np.linalg.inv(A)
    dtype, want = F.dtype, np.diagonal(exact)
    estimated = isinstance(F, probing.ProbedInverse)
    iterated = 1e-9 if estimated and dtype == np.float64 else 0.0
    relative = max(20 * float(np.finfo(dtype).eps) * np.linalg.cond(A), iterated)
    atol = relative * np.abs(exact).max()
    everything = {"probes": n} if estimated else {}

    assert F.inverse_diagonal_error is None is F.logdet_gradient_error
    got = F.inverse_diagonal(**everything)
    assert isinstance(got, xp.ndarray)
    assert got.dtype == F.inverse_diagonal_error.dtype == dtype
    np.testing.assert_allclose(to_host(got), want, rtol=0, atol=atol)
    np.testing.assert_array_equal(to_host(F.inverse_diagonal_error), np.zeros(n))
    trace = F.logdet_gradient(**everything)
    assert isinstance(trace, float)
    assert trace == pytest.approx(want.sum(), abs=n * atol)
    assert F.logdet_gradient_error == 0.0
    if estimated:
        check_estimates(F, want, atol)

    index = np.random.default_rng(3).permutation(n)[:7]
    block = F.inverse_block(index)
    assert isinstance(block, xp.ndarray)
    assert (block.shape, block.dtype) == ((7, 7), dtype)
    np.testing.assert_allclose(to_host(block), exact[np.ix_(index, index)], rtol=0, atol=atol)
    np.testing.assert_array_equal(to_host(block), to_host(block).T)

    b = np.random.default_rng(4).standard_normal((n, 3)).astype(dtype)
    forms = F.quadratic_form(xp.asarray(b))
    assert isinstance(forms, xp.ndarray)
    assert (forms.shape, forms.dtype) == ((3,), dtype)
    wanted = np.einsum("ij,ij->j", b, exact @ b.astype(np.float64))
    np.testing.assert_allclose(to_host(forms), wanted, rtol=0, atol=n * atol)
    one = F.quadratic_form(xp.asarray(b[:, 1]))
    assert one.shape == ()
    np.testing.assert_allclose(float(one), wanted[1], rtol=0, atol=n * atol)


def check_estimates(F: Any, want: np.ndarray, atol: float) -> None:
    """Of few probes: within the errors that are said, which are no larger than need be."""
    got, errors = to_host(F.inverse_diagonal()), to_host(F.inverse_diagonal_error)
    assert (errors >= 0).all()
    assert (np.abs(got - want) <= 6 * errors + atol).all()
    sure = errors > 10 * atol  # that they are not of rounding
    if sure.any():
        assert 0.4 < np.sqrt(np.mean(((got - want)[sure] / errors[sure]) ** 2)) < 2
        again = to_host(F.inverse_diagonal(seed=1))
        assert (again != got).any()
    np.testing.assert_array_equal(to_host(F.inverse_diagonal()), got)
    trace = F.logdet_gradient()
    assert abs(trace - want.sum()) <= 4 * F.logdet_gradient_error + len(want) * atol
    assert trace == pytest.approx(got.sum(dtype=np.float64), rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_form(name: str):
    K = compressed(name)
    check(K.factorize(DAMPING), dense_of(K, DAMPING))


@pytest.mark.parametrize("name", ON_EVERY)
def test_on_every_library(name: str, xp: ModuleType, dtype: Any):
    """Also with a damping of every row, of a scaled matrix with a diagonal."""
    K = compressed(name, xp, dtype)
    check(K.factorize(DAMPING), dense_of(K, DAMPING), xp)
    rows = np.random.default_rng(1).uniform(0.2, 0.6, K.shape[0])
    if name in ("fmm", "kfe") and xp is not np:
        return  # the stand-in takes long
    K = 2 * K + gh.Diagonal(xp.asarray(rows.astype(dtype)))
    d = rows[::-1].astype(dtype)
    check(K.factorize(xp.asarray(d)), dense_of(K, d), xp)


@pytest.mark.parametrize("name", ON_EVERY)
def test_of_a_factor_that_was_loaded(name: str, tmp_path: Path):
    K = compressed(name)
    for damping in (DAMPING, np.linspace(0.2, 0.5, K.shape[0])):
        F = K.factorize(damping)
        F.save(tmp_path / "F.npz")
        again = gh.load(tmp_path / "F.npz")
        check(again, dense_of(K, damping))
        np.testing.assert_array_equal(again.inverse_diagonal(), F.inverse_diagonal())


@pytest.mark.parametrize("name", ["hss", "hodlr", "lowrank", "fmm"])
def test_of_a_matrix_that_is_stored_in_float32(name: str):
    """The factor is of float64, and of orthonormal vectors to that."""
    K = compressed(name, storage_dtype="float32")
    F = K.factorize(DAMPING)
    exact = np.linalg.inv(dense_of(K, DAMPING))
    got = F.inverse_diagonal(**({"probes": N} if name == "fmm" else {}))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, np.diagonal(exact), rtol=1e-5)
    if name == "lowrank":
        U = F._form.U
        np.testing.assert_allclose(U.T @ U, np.eye(U.shape[1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["hss", "hodlr", "lowrank", "lowrank, tail"])
def test_of_a_factor_in_float32_that_is_refined(name: str):
    """Diagonal and trace have its rounding, blocks and forms that of float64."""
    K = compressed(name)
    for damping in (DAMPING, np.linspace(0.2, 0.5, N)):
        F, G = K.factorize(damping, dtype="float32"), K.factorize(damping)
        got, want = F.inverse_diagonal(), G.inverse_diagonal()
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=2e-4)
        assert (got != want).any()
        assert F.logdet_gradient() == pytest.approx(G.logdet_gradient(), rel=1e-4)
        b = np.random.default_rng(0).standard_normal((N, 2))
        np.testing.assert_allclose(F.quadratic_form(b), G.quadratic_form(b), rtol=1e-10)
        block, wanted = F.inverse_block([3, 5]), G.inverse_block([3, 5])
        np.testing.assert_allclose(block, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["hss", "hodlr", "lowrank", "fmm"])
def test_of_a_tolerance_that_the_damping_asks_for(name: str):
    """What users want to know is of the matrix itself: `compress(damping=)` finds the rtol."""
    damping = 1e-2
    op = gh.KernelOperator(POINTS, "matern32", 0.3)
    options = {k: v for k, v in CASES[name][1].items() if k != "rtol"}
    K = gh.compress(op, damping=damping, leaf_size=20, **options)
    F = K.factorize(damping)
    got = F.inverse_diagonal(**({"probes": N} if name == "fmm" else {}))
    exact = kernel_matrix(POINTS, "matern32", 0.3, damping)
    np.testing.assert_allclose(got, np.diagonal(np.linalg.inv(exact)), rtol=0.2)


def test_hard_matrices_keep_small_diagonals_positive():
    """Of a condition of 1e12: no entry is the difference of large numbers."""
    scale = np.logspace(0, 6, N)
    exact = scale[:, None] * kernel_matrix(POINTS, "laplace", 0.3, 0.1) * scale
    want = np.diagonal(np.linalg.inv(kernel_matrix(POINTS, "laplace", 0.3, 0.1))) / scale**2
    for scheme in ("hss", "hodlr"):
        K = gh.compress(exact, scheme, rtol=1e-14, max_rank=N, leaf_size=20, ordering="natural")
        got = K.factorize().inverse_diagonal()
        assert (got > 0).all()
        np.testing.assert_allclose(got, want, rtol=1e-2)


def test_a_row_within_low_rank_has_nothing_of_the_complement():
    """Of a damping far below rounding: a unit vector's row is 1 / (lambda + damping)."""
    exact = np.zeros((40, 40))
    exact[3, 3], exact[7, 7] = 2.0, 5.0
    F = gh.compress(exact, "lowrank", rtol=1e-8).factorize(1e-12)
    got = F.inverse_diagonal()
    np.testing.assert_allclose(got[[3, 7]], [0.5, 0.2], rtol=1e-9)
    np.testing.assert_allclose(np.delete(got, [3, 7]), 1e12, rtol=1e-9)
    assert F.inverse_norm == pytest.approx(1e12)


def test_the_norm_of_an_inverse_of_low_rank_is_known():
    for name in ("lowrank", "lowrank of full rank", "lowrank, both signs"):
        K = compressed(name)
        smallest = np.linalg.eigvalsh(dense_of(K, DAMPING))[0]
        assert K.factorize(DAMPING).inverse_norm == pytest.approx(1 / smallest, rel=1e-9)


# --- estimates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fmm", "kfe"])
def test_standard_errors_are_the_spread_over_seeds(name: str):
    F = compressed(name).factorize(DAMPING)
    diagonals, errors, traces, trace_errors = [], [], [], []
    for seed in range(24):
        diagonals.append(F.inverse_diagonal(8, seed))
        errors.append(F.inverse_diagonal_error)
        traces.append(F.logdet_gradient(8, seed))
        trace_errors.append(F.logdet_gradient_error)
    spread, said = np.var(diagonals, axis=0, ddof=1), np.mean(np.square(errors), axis=0)
    assert 0.8 < np.median(spread[said > 0] / said[said > 0]) < 1.25
    assert 0.4 < np.var(traces, ddof=1) / np.mean(np.square(trace_errors)) < 2.5


def test_estimates_are_means_over_the_probes():
    F = compressed("fmm").factorize(DAMPING)
    F.preconditioner = None
    z = probing.signs((5, streams.DIAGONAL), (N, 8), F.dtype, "cpu")
    products = z * (np.linalg.inv(dense_of(compressed("fmm"), DAMPING)) @ z)
    near = {"rtol": 1e-7, "atol": 1e-8}
    np.testing.assert_allclose(F.inverse_diagonal(8, 5), products.mean(axis=1), **near)
    errors = products.std(axis=1, ddof=1) / 8**0.5
    np.testing.assert_allclose(F.inverse_diagonal_error, errors, **near)
    traces = products.sum(axis=0)
    assert F.logdet_gradient(8, 5) == pytest.approx(traces.mean(), rel=1e-7)
    assert F.logdet_gradient_error == pytest.approx(traces.std(ddof=1) / 8**0.5, rel=1e-6)


@pytest.mark.parametrize(("name", "share"), [("fmm", 0.3), ("kfe", 0.8)])
def test_what_is_near_the_inverse_takes_some_of_the_error(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
):
    F = compressed(name).factorize(DAMPING)
    F.inverse_diagonal()
    error = np.linalg.norm(F.inverse_diagonal_error)
    monkeypatch.setattr(type(F), "_control", lambda self: None)
    want = np.diagonal(np.linalg.inv(dense_of(compressed(name), DAMPING)))
    got = F.inverse_diagonal()
    assert error < share * np.linalg.norm(F.inverse_diagonal_error)
    assert (np.abs(got - want) <= 6 * F.inverse_diagonal_error).all()


def test_without_a_preconditioner():
    F = compressed("fmm").factorize(DAMPING)
    F.preconditioner = None
    check(F, dense_of(compressed("fmm"), DAMPING))


def test_what_is_known_in_the_eigenbasis_is_a_diagonal():
    """The matrix that is applied has the diagonal that is said."""
    K = compressed("kfe")
    n = K.shape[0]
    for damping in (DAMPING, np.random.default_rng(2).uniform(0.2, 0.6, n)):
        control = K.factorize(damping)._control()
        P = control.apply(np.eye(n))
        np.testing.assert_allclose(control.diagonal, np.diagonal(P), rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"probes": 1}, ArgumentError),
        ({"probes": 2.0}, DtypeError),
        ({"probes": None}, DtypeError),
        ({"seed": -1}, ArgumentError),
        ({"seed": "1"}, DtypeError),
    ],
)
def test_bad_probes_are_refused(options: dict[str, Any], error: type[Exception]):
    F = compressed("fmm").factorize(DAMPING)
    for method in (F.inverse_diagonal, F.logdet_gradient):
        with pytest.raises(error, match=next(iter(options))):
            method(**options)
    assert F.inverse_diagonal_error is None


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ([1, 2, 1], ArgumentError),
        ([-1, 2], ArgumentError),
        ([0, N], ArgumentError),
        ([0.0, 1.0], DtypeError),
        ([True, False], DtypeError),
        (["a"], DtypeError),
        (3, ShapeError),
        ([[0, 1]], ShapeError),
        (np.ma.masked_array([0, 1], [True, False]), ArgumentError),
    ],
)
def test_bad_indices_are_refused(index: Any, error: type[Exception]):
    with pytest.raises(error, match="index"):
        compressed("hss").factorize(DAMPING).inverse_block(index)


def test_indices_of_any_kind(monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    F = compressed("hss").factorize(DAMPING)
    want = F.inverse_block([4, 9, 2])
    kinds = (np.array([4, 9, 2], np.uint8), (4, 9, 2), torch.tensor([4, 9, 2]), range(4, 5))
    for index in kinds[:3]:
        np.testing.assert_array_equal(F.inverse_block(index), want)
    np.testing.assert_allclose(F.inverse_block(kinds[3]), want[:1, :1], rtol=1e-13)
    for empty in ([], np.zeros(0, int), torch.zeros(0, dtype=torch.int64)):
        assert F.inverse_block(empty).shape == (0, 0)
    monkeypatch.setattr(inverse, "_CHUNK", 2)
    np.testing.assert_allclose(F.inverse_block([4, 9, 2]), want, rtol=1e-12)
    monkeypatch.setattr(inverse, "_CHUNK", 256)
    every = F.inverse_block(np.arange(N))
    np.testing.assert_allclose(np.diagonal(every), F.inverse_diagonal(), rtol=1e-10)


# --- quadratic forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hss", "lowrank, both signs", "kfe", "fmm"])
def test_quadratic_forms_are_of_any_shape_and_not_negative(name: str):
    K = compressed(name)
    F = K.factorize(DAMPING)
    n = K.shape[0]
    assert F.quadratic_form(np.zeros((n, 0))).shape == (0,)
    assert not F.quadratic_form(np.zeros((n, 2))).any()
    b = np.linalg.eigh(dense_of(K, DAMPING))[1][:, ::-1]  # of the smallest forms first
    assert (F.quadratic_form(b) > 0).all()


@pytest.mark.parametrize("b", [np.ones(3), np.ones((N, 2, 2)), np.ones(N, int), [1.0] * N, None])
def test_bad_vectors_are_refused(b: Any):
    for name in ("hss", "fmm"):
        with pytest.raises((ShapeError, DtypeError)):
            compressed(name).factorize(DAMPING).quadratic_form(b)


@pytest.mark.parametrize("name", ["hss", "fmm"])
def test_quadratic_forms_of_tensors_have_gradients(name: str):
    """Twice: 2 A^-1 b, and 2 A^-1."""
    torch = pytest.importorskip("torch")
    K = compressed(name)
    F, exact = K.factorize(DAMPING), np.linalg.inv(dense_of(K, DAMPING))
    b = torch.linspace(-1, 1, N, dtype=torch.float64, requires_grad=True)
    form = F.quadratic_form(b)
    want = b.detach().numpy() @ exact @ b.detach().numpy()
    assert form.item() == pytest.approx(want, rel=1e-8)
    (slope,) = torch.autograd.grad(form, b, create_graph=True)
    np.testing.assert_allclose(slope.detach(), 2 * exact @ b.detach().numpy(), rtol=1e-6, atol=1e-7)
    (again,) = torch.autograd.grad(slope[5], b)
    np.testing.assert_allclose(again, 2 * exact[5], rtol=1e-6, atol=1e-7)
    B = torch.eye(N, 3, dtype=torch.float32)
    forms = F.quadratic_form(B)
    assert forms.dtype == torch.float64
    np.testing.assert_allclose(forms, np.diagonal(exact)[:3], rtol=1e-6)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_EVERY)
def test_what_does_not_fit_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    F = compressed(name).factorize(DAMPING)
    monkeypatch.setattr(devices, "free_bytes", lambda device="cpu": 10)
    for work in (F.inverse_diagonal, F.logdet_gradient, lambda: F.inverse_block([1, 2])):
        with pytest.raises(MemoryEstimateError, match="inverse"):
            work()


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("hss", {"leaf_size": 150}),
        ("hss", {"leaf_size": 30, "rtol": 1e-4}),
        ("hss", {"leaf_size": 1500}),
        ("hodlr", {"leaf_size": 40}),
        ("hodlr", {"leaf_size": 200}),
        ("lowrank", {"max_rank": 400, "rtol": 0.1}),
    ],
)
def test_memory_is_estimated_within_half(scheme: str, options: dict[str, Any]):
    points = np.random.default_rng(0).random((1500, 3))
    op = gh.KernelOperator(points, "matern32", 0.5, nugget=0.5)
    F = gh.compress(op, scheme, **{"rtol": 1e-2, **options}).factorize(20.0)
    most = peak(F.inverse_diagonal)[1]
    assert 1 / 1.5 < F._inverse_diagonal_bytes() / most < 1.5


@pytest.mark.parametrize(
    ("scheme", "options"), [("hss", {"leaf_size": 150}), ("lowrank", {"max_rank": 400})]
)
def test_memory_of_a_block_is_estimated_within_half(
    scheme: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Of few rows the vectors that are solved for, of many the block."""
    points = np.random.default_rng(0).random((1500, 3))
    op = gh.KernelOperator(points, "matern32", 0.5, nugget=0.5)
    F = gh.compress(op, scheme, rtol=0.1, **options).factorize(20.0)
    said = estimates(monkeypatch, inverse)
    for p in (20, 200, 1400):
        said.clear()
        most = peak(lambda p=p: F.inverse_block(np.arange(p)))[1]
        assert 1 / 1.5 < said[0] / most < 1.5


@pytest.mark.parametrize("name", ["fmm", "kfe"])
def test_memory_of_probes_is_estimated_within_half(name: str, monkeypatch: pytest.MonkeyPatch):
    op = gh.KernelOperator(np.random.default_rng(0).random((700, 2)), "laplace", 0.3, nugget=0.5)
    if name == "kfe":
        pytest.importorskip("torch")
        from eigenbasis_cases import operator

        op = operator("larger classifier")
    budget = {"budget": 0.1, "leaf_size": 25} if name == "fmm" else {}
    F = gh.compress(op, name, rtol=1e-2, **budget).factorize(5.0)
    F.inverse_diagonal(2)  # what is made at first use
    said = estimates(monkeypatch, probing)
    for probes in (8, 200):
        said.clear()
        most = peak(lambda probes=probes: F.inverse_diagonal(probes))[1]
        assert 1 / 1.5 < said[0] / most < 1.5


def test_what_runs_out_of_memory_is_named():
    """Where the estimate had let it pass."""

    def full(self: Any) -> Any:
        raise MemoryError("no more")

    F = compressed("hss").factorize(DAMPING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(F), "_inverse_diagonal", full)
        said = "the inverse's diagonal ran out of memory: no more.*; lower max_rank, or use float32"
        with pytest.raises(MemoryEstimateError, match=said):
            F.inverse_diagonal()


# --- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_EVERY)
def test_ranks(name: str):
    """The same bits on every rank, those of one rank to rounding; vectors whole or by rows."""
    n = compressed(name).shape[0]
    b = np.random.default_rng(0).standard_normal((n, 2))
    d = np.linspace(0.2, 0.5, n)

    def job(comm: Any = None) -> Any:
        found = []
        for damping in (d,) if name == "fmm" else (DAMPING, d):
            K = compressed(name, comm=comm, seed=3)
            F = K.factorize(damping)
            diagonal = F.inverse_diagonal()
            found += [
                diagonal, F.inverse_diagonal_error, F.logdet_gradient(), F.inverse_block([7, 3]),
                F.quadratic_form(b), F.quadratic_form(b[K.rows]), F.quadratic_form(b[K.rows, 0]),
            ]  # fmt: skip
        return found

    alone = job()
    for size in (2, 3):
        results = on_threads(size, job)
        for got in results:
            assert isinstance(got, list), got
            for part, first, want in zip(got, results[0], alone, strict=True):
                np.testing.assert_array_equal(part, first)
                np.testing.assert_allclose(part, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("name", ["hss", "fmm"])
def test_quadratic_forms_of_tensors_on_ranks(name: str):
    """Of vectors by rows: the same form on every rank, and of its gradient the rank's rows."""
    torch = pytest.importorskip("torch")
    exact = np.linalg.inv(dense_of(compressed(name), DAMPING))
    B = np.random.default_rng(0).standard_normal((N, 2))
    want, slopes = np.einsum("ij,ij->j", B, exact @ B), 2 * exact @ B

    def job(comm: Any) -> Any:
        K = compressed(name, comm=comm)
        F, found = K.factorize(DAMPING), []
        for own in (B[K.rows], B[K.rows, 1]):
            b = torch.tensor(own, requires_grad=True)
            form = F.quadratic_form(b)
            form.sum().backward()
            found += [form.detach().numpy(), b.grad.numpy()]
        return K.rows, *found

    for got in on_threads(2, job):
        assert isinstance(got, tuple), got
        rows, forms, gradients, form, gradient = got
        np.testing.assert_allclose(forms, want, rtol=1e-6)
        np.testing.assert_allclose(gradients, slopes[rows], rtol=0, atol=1e-6)
        np.testing.assert_allclose(form, want[1], rtol=1e-6)
        np.testing.assert_allclose(gradient, slopes[rows, 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["hss", "hodlr"])
def test_on_devices_of_many_ranks(name: str, stand_in: Any):
    xp = stand_in.cupy

    def job(comm: Any = None) -> Any:
        F = compressed(name, xp, comm=comm).factorize(DAMPING)
        b = xp.asarray(np.eye(N, 2))
        found = F.inverse_diagonal(), F.inverse_block([7, 3]), F.quadratic_form(b)
        return [part.get() for part in found]

    alone = job()
    for got in on_threads(3, job):
        assert isinstance(got, list), got
        for part, want in zip(got, alone, strict=True):
            np.testing.assert_allclose(part, want, rtol=0, atol=1e-9 * np.abs(want).max())

"""The FMM form on every array library: operator, compression, product, solve, file."""

from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from host_cupy import HostCupy
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr.compressed.weak_form import weak_form
from gpu_hodlr.devices import device_of, to_host
from gpu_hodlr.factor import MultipoleSolver, ULVCholesky
from gpu_hodlr.factor.multipole_solver import preconditioner_of
from gpu_hodlr.structures import Multipole

SAMPLERS = ("entries", "products+entries")
N = 157


def matrix(kind: str, xp: ModuleType, dtype: Any) -> tuple[gh.Operator, np.ndarray]:
    """An operator made of arrays of xp, and its dense float64 form."""
    if kind == "dense":
        exact = toeplitz(N)
        return gh.DenseOperator(xp.asarray(exact.astype(dtype))), exact
    points = np.random.default_rng(3).random((N, 2 if kind == "plane" else 6)).astype(dtype)
    exact = dense_oracles.kernel_matrix(points, "laplace", 0.4, 0.5)
    return gh.KernelOperator(xp.asarray(points), "laplace", 0.4, 0.5), exact


def compressed(op: Any, dtype: Any = np.float64, **options: Any) -> gh.FMMMatrix:
    rtol = 1e-6 if dtype == np.float64 else 1e-3
    defaults = {"rtol": rtol, "leaf_size": 20, "budget": 0.12, "max_rank": N}
    return gh.compress(op, "fmm", **{**defaults, **options})


def columns(k: int, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(k).standard_normal((N, k)).astype(dtype)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["dense", "six dimensions"])
def test_from_operator_to_solution(kind: str, sampler: str, xp: ModuleType, dtype: Any):
    op, exact = matrix(kind, xp, dtype)
    K = compressed(op, dtype, sampler=sampler)
    assert K.device == op.device
    assert len(K.structure.near_pairs)
    assert any(len(pairs) for pairs in K.structure.far_pairs)
    assert all(isinstance(a, xp.ndarray) for a in K.structure.arrays())
    dense = to_host(K.to_dense()).astype(np.float64)
    assert dense_oracles.frobenius_error(dense, exact) <= 3 * K.report.rtol
    accuracy = 1e-12 if dtype == np.float64 else 1e-4
    for k in (1, 3, 8, 20, 40):
        b = columns(k, dtype)
        for _ in range(2):  # as it is, and as a graph
            product = K @ xp.asarray(b)
            assert isinstance(product, xp.ndarray)
            want = dense @ b
            atol = accuracy * np.abs(want).max()
            np.testing.assert_allclose(to_host(product), want, rtol=0, atol=atol)
    F, b = K.factorize(0.25), columns(3, dtype)
    assert isinstance(F, MultipoleSolver)
    x = F.solve(xp.asarray(b))
    assert isinstance(x, xp.ndarray)
    assert F.info.converged
    assert F.info.iterations <= 20
    residual = dense @ to_host(x) + 0.25 * to_host(x) - b
    allowed = 1e-9 if dtype == np.float64 else 1e-4
    assert np.linalg.norm(residual) <= allowed * np.linalg.norm(b)
    assert not to_host(F.solve(xp.zeros((N, 2), dtype))).any()


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_same_form_on_the_cpu_and_on_a_device(cupy: ModuleType, dtype: Any, k: int):
    """The same arrays: products and solutions differ by rounding."""
    host = compressed(matrix("plane", np, dtype)[0], dtype).structure
    form, b = host.to("cuda"), columns(k, dtype)
    product, want = form.matmat(cupy.asarray(b)), host.matmat(b)

    def solver(one: Multipole) -> MultipoleSolver:
        weak = weak_form(one, 0.15, N)
        return MultipoleSolver(one, 0.3, preconditioner_of(weak, 0.3), rtol=1e-4)

    assert device_of(product) == "cuda"
    accuracy = 200 * float(np.finfo(dtype).eps) * np.abs(want).max()
    np.testing.assert_allclose(to_host(product), want, rtol=0, atol=accuracy)
    np.testing.assert_array_equal(to_host(form.diagonal()), host.diagonal())
    rtol, allowed = (1e-12, 1e-10) if dtype == np.float64 else (1e-6, 1e-4)
    solutions = [
        to_host(solver(one).solve(vectors, rtol=rtol))
        for one, vectors in ((form, cupy.asarray(b)), (host, b))
    ]
    np.testing.assert_allclose(*solutions, rtol=0, atol=allowed * np.abs(solutions[1]).max())


@pytest.mark.parametrize("kind", ["dense", "plane"])
def test_the_near_field_does_not_depend_on_the_device(cupy: ModuleType, kind: str):
    on_device, on_host = (
        compressed(matrix(kind, xp, np.float64)[0], sampler="entries", ordering="natural")
        for xp in (cupy, np)
    )
    np.testing.assert_array_equal(on_device.structure.near_pairs, on_host.structure.near_pairs)
    atol = 1e-5 * np.abs(on_host.to_dense()).max()
    np.testing.assert_allclose(to_host(on_device.to_dense()), on_host.to_dense(), atol=atol)


def test_without_budget_it_has_a_factor(xp: ModuleType):
    K = compressed(matrix("plane", xp, np.float64)[0], budget=0.0)
    F, b = K.factorize(0.1), columns(2)
    assert isinstance(F, ULVCholesky)
    x = to_host(F.solve(xp.asarray(b)))
    residual = to_host(K.to_dense()) @ x + 0.1 * x - b
    assert np.abs(residual).max() < 1e-10


def test_everything_near(xp: ModuleType):
    exact = dense_oracles.random_spd(N)
    K = compressed(xp.asarray(exact), budget=1.0, leaf_size=40)
    assert K.ranks == ()
    b = columns(2)
    np.testing.assert_allclose(to_host(K @ xp.asarray(b)), exact @ b, rtol=0, atol=1e-11)
    x = to_host(K.factorize(0.1).solve(xp.asarray(b)))
    np.testing.assert_allclose(exact @ x + 0.1 * x, b, rtol=0, atol=1e-7)


def test_files(xp: ModuleType, tmp_path: Path):
    K = compressed(matrix("plane", xp, np.float64)[0])
    K.save(tmp_path / "m")
    again = gh.load(tmp_path / "m", device=K.device)
    assert again.device == K.device
    b = xp.asarray(columns(2))
    np.testing.assert_array_equal(to_host(again @ b), to_host(K @ b))


def test_an_indefinite_matrix_is_refused(xp: ModuleType):
    exact = toeplitz(N) - 3 * np.eye(N)
    K = compressed(xp.asarray(exact))
    with pytest.raises(gh.errors.NotPositiveDefiniteError):
        K.factorize(0.0).solve(xp.asarray(columns(1)))


def test_gauss_newton(cupy: ModuleType):
    pytest.importorskip("torch")
    from network_cases import data, image_network, images

    inputs, model = images(8, n=25, border=1), image_network(64, 6, 10)
    targets = data((64,), 10, "cross_entropy", n=25)[1]
    op = gh.GGNOperator(model, "cross_entropy", inputs, targets, device="cuda")
    K = gh.compress(op, "fmm", rtol=1e-4, leaf_size=20, budget=0.1)
    exact = to_host(op.to_dense())
    assert dense_oracles.frobenius_error(to_host(K.to_dense()), exact) <= 3e-4


@pytest.mark.parametrize("k", [1, 20])
def test_a_replayed_product_is_one_launch(stand_in: HostCupy, k: int):
    """No copy from the host, no wait, no cudaMalloc."""
    K = compressed(matrix("plane", stand_in.cupy, np.float64)[0])
    v = stand_in.cupy.asarray(columns(k))
    K @ v, K @ v
    counters = stand_in.counters
    counters.reset()
    K @ v
    assert counters.graph_launches == 1
    assert counters.launches == counters.library_calls == 0
    assert counters.synchronizations == counters.host_to_device == 0
    assert counters.device_allocations == 0
    F = K.factorize(0.1)
    F.solve(v)
    counters.reset()
    F.solve(v)  # a product and a solve of the preconditioner each step, and the residual's product
    steps, rest = divmod(counters.graph_launches - 2, 2)
    assert rest == 0
    assert F.info.iterations <= steps <= 1.25 * F.info.iterations + 1  # it is read seldom
    dots = 3 * steps + 4
    assert counters.launches == dots * (1 if k == 1 else 2)
    assert counters.library_calls == counters.host_to_device == 0
    assert counters.synchronizations <= F.info.iterations + 2  # before CG and after it


def test_nothing_is_left_behind(stand_in: HostCupy):
    pool = stand_in.cupy.get_default_memory_pool()
    op, b = matrix("plane", stand_in.cupy, np.float64)[0], stand_in.cupy.asarray(columns(2))
    used = 0
    for _ in range(3):
        F = compressed(op).factorize(0.1)
        F.solve(b)
        del F
        used, before = pool.used_bytes(), used
    assert used <= before

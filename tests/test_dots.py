"""Dot products of columns and squared norms: the kernels on the host, and every array library."""

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cuda import launches, runner
from host_cupy import HostCupy
from kernel_cases import DTYPES, built_for_host, needs_compiler, under_schedules

from gpu_hodlr import batched
from gpu_hodlr.batched import dots
from gpu_hodlr.devices import to_host

SHAPES = [(1, 1), (5, 3), (100, 1), (257, 8), (1000, 33), (4097, 2)]


def numbers(*shape: int, dtype: Any, seed: int = 0) -> np.ndarray:
    """Of very different size."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-5, 5, shape)).astype(dtype)


def exact_columns(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The dot products, and those of the absolute values, which rounding is relative to."""
    terms = u.astype(np.longdouble) * v.astype(np.longdouble)
    return terms.sum(axis=0).astype(float), np.abs(terms).sum(axis=0).astype(float)


def bound(terms: int, dtype: Any, summed_in: Any) -> float:
    """Of a sum in any order (Higham 2002, section 3.1), a product and the last rounding."""
    u, v = (float(np.finfo(kind).eps) for kind in (summed_in, dtype))
    return 2 * (terms * u + v)


@pytest.fixture(scope="module")
def kernels(host_library_folder: Any) -> runner.HostKernels:
    return built_for_host(host_library_folder)["dots"]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 64), (8, 8), (32, 1)])
@pytest.mark.parametrize(("n", "k"), SHAPES[:-1])
def test_column_dots_on_host(kernels: Any, dtype: Any, block: tuple[int, int], n: int, k: int):
    u, v = numbers(2, n, k, dtype=dtype)
    got = under_schedules(launches.column_dots, kernels, u, v, block=block)
    want, size = exact_columns(u, v)
    assert got.dtype == dtype
    assert (np.abs(got - want) <= bound(n, dtype, np.float64) * size).all()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "length"), [(1, 1), (3, 50), (7, 51), (5, 333), (70, 20)])
def test_squared_norms_on_host(kernels: Any, dtype: Any, n: int, length: int):
    x = numbers(n, length, dtype=dtype)
    got = under_schedules(launches.squared_norms, kernels, x)
    want = [math.fsum(float(a) ** 2 for a in row) for row in x]
    np.testing.assert_allclose(got, want, rtol=bound(length, np.float64, np.float64))


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (0, 3), (3, 0)])
def test_column_dots(xp: ModuleType, dtype: Any, n: int, k: int):
    u, v = numbers(2, n, k, dtype=dtype)
    got = batched.column_dots(xp.asarray(u), xp.asarray(v))
    want, size = exact_columns(u, v)
    assert (got.dtype, got.shape) == (dtype, (k,))
    assert (np.abs(to_host(got) - want) <= bound(n, dtype, dtype) * size).all()


def test_column_dots_of_views(xp: ModuleType):
    u, v = numbers(2, 40, 6, dtype=np.float64)
    got = batched.column_dots(xp.asarray(u)[:, 1:4], xp.asarray(np.asfortranarray(v))[:, ::2])
    want, size = exact_columns(u[:, 1:4], v[:, ::2])
    assert (np.abs(to_host(got) - want) <= bound(40, np.float64, np.float64) * size).all()


@pytest.mark.parametrize(
    "shape", [(1, 1), (6, 5), (3, 4, 5), (2, 300, 160), (1, 5_000_001), (0, 4), (4, 0), (3, 0, 2)]
)
def test_squared_norms(xp: ModuleType, dtype: Any, shape: tuple[int, ...]):
    """Of rows, of matrices, of long ones in more chunks than one."""
    x = numbers(*shape, dtype=dtype) if np.prod(shape) < 10**6 else np.ones(shape, dtype)
    got = batched.squared_norms(xp.asarray(x))
    assert (got.dtype, got.shape) == (np.float64, shape[:1])
    rows = x.reshape(shape[0], int(np.prod(shape[1:]))).astype(np.longdouble)
    want = (rows**2).sum(axis=1).astype(float)
    allowed = bound(min(rows.shape[1], 10**6), dtype, dtype)
    np.testing.assert_allclose(to_host(got), want, rtol=allowed)


def test_two_launches_at_most(stand_in: HostCupy):
    """One where one chunk has it all; no call of cuBLAS, no wait and no copy."""
    xp, counters = stand_in.cupy, stand_in.counters
    for n, k in SHAPES:
        u = xp.asarray(numbers(n, k, dtype=np.float64))
        counters.reset()
        batched.column_dots(u, u)
        assert counters.launches == (2 if n >= 1000 else 1)
        batched.squared_norms(u)
        assert counters.launches <= 3
        assert counters.array_operations == 0
        assert counters.library_calls == counters.synchronizations == 0


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_dots_on_host(kernels: Any, dtype: Any):
    rng = np.random.default_rng(4)
    c, (u, v) = rng.standard_normal((6, 3, 35)).astype(dtype), rng.integers(0, 6, (2, 9))
    got = under_schedules(launches.pair_dots, kernels, c, u, v)
    np.testing.assert_array_equal(got, dots.pair_dots(c, u, v))


def test_pair_dots(xp: ModuleType, dtype: Any):
    """A launch and a copy of both index arrays on a GPU, however many outputs."""
    rng = np.random.default_rng(5)
    c, (u, v) = rng.standard_normal((7, 10, 33)).astype(dtype), rng.integers(0, 7, (2, 30))
    got = dots.pair_dots(xp.asarray(c), u, v)
    assert got.dtype == dtype
    want = (c[u].astype(np.float64) * c[v]).sum(axis=1)
    np.testing.assert_allclose(to_host(got), want, rtol=0, atol=100 * np.finfo(dtype).eps)
    assert dots.pair_dots(xp.asarray(c), u[:0], v[:0]).shape == (0, 33)


def test_pair_dots_are_one_launch(stand_in: HostCupy):
    c, u = stand_in.cupy.ones((4, 10, 5)), np.arange(4)
    dots.pair_dots(c, u, u)
    stand_in.counters.reset()
    dots.pair_dots(c, u, u)
    found = stand_in.counters
    assert (found.launches, found.array_operations, found.host_to_device) == (1, 0, 1)

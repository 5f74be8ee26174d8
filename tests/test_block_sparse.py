"""Block-sparse products: the contract on every array library, and the kernel's source on the host.

Executing the source on the host is not a GPU run: see tests/host_cuda/host_cuda.h.
"""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cuda import launches, runner
from host_cupy import HostCupy
from kernel_cases import DTYPES, built_for_host, needs_compiler, under_schedules

from gpu_hodlr import batched
from gpu_hodlr.devices import to_host

SIZES = (1, 5, 33, 64, 130)
COLUMNS = (0, 1, 3, 8, 9, 33)
# Node 2 has no terms; node 5 is first in one pair and second in others.
PAIRS = np.array([[0, 1], [5, 6], [0, 5], [3, 5], [1, 4], [3, 4]])
NODES = 7


def stacks(m: int, k: int, dtype: Any, pairs: np.ndarray = PAIRS) -> tuple[np.ndarray, ...]:
    """Blocks, x and y."""
    rng = np.random.default_rng((m, k))
    blocks = rng.standard_normal((len(pairs), m, m)).astype(dtype)
    x, y = rng.standard_normal((2, NODES, m, k)).astype(dtype)
    return blocks, x, y


def exact(blocks: np.ndarray, x: np.ndarray, y: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """In float64."""
    blocks, x, result = blocks.astype(float), x.astype(float), y.astype(float)
    for (a, b), block in zip(pairs, blocks, strict=True):
        result[a] += block @ x[b]
        result[b] += block.T @ x[a]
    return result


def close(got: Any, want: np.ndarray, terms: int) -> None:
    got = to_host(got)
    atol = 8 * np.finfo(got.dtype).eps * (np.sqrt(terms) + 1) * np.abs(want).max(initial=1.0)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


# ---- On every array library -------------------------------------------------------------------


@pytest.mark.parametrize("k", COLUMNS)
@pytest.mark.parametrize("m", SIZES)
def test_product(xp: ModuleType, dtype: Any, m: int, k: int):
    blocks, x, y = stacks(m, k, dtype)
    device, target = xp.asarray(blocks), xp.asarray(y.copy())
    pattern = batched.block_pattern(PAIRS, NODES, device)
    assert isinstance(pattern.terms, xp.ndarray)
    got = batched.block_sparse_matmul(device, pattern, xp.asarray(x), target)
    assert got is target
    close(got, exact(blocks, x, y, PAIRS), 3 * m)
    np.testing.assert_array_equal(to_host(got)[2], y[2])


@pytest.mark.parametrize("k", [1, 5, 20])
def test_views(xp: ModuleType, dtype: Any, k: int):
    """add_to is a part of the rows, x of the columns; what is beside add_to stays."""
    blocks, x, _ = stacks(6, k, dtype)
    wide = np.random.default_rng(0).standard_normal((NODES, 8, k)).astype(dtype)
    whole, device = xp.asarray(wide.copy()), xp.asarray(blocks)
    pattern, beside = batched.block_pattern(PAIRS, NODES, device), xp.asarray(np.tile(x, 2))
    target = whole[:, 2:]
    assert batched.block_sparse_matmul(device, pattern, beside[:, :, k:], target) is target
    np.testing.assert_array_equal(to_host(whole)[:, :2], wide[:, :2])
    close(to_host(whole)[:, 2:], exact(blocks, x, wide[:, 2:], PAIRS), 20)


@pytest.mark.parametrize("k", [1, 20])
def test_no_blocks(xp: ModuleType, dtype: Any, k: int):
    none = np.empty((0, 2), np.int64)
    blocks, x, y = stacks(4, k, dtype, none)
    device, target = xp.asarray(blocks), xp.asarray(y.copy())
    pattern = batched.block_pattern(none, NODES, device)
    assert batched.block_sparse_matmul(device, pattern, xp.asarray(x), target) is target
    np.testing.assert_array_equal(to_host(target), y)


@pytest.mark.parametrize("k", [1, 8, 9, 70])
@pytest.mark.parametrize("m", [3, 600])
def test_all_pairs_of_a_few_nodes(xp: ModuleType, dtype: Any, m: int, k: int):
    """Large blocks are staged in parts; tiles of columns are full and not."""
    pairs = np.array([[1, 0], [0, 2], [1, 2]])[: 3 if m < 100 else 1]  # a larger node first, too
    blocks, x, y = stacks(m, k, dtype, pairs)
    device, target = xp.asarray(blocks), xp.asarray(y[:3].copy())
    pattern = batched.block_pattern(pairs, 3, device)
    got = batched.block_sparse_matmul(device, pattern, xp.asarray(x[:3]), target)
    close(got, exact(blocks, x[:3], y[:3], pairs), 2 * m)


@pytest.mark.parametrize("k", [1, 8, 9, 33])
def test_a_product_is_one_launch(stand_in: HostCupy, k: int):
    """No copy, no wait: it can be captured into a graph."""
    xp = stand_in.cupy
    blocks, x, y = (xp.asarray(a) for a in stacks(5, k, np.float32))
    pattern = batched.block_pattern(PAIRS, NODES, blocks)
    batched.block_sparse_matmul(blocks, pattern, x, y)
    stand_in.counters.reset()
    batched.block_sparse_matmul(blocks, pattern, x, y)
    c = stand_in.counters
    assert (c.launches, c.library_calls, c.array_operations) == (1, 0, 0)
    assert (c.synchronizations, c.host_to_device, c.device_allocations) == (0, 0, 0)


# ---- Kernel source executed on the host -------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(host_library_folder) -> runner.HostKernels:
    return built_for_host(host_library_folder)["block_sparse"]


def arguments(m: int, k: int, dtype: Any) -> tuple[np.ndarray, ...]:
    blocks, x, y = stacks(m, k, dtype)
    pattern = batched.block_pattern(PAIRS, NODES, blocks)
    return blocks, pattern.starts, pattern.terms, x, y


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [k for k in (2, *COLUMNS, 65) if k > 0])
@pytest.mark.parametrize("m", SIZES)
def test_block_sparse_on_host(kernels, dtype, m, k) -> None:
    blocks, starts, terms, x, y = arguments(m, k, dtype)
    got = under_schedules(launches.block_sparse, kernels, blocks, starts, terms, x, y)
    reference = y.copy()
    pattern = batched.block_pattern(PAIRS, NODES, blocks)
    batched.block_sparse_matmul(blocks, pattern, x, reference)
    close(got, reference.astype(float), 3 * m)
    np.testing.assert_array_equal(got[2], y[2])


@needs_compiler
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_block_sparse_of_every_shape_on_host(kernels, warps, k) -> None:
    blocks, starts, terms, x, y = arguments(45, k, np.float32)
    got = under_schedules(
        launches.block_sparse, kernels, blocks, starts, terms, x, y, warps=warps
    )  # fmt: skip
    close(got, exact(blocks, x, y, PAIRS), 150)


@needs_compiler
def test_block_sparse_orders_of_terms_on_host(kernels) -> None:
    """Terms of a row whose orientation changes again and again."""
    rng = np.random.default_rng(0)
    blocks, x = rng.standard_normal((5, 20, 20)), rng.standard_normal((3, 20, 12))
    terms = np.array([[p, p % 3, flag] for p, flag in enumerate((1, 0, 0, 1, 0))], np.int32)
    starts = np.array([0, 0, 5, 5], np.int32)
    want = sum((blocks[p].T if flag else blocks[p]) @ x[j] for p, j, flag in terms)
    for k in (1, 8, 12):
        some, zero = np.ascontiguousarray(x[:, :, :k]), np.zeros((3, 20, k))
        got = under_schedules(launches.block_sparse, kernels, blocks, starts, terms, some, zero)
        close(got[1], want[:, :k], 100)
        assert not got[[0, 2]].any()

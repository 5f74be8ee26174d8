"""Block-sparse products: one body for every array library."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from block_cases import COLUMNS, NODES, PAIRS, SIZES, close, exact, stacks
from host_cupy import HostCupy

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.batched import stored
from gpu_hodlr.devices import to_host


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
def test_a_product_of_small_blocks_is_one_launch(stand_in: HostCupy, k: int):
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


@pytest.mark.parametrize(("m", "k", "gemm"), [
    (96, 32, {np.float64}), (95, 32, set()), (96, 31, set()), (192, 40, {np.float32, np.float64}),
])  # fmt: skip
def test_large_blocks_and_many_columns_are_products_of_matrices(
    stand_in: HostCupy, dtype: Any, m: int, k: int, gemm: set[Any]
):
    """Two GEMMs, whose panels are gathered before and added up after; nothing else, no wait."""
    xp = stand_in.cupy
    blocks, x, y = (xp.asarray(a) for a in stacks(m, k, dtype))
    pattern = batched.block_pattern(PAIRS, NODES, blocks)
    batched.block_sparse_matmul(blocks, pattern, x, y)
    stand_in.counters.reset()
    batched.block_sparse_matmul(blocks, pattern, x, y)
    c = stand_in.counters
    assert (c.launches, c.library_calls, c.array_operations) == (
        (3, 2, 0) if dtype in gemm else (1, 0, 0)
    )
    assert (c.synchronizations, c.host_to_device) == (0, 0)


def test_blocks_multiplied_together_change_no_bit(
    stand_in: HostCupy, dtype: Any, monkeypatch: pytest.MonkeyPatch
):
    """As many as there is room for; of other ranks' columns too."""
    m, k, xp = 200, 40, stand_in.cupy
    pairs = np.array([[0, 1], [0, 3], [0, 4], [1, 2], [2, 4]])  # nodes 3 and 4 are columns alone
    blocks, x, y = stacks(m, k, dtype, pairs)
    device, columns = xp.asarray(blocks), xp.asarray(x[:5])
    pattern = batched.block_pattern(pairs, 3, device)
    bits = []
    for room in (1 << 28, 1, 6 * m * k * 8):
        monkeypatch.setattr("gpu_hodlr.batched.cupy_blocks._SCRATCH", room)
        got = batched.block_sparse_matmul(device, pattern, columns, xp.asarray(y[:3]))
        bits.append(to_host(got))
    want = exact(blocks, x[:5], y[:5], pairs)[:3]
    for got in bits:
        close(got, want, 3 * m)
        np.testing.assert_array_equal(got, bits[0])


def test_products_of_large_blocks_are_captured(stand_in: HostCupy):
    """Into a graph, as all products are: the same bits from it."""
    xp, rng = stand_in.cupy, np.random.default_rng(0)
    op = gh.KernelOperator(xp.asarray(rng.random((400, 2))), "matern32", 0.3, nugget=0.1)
    K = gh.compress(op, "fmm", rtol=1e-3, leaf_size=100, budget=0.3)
    v = xp.asarray(rng.standard_normal((400, 40)))
    first = to_host(K @ v)
    for _ in range(2):
        stand_in.counters.reset()
        np.testing.assert_array_equal(to_host(K @ v), first)
        assert stand_in.counters.graph_launches == 1


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "tfloat32"])
def test_large_blocks_that_are_stored_in_fewer_bits(stand_in: HostCupy, kind: str):
    """They are widened, some at a time, as by the kernel."""
    m, k, xp = 200, 40, stand_in.cupy
    blocks, x, y = stacks(m, k, np.float32)
    kept = xp.asarray(blocks) if kind == "float32" else stored.packed(xp.asarray(blocks), kind)
    pattern, wide = batched.block_pattern(PAIRS, NODES, kept), np.float64
    got = batched.block_sparse_matmul(
        kept, pattern, xp.asarray(x.astype(wide)), xp.asarray(y.astype(wide))
    )
    assert got.dtype == wide
    close(got, exact(to_host(stored.unpacked(kept, np.dtype(wide))), x, y, PAIRS), 3 * m)

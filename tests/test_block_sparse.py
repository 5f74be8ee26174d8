"""Block-sparse products: one body for every array library."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from block_cases import COLUMNS, NODES, PAIRS, SIZES, close, exact, stacks
from host_cupy import HostCupy

from gpu_hodlr import batched
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

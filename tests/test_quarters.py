"""Stacks of blocks cut into quarters and put together; one body for every array library."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy

from gpu_hodlr import batched
from gpu_hodlr.batched import quarters
from gpu_hodlr.devices import to_host


@pytest.mark.parametrize("with_order", [False, True])
@pytest.mark.parametrize("with_ridge", [False, True])
@pytest.mark.parametrize(("m", "r"), [(1, 0), (1, 1), (9, 4), (6, 6), (6, 0)])
def test_quarters(xp: ModuleType, dtype: Any, with_order: bool, with_ridge: bool, m: int, r: int):
    rng = np.random.default_rng(m + r)
    blocks, ridge = rng.standard_normal((3, m, m)).astype(dtype), rng.random((3, m)).astype(dtype)
    order = np.argsort(rng.random((3, m)), axis=1)
    given, node = xp.asarray(blocks), np.arange(3)[:, None, None]
    got = quarters.quartered(
        given, r, xp.asarray(order) if with_order else None,
        xp.asarray(ridge) if with_ridge else None,
    )  # fmt: skip
    want = blocks[node, order[:, :, None], order[:, None]] if with_order else blocks.copy()
    if with_ridge:
        want[:, np.arange(m), np.arange(m)] += ridge
    parts = (want[:, :r, :r], want[:, r:, :r], want[:, :r, r:], want[:, r:, r:])
    for mine, right in zip(got, parts, strict=True):
        np.testing.assert_array_equal(to_host(mine), right)
    for part in (got[0], got[1], got[3]):
        part[:] = 7  # new arrays
    np.testing.assert_array_equal(to_host(given), blocks)


def test_pairs(xp: ModuleType, dtype: Any):
    rng = np.random.default_rng(0)
    d, b = (
        rng.standard_normal((6, 4, 4)).astype(dtype),
        rng.standard_normal((3, 4, 4)).astype(dtype),
    )
    got = to_host(quarters.paired(xp.asarray(d), xp.asarray(b)))
    for p in range(3):
        want = np.block([[d[2 * p], b[p]], [b[p].T, d[2 * p + 1]]])
        np.testing.assert_array_equal(got[p], want)


def test_each_is_one_launch(stand_in: HostCupy):
    xp = stand_in.cupy
    blocks, order = xp.ones((4, 6, 6)), xp.zeros((4, 6), np.int64)
    for work in (
        lambda: quarters.quartered(blocks, 2, order, blocks[:, 0].copy()),
        lambda: quarters.paired(blocks, blocks[:2]),
        lambda: batched.permute_both(blocks, order),
    ):
        work()
        stand_in.counters.reset()
        work()
        c = stand_in.counters
        assert (c.launches, c.library_calls, c.synchronizations) == (1, 0, 0)
        assert c.array_operations <= 1  # the copy above

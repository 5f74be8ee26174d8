"""The merge of short sorted lists; one body for every array library."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from merge_cases import SHAPES, lists, merged

from gpu_hodlr import batched
from gpu_hodlr.devices import to_host


@pytest.mark.parametrize("shape", SHAPES)
def test_merge(xp: ModuleType, dtype: Any, shape: tuple[int, ...]):
    values, index, *found = lists(*shape, dtype)
    want = merged(values, index, *found)
    got = xp.asarray(values.copy()), xp.asarray(index.copy())
    batched.merge_smallest(*got, *(xp.asarray(a.copy()) for a in found))
    for mine, right in zip(got, want, strict=True):
        np.testing.assert_array_equal(to_host(mine), right)


def test_twice_is_once(xp: ModuleType, dtype: Any):
    values, index, *found = lists(*SHAPES[2], dtype)
    got = xp.asarray(values), xp.asarray(index)
    batched.merge_smallest(*got, *(xp.asarray(a.copy()) for a in found))
    first = [to_host(a).copy() for a in got]
    batched.merge_smallest(*got, *(xp.asarray(a.copy()) for a in found))
    for mine, right in zip(got, first, strict=True):
        np.testing.assert_array_equal(to_host(mine), right)


def test_one_node_of_many_rows(xp: ModuleType):
    """All against all."""
    x = np.random.default_rng(0).standard_normal(1500)
    every, d = np.arange(1500)[None], (x[:, None] - x)[None] ** 2
    lists = xp.full((1500, 3), np.inf), xp.full((1500, 3), -1, np.int64)
    batched.merge_smallest(*lists, xp.asarray(every), xp.asarray(d), xp.asarray(every))
    np.fill_diagonal(d[0], np.inf)
    np.testing.assert_array_equal(to_host(lists[1]), np.argsort(d[0], axis=1)[:, :3])


def test_a_merge_is_one_launch(stand_in: HostCupy):
    xp = stand_in.cupy
    arguments = [xp.asarray(a) for a in lists(*SHAPES[2], np.float32)]
    batched.merge_smallest(*arguments)
    stand_in.counters.reset()
    batched.merge_smallest(*arguments)
    c = stand_in.counters
    assert (c.launches, c.library_calls, c.array_operations) == (1, 0, 0)
    assert (c.synchronizations, c.host_to_device) == (0, 0)

"""Cells as block rows see them; one body for every array library, and kernel source on the host."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cuda import runner
from host_cuda import sampling_launches as launches
from host_cupy import HostCupy
from kernel_cases import DTYPES, assert_one_launch, built_for_host, needs_compiler, under_schedules

from gpu_hodlr.batched import ranking
from gpu_hodlr.devices import to_host


def case(
    dtype: Any, d: int, left_out: int, seed: int = 0
) -> tuple[np.ndarray, ranking.Boxes, ranking.Rows]:
    """Eight cells, one of them empty, and five rows that leave out nodes of ten positions."""
    rng = np.random.default_rng((seed, d, left_out))
    sizes = np.array([9, 10, 11, 0, 10, 8, 12, 20])
    points = rng.random((8, d, 2)).astype(dtype)
    low, high = points.min(axis=2), points.max(axis=2)
    low[3], high[3] = np.inf, -np.inf
    boxes = ranking.Boxes(np.concatenate([[0], np.cumsum(sizes)]), low, high)
    run = np.stack([[0, 80], [0, 80], [7, 33], [20, 80], [80, 80]])
    nodes = np.sort([rng.permutation(8)[:left_out] for _ in range(5)], axis=1)
    left = 10 * nodes
    size = np.minimum(np.maximum(run[:, 1:] - left, 0), 10) - np.minimum(
        np.maximum(run[:, :1] - left, 0), 10
    )  # of what is in the run
    left = np.minimum(np.maximum(left, run[:, :1]), 80)
    rows = ranking.Rows(low[[0, 1, 3, 4, 5]], high[[0, 1, 3, 4, 5]], run, left, size)
    cell = np.stack([rng.permutation(np.append(np.arange(8), [-1, -1])) for _ in range(5)])
    return cell, boxes, rows


def on(xp: ModuleType, x: Any) -> Any:
    """The same with its arrays in a library."""
    return type(x)(*(xp.asarray(a) for a in vars(x).values()))


@pytest.mark.parametrize("left_out", [0, 1, 3])
@pytest.mark.parametrize("d", [1, 3])
def test_cells_are_examined(xp: ModuleType, dtype: Any, d: int, left_out: int):
    cell, boxes, rows = case(dtype, d, left_out)
    seen = ranking.examined(xp.asarray(cell), on(xp, boxes), on(xp, rows))
    first, held, distance = (to_host(x) for x in seen)
    assert distance.dtype == dtype
    for t, i in np.ndindex(*cell.shape):
        c = cell[t, i]
        inside = np.zeros(81, bool)
        inside[slice(*rows.run[t])] = True
        for start, count in zip(rows.left[t], rows.size[t], strict=True):
            inside[start : start + count] = False
        start, stop = (boxes.offsets[c], boxes.offsets[c + 1]) if c >= 0 else (0, 0)
        assert held[t, i] == np.count_nonzero(inside[start:stop])
        if not held[t, i]:
            assert distance[t, i] == np.inf
            continue
        assert first[t, i] == start
        if held[t, i] < stop - start:
            assert distance[t, i] == -1
            continue
        if t == 2:  # an empty row is as far as can be from all
            assert distance[t, i] == np.finfo(dtype).max
            continue
        low, high = (np.stack([a[c], b[t]]).astype(float) for a, b in
                     ((boxes.low, rows.low), (boxes.high, rows.high)))  # fmt: skip
        gap = np.maximum(low.max(axis=0) - high.min(axis=0), 0)
        centers = (low[0] + high[0] - low[1] - high[1]) / 2
        want = (gap**2 + 1e-3 * centers**2).sum()
        np.testing.assert_allclose(distance[t, i], want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("split", [0, 1, 4, 10])
def test_cells_are_divided(xp: ModuleType, dtype: Any, split: int):
    cell, boxes, rows = case(dtype, 2, 1)
    given, order = xp.asarray(cell), np.argsort(np.random.default_rng(split).random(cell.shape))
    seen = ranking.examined(given, on(xp, boxes), on(xp, rows))
    kept = tuple(xp.full((5, 14), -7, x.dtype) for x in seen)
    half = to_host(ranking.divided(xp.asarray(order), split, given, seen, kept, 3))
    for x, to in zip(seen, kept, strict=True):
        want = np.full((5, 14), -7, x.dtype)
        want[:, 3 : 13 - split] = np.take_along_axis(to_host(x), order, axis=1)[:, split:]
        np.testing.assert_array_equal(to_host(to), want)
    assert half.shape == (5, 2 * split)
    held = np.take_along_axis(to_host(seen[1]), order, axis=1)[:, :split]
    mine = np.take_along_axis(cell, order, axis=1)[:, :split]
    np.testing.assert_array_equal(half[:, 0::2], np.where(held > 0, 2 * mine, -1))
    np.testing.assert_array_equal(half[:, 1::2], np.where(held > 0, 2 * mine + 1, -1))


def test_each_is_one_launch(stand_in: HostCupy):
    xp = stand_in.cupy
    cell, boxes, rows = case(np.float64, 3, 2)
    given, boxes, rows = xp.asarray(cell), on(xp, boxes), on(xp, rows)
    seen = ranking.examined(given, boxes, rows)
    kept, order = tuple(x.copy() for x in seen), xp.zeros(cell.shape, np.int64)
    assert_one_launch(stand_in, lambda: ranking.examined(given, boxes, rows))
    assert_one_launch(stand_in, lambda: ranking.divided(order, 0, given, seen, kept, 0))


@pytest.fixture(scope="module")
def on_host(host_library_folder) -> runner.HostKernels:
    return built_for_host(host_library_folder, ["ranking"])["ranking"]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", [0, 1, 3])
def test_ranking_on_host(on_host: runner.HostKernels, dtype: Any, left_out: int):
    cell, boxes, rows = case(dtype, 3, left_out)
    want = ranking.examined(cell, boxes, rows)
    seen = under_schedules(launches.examine_cells, on_host, cell, boxes, rows)
    np.testing.assert_array_equal(seen[1], want[1])
    np.testing.assert_array_equal(seen[0][want[1] > 0], want[0][want[1] > 0])
    np.testing.assert_allclose(seen[2], want[2], rtol=1e-5, atol=1e-9)
    order = np.argsort(want[2], axis=1, kind="stable")
    for split in (0, 4, 10):
        kept = tuple(np.zeros((5, 12), x.dtype) for x in want)
        mine = under_schedules(launches.divide_cells, on_host, order, split, cell, want, kept, 2)
        half = ranking.divided(order, split, cell, want, kept, 2)
        for got, right in zip(mine, (half, *kept), strict=True):
            np.testing.assert_array_equal(got, right)

"""Steps of a bisection: one body for every array library, and kernel source on the host."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cuda import runner
from host_cuda import sampling_launches as launches
from host_cupy import HostCupy
from kernel_cases import DTYPES, built_for_host, needs_compiler, padded_index, under_schedules

from gpu_hodlr.batched import splits
from gpu_hodlr.batched.distances import DISTANCES
from gpu_hodlr.devices import to_host

OFFSETS = np.array([4, 4, 9, 12, 12, 40, 41, 41, 60])  # some are empty; they do not begin at 0
VALUES = np.random.default_rng(0).permutation(60)


def level(rng: np.random.Generator, m: int, dtype: Any) -> tuple[np.ndarray, ...]:
    """Nodes of so many members, padding at the end, ties, infinite numbers and none."""
    index = rng.permutation(4 * m).reshape(4, m)
    index[1, m // 2 :] = -1
    index[3] = -1
    x = rng.integers(0, 5, (4, m)).astype(dtype)
    x[0, rng.integers(m)] = np.inf
    x[2, rng.integers(m)] = np.nan
    return index, x


@pytest.mark.parametrize("step", [1, 2, 4, 8])
def test_segments_there_and_back(xp: ModuleType, step: int):
    edges = OFFSETS[::step]
    width = int(np.diff(edges).max()) + 1
    values, offsets = xp.asarray(VALUES), xp.asarray(OFFSETS)
    padded = splits.pad_segments(values, offsets, width, step)
    for row, start, stop in zip(to_host(padded), edges[:-1], edges[1:], strict=True):
        np.testing.assert_array_equal(row[: stop - start], VALUES[start:stop])
        assert (row[stop - start :] == -1).all()
    back = xp.full(56, -7)
    splits.join_segments(padded, offsets, back, step=step)
    np.testing.assert_array_equal(to_host(back), VALUES[4:])


def test_no_values_are_padding(xp: ModuleType):
    empty = xp.asarray(np.empty(0, np.int64)), xp.asarray(np.zeros(3, np.int64))
    np.testing.assert_array_equal(to_host(splits.pad_segments(*empty, 2)), [[-1, -1]] * 2)


@pytest.mark.parametrize("step", [1, 2])
def test_segments_are_sorted(xp: ModuleType, dtype: Any, step: int):
    """Equal keys stay in order; infinity and what is no number come last, before padding."""
    edges, rng = OFFSETS[::step], np.random.default_rng(step)
    width = int(np.diff(edges).max())
    padded = splits.pad_segments(VALUES, OFFSETS, width, step)
    key = rng.integers(0, 4, padded.shape).astype(dtype)
    key[rng.random(key.shape) < 0.1] = np.nan
    key[rng.random(key.shape) < 0.1] = np.inf
    key[rng.random(key.shape) < 0.1] = -np.inf
    got = xp.full(56, -7)
    splits.sort_segments(xp.asarray(padded), xp.asarray(key), xp.asarray(OFFSETS), got, step)
    want = []
    for row, its, size in zip(padded, key, np.diff(edges), strict=True):
        last = np.where(np.isfinite(its) | (its < 0), its, np.finfo(dtype).max)[:size]
        want += row[:size][np.argsort(last, kind="stable")].tolist()
    np.testing.assert_array_equal(to_host(got), want)


@pytest.mark.parametrize("m", [1, 33, 70])
def test_farthest(xp: ModuleType, dtype: Any, m: int):
    index, distance = level(np.random.default_rng(m), m, dtype)
    got = to_host(splits.farthest(xp.asarray(index), xp.asarray(distance)))
    for t in range(4):
        real = index[t] >= 0
        slot = np.where(real, distance[t], -np.inf).argmax()
        assert got[t, 0] == index[t, slot]


@pytest.mark.parametrize("name", ["gram", "angle"])
def test_distances(xp: ModuleType, dtype: Any, name: str):
    """Against vectors in double, of which some are zero; sums over the members likewise."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 7))
    x[:5] = 0
    x = x.astype(dtype).astype(np.float64)
    rows, cols = padded_index(rng, 3, 21, 40), rng.integers(0, 40, (3, 4))
    norms, inner = (x * x).sum(axis=1), np.einsum("tid,tjd->tij", x[rows], x[cols])
    difference = x[rows][:, :, None] - x[cols][:, None]
    size = np.sqrt(norms[rows][:, :, None] * norms[cols][:, None])
    cosine = np.divide(inner, size, out=np.zeros_like(inner), where=size > 0)
    want = (difference**2).sum(axis=3) if name == "gram" else 1 - cosine**2
    real = rows >= 0
    for summed in (False, True):
        given = (a.astype(dtype) for a in (inner, norms))
        got = splits.distances(name, *map(xp.asarray, (*given, rows, cols)), summed=summed)
        assert got.dtype == dtype
        right = want.sum(axis=2) if summed else want
        atol = 200 * np.finfo(dtype).eps
        np.testing.assert_allclose(to_host(got)[real], right[real], rtol=0, atol=atol)


def test_zero_vectors_come_last(xp: ModuleType, dtype: Any):
    rng = np.random.default_rng(2)
    norms = rng.random(30).astype(dtype)
    norms[::3] = 0
    index, near, far = rng.permutation(30).reshape(2, 15), *rng.random((2, 2, 15)).astype(dtype)
    got = to_host(splits.split_keys(*map(xp.asarray, (near, far, norms, index))))
    zero = index % 3 == 0
    assert (got[zero] == np.finfo(dtype).max).all()
    np.testing.assert_array_equal(got[~zero], (near - far)[~zero])


def test_launches_of_a_level(stand_in: HostCupy):
    """Three for a sort, one for each other step; nothing is waited for, nothing sent."""
    xp, m = stand_in.cupy, 20
    index, near, offsets = xp.arange(4 * m).reshape(4, m), xp.zeros((4, m)), xp.arange(5) * m
    norms, inner, out = xp.ones(4 * m), xp.zeros((4, m, 2)), xp.empty(4 * m, np.int64)
    members = index[:, :2].copy()
    for count, step in (
        (1, lambda: splits.pad_segments(out, offsets, m)),
        (1, lambda: splits.distances("angle", inner, norms, index, members, True)),
        (1, lambda: splits.farthest(index, near)),
        (1, lambda: splits.split_keys(near, near, norms, index)),
        (3, lambda: splits.sort_segments(index, near, offsets, out)),
    ):
        step()
        stand_in.counters.reset()
        step()
        c = stand_in.counters
        assert c.launches + c.array_operations == count
        assert (c.synchronizations, c.host_to_device) == (0, 0)


@pytest.fixture(scope="module")
def on_host(host_library_folder) -> runner.HostKernels:
    return built_for_host(host_library_folder, ["splits"])["splits"]


@needs_compiler
@pytest.mark.parametrize("step", [1, 4])
def test_segments_on_host(on_host: runner.HostKernels, step: int):
    width = int(np.diff(OFFSETS[::step]).max()) + 2
    padded = under_schedules(launches.pad_segments, on_host, VALUES, OFFSETS, width, step)
    np.testing.assert_array_equal(padded, splits.pad_segments(VALUES, OFFSETS, width, step))
    order = np.argsort(np.where(padded < 0, 99, -padded), axis=1)
    for chosen in (None, order):
        want = np.empty(56, np.int64)
        splits.join_segments(padded, OFFSETS, want, chosen, step)
        got = under_schedules(launches.join_segments, on_host, padded, chosen, OFFSETS, step)
        np.testing.assert_array_equal(got, want)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 40, 130])
def test_steps_of_a_level_on_host(on_host: runner.HostKernels, dtype: Any, m: int):
    rng = np.random.default_rng(m)
    index, distance = level(rng, m, dtype)
    for warps in (1, 4):
        got = under_schedules(launches.farthest, on_host, index, distance, warps=warps)
        np.testing.assert_array_equal(got, splits.farthest(index, distance))
    norms, near = np.maximum(rng.standard_normal(4 * m), 0).astype(dtype), distance[::-1].copy()
    got = under_schedules(launches.split_keys, on_host, near, distance, norms, index)
    real = index >= 0
    want = splits.split_keys(near, distance, norms, index)
    np.testing.assert_array_equal(got[real], want[real])
    last = np.finfo(dtype).max
    got = under_schedules(launches.sort_keys, on_host, distance, index)
    np.testing.assert_array_equal(got, np.where(real, np.fmin(distance, last), np.inf))
    inner, cols = rng.standard_normal((4, m, 3)).astype(dtype), rng.integers(0, 4 * m, (4, 3))
    for name in DISTANCES:
        for summed in (False, True):
            got = under_schedules(
                launches.distances, on_host, name, inner, norms, index, cols, summed
            )
            with np.errstate(divide="ignore", over="ignore"):
                want = splits.distances(name, inner, norms, index, cols, summed)
            size = float(np.abs(want[real]).max(initial=1.0))
            atol = 20 * float(np.finfo(dtype).eps) * size
            np.testing.assert_allclose(got[real], want[real], rtol=0, atol=atol)

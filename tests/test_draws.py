"""Draws of columns of cells; one body for every array library, and kernel source on the host."""

from types import ModuleType

import numpy as np
import pytest
from host_cuda import runner
from host_cuda import sampling_launches as launches
from host_cupy import HostCupy
from kernel_cases import assert_one_launch, built_for_host, needs_compiler, under_schedules

from gpu_hodlr.batched import draws
from gpu_hodlr.devices import to_host


def cells(q: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """First positions and columns: few of each, many of one, padding, nothing at all."""
    rng = np.random.default_rng((q, seed))
    count = rng.integers(1, 5, (6, q))
    count[1] *= 50
    count[2, q // 2 :] = 0
    count[3] = 0
    count[4, -1] = 10_000
    return np.cumsum(count, axis=1) - count, count


@pytest.mark.parametrize("q", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("wanted", [1, 20, 300])
def test_chances_add_up_to_what_is_wanted(xp: ModuleType, q: int, wanted: int):
    """They fall with the distance, none is above 1, padding has none."""
    _, count = cells(q)
    got = to_host(draws.chances(xp.asarray(count), wanted))
    np.testing.assert_allclose(got, draws.chances(count, wanted), rtol=1e-12, atol=1e-14)
    total = count.sum(axis=1)
    np.testing.assert_allclose((got * count).sum(axis=1), np.minimum(total, wanted), rtol=1e-12)
    real = np.where(count > 0, got, 0.0)
    assert (np.diff(real, axis=1) <= 1e-12).all()
    assert real.max() <= 1


@pytest.mark.parametrize("q", [1, 31, 33, 100])
@pytest.mark.parametrize("wanted", [0, 1, 20, 300])
def test_columns_are_drawn_once(xp: ModuleType, q: int, wanted: int):
    """The same on every library, whatever the chances: their sums are exact."""
    first, count = cells(q)
    chance = draws.chances(count, wanted)
    start = np.random.default_rng(q).random((6, 1))
    given = [xp.asarray(x) for x in (first, count, chance)]
    position, drawn = map(to_host, draws.systematic(*given, wanted, xp.asarray(start)))
    want = draws.systematic(first, count, chance, wanted, start)
    np.testing.assert_array_equal(position, want[0])
    np.testing.assert_array_equal(drawn, want[1])
    for t in range(6):
        mine = position[t][position[t] >= 0]
        assert len(set(mine.tolist())) == len(mine) == min(wanted, count[t].sum())
        cell = np.searchsorted(np.cumsum(count[t]), mine, side="right")
        np.testing.assert_array_equal(drawn[t][position[t] >= 0], chance[t][cell])
        assert (drawn[t][position[t] < 0] == 1).all()


def test_each_is_one_launch(stand_in: HostCupy):
    xp = stand_in.cupy
    first, count = (xp.asarray(x) for x in cells(40))
    chance, start = draws.chances(count, 9), xp.zeros((6, 1))
    assert_one_launch(stand_in, lambda: draws.chances(count, 9))
    assert_one_launch(stand_in, lambda: draws.systematic(first, count, chance, 9, start))


@pytest.fixture(scope="module")
def on_host(host_library_folder) -> runner.HostKernels:
    return built_for_host(host_library_folder, ["draws"])["draws"]


@needs_compiler
@pytest.mark.parametrize("q", [1, 32, 70])
@pytest.mark.parametrize("wanted", [3, 150])
def test_draws_on_host(on_host: runner.HostKernels, q: int, wanted: int):
    first, count = cells(q)
    want, start = draws.chances(count, wanted), np.random.default_rng(q).random((6, 1))
    right = draws.systematic(first, count, want, wanted, start)
    for warps in (1, 3):
        got = under_schedules(launches.draw_chances, on_host, count, wanted, warps=warps)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
        drawn = under_schedules(
            launches.draw_systematic, on_host, first, count, want, wanted, start, warps=warps
        )
        for mine, its in zip(drawn, right, strict=True):
            np.testing.assert_array_equal(mine, its)

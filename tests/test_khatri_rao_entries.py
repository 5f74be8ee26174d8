"""Blocks of Khatri-Rao Gram matrices: thin ones, and those that are products of matrices."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from stacks import stack
from test_batched import Table

from gpu_hodlr import batched
from gpu_hodlr.devices import to_host

FEATURES, UNITS, SAMPLES = 40, 7, 23


def problem(dtype: Any, sparse: bool = False) -> tuple[np.ndarray, ...]:
    """Features, the maps of 400 indices, G, and the matrix itself."""
    rng = np.random.default_rng(3)
    features = stack(FEATURES, SAMPLES, dtype=dtype)
    g = stack(UNITS, UNITS, SAMPLES, dtype=dtype, seed=1)
    g = g + g.swapaxes(0, 1)
    if sparse:  # an elementwise output layer: its units share nothing
        g[4:, 4:] *= np.eye(UNITS - 4, dtype=dtype)[:, :, None]
    feature_of, unit_of = rng.integers(FEATURES, size=400), np.sort(rng.integers(UNITS, size=400))
    x = features[feature_of]
    exact = np.einsum("ik,jk,ijk->ij", x, x, g[unit_of][:, unit_of], dtype=np.float64)
    return features, feature_of, unit_of, g, exact


def wide_nodes() -> tuple[np.ndarray, np.ndarray]:
    """Rows of one to four units a node, padded anywhere; columns of all units."""
    rng = np.random.default_rng(4)
    rows = np.stack([np.arange(80 * t, 80 * t + 110) % 400 for t in range(4)])
    rows[:, ::13] = -1
    rows[2, 40:] = -1
    cols = np.stack([rng.permutation(400)[:130] for _ in rows])
    cols[:, 5::17] = -1
    cols[3] = -1
    return rows, cols


def blocks_of(exact: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    there = (rows >= 0)[:, :, None] & (cols >= 0)[:, None, :]
    return np.where(there, exact[rows[:, :, None], cols[:, None, :]], 0)


def close(got: Any, want: np.ndarray) -> None:
    got = to_host(got)
    atol = 100 * np.finfo(got.dtype).eps * max(1.0, np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("turned", [False, True], ids=["units of rows", "units of columns"])
def test_wide_blocks(xp: ModuleType, dtype: Any, sparse: bool, turned: bool):
    features, feature_of, unit_of, g, exact = problem(dtype, sparse)
    sides = wide_nodes()
    rows, cols = sides[::-1] if turned else sides
    got = batched.khatri_rao_entries(
        xp.asarray(features), feature_of, unit_of, Table(xp.asarray(g)), xp.asarray(rows), cols
    )
    close(got, blocks_of(exact, rows, cols))
    assert not to_host(got)[rows < 0].any()
    assert not to_host(got).swapaxes(1, 2)[cols < 0].any()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
def test_units_of_a_node_that_has_nothing_to_meet(
    xp: ModuleType, dtype: Any, turned: bool, wide: bool
):
    """They are in no pair of units, and the last of all."""
    features, feature_of, unit_of, g, exact = problem(dtype)
    count = 120 if wide else 3
    few, last = np.nonzero(unit_of < 3)[0], np.nonzero(unit_of == UNITS - 1)[0]
    one = np.stack([np.resize(few, count), np.resize(last, count)])
    other = np.stack([few[:count], np.full(min(count, len(few)), -1)])
    rows, cols = (other, one) if turned else (one, other)
    got = batched.khatri_rao_entries(
        xp.asarray(features), feature_of, unit_of, Table(xp.asarray(g)), xp.asarray(rows), cols
    )
    close(got, blocks_of(exact, rows, cols))


@pytest.fixture
def khatri_rao() -> ModuleType:
    return importlib.import_module("gpu_hodlr.batched.cupy_khatri_rao")


@pytest.mark.parametrize("room", [1 << 30, 40_000, 3_000])
def test_what_is_multiplied_at_a_time_is_bounded(
    stand_in: HostCupy, dtype: Any, room: int, khatri_rao: ModuleType, monkeypatch: Any
):
    """Groups, and at last samples, one part after the other."""
    xp = stand_in.cupy
    features, feature_of, unit_of, g, exact = problem(dtype)
    rows, cols = wide_nodes()
    monkeypatch.setattr(khatri_rao, "_SCRATCH", room)
    largest, multiply = [], khatri_rao.gemm

    def gemm(a: Any, b: Any, c: Any, **options: Any) -> None:
        largest.append(a.nbytes + b.nbytes + c.nbytes)
        multiply(a, b, c, **options)

    monkeypatch.setattr(khatri_rao, "gemm", gemm)
    got = batched.khatri_rao_entries(
        xp.asarray(features), feature_of, unit_of, Table(xp.asarray(g)), rows, cols
    )
    close(got, blocks_of(exact, rows, cols))
    a_group = (16 + 130 + 16 * 130) * features.itemsize  # of one sample: the least there can be
    assert max(largest) <= max(room, 8 * a_group)
    if room < 1 << 30:
        assert len(largest) > 4


def test_thin_blocks_are_left_to_the_kernel(stand_in: HostCupy, dtype: Any, khatri_rao: ModuleType):
    """Few indices a unit on both sides, or few columns: panels would cost more than they save."""
    xp = stand_in.cupy
    features, feature_of, unit_of, g, exact = problem(dtype)
    rows, cols = wide_nodes()
    table, device = Table(xp.asarray(g)), xp.asarray(features)

    def launched(rows: np.ndarray, cols: np.ndarray) -> tuple[int, int]:
        stand_in.counters.reset()
        got = batched.khatri_rao_entries(device, feature_of, unit_of, table, rows, cols)
        close(got, blocks_of(exact, rows, cols))
        return stand_in.counters.launches, stand_in.counters.library_calls

    assert launched(rows, cols[:, :10]) == (1, 0)
    assert launched(rows[:, ::8].copy(), cols[:, ::8].copy()) == (1, 0)
    by_unit = np.argsort(unit_of, kind="stable")
    wide = np.stack([by_unit[:50], by_unit[-50:]])  # of a unit each, or nearly
    launches, products = launched(wide, cols[:2])
    assert 1 <= products <= 4  # heights of 16, 32, 64 and 128
    assert launches in (3 * products, 3 * products + 2)
    mixed = wide.copy()
    mixed[:, ::9] = by_unit[[100, 150, 200, 250, 300, 340]]  # a few of other units in each node
    launches, products = launched(mixed, cols[:2])
    assert launches == 3 * products + 2  # the kernel, and its rows put where they belong


def test_the_host_waits_once_for_indices_of_the_device(stand_in: HostCupy):
    xp = stand_in.cupy
    features, feature_of, unit_of, g, exact = problem(np.float64)
    table = SimpleNamespace(
        pairs=lambda u, v: xp.asarray(g[u, v]), coupled=lambda u, v: np.ones(len(u), bool)
    )
    rows, cols = map(xp.asarray, wide_nodes())
    stand_in.counters.reset()
    got = batched.khatri_rao_entries(xp.asarray(features), feature_of, unit_of, table, rows, cols)
    assert stand_in.counters.synchronizations == 1
    close(got, blocks_of(exact, *wide_nodes()))

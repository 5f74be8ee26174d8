"""Blocked pivoted QR by Gram matrices, against LAPACK's QR with column pivoting."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from host_cupy import HostCupy
from scripts import script
from stacks import stack

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.bases.samplers import Sample, regression_inflation
from gpu_hodlr.bases.sweep import bases_of_level
from gpu_hodlr.batched import blocked_id, tall
from gpu_hodlr.devices import to_host

SHAPES = [(70, 90), (90, 70), (96, 40)]
PANEL = 32
NEGLIGIBLE = [0.0, 1e-7]  # of the squared norm


def samples(case: str, m: int, s: int) -> np.ndarray:
    """Three nodes."""
    rng = np.random.default_rng(m + s)
    k = min(m, s)
    S = rng.standard_normal((3, m, s))
    if case == "rows graded":
        S *= 10.0 ** -rng.uniform(0, 12, (3, m, 1))
    if case == "falling":  # each node faster than the one before
        fall = 10.0 ** -(np.array([2, 6, 14])[:, None, None] * np.arange(k) / k)
        S = (S[:, :, :k] * fall) @ rng.standard_normal((3, k, s))
    if case == "rank deficient":
        S = S[:, :, : k // 3] @ rng.standard_normal((3, k // 3, s))
    if case == "equal rows":
        S[:, m // 2 :] = S[:, : m - m // 2]
    if case == "smooth":
        x, y = rng.random((3, m, 1)), 1.5 + rng.random((3, 1, s))
        S = 1 / np.abs(x - y)
    if case == "padded":
        S[0] = 0
        S[1, 1::2] = 0
        S[2, :, s // 2 :] = 0
    return S


CASES = [
    "random", "rows graded", "falling", "rank deficient", "equal rows", "smooth", "padded",
]  # fmt: skip


def on_host(factor: tuple[Any, Any, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pivots, r, tails = (to_host(x) for x in factor)
    return pivots, r, tails


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", NEGLIGIBLE)
def test_as_good_as_lapacks(xp: ModuleType, dtype: Any, case: str, part: float):
    eps = float(np.finfo(dtype).eps)
    for m, s in SHAPES:
        S = samples(case, m, s).astype(dtype)
        negligible = part * float((S.astype(float) ** 2).sum()) / 3
        pivots, r, tails = on_host(blocked_id.pivoted_qr(xp.asarray(S), 1000, negligible))
        k = min(m, s)
        assert (pivots.shape, r.shape, tails.shape) == ((3, m), (3, k, m), (3, k + 1))
        assert (r.dtype, tails.dtype) == (dtype, np.float64)
        np.testing.assert_array_equal(np.sort(pivots), np.tile(np.arange(m), (3, 1)))
        assert not np.tril(r, -1).any()
        assert (np.diff(tails) <= 0).all()
        for t in range(3):
            A = S[t, pivots[t]].astype(np.float64)
            energy = float((A**2).sum())
            # As exact as is asked for, and backward stable.
            below = max(negligible, (8 * eps) ** 2 * energy)
            off = np.linalg.norm(r[t].astype(float).T @ r[t] - A @ A.T)
            assert off <= 4 * np.sqrt(below * energy) * (part > 0) + 30 * eps * energy
            want = scipy.linalg.qr(S[t].T.astype(float), mode="r", pivoting=True)[0][:k]
            want = np.append(np.cumsum((want**2).sum(axis=1)[::-1])[::-1], 0.0)
            for j in {*range(0, k + 1, PANEL), k}:
                assert tails[t, j] <= 1.5 * want[j] + 2 * below, j
                assert want[j] <= 1.5 * tails[t, j] + 2 * below, j
            rank = int(np.count_nonzero(tails[t, :k] > below))
            T = scipy.linalg.solve_triangular(r[t, :rank, :rank].astype(float), r[t, :rank, rank:])
            assert np.abs(T).max(initial=0.0) <= 10
            left = A[rank:] - T.T @ A[:rank]
            assert (left**2).sum() <= 2 * tails[t, rank] + (100 * eps) ** 2 * energy


@pytest.mark.parametrize("scale", [1e-290, 1e-150, 1e150, 1e300])
def test_any_scale(xp: ModuleType, scale: float):
    S = samples("falling", 40, 50) / 100
    want = on_host(blocked_id.pivoted_qr(xp.asarray(S), 1000, 0.0))
    got = on_host(blocked_id.pivoted_qr(xp.asarray(S * scale), 1000, 0.0))
    known = want[2][:, :-1] > 1e-20
    for t in range(3):
        rank = int(known[t].sum())
        np.testing.assert_array_equal(got[0][t, :rank], want[0][t, :rank])
        np.testing.assert_allclose(
            got[1][t, :rank] / scale, want[1][t, :rank], rtol=0, atol=1e-9
        )  # fmt: skip


def test_samples_are_left_alone(xp: ModuleType):
    """Of several rounds as well, whose rows are taken off a copy."""
    S = xp.asarray(samples("falling", 40, 50))
    kept = S.copy()
    blocked_id.of_scaled(S, 1000, 0.0, np.dtype(np.float64))
    blocked_id.pivoted_qr(S, 1000, 0.0)
    np.testing.assert_array_equal(to_host(S), to_host(kept))


def test_nothing_of_other_nodes_and_of_a_nan_no_silence(xp: ModuleType, dtype: Any):
    S = samples("random", 50, 60).astype(dtype)
    S[0, 3, 5], S[1, 7, 2] = np.nan, np.inf
    pivots, r, tails = on_host(blocked_id.pivoted_qr(xp.asarray(S), 1000, 0.0))
    assert not np.isfinite(tails[:2]).any()
    alone = on_host(blocked_id.pivoted_qr(xp.asarray(S[2:]), 1000, 0.0))
    np.testing.assert_array_equal(pivots[2], alone[0][0])
    np.testing.assert_allclose(r[2], alone[1][0], rtol=0, atol=50 * np.finfo(dtype).eps)


@pytest.mark.parametrize("part", NEGLIGIBLE)
def test_steps_at_most(xp: ModuleType, part: float):
    for case in ("random", "falling"):
        S = samples(case, 70, 60)
        whole = on_host(blocked_id.pivoted_qr(xp.asarray(S), 1000, part))
        for most in (0, 1, 31, 32, 33, 45):
            pivots, r, tails = on_host(blocked_id.pivoted_qr(xp.asarray(S), most, part))
            assert r.shape == (3, 60, 70)
            assert not r[:, most:].any()
            np.testing.assert_allclose(tails[:, : most + 1], whole[2][:, : most + 1], rtol=1e-6)
            np.testing.assert_array_equal(np.diff(tails[:, most:]), 0)
            np.testing.assert_array_equal(pivots[:, :most], whole[0][:, :most])


def test_it_stops_where_the_rest_is_negligible(xp: ModuleType):
    S = samples("falling", 90, 100)
    energy = (S**2).sum(axis=(1, 2))
    for part in (1e-2, 1e-8, 1e-14):
        _, r, tails = on_host(blocked_id.pivoted_qr(xp.asarray(S), 1000, part * energy.min()))
        steps = (np.diagonal(r, axis1=1, axis2=2) != 0).sum(axis=1)
        assert (tails[:, -1] <= part * energy.min()).all()
        assert steps[2] < steps[1] <= steps[0] <= 90
        # Two panels more than are needed are too many.
        assert (tails[[0, 1, 2], np.maximum(steps - 2 * PANEL, 0)] > part * energy.min()).all()


@pytest.mark.parametrize("part", [1e-20, 1e-7])
def test_the_bits_do_not_depend_on_the_stack(stand_in: HostCupy, part: float):
    """Of some nodes there are more rounds than of others."""
    S = samples("falling", 90, 70)
    negligible = part * float((S**2).sum())
    cp = stand_in.cupy
    together = on_host(blocked_id.pivoted_qr(cp.asarray(S), 1000, negligible))
    for t in range(3):
        alone = on_host(blocked_id.pivoted_qr(cp.asarray(S[t : t + 1]), 1000, negligible))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a[0], b[t])
    again = batched.pivoted_qr(S, None, negligible)
    for t in range(3):
        alone = batched.pivoted_qr(S[t : t + 1], None, negligible)
        np.testing.assert_array_equal(alone.r[0], again.r[t])
        np.testing.assert_array_equal(alone.tails[0], again.tails[t])


def test_numpy_takes_it_where_gram_matrices_are_exact_enough(monkeypatch: pytest.MonkeyPatch):
    """And wide enough to be quicker than GEQP3: node by node, whatever the others are."""
    calls = []
    original = blocked_id.of_scaled

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[0].shape)
        return original(*arguments)

    monkeypatch.setattr(blocked_id, "of_scaled", counted)
    S = stack(3, 40, 30, dtype=np.float64) * np.array([1.0, 1e3, 0.0])[:, None, None]
    energy = float((S[0] ** 2).sum())
    both = batched.pivoted_qr(S, None, 1e-10 * energy)
    assert calls == [(1, 40, 30)]  # the second is too large for that, and the last is zero
    for t in range(3):
        alone = batched.pivoted_qr(S[t : t + 1], None, 1e-10 * energy)
        for name in ("pivots", "r", "tails"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(both, name)[t])
    calls.clear()
    batched.pivoted_qr(S[:2], None, 1e-4 * energy)
    assert calls == [(2, 40, 30)]
    batched.pivoted_qr(S, None, 1e-16 * energy)
    batched.pivoted_qr(S, None, 0.0)
    batched.pivoted_qr(S[:, :, :20], None, 1e-10 * energy)
    batched.pivoted_qr(1e-200 * S, None, 1e-10)  # whose squares are 0
    batched.pivoted_qr(1e200 * S[:1, :, :1], None, 1e-10)  # whose squares are infinite
    huge = batched.pivoted_qr(1e160 * S[:1], None, 1e300)
    assert np.isfinite(huge.r).all()
    assert len(calls) == 1


def test_a_gpu_takes_it_for_large_matrices(stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch):
    from gpu_hodlr.batched import cupy_linalg

    calls = []
    original = blocked_id.pivoted_qr

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[0].shape)
        return original(*arguments)

    monkeypatch.setattr(blocked_id, "pivoted_qr", counted)
    monkeypatch.setattr(cupy_linalg, "_BLOCKED", 40 * 50)
    for shape in ((2, 40, 49), (2, 40, 50), (2, 110, 50), (0, 40, 50)):
        batched.pivoted_qr(stand_in.cupy.asarray(stack(*shape, dtype=np.float64)))
    assert calls == [(2, 40, 50)]


def test_a_gpu_waits_few_times_and_makes_two_calls_a_panel(stand_in: HostCupy):
    S = stand_in.cupy.asarray(samples("random", 300, 320))
    negligible = 1e-9 * float((S * S).sum())
    blocked_id.pivoted_qr(S, 1000, negligible)
    stand_in.counters.reset()
    blocked_id.pivoted_qr(S, 1000, negligible)
    assert stand_in.counters.synchronizations <= 3  # after 4 and 8 panels, and at the end
    panels = 10
    assert stand_in.counters.launches <= panels + 8
    assert stand_in.counters.array_operations <= 18
    assert stand_in.counters.library_calls <= panels + 1


@pytest.mark.parametrize("rtol", [1e-3, 1e-9])
def test_a_matrix_compressed_with_it(xp: ModuleType, rtol: float, monkeypatch: pytest.MonkeyPatch):
    """Of products, all levels by blocks."""
    if xp is not np:
        from gpu_hodlr.batched import cupy_linalg

        monkeypatch.setattr(cupy_linalg, "_BLOCKED", 0)
    x = np.linspace(0, 1, 300)
    dense = 1 / (1 + 30 * np.abs(x[:, None] - x))
    K = gh.compress(xp.asarray(dense), rtol=rtol, leaf_size=40, scheme="hss")
    error = np.linalg.norm(to_host(K @ xp.eye(300)) - dense) / np.linalg.norm(dense)
    assert error <= 3 * rtol


class OneSample:
    """A level of samples that stay as they are."""

    sampled = None

    def __init__(self, S: np.ndarray, scale: float) -> None:
        self.num_samples = S.shape[2]
        noise = np.zeros(len(S))
        self._sample = Sample(S, regression_inflation(self.num_samples, scale), noise)

    def samples(self) -> Any:
        yield self._sample

    def check(self, order: Any, T: Any) -> None:
        return None

    def grow(self, nodes: Any = None) -> bool:
        return False


def test_what_is_negligible_is_in_the_units_of_the_sample(monkeypatch: pytest.MonkeyPatch):
    """Sums over 50 columns are 50 times their mean, and so is what they may be wrong by."""
    given: list[float] = []
    original = tall.pivoted_qr

    def noted(samples: Any, max_rank: Any, negligible: float) -> Any:
        given.append(negligible)
        return original(samples, max_rank, negligible)

    monkeypatch.setattr(tall, "pivoted_qr", noted)
    S = samples("falling", 30, 50)
    ranks = []
    for scaled, scale in ((S, 1.0), (S / 50**0.5, 50.0)):
        level = OneSample(scaled, scale)
        (_, T, _), _ = bases_of_level(level, np.zeros((3, 30), bool), 1e-2, 30)
        ranks.append(T.shape[2])
    assert given[0] == pytest.approx(50 * given[1])
    assert given[1] == pytest.approx(1e-3 * 1e-2 / 3)
    assert ranks[0] == ranks[1] < 30


def test_the_script_measures_both_ways(stand_in: HostCupy, capsys: pytest.CaptureFixture[str]):
    measuring = script("pivoted_qr")
    for device in ("cpu", "cuda"):
        row = measuring.measure(2, 20, 30, device, 1e9)
        assert row["nodes"] == (1 if device == "cpu" else 2)
        assert row["floor"] == pytest.approx(row["nodes"] * (12_000 + 8000 / 3) * 1e-6)
        assert row["one by one"] > 0 < row["products"]


def test_the_script_compresses_both_ways(capsys: pytest.CaptureFixture[str]):
    """GEQP3 alone, then as it is used; both reach the same."""
    pytest.importorskip("torch")
    measuring = script("pivoted_qr")
    rows = measuring.tell_compressions(measuring.compressions("mnist", 1e-2, 200, 1, small=True))
    assert [row["way"] for row in rows] == ["one by one", "products"]
    assert {row["N"] for row in rows} == {rows[0]["N"]}
    for row in rows:
        assert row["error"] <= 1e-2
        assert 0 < row["pivoted_qr_s"] < row["s"]
    assert "times faster by products" in capsys.readouterr().out

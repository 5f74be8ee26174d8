"""What is around the factorization of Gram matrices; the kernels on the host."""

from typing import Any

import numpy as np
import pytest
from host_cuda import factor_launches
from kernel_cases import DTYPES, built_for_host, needs_compiler, under_schedules

from gpu_hodlr.batched import blocked_id
from gpu_hodlr.devices import to_host


def on_host(arrays: Any) -> list[np.ndarray]:
    return [to_host(x) for x in arrays]


def stacks_of_all_scales(dtype: Any) -> np.ndarray:
    """Tiny, huge, zero, subnormal, infinite and not a number; a power of two and the next below."""
    S = np.random.default_rng(0).uniform(-1, 1, (9, 7, 11)).astype(dtype)
    exponent = np.finfo(dtype).maxexp
    S[1] = np.ldexp(S[1], -exponent + 8)
    S[2] = np.ldexp(S[2], exponent - 2)
    S[3] = 0
    S[4, 2, 3], S[5, 2, 3] = np.inf, np.nan
    S[6], S[7] = S[6] * 0.5, S[7] * 0.5
    S[6, 1, 1], S[7, 1, 1] = 1.0, -np.nextafter(dtype(1.0), dtype(0.0))
    S[8] = np.finfo(dtype).smallest_subnormal * 5
    return S


def test_samples_are_scaled_to_about_one(xp: Any, dtype: Any):
    S = stacks_of_all_scales(dtype)
    out, down, up = on_host(blocked_id.scaled(xp.asarray(S)))
    assert out.dtype == down.dtype == up.dtype == np.float64
    np.testing.assert_array_equal(down * up, 1.0)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(out, S.astype(np.float64) * down[:, None, None])
    largest = np.abs(out[[0, 1, 2, 6, 7, 8]]).max(axis=(1, 2))
    if dtype == np.float64:  # beyond 2^-1000 and 2^1000 it stays small, or large
        np.testing.assert_array_equal(down[[1, 2, 8]], 2.0 ** np.array([1000, -1000, 1000]))
        largest = largest[[0, 3, 4]]
    assert (largest >= 1).all()
    assert (largest < 2).all()
    np.testing.assert_array_equal(down[[3, 4, 5]], 1.0)


def test_limits_of_a_round(xp: Any):
    energy, enough = np.array([1.0, 4.0, 0.0, np.nan, np.inf]), np.array([0.5, 0.5, 0.0, 1.0, 1.0])
    found = on_host(blocked_id.limits(xp.asarray(energy), xp.asarray(enough), 0.25, 0.125))
    np.testing.assert_array_equal(found[0], 0.25 * energy)
    np.testing.assert_array_equal(found[1], [True, False, True, True, False])
    np.testing.assert_array_equal(found[2], [0.5, 0.5, 0.0, 1.0, np.inf])


@pytest.mark.parametrize("k", [0, 1, 31, 32, 33, 100])
def test_tails_of_a_round(xp: Any, k: int):
    squares = np.random.default_rng(k).random((5, k))
    total = squares.sum(axis=1)
    energy = total + np.array([1.0, 1e-9, 0.0, np.nan, np.inf])
    unknown = np.full(5, 1e-6)
    left, tails = on_host(blocked_id.left_and_tails(*map(xp.asarray, (energy, unknown, squares))))
    np.testing.assert_allclose(left, [1.0, 0.0, 0.0, np.nan, np.inf], rtol=1e-13)
    want = left[:, None] + np.array([[row[i:].sum() for i in range(k + 1)] for row in squares])
    np.testing.assert_allclose(tails, want, rtol=1e-13)
    assert (np.diff(tails[:3], axis=1) <= 0).all()
    np.testing.assert_array_equal(tails[:, k], left)


@pytest.mark.parametrize("nodes", [1, 32, 70])
def test_what_the_host_sees_of_a_round(xp: Any, nodes: int):
    rng = np.random.default_rng(nodes)
    ranks, before = rng.integers(0, 9, nodes), rng.integers(0, 3, nodes)
    for exact in (np.ones(nodes, bool), np.arange(nodes) > 0):
        for most in (0, 100):
            done = xp.asarray(before.copy())
            found = on_host((blocked_id.seen(xp.asarray(exact), xp.asarray(ranks), done, most),))
            ended = exact | (before + ranks >= most)
            assert found[0].tolist() == [exact.all(), ended.all(), ranks.max()]
            np.testing.assert_array_equal(to_host(done), before + ranks)


@needs_compiler
def test_a_round_on_host(host_library_folder: Any):
    kernels = built_for_host(host_library_folder, ["gram_rounds"])["gram_rounds"]
    for dtype in DTYPES:
        S = stacks_of_all_scales(dtype)
        want, *powers = blocked_id.scaled(S)
        for threads in (32, 96):
            got = under_schedules(factor_launches.sample_powers, kernels, S, threads=threads)
            for mine, right in zip(got, powers, strict=True):
                np.testing.assert_array_equal(mine, right)
        scaled = under_schedules(factor_launches.scaled_samples, kernels, S, powers[0])
        np.testing.assert_array_equal(scaled, want)
    rng = np.random.default_rng(1)
    energy, enough, squares = 9 * rng.random(70), rng.random(70), rng.random((70, 45)) / 9
    got = under_schedules(factor_launches.round_limits, kernels, energy, enough, 0.1, 0.01)
    for mine, right in zip(got, blocked_id.limits(energy, enough, 0.1, 0.01), strict=True):
        np.testing.assert_array_equal(mine, right)
    got = under_schedules(factor_launches.round_tails, kernels, energy, enough, squares)
    for mine, right in zip(got, blocked_id.left_and_tails(energy, enough, squares), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-13, atol=1e-14)
    exact, ranks, done = rng.random(70) < 0.5, rng.integers(0, 9, 70), rng.integers(0, 9, 70)
    got = under_schedules(factor_launches.round_seen, kernels, exact, ranks, done, 8)
    np.testing.assert_array_equal(got[0], blocked_id.seen(exact, ranks, done, 8))
    np.testing.assert_array_equal(got[1], done)

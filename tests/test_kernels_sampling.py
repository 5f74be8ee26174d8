"""Interpolation, normal numbers and merged lists: kernel source executed on the host."""

import numpy as np
import pytest
from host_cuda import factor_launches, launches, runner
from kernel_cases import DTYPES, built_for_host, needs_compiler, under_schedules
from merge_cases import SHAPES, lists, merged

from gpu_hodlr import batched

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def on_host(host_library_folder) -> dict[str, runner.HostKernels]:
    return built_for_host(host_library_folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("warps", [1, 8])
@pytest.mark.parametrize(
    ("m", "s", "rank"), [(1, 1, 0), (5, 9, 5), (40, 12, 20), (70, 80, 33), (100, 40, 7)]
)
def test_interpolation_on_host(on_host, dtype, warps, m, s, rank) -> None:
    """Against LAPACK's, of the same pivoted QR; nodes of full, low and no rank."""
    rng = np.random.default_rng(m)
    S = np.stack([rng.standard_normal((m, s)) for _ in range(4)])
    S[1] = rng.standard_normal((m, 3)) @ rng.standard_normal((3, s))
    S[2] = 0
    padding = rng.random((4, m)) < 0.3
    S[padding] = 0
    qr = batched.pivoted_qr(S.astype(dtype))
    order, T, ranks = under_schedules(
        factor_launches.interpolation, on_host["interpolation"], qr,
        batched.squared_rounding(qr.tails[:, 0], qr.r.dtype), rank, padding, warps=warps,
    )  # fmt: skip
    want_order, want_T, want_ranks = batched.interpolation(qr, rank, padding)
    np.testing.assert_array_equal(order, want_order)
    np.testing.assert_array_equal(ranks, want_ranks)
    size = max(1.0, np.abs(want_T).max(initial=0.0))
    np.testing.assert_allclose(T, want_T, rtol=0, atol=2000 * np.finfo(dtype).eps * size)
    for t, found in enumerate(ranks):
        assert not T[t, :, found:].any()


def philox(lower: int, upper: int, seed: int) -> list[int]:
    """Philox4x32-10 of Random123 (Salmon et al., SC11), of a counter of two halves."""
    word = [lower & 0xFFFFFFFF, lower >> 32, upper & 0xFFFFFFFF, upper >> 32]
    low, high = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * word[0], 0xCD9E8D57 * word[2]
        word = [(b >> 32) ^ word[1] ^ low, b, (a >> 32) ^ word[3] ^ high, a]
        word = [w & 0xFFFFFFFF for w in word]
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return word


def test_the_reference_is_philox() -> None:
    """The known answers of Random123: zeros; the digits of pi."""
    assert philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    pi = philox(0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822)
    assert pi == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("seed", [0, 2**63 - 25])
def test_normal_numbers_on_host(on_host, seed) -> None:
    """Box and Muller of Philox, in both types, of any columns, by any blocks."""
    n, columns = 301, range(2**32 - 2, 2**32 + 3)  # both words of a column's number count
    words = np.array([[philox(i, j, seed) for j in columns] for i in range(151)], dtype=np.uint64)
    for dtype in DTYPES:
        if dtype == np.float64:
            bits = (words[..., [0, 2]] >> 5 << 26) + (words[..., [1, 3]] >> 6)
            u = (bits + 0.5) * 2.0**-53
        else:
            u = ((words[..., [0, 2]] >> 8) + 0.5) * 2.0**-24
        angle = 2 * np.pi * u[..., 1]
        pairs = np.sqrt(-2 * np.log(u[..., 0])) * np.stack([np.cos(angle), np.sin(angle)])
        want = pairs.swapaxes(0, 1).reshape(302, 5)[:n]
        for blocks in (1, 3):
            got = under_schedules(
                launches.normal, on_host["normal"], n, columns, dtype, seed_of_numbers=seed,
                blocks=blocks,
            )  # fmt: skip
            allowed = 20 * float(np.finfo(dtype).eps)
            np.testing.assert_allclose(got, want, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_smallest_on_host(on_host, dtype, warps, shape) -> None:
    arguments = lists(*shape, dtype)
    kernels = on_host["merge_smallest"]
    got = under_schedules(launches.merge_smallest, kernels, *arguments, warps=warps)
    for mine, right in zip(got, merged(*arguments), strict=True):
        np.testing.assert_array_equal(mine, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_of_long_lists_on_host(on_host, dtype, shape) -> None:
    """Lists that stay in global memory."""
    arguments = lists(*shape, dtype)
    kernels = on_host["merge_smallest"]
    got = under_schedules(launches.merge_smallest, kernels, *arguments, long=True)
    for mine, right in zip(got, merged(*arguments), strict=True):
        np.testing.assert_array_equal(mine, right)

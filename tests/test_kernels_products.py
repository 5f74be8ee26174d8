"""Narrow products and inner products: kernel source executed on the host."""

from typing import Any

import numpy as np
import pytest
from host_cuda import launches, runner
from kernel_cases import DTYPES, built_for_host, needs_compiler, padded_index, under_schedules

from gpu_hodlr.batched import stored

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def on_host(host_library_folder) -> dict[str, runner.HostKernels]:
    return built_for_host(host_library_folder)


@pytest.fixture
def kernels(on_host) -> runner.HostKernels:
    return on_host["basis_products"]


def _close(got: np.ndarray, want: np.ndarray, terms: int) -> None:
    """`want` is in float64; errors grow about as the root of the number of terms."""
    eps = np.finfo(got.dtype).eps
    atol = 8 * eps * (np.sqrt(terms) + 1) * max(1.0, np.abs(want).max(initial=0.0))
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def _basis(rng: np.random.Generator, nodes: int, rows: int, r: int, dtype: Any) -> Any:
    """T, an order, and the basis U in float64."""
    T = rng.standard_normal((nodes, rows - r, r)).astype(dtype)
    order = np.argsort(rng.random((nodes, rows)), axis=1)
    full = np.concatenate([np.broadcast_to(np.eye(r), (nodes, r, r)), T], axis=1)
    U = np.empty((nodes, rows, r))
    np.put_along_axis(U, order[:, :, None], full, axis=1)
    return T, order, full, U


# rows, r, block: one strip or tile and many, even and not; no other rows than the skeleton's
SHAPES = [
    (3, 1, (8, 4)),
    (7, 7, (16, 2)),
    (40, 33, (8, 8)),
    (75, 21, (32, 3)),
    (100, 64, (32, 8)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize(("rows", "r", "block"), SHAPES)
def test_products_with_bases_on_host(kernels, dtype, k, rows, r, block) -> None:
    rng = np.random.default_rng(rows + k)
    T, order, in_order, U = _basis(rng, 2, rows, r, dtype)
    x = rng.standard_normal((2, rows, k)).astype(dtype)
    z = rng.standard_normal((2, r, k)).astype(dtype)
    for how, basis in ((order, U), (None, in_order)):
        down = under_schedules(launches.restrict_rows, kernels, T, x, how, block=block)
        _close(down, basis.swapaxes(1, 2) @ x.astype(np.float64), rows)
        up = under_schedules(launches.prolong_rows, kernels, T, z, how, block=block)
        _close(up, basis @ z.astype(np.float64), r)
        added = under_schedules(launches.prolong_rows, kernels, T, z, how, x, block=block)
        _close(added, x + basis @ z.astype(np.float64), r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize(("rows", "r", "block"), SHAPES)
def test_products_with_bases_of_rows_of_vectors_on_host(kernels, dtype, k, rows, r, block) -> None:
    """Of the leaves: an index of all rows, where padding is zero, and not written."""
    rng = np.random.default_rng(rows + k)
    T, _, U, _ = _basis(rng, 2, rows, r, dtype)
    U = np.concatenate([np.broadcast_to(np.eye(r), (2, r, r)), T.astype(float)], axis=1)
    index = rng.permutation(2 * rows).reshape(2, rows)
    index[0, -1] = -1  # a row of its basis, or of its skeleton, that is not there
    real = index >= 0
    x = rng.standard_normal((2 * rows, k)).astype(dtype)
    z = rng.standard_normal((2, r, k)).astype(dtype)
    picked = np.where(real[:, :, None], x[index], 0).astype(float)
    down = under_schedules(launches.restrict_rows, kernels, T, x, index, block=block)
    _close(down, U.swapaxes(1, 2) @ picked, rows)
    want = x.astype(float)
    want[index[real]] += (U @ z)[real]
    added = under_schedules(launches.prolong_rows, kernels, T, z, index, x, block=block)
    _close(added, want, r)
    D = rng.standard_normal((2, rows, rows)).astype(dtype)
    got = under_schedules(
        launches.block_diagonal, kernels, D, x, index, scattered=True, block=block
    )
    _close(got[index[real]], (D.astype(float) @ picked)[real], rows)
    assert np.isnan(got[np.setdiff1d(np.arange(2 * rows), index)]).all()  # not written


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "r", "k"), [(530, 6, 5), (530, 523, 5), (2060, 5, 1), (6, 0, 3)])
def test_products_with_bases_staged_in_parts_on_host(kernels, dtype, rows, r, k) -> None:
    """More rows or columns than the shared memory holds at a time; and a rank of 0."""
    rng = np.random.default_rng(r)
    T, order, _, U = _basis(rng, 1, rows, r, dtype)
    x = rng.standard_normal((1, rows, k)).astype(dtype)
    z = rng.standard_normal((1, r, k)).astype(dtype)
    up = under_schedules(launches.prolong_rows, kernels, T, z, order)
    _close(up, U @ z.astype(np.float64), r)
    if r > 0:
        down = under_schedules(launches.restrict_rows, kernels, T, x, order)
        _close(down, U.swapaxes(1, 2) @ x.astype(np.float64), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 4, 7])
@pytest.mark.parametrize(("r", "block"), [(1, (8, 4)), (19, (16, 2)), (45, (32, 8)), (270, (8, 8))])
def test_couplings_on_host(kernels, dtype, k, r, block) -> None:
    rng = np.random.default_rng(r + k)
    pairs = 1 if r > 200 else 2
    B = rng.standard_normal((pairs, r, r)).astype(dtype)
    w = rng.standard_normal((2 * pairs, r, k)).astype(dtype)
    want = np.empty(w.shape)
    want[0::2] = B.astype(np.float64) @ w[1::2]
    want[1::2] = B.astype(np.float64).swapaxes(1, 2) @ w[0::2]
    _close(under_schedules(launches.couple, kernels, B, w, block=block), want, r)
    target = rng.standard_normal(w.shape).astype(dtype)
    added = under_schedules(launches.couple, kernels, B, w, target, block=block)
    _close(added, target + want, r)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize(("rows", "r", "block"), SHAPES)
def test_products_with_bfloat16_on_host(kernels, k, rows, r, block) -> None:
    """What the kernels of float32 give for the same numbers, to the bit."""
    rng = np.random.default_rng(rows + k)
    T, order, _, _ = _basis(rng, 2, rows, r, np.float32)
    B = rng.standard_normal((1, r, r)).astype(np.float32)
    x, z = (rng.standard_normal((2, m, k)).astype(np.float32) for m in (rows, r))
    (T, T32), (B, B32) = (
        (bits, stored.unpacked(bits, stored.FLOAT32))
        for bits in (stored.packed(a, "bfloat16") for a in (T, B))
    )
    for how in (order, None):
        down, up = (
            [under_schedules(launch, kernels, basis, v, how, block=block) for basis in (T, T32)]
            for launch, v in ((launches.restrict_rows, x), (launches.prolong_rows, z))
        )
        np.testing.assert_array_equal(*down)
        np.testing.assert_array_equal(*up)
    across = [under_schedules(launches.couple, kernels, b, z, block=block) for b in (B, B32)]
    np.testing.assert_array_equal(*across)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize(("m", "block"), [(1, (8, 4)), (33, (16, 2)), (70, (32, 8)), (260, (8, 8))])
def test_block_diagonal_on_host(kernels, dtype, k, m, block) -> None:
    rng = np.random.default_rng(m + k)
    D = rng.standard_normal((2, m, m)).astype(dtype)
    x = rng.standard_normal((50, k)).astype(dtype)
    index = padded_index(rng, 2, m, 50)
    got = under_schedules(launches.block_diagonal, kernels, D, x, index, block=block)
    _close(got, D.astype(np.float64) @ np.where(index[:, :, None] >= 0, x[index], 0), m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 4, 5])
@pytest.mark.parametrize(
    ("m", "d", "threads"), [(1, 1, 32), (70, 32, 64), (100, 45, 96), (9, 300, 32)]
)
def test_inner_products_on_host(on_host, dtype, count, m, d, threads) -> None:
    rng = np.random.default_rng(m + count)
    x = rng.standard_normal((40, d)).astype(dtype)
    index, centers = padded_index(rng, 3, m, 40), padded_index(rng, 3, count, 40)
    centers[0, 0] = -1
    got = under_schedules(
        launches.inner_products, on_host["inner_products"],
        x, index, centers, threads=threads,
    )  # fmt: skip
    rows, members = (np.where(i[:, :, None] >= 0, x[i], 0).astype(float) for i in (index, centers))
    _close(got, rows @ members.swapaxes(1, 2), d)
    assert not got[index < 0].any()
    assert not got[0, :, 0].any()

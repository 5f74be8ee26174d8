"""No limit by shape: sizes at and around every limit of a GPU, a kernel or a library.

The stand-in for CuPy pretends a GPU with little shared memory, so that small matrices are past
its limits (not a GPU run).
"""

import importlib
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from host_cupy import kernels as host_kernels
from matrix_cases import toeplitz
from merge_cases import lists, merged
from stacks import close, stack
from test_batched import Table

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.devices import namespace, to_host
from gpu_hodlr.errors import DeviceError

# --- a GPU with little shared memory ---------------------------------------------------------

LITTLE = 48 * 1024  # bytes of a block: every GPU has as much


@pytest.fixture
def small_gpu(stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch) -> HostCupy:
    """The stand-in with the least shared memory that a GPU has."""
    monkeypatch.setitem(
        stand_in.cupy.cuda.Device.attributes, "MaxSharedMemoryPerBlockOptin", LITTLE
    )
    monkeypatch.setattr(host_kernels, "_MOST_SHARED", LITTLE)
    return stand_in


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that a test launches, in order."""
    names: list[str] = []
    original = host_kernels.RawKernel.__call__

    def call(self: Any, *arguments: Any, **options: Any) -> None:
        names.append(self.name)
        original(self, *arguments, **options)

    monkeypatch.setattr(host_kernels.RawKernel, "__call__", call)
    return names


@pytest.mark.parametrize("scheme", ["hss", "hodlr", "fmm"])
def test_every_scheme_with_little_shared_memory(small_gpu: HostCupy, scheme: str):
    matrix, options = toeplitz(96), {"budget": 0.2} if scheme == "fmm" else {}
    K = gh.compress(matrix, rtol=1e-4, leaf_size=24, scheme=scheme, device="cuda", **options)
    F = K.factorize(0.5)
    for k in (2, 9):
        v = stack(96, k, dtype=np.float64)
        np.testing.assert_allclose(to_host(K @ small_gpu.cupy.asarray(v)), matrix @ v, atol=1e-2)
        x = to_host(F.solve(small_gpu.cupy.asarray(v)))
        np.testing.assert_allclose(matrix @ x + 0.5 * x, v, atol=1e-2)


def rows_that_fit(dtype: Any, steps: int) -> int:
    """Rows up to which pivoted QR keeps its norms in `LITTLE` bytes."""
    item = np.dtype(dtype).itemsize
    return (LITTLE - 8 * (steps + 33) - item * steps) // (2 * item + 4)


@pytest.mark.parametrize("past", [0, 1, 700])
def test_pivoted_qr_of_many_rows(small_gpu: HostCupy, launched: list[str], dtype: Any, past: int):
    s = 3
    m = rows_that_fit(dtype, s) + past
    S = stack(2, m, s, dtype=dtype)
    qr = batched.pivoted_qr(small_gpu.cupy.asarray(S))
    assert launched[0].startswith("pivoted_qr_tall" if past else "pivoted_qr_f")
    want = batched.pivoted_qr(S)
    np.testing.assert_array_equal(to_host(qr.pivots)[:, :s], want.pivots[:, :s])
    place = np.argsort(want.pivots, axis=1)
    place = np.take_along_axis(place, to_host(qr.pivots), axis=1)
    close(abs(qr.r), abs(np.take_along_axis(want.r, place[:, None], axis=2)), factor=10)
    np.testing.assert_allclose(to_host(qr.tails), want.tails, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("past", [0, 1, 60])
def test_full_qr_of_many_rows(small_gpu: HostCupy, launched: list[str], dtype: Any, past: int):
    """One warp a group of columns leaves room for so many rows."""
    item, k = np.dtype(dtype).itemsize, 9
    group = 16 // item
    m = (LITTLE // item - 848) // (9 * group) * group + past
    a = stack(1, m, k, dtype=dtype)
    q, r = (to_host(x) for x in batched.full_qr(small_gpu.cupy.asarray(a)))
    assert launched[0].startswith("householder_qr_tall" if past else "householder_qr_f")
    close(q[0].T @ q[0], np.eye(m, dtype=dtype))
    close(q[:, :, :k] @ r, a)
    np.testing.assert_array_equal(r, np.triu(r))


@pytest.mark.parametrize("past", [0, 1, 50])
def test_few_columns_of_a_large_triangle(small_gpu: HostCupy, launched, dtype: Any, past: int):
    """Past the shared memory they go to cuBLAS."""
    k = 8
    m = 32 * ((LITTLE // np.dtype(dtype).itemsize - 4224) // (32 * k)) + past
    lower = np.tril(stack(2, m, m, dtype=dtype)) / m**0.5 + 2 * np.eye(m, dtype=dtype)
    b = stack(2, m, k, dtype=dtype, seed=1)
    for transpose in (False, True):
        L = lower.swapaxes(1, 2) if transpose else lower
        x = batched.solve_triangular(
            small_gpu.cupy.asarray(lower.astype(dtype)), small_gpu.cupy.asarray(b),
            transpose=transpose,
        )  # fmt: skip
        close((L @ to_host(x)).astype(dtype), b, factor=20)
    assert bool(launched) == (past == 0)


@pytest.mark.parametrize("past", [0, 1, 40])
def test_long_lists(stand_in: HostCupy, launched: list[str], dtype: Any, past: int):
    count = 32 * 1024 // (8 + np.dtype(dtype).itemsize) + past
    arguments = lists(3, count, 1, 3, 40, dtype)
    want = merged(*arguments)
    got = [stand_in.cupy.asarray(a) for a in arguments]
    batched.merge_smallest(*got)
    for mine, right in zip(got, want, strict=False):
        np.testing.assert_array_equal(to_host(mine), right)
    assert ("long" in launched[0]) == (past > 0)


def on_gpu(qr: batched.PivotedQR, host: HostCupy) -> batched.PivotedQR:
    return batched.PivotedQR(*(host.cupy.asarray(x) for x in (qr.pivots, qr.r, qr.tails)))


@pytest.mark.parametrize("m", [31, 32, 33, 511, 512, 513, 1025])
def test_interpolation_orders_by_whole_blocks(stand_in: HostCupy, dtype: Any, m: int):
    """Rows and padding around the sizes of warps and blocks, as on the CPU."""
    rng = np.random.default_rng(m)
    S = stack(3, m, 6, dtype=dtype)
    S[1] = S[1, :, :1] * S[1, :1]
    padding = rng.random((3, m)) < 0.5
    S[padding] = 0
    qr = batched.pivoted_qr(S)
    got = batched.interpolation(on_gpu(qr, stand_in), 5, stand_in.cupy.asarray(padding))
    want = batched.interpolation(qr, 5, padding)
    np.testing.assert_array_equal(to_host(got[0]), want[0])
    np.testing.assert_array_equal(to_host(got[2]), want[2])
    close(got[1], want[1], factor=100)


@pytest.mark.slow
def test_rank_4096(xp: ModuleType):
    """The largest rank that is promised, of well-conditioned triangles."""
    rows = 200 if xp is np else 8  # on the stand-in every thread is a fiber
    rank, rng = 4096, np.random.default_rng(0)
    m = rank + rows
    R = np.triu(rng.standard_normal((rank, m))) / rank**0.5
    R[np.arange(rank), np.arange(rank)] = 2.0
    qr = batched.PivotedQR(
        xp.arange(m)[None], xp.asarray(R[None]), xp.arange(rank, -1.0, -1.0)[None]
    )
    order, T, ranks = batched.interpolation(qr, rank, xp.zeros((1, m), bool))
    assert int(ranks[0]) == rank
    np.testing.assert_array_equal(to_host(order)[0], np.arange(m))
    product = R[:, :rank] @ to_host(T)[0].T
    np.testing.assert_allclose(product, R[:, rank:], rtol=0, atol=1e-12)
    gram = R[:, :rank].T @ R[:, :rank]
    L, info = batched.cholesky(xp.asarray(gram[None]))
    assert not int(info[0])
    L = to_host(L)[0]
    np.testing.assert_allclose(L @ L.T, gram, rtol=0, atol=1e-10)
    x = batched.solve_triangular(xp.asarray(L[None]), xp.asarray(gram[None, :, :3]))
    np.testing.assert_allclose(L @ to_host(x)[0], gram[:, :3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("m", [60_000, pytest.param(1 << 20, marks=pytest.mark.slow)])
def test_interpolation_of_very_many_rows(stand_in: HostCupy, m: int):
    """Blocks of HODLR's first level have half of all rows."""
    S = stack(1, m, 3, dtype=np.float32)
    padding = np.zeros((1, m), bool)
    padding[:, -m // 3 :] = True
    S[padding] = 0
    order, T, ranks = batched.interpolation(
        on_gpu(batched.pivoted_qr(S), stand_in), 3, stand_in.cupy.asarray(padding)
    )
    order = to_host(order)
    np.testing.assert_array_equal(np.sort(order), np.arange(m)[None])
    assert padding[0, order[0, -m // 3 :]].all()
    assert int(ranks[0]) == 3
    ordered = S[0, order[0]]
    close(to_host(T)[0] @ ordered[:3], ordered[3:], factor=20)


def test_nodes_of_more_units_than_a_table_has_room_for(
    stand_in: HostCupy, launched: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Entries of a network's matrix: fewer nodes at a time, the same blocks."""
    entries = importlib.import_module("gpu_hodlr.batched.cupy_entries")
    rng, xp = np.random.default_rng(0), stand_in.cupy
    features, g = stack(6, 20, dtype=np.float64), stack(9, 9, 20, dtype=np.float64, seed=1)
    g = g + g.swapaxes(0, 1)
    feature_of, unit_of = rng.integers(6, size=80), np.sort(rng.integers(9, size=80))
    rows = np.arange(80).reshape(8, 10)
    cols = rows[:, ::-1].copy()
    blocks = []
    for most in (1 << 13, 4, 1):
        monkeypatch.setattr(entries, "_MOST_UNITS", most)
        launched.clear()
        got = batched.khatri_rao_entries(
            xp.asarray(features), feature_of, unit_of, Table(xp.asarray(g)), rows, cols
        )
        blocks.append((len(launched), to_host(got)))
    (once, want), (few, got), (each, again) = blocks
    assert (once, each) == (1, 8)
    assert 1 < few < 8
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(again, want)


# --- strides -----------------------------------------------------------------------------------


def by_columns(x: Any) -> Any:
    return x.swapaxes(1, 2).copy().swapaxes(1, 2)


def sliced(x: Any) -> Any:
    """A view into larger matrices, of every other node."""
    xp = namespace(x)
    nodes, p, q = x.shape
    whole = xp.full((2 * nodes, p + 3, q + 2), xp.nan, x.dtype)
    view = whole[::2, 1 : p + 1, 2:]
    view[...] = x
    return view


def sliced_by_columns(x: Any) -> Any:
    return sliced(x.swapaxes(1, 2)).swapaxes(1, 2)


def stepped(x: Any) -> Any:
    """No leading dimension describes it."""
    xp = namespace(x)
    nodes, p, q = x.shape
    view = xp.full((nodes, 2 * p, 3 * q), xp.nan, x.dtype)[:, ::2, ::3]
    view[...] = x
    return view


def nodes_backwards(x: Any) -> Any:
    return x[::-1].copy()[::-1]


def rows_backwards(x: Any) -> Any:
    return x[:, ::-1].copy()[:, ::-1]


def columns_backwards(x: Any) -> Any:
    return x[:, :, ::-1].copy()[:, :, ::-1]


LAYOUTS = [by_columns, sliced, sliced_by_columns, stepped, nodes_backwards, rows_backwards,
           columns_backwards]  # fmt: skip
layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)


@layout
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 1), (1, 5, 6), (1, 5, 1), (4, 1, 3)])
def test_matmul_of_any_layout(xp: ModuleType, dtype: Any, layout: Any, shape: tuple[int, ...]):
    """Each operand, and the result, lies in memory as it likes."""
    m, k, n = shape
    a, b, c = (stack(3, *s, dtype=dtype) for s in ((m, k), (k, n), (m, n)))
    want = c - a @ b
    for ta, tb in product((False, True), repeat=2):
        left, right = (x.swapaxes(1, 2).copy() if t else x for x, t in ((a, ta), (b, tb)))
        for which in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
            x, y, out = (
                layout(xp.asarray(z)) if turned else xp.asarray(z.copy())
                for z, turned in zip((left, right, c), which, strict=True)
            )
            got = batched.matmul(x, y, transpose_a=ta, transpose_b=tb, subtract_from=out)
            assert got is out
            close(out, want)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (1, 4)])
def test_matmul_of_repeated_rows_and_columns(xp: ModuleType, dtype: Any, shape: tuple[int, int]):
    """Stacks, rows and columns of stride 0."""
    a = xp.asarray(stack(2, 5, shape[0], dtype=dtype))
    for part in ((1, *shape), (2, 1, shape[1]), (2, shape[0], 1), (1, 1, 1)):
        b = xp.broadcast_to(xp.asarray(stack(*part, dtype=dtype)), (2, *shape))
        close(batched.matmul(a, b), to_host(a) @ to_host(b))
        want = to_host(b).swapaxes(1, 2) @ to_host(a).swapaxes(1, 2)
        close(batched.matmul(b, a, transpose_a=True, transpose_b=True), want)


def triangles(n: int, dtype: Any) -> np.ndarray:
    return (np.tril(stack(3, n, n, dtype=dtype)) / n + 2 * np.eye(n)).astype(dtype)


@layout
@pytest.mark.parametrize(("n", "k"), [(1, 9), (7, 3), (7, 9), (150, 9)])
def test_triangular_solves_of_any_layout(xp: ModuleType, dtype: Any, layout: Any, n: int, k: int):
    """In blocks and as a whole, by the kernel and by cuBLAS."""
    lower, b = triangles(n, dtype), stack(3, n, k, dtype=dtype)
    dirty = xp.asarray(lower + np.triu(np.full((n, n), np.nan, dtype), 1))
    right_side = xp.asarray(b)
    for transpose in (False, True):
        want = np.linalg.solve(lower.swapaxes(1, 2) if transpose else lower, b)
        for left, right in ((layout(dirty), right_side), (dirty, layout(right_side))):
            close(batched.solve_triangular(left, right, transpose=transpose), want, factor=10)


@layout
def test_trsm_of_any_layout(cupy: ModuleType, dtype: Any, layout: Any):
    """cuBLAS's own, in place: every side, triangle and operation."""
    cublas = importlib.import_module("gpu_hodlr.batched.cublas")
    lower, b = triangles(5, dtype), stack(3, 5, 5, dtype=dtype)
    inverse = np.linalg.inv(lower)
    turned = inverse.swapaxes(1, 2)
    wants = {(0, 0): inverse @ b, (1, 0): turned @ b, (0, 1): b @ turned}
    for (transpose, right), want in wants.items():
        for which in ((1, 0), (0, 1), (1, 1)):
            L, x = (
                layout(cupy.asarray(y)) if turned else cupy.asarray(y)
                for y, turned in zip((lower, b), which, strict=True)
            )
            cublas.trsm(L, x, transpose=bool(transpose), right=bool(right))
            close(x, want, factor=10)


@layout
@pytest.mark.parametrize("n", [1, 6, 140])
def test_cholesky_of_any_layout(xp: ModuleType, dtype: Any, layout: Any, n: int):
    lower = triangles(n, dtype)
    spd = lower @ lower.swapaxes(1, 2)
    got, info = batched.cholesky(layout(xp.asarray(spd)))
    close(got, lower, factor=10)
    assert not to_host(info).any()


@layout
def test_factors_and_rows_of_any_layout(xp: ModuleType, dtype: Any, layout: Any):
    """What is asked of a view is what is asked of a copy."""
    S = xp.asarray(stack(3, 8, 5, dtype=dtype))
    qr, padding = batched.pivoted_qr(S), xp.zeros((3, 8), bool)
    again = batched.pivoted_qr(layout(S))
    for got, want in zip(vars(again).values(), vars(qr).values(), strict=True):
        np.testing.assert_array_equal(to_host(got), to_host(want))
    turned = batched.PivotedQR(qr.pivots, layout(qr.r), qr.tails)
    for got, want in zip(batched.interpolation(turned, 3, padding),
                         batched.interpolation(qr, 3, padding), strict=True):  # fmt: skip
        np.testing.assert_array_equal(to_host(got), to_host(want))
    for got, want in zip(batched.full_qr(layout(S)), batched.full_qr(S), strict=True):
        np.testing.assert_array_equal(to_host(got), to_host(want))
    order = xp.asarray(np.stack([np.random.default_rng(t).permutation(8) for t in range(3)]))
    for call in (batched.permute_rows, batched.unpermute_rows):
        np.testing.assert_array_equal(to_host(call(layout(S), order)), to_host(call(S, order)))
    index = xp.arange(24).reshape(3, 8)
    got = batched.scatter_rows(layout(S), index, 24)
    np.testing.assert_array_equal(to_host(got), to_host(S).reshape(24, 5))
    got = batched.gather_rows(layout(S)[1], index % 8)
    np.testing.assert_array_equal(to_host(got), to_host(S)[1][to_host(index % 8)])


# --- many matrices, not a number, numbers past 32 bits -------------------------------------------

MANY = 65_535  # matrices that a call to cuBLAS is known to take


@pytest.mark.parametrize("nodes", [MANY, MANY + 1, 2 * MANY])
def test_many_matrices(cupy: ModuleType, dtype: Any, nodes: int):
    a = triangles(2, dtype)[0] + stack(nodes, 1, 1, dtype=dtype) ** 2 * np.eye(2, dtype=dtype)
    L, x = cupy.asarray(a), cupy.asarray(stack(nodes, 2, 9, dtype=dtype))
    close(batched.matmul(L, x), a @ to_host(x))
    close(batched.matmul(L, x[:, :, :1]), a @ to_host(x)[:, :, :1])
    close(batched.matmul(L, batched.solve_triangular(L, x)), to_host(x), factor=5)
    lower, info = batched.cholesky(batched.matmul(L, L, transpose_b=True))
    close(lower, a, factor=10)
    assert not to_host(info).any()


@pytest.mark.parametrize("n", [1, 6, 130, 300])
@pytest.mark.parametrize("where", ["diagonal", "below"])
def test_cholesky_of_nan_fails(xp: ModuleType, dtype: Any, n: int, where: str):
    """At the first minor that is not a number, whatever the library makes of it; the same minor
    on both; and what was indefinite before is not hidden."""
    a = np.stack([np.eye(n, dtype=dtype) * 2 for _ in range(4)])
    j = n // 2
    a[1, j, j if where == "diagonal" else 0] = np.nan
    a[2, n - 1, n - 1] = np.nan
    a[2, 0, 0] = -1
    a[3] += np.triu(np.full((n, n), np.nan, dtype), 1)  # is not read
    lower, info = batched.cholesky(xp.asarray(a))
    np.testing.assert_array_equal(to_host(info), [0, j + 1, 1, 0])
    np.testing.assert_array_equal(to_host(lower)[3], np.eye(n, dtype=dtype) * dtype(2) ** 0.5)


def test_sizes_past_32_bits_are_named(stand_in: HostCupy):
    cublas = importlib.import_module("gpu_hodlr.batched.cublas")
    cublas._check_sizes("GEMM", 1, 2**31 - 1)
    with pytest.raises(DeviceError, match=r"cuBLAS GEMM.* 2147483648 "):
        cublas._check_sizes("GEMM", 1, 2**31, 5)


def test_launches_that_do_not_fit_are_named(stand_in: HostCupy):
    cuda = importlib.import_module("gpu_hodlr.batched.cuda")
    x, none = stand_in.cupy.zeros((1, 1)), stand_in.cupy.zeros(1, np.int32)
    for size, grid, match in (
        (2**31, (1,), "finish_cholesky_f64: a size of 2147483648"),
        (1, (2**31,), "grid of 2147483648 blocks"),
        (1, (1, 2**16), "grid of 1 x 65536 blocks"),
    ):
        with pytest.raises(DeviceError, match=match):
            cuda.launch("cholesky", "finish_cholesky_f64", grid, (32,), (x, none, size))

"""QR, narrow solves with triangles and ULV steps, ends of Cholesky: kernels on the host."""

import numpy as np
import pytest
from host_cuda import factor_launches, runner
from kernel_cases import DTYPES, built_for_host, needs_compiler, under_schedules

from gpu_hodlr.batched import quarters

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def on_host(host_library_folder) -> dict[str, runner.HostKernels]:
    return built_for_host(host_library_folder)


def _matrices(case: str, rng: np.random.Generator, m: int, k: int) -> np.ndarray:
    a = rng.standard_normal((2, m, k))
    if case == "rank deficient":
        rank = max(1, k // 3)
        a = rng.standard_normal((2, m, rank)) @ rng.standard_normal((2, rank, k))
    if case == "zeros":
        a[0, :, ::2] = 0
        a[0, m // 2 :] = 0
        a[1] = 0
    if case == "graded":
        a *= 10.0 ** -rng.uniform(0, 25, k)
    return a


def _check_qr(a: np.ndarray, q: np.ndarray, r: np.ndarray) -> None:
    """Q is orthogonal, R upper triangular, and every column as exact as its own size allows."""
    (_, m, k), eps = a.shape, np.finfo(a.dtype).eps
    q64, r64 = q.astype(np.float64), r.astype(np.float64)
    np.testing.assert_array_equal(r, np.triu(r))
    np.testing.assert_allclose(q64 @ q64.swapaxes(1, 2), np.eye(m)[None] + 0 * q, atol=20 * eps)
    error = np.linalg.norm(q64[:, :, :k] @ r64 - a, axis=1)
    assert (error <= 20 * eps * np.linalg.norm(a.astype(np.float64), axis=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["random", "rank deficient", "zeros", "graded"])
@pytest.mark.parametrize(
    ("m", "k", "sharers", "groups"),
    [(1, 1, 2, 1), (9, 2, 1, 2), (33, 33, 16, 1), (40, 23, 3, 2), (70, 61, 1, 2), (130, 12, 4, 4)],
)
def test_householder_qr_on_host(on_host, dtype, case, m, k, sharers, groups) -> None:
    a = _matrices(case, np.random.default_rng(m), m, k).astype(dtype)
    q, r = under_schedules(
        factor_launches.householder_qr, on_host["householder_qr"], a, sharers=sharers, groups=groups
    )
    _check_qr(a, q, r)
    if case == "zeros":
        np.testing.assert_array_equal(q[1], np.eye(m))
        assert not r[1].any()


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float32, 1e-30), (np.float32, 1e30), (np.float64, 1e-290), (np.float64, 1e300)],
)
def test_householder_qr_of_tiny_and_huge_numbers_on_host(on_host, dtype, scale) -> None:
    a = np.random.default_rng(2).standard_normal((2, 30, 13))
    a[:, :, 5] *= 1e-6
    q, r = factor_launches.householder_qr(on_host["householder_qr"], (a * scale).astype(dtype))
    _check_qr(a.astype(dtype), q, (r / dtype(scale)).astype(dtype))


def test_householder_qr_of_nan_shows_it_on_host(on_host) -> None:
    a = np.random.default_rng(3).standard_normal((2, 20, 6))
    a[0, 4, 2] = np.nan
    q, r = factor_launches.householder_qr(on_host["householder_qr"], a)
    assert np.isnan(r[0, 2, 2:]).all()
    _check_qr(a[1:], q[1:], r[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("m", "threads"), [(1, 64), (31, 512), (32, 64), (33, 96), (100, 128), (170, 64)]
)
def test_triangular_solves_on_host(on_host, dtype, k, m, threads) -> None:
    rng = np.random.default_rng(m + k)
    lower = np.tril(rng.standard_normal((2, m, m)) / np.sqrt(m)) + 2 * np.eye(m)
    lower = lower.astype(dtype)
    b = rng.standard_normal((2, m, k)).astype(dtype)
    stored = lower + np.triu(np.full((m, m), np.nan, dtype), 1)  # must not be used
    for transpose in (False, True):
        x = under_schedules(
            factor_launches.solve_lower, on_host["triangular"], stored, b,
            transpose=transpose, threads=threads,
        )  # fmt: skip
        L = (lower.swapaxes(1, 2) if transpose else lower).astype(np.float64)
        residual = np.abs(L @ x - b)
        allowed = 8 * np.finfo(dtype).eps * (np.abs(L) @ np.abs(x))
        assert (residual <= allowed).all()


@pytest.mark.parametrize("k", [1, 8])
def test_triangular_solves_of_rows_by_number_on_host(on_host, k) -> None:
    """Read by the first solve and written by the transposed one; padding is 0 and not written."""
    rng, (nodes, m) = np.random.default_rng(k), (2, 40)
    lower = np.tril(rng.standard_normal((nodes, m, m)) / 8) + 2 * np.eye(m)
    index = rng.permutation(nodes * m).reshape(nodes, m)
    index[1, -3:] = -1
    b = rng.standard_normal((nodes * m, k))
    rows = np.where(index[:, :, None] < 0, 0, b[index])
    solve, kernels = factor_launches.solve_lower, on_host["triangular"]
    x = under_schedules(solve, kernels, lower, b, index=index)
    np.testing.assert_array_equal(x, solve(kernels, lower, rows))
    out = under_schedules(solve, kernels, lower, rows, transpose=True, index=index)
    back, real = solve(kernels, lower, rows, transpose=True), index >= 0
    np.testing.assert_array_equal(out[index[real]], back[real])
    assert np.isnan(np.delete(out, index[real], axis=0)).all()


@pytest.mark.parametrize("transpose", [False, True])
def test_triangular_solves_of_graded_factors_on_host(on_host, transpose) -> None:
    """Cholesky factors of matrices of condition 1e12: backward stable all the same."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((90, 90)))[0]
    lower = np.linalg.cholesky((basis * np.logspace(0, -12, 90)) @ basis.T)[None]
    b = rng.standard_normal((1, 90, 1))
    x = under_schedules(
        factor_launches.solve_lower, on_host["triangular"], lower, b, transpose=transpose
    )
    L = lower.swapaxes(1, 2) if transpose else lower
    assert (np.abs(L @ x - b) <= 200 * np.finfo(float).eps * (np.abs(L) @ np.abs(x))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("rest", "r", "threads"),
    [(5, 3, 64), (40, 0, 64), (0, 7, 96), (33, 64, 96), (70, 20, 512), (20, 150, 64)],
)
@pytest.mark.parametrize("whole", [False, True])
def test_ulv_steps_on_host(on_host, dtype, k, rest, r, threads, whole) -> None:
    """Rows of the node, or of all vectors: those with padding are zero, and not written."""
    rng, kernels = np.random.default_rng(rest + k), on_host["ulv_steps"]
    rows, nodes = rest + r, 2
    T, W = (rng.standard_normal((2, nodes, rest, r)) / 8).astype(dtype)
    lower = np.tril(rng.standard_normal((nodes, rest, rest)) / 10) + 2 * np.eye(rest)
    stored = (lower + np.triu(np.full((rest, rest), np.nan), 1)).astype(dtype)
    x = rng.standard_normal((nodes, rows, k)).astype(dtype)
    y, w = (np.full((nodes, n, k), np.nan, dtype) for n in (rest, r))
    index = np.argsort(rng.random((nodes, rows)), axis=1)
    if whole:
        x = x.reshape(-1, k)
        index = index + rows * np.arange(nodes)[:, None]
        index[:, -1] = -1
    arrays = (T, stored, W)
    step = 0 if whole else rows
    T64, W64, lower = T.astype(float), W.astype(float), lower.astype(dtype).astype(float)
    picked = x.reshape(-1, k)[index + (0 if whole else rows * np.arange(nodes)[:, None])]
    picked = np.where(index[:, :, None] < 0, 0, picked).astype(float)
    y, w = under_schedules(
        factor_launches.ulv_step, kernels, "eliminate", arrays, index, (x,), (y, w), step,
        threads=threads,
    )  # fmt: skip
    want_y = np.linalg.solve(lower, picked[:, r:] - T64 @ picked[:, :r])
    scale = 50 * np.finfo(dtype).eps * (1 + rows**0.5)
    np.testing.assert_allclose(y, want_y, rtol=0, atol=scale)
    want_w = picked[:, :r] - W64.swapaxes(1, 2) @ want_y
    np.testing.assert_allclose(w, want_w, rtol=0, atol=scale)
    [back] = under_schedules(
        factor_launches.ulv_step, kernels, "substitute", arrays, index, (y, w),
        (np.full_like(x, 7.0),), step, threads=threads,
    )  # fmt: skip
    z = np.linalg.solve(lower.swapaxes(1, 2), y - W64 @ w)
    node = np.concatenate([w - T64.swapaxes(1, 2) @ z, z], axis=1)
    want = np.full((nodes * rows, k), 7.0)
    flat = index + (0 if whole else rows * np.arange(nodes)[:, None])
    want[flat[index >= 0]] = node[index >= 0]
    np.testing.assert_allclose(back.reshape(-1, k), want, rtol=0, atol=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["random", "rank deficient", "zeros", "stopped"])
@pytest.mark.parametrize(("m", "s"), [(1, 1), (3, 40), (45, 18), (70, 75)])
def test_pivoted_qr_in_global_memory_on_host(on_host, dtype, case, m, s) -> None:
    """The bits of the one in shared memory."""
    S = _matrices(case, np.random.default_rng(m), m, s).astype(dtype)
    options = {"max_rank": 9} if case == "stopped" else {}
    kernels = on_host["pivoted_qr"]
    want = factor_launches.pivoted_qr(kernels, S, **options)
    got = under_schedules(factor_launches.pivoted_qr, kernels, S, tall=True, **options)
    for mine, right in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["random", "rank deficient", "zeros"])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (9, 9), (33, 17), (70, 61), (130, 12)])
def test_householder_qr_in_global_memory_on_host(on_host, dtype, case, m, k) -> None:
    """The bits of the one in shared memory."""
    a = _matrices(case, np.random.default_rng(m), m, k).astype(dtype)
    kernels = on_host["householder_qr"]
    want = factor_launches.householder_qr(kernels, a)
    got = under_schedules(factor_launches.householder_qr, kernels, a, tall=True)
    for mine, right in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
def test_the_end_of_cholesky_on_host(on_host, dtype, n) -> None:
    """Zeros above the diagonal; the first NaN on it, unless a minor failed before."""
    a = np.random.default_rng(n).standard_normal((5, n, n)).astype(dtype)
    a[1, n // 2 :, n // 2] = a[2, -1, -1] = a[3, 0, 0] = np.nan
    said = np.array([[0, 0, 1, n, 7]], np.int32)
    kernels = on_host["cholesky"]
    lower, info = under_schedules(factor_launches.finish_cholesky, kernels, a, said, n)
    np.testing.assert_array_equal(lower, np.tril(a))
    np.testing.assert_array_equal(info, [0, n // 2 + 1, 1, 1, 7])


def test_the_first_of_failing_pieces_counts_on_host(on_host) -> None:
    """Of rows 0 .. 9, 10 .. 19 and 20 .. 24, orders are those of the whole matrix."""
    a = np.random.default_rng(0).standard_normal((5, 25, 25))
    a[4, 12, 12] = np.nan
    said = np.array([[0, 0, 3, -1, 0], [0, 2, 4, 1, 0], [0, 1, 1, 0, 5]], np.int32)
    kernels = on_host["cholesky"]
    _, info = under_schedules(factor_launches.finish_cholesky, kernels, a, said, 10)
    np.testing.assert_array_equal(info, [0, 12, 3, -1, 13])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "r"), [(1, 0), (1, 1), (13, 5), (20, 20), (20, 0)])
def test_quarters_on_host(on_host, dtype, m, r) -> None:
    rng, kernels = np.random.default_rng(m), on_host["quarters"]
    blocks, added = rng.standard_normal((4, m, m)).astype(dtype), rng.random((4, m)).astype(dtype)
    order = np.argsort(rng.random((4, m)), axis=1)
    for which in ((None, None), (order, None), (None, added), (order, added)):
        got = under_schedules(factor_launches.quartered, kernels, blocks, r, *which)
        for mine, right in zip(got, quarters.quartered(blocks, r, *which), strict=True):
            np.testing.assert_array_equal(mine, right)
    pairs = rng.standard_normal((2, m, m)).astype(dtype)
    got = under_schedules(factor_launches.paired, kernels, blocks, pairs)
    np.testing.assert_array_equal(got, quarters.paired(blocks, pairs))


def _hodlr_level(rng, nodes: int, rows: int, r: int, dtype) -> tuple[np.ndarray, ...]:
    """Q, P and Y with what lies above its diagonal not a number."""
    Q, P = (rng.standard_normal((2, nodes // 2, rows, r)) / np.sqrt(rows)).astype(dtype)
    Y = np.tril(rng.standard_normal((nodes // 2, r, r)) / (2 + r)) + 2 * np.eye(r)
    return Q, P, (Y + np.triu(np.full((r, r), np.nan), 1)).astype(dtype)


def _hodlr_sums(level: tuple[np.ndarray, ...], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    Q, P, _ = (a.astype(float) for a in level)
    x = x.reshape(2 * len(Q), Q.shape[1], -1)
    return Q.swapaxes(1, 2) @ x[0::2], P.swapaxes(1, 2) @ x[1::2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("rows", "chunk", "r", "next_r", "threads"),
    [(5, 32, 3, 4, 64), (33, 32, 0, 5, 96), (40, 64, 4, 0, 64), (300, 288, 40, 33, 96),
     (70, 32, 35, 70, 512)],
)  # fmt: skip
def test_hodlr_steps_on_host(on_host, dtype, k, rows, chunk, r, next_r, threads) -> None:
    """A finer level applied before a coarser one, and after it, one level twice, and the ends."""
    rng, kernels = np.random.default_rng(rows + k), on_host["hodlr_steps"]
    fine = _hodlr_level(rng, 4, rows, r, dtype)
    coarse = _hodlr_level(rng, 2, 2 * rows, next_r, dtype)
    atol = 100 * np.finfo(dtype).eps * (1 + rows**0.5)

    def step(applied, transposed, following, transpose) -> None:
        x = rng.standard_normal((4 * rows, k)).astype(dtype)
        sums, want = (None, None), x.astype(float)
        if applied is not None:
            # Parts that do not add up to Q^T x: the kernel is to use what it is given.
            shape = (len(applied[0]), 7, applied[0].shape[2], k)
            w, p = rng.standard_normal((2, *shape)).astype(dtype)
            sums = (w, None if transposed else p)
            want = _applied(applied, w, None if transposed else p, want)
        got, *left = under_schedules(
            factor_launches.hodlr_step, kernels, applied, sums, following, x, chunk=chunk,
            transpose=transpose, threads=threads,
        )  # fmt: skip
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)
        if following is not None:
            even, odd = _hodlr_sums(following, want)
            for part, exact in zip(left, (even,) if transpose else (even, odd), strict=True):
                np.testing.assert_allclose(part.sum(axis=1), exact, rtol=0, atol=atol)

    step(None, False, fine, False)
    step(fine, False, coarse, False)
    step(coarse, False, coarse, True)
    step(coarse, True, fine, True)
    step(fine, True, None, False)


def _applied(level, w, p, x: np.ndarray) -> np.ndarray:
    """W^-1 x by its sums' parts, or W^-T x where p is None."""
    Q, P, Y = (a.astype(float) for a in level)
    Y, w = np.tril(np.nan_to_num(Y)), w.sum(axis=1, dtype=float)
    x = x.reshape(2 * len(Q), Q.shape[1], -1).copy()
    if p is None:
        t = np.linalg.solve(Y.swapaxes(1, 2), w)
        x[1::2] -= P @ t
    else:
        t = np.linalg.solve(Y, w - p.sum(axis=1, dtype=float))
    x[0::2] += Q @ (t - w)
    return x.reshape(-1, x.shape[2])

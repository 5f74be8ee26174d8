"""The level-batched primitives against NumPy and SciPy; one body for every array library."""

from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
import scipy.linalg
from stacks import close, stack, tolerance

from gpu_hodlr import batched
from gpu_hodlr.devices import namespace, to_host

# --- matmul ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2, 7])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
def test_matmul(xp: ModuleType, dtype: Any, transpose_a: bool, transpose_b: bool, nodes: int):
    a = stack(nodes, 5, 4, dtype=dtype)
    b = stack(nodes, 4, 6, dtype=dtype, seed=1)
    given_a = a.swapaxes(1, 2).copy() if transpose_a else a
    given_b = b.swapaxes(1, 2).copy() if transpose_b else b
    got = batched.matmul(
        xp.asarray(given_a), xp.asarray(given_b), transpose_a=transpose_a, transpose_b=transpose_b
    )
    close(got, np.einsum("tij,tjk->tik", a, b))


def test_matmul_add_to_writes_into_its_argument(xp: ModuleType, dtype: Any):
    a, b, c = (stack(3, *s, dtype=dtype) for s in ((4, 5), (4, 2), (5, 2)))
    target = xp.asarray(c.copy())
    got = batched.matmul(xp.asarray(a), xp.asarray(b), transpose_a=True, add_to=target)
    assert got is target
    close(target, c + np.einsum("tji,tjk->tik", a, b))


def test_matmul_add_to_a_view(xp: ModuleType, dtype: Any):
    a, b, c = (stack(2, *s, dtype=dtype) for s in ((3, 4), (4, 2), (7, 2)))
    whole = xp.asarray(c.copy())
    batched.matmul(xp.asarray(a), xp.asarray(b), add_to=whole[:, 4:])
    expected = c.copy()
    expected[:, 4:] += a @ b
    close(whole, expected)


@pytest.mark.parametrize(
    ("left", "right"), [((3, 0, 4), (3, 4, 2)), ((3, 5, 0), (3, 0, 2)), ((3, 5, 4), (3, 4, 0))]
)
def test_matmul_with_a_zero_dimension(xp: ModuleType, dtype: Any, left: Any, right: Any):
    a, b = np.zeros(left, dtype), np.zeros(right, dtype)
    close(batched.matmul(xp.asarray(a), xp.asarray(b)), a @ b)
    start = np.ones((3, left[1], right[2]), dtype)
    close(batched.matmul(xp.asarray(a), xp.asarray(b), add_to=xp.asarray(start)), start)


def test_matmul_takes_broadcast_stacks(xp: ModuleType, dtype: Any):
    a, b = stack(6, 4, 5, dtype=dtype), stack(5, 3, dtype=dtype)
    close(batched.matmul(xp.asarray(a), xp.broadcast_to(xp.asarray(b), (6, 5, 3))), a @ b)


# --- pivoted QR and interpolation ------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 6, 6), (4, 5, 20), (3, 20, 5), (1, 8, 9), (2, 40, 150)])
def test_pivoted_qr_is_scipys(xp: ModuleType, dtype: Any, shape: tuple[int, int, int]):
    S = stack(*shape, dtype=dtype)
    qr = batched.pivoted_qr(xp.asarray(S))
    pivots, r, tails = (to_host(x) for x in (qr.pivots, qr.r, qr.tails))
    nodes, m, s = shape
    k = min(m, s)
    assert r.shape == (nodes, k, m)
    assert tails.shape == (nodes, k + 1)
    for t in range(nodes):
        _, want_r, want_pivots = scipy.linalg.qr(S[t].T, mode="economic", pivoting=True)
        np.testing.assert_array_equal(pivots[t, :k], want_pivots[:k])
        place = np.argsort(want_pivots)[pivots[t]]  # rows never chosen come in any order
        np.testing.assert_array_equal(np.sort(place), np.arange(m))
        close(np.abs(r[t]), np.abs(want_r[:, place]), factor=10)
        # R itself: S^T P = Q R with orthonormal Q, that is, the same Gram matrix
        gram = S[t].astype(np.float64) @ S[t].T
        got = r[t].astype(np.float64).T @ r[t]
        allowed = 10 * tolerance(dtype) * np.abs(gram).max()
        np.testing.assert_allclose(got, gram[np.ix_(pivots[t], pivots[t])], rtol=0, atol=allowed)
        want = [np.linalg.norm(want_r[j:, j:].astype(np.float64)) ** 2 for j in range(k)]
        np.testing.assert_allclose(tails[t, :k], want, rtol=2e3 * np.finfo(dtype).eps)
        assert tails[t, k] == 0
        np.testing.assert_array_equal(r[t], np.triu(r[t]))


@pytest.mark.parametrize("negligible", [1e-9, 1e-13])
def test_pivoted_qr_is_as_exact_as_is_asked_for(xp: ModuleType, dtype: Any, negligible: float):
    decay = 10.0 ** -np.linspace(0, 9, 24)
    S = np.asarray(stack(3, 24, 70, dtype=np.float64) * decay[None, :, None], dtype)
    S[2] = 0
    exact = batched.pivoted_qr(xp.asarray(S))
    qr = batched.pivoted_qr(xp.asarray(S), None, negligible)
    tails, want = (to_host(x.tails) for x in (qr, exact))
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(tails, want, rtol=2e4 * eps, atol=negligible)
    known = np.count_nonzero(want[0] > 100 * max(negligible, eps**2 * want[0, 0]))
    np.testing.assert_array_equal(to_host(qr.pivots)[:2, :known], to_host(exact.pivots)[:2, :known])
    r, want_r = (np.abs(to_host(x.r)[:, :known]) for x in (qr, exact))
    order, want_order = (to_host(x.pivots).argsort(axis=1)[:, None] for x in (qr, exact))
    r, want_r = (np.take_along_axis(x, o, 2) for x, o in ((r, order), (want_r, want_order)))
    np.testing.assert_allclose(r, want_r, rtol=0, atol=2 * negligible**0.5 + 100 * eps * r.max())
    assert not to_host(qr.r)[2].any()


def test_samples_with_nan_are_left_to_qr():
    S = stack(2, 5, 9, dtype=np.float64)
    S[0, 2, 3] = np.nan
    want, got = batched.pivoted_qr(S), batched.pivoted_qr(S, None, 1.0)
    assert np.isnan(got.r[0]).any()
    close(np.abs(got.r[1]), np.abs(want.r[1]))


def test_pivoted_qr_tail_is_the_error_of_the_interpolation(xp: ModuleType):
    S = stack(3, 12, 30, dtype=np.float64) * 10.0 ** -np.arange(12)[None, :, None]
    qr = batched.pivoted_qr(xp.asarray(S))
    for rank in (0, 1, 5, 12):
        order, T, _ = batched.interpolation(qr, rank, xp.zeros((3, 12), bool))
        ordered = np.take_along_axis(S, to_host(order)[:, :, None], axis=1)
        rebuilt = to_host(T) @ ordered[:, :rank]
        error = np.linalg.norm(ordered[:, rank:] - rebuilt, axis=(1, 2)) ** 2
        want = to_host(qr.tails)[:, rank]
        np.testing.assert_allclose(error, want, rtol=1e-9, atol=1e-26)


def low_rank_stack(ranks: tuple[int, ...], m: int, s: int, dtype: Any) -> np.ndarray:
    return np.stack(
        [stack(m, r, dtype=dtype, seed=r) @ stack(r, s, dtype=dtype, seed=r + 1) for r in ranks]
    )


@pytest.mark.parametrize("s", [8, 12, 40])
def test_interpolation_reproduces_the_samples(xp: ModuleType, dtype: Any, s: int):
    """One padded rank for nodes of rank 0 (zero), 1, 3 and 5."""
    ranks, m, rank = (0, 1, 3, 5), 12, 5
    S = low_rank_stack(ranks, m, s, dtype)
    qr = batched.pivoted_qr(xp.asarray(S))
    order, T, found = (to_host(x) for x in batched.interpolation(qr, rank, xp.zeros((4, m), bool)))
    assert T.dtype == dtype
    assert tuple(found) == ranks
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(m), (4, 1)))
    ordered = np.take_along_axis(S, order[:, :, None], axis=1)
    close(T @ ordered[:, :rank], ordered[:, rank:], factor=20)
    for t, r in enumerate(ranks):
        assert not T[t, :, r:].any()


def test_interpolation_keeps_padding_last(xp: ModuleType, dtype: Any):
    """Rows of zeros that are padding are chosen after rows of zeros that are not."""
    S = stack(2, 8, 10, dtype=dtype)
    padding = np.zeros((2, 8), bool)
    padding[0, [1, 4]] = padding[1, [0, 1, 2]] = True
    S[0, [1, 2, 4, 7]] = 0  # two zero rows are real, two are padding
    S[1, [0, 1, 2]] = 0
    order, T, found = (
        to_host(x)
        for x in batched.interpolation(batched.pivoted_qr(xp.asarray(S)), 6, xp.asarray(padding))
    )
    assert tuple(found) == (4, 5)
    ordered = np.take_along_axis(padding, order, axis=1)
    np.testing.assert_array_equal(ordered[0], [0, 0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(ordered[1], [0, 0, 0, 0, 0, 1, 1, 1])
    assert not T[0].any()  # all that is left are zero rows
    assert np.isfinite(T).all()


@pytest.mark.parametrize("shape", [(3, 6, 0), (3, 0, 6), (2, 4, 7)])
def test_interpolation_of_rank_zero(xp: ModuleType, dtype: Any, shape: tuple[int, int, int]):
    qr = batched.pivoted_qr(xp.zeros(shape, dtype))
    nodes, m, s = shape
    assert to_host(qr.tails).shape == (nodes, min(m, s) + 1)
    assert not to_host(qr.tails).any()
    order, T, found = batched.interpolation(qr, 0, xp.zeros((nodes, m), bool))
    assert order.shape == (nodes, m)
    assert T.shape == (nodes, m, 0)
    assert not to_host(found).any()


def test_interpolation_of_full_rank_has_no_rest(xp: ModuleType, dtype: Any):
    qr = batched.pivoted_qr(xp.asarray(stack(3, 5, 9, dtype=dtype)))
    _, T, found = batched.interpolation(qr, 5, xp.zeros((3, 5), bool))
    assert T.shape == (3, 0, 5)
    np.testing.assert_array_equal(to_host(found), 5)


# --- orthogonal and triangular factors -------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 6, 4), (1, 5, 5), (5, 40, 33), (2, 3, 0), (4, 7, 1)])
def test_full_qr(xp: ModuleType, dtype: Any, shape: tuple[int, int, int]):
    a = stack(*shape, dtype=dtype)
    nodes, m, k = shape
    q, r = (to_host(x) for x in batched.full_qr(xp.asarray(a)))
    assert q.shape == (nodes, m, m)
    assert r.shape == (nodes, k, k)
    close(q.swapaxes(1, 2) @ q, np.broadcast_to(np.eye(m, dtype=dtype), q.shape))
    close(q[:, :, :k] @ r, a)
    np.testing.assert_array_equal(r, np.triu(r))


def test_full_qr_of_zero_columns(xp: ModuleType, dtype: Any):
    """Padded ranks: zero columns, and a wholly zero basis."""
    a = stack(2, 6, 3, dtype=dtype)
    a[0, :, 1] = 0
    a[1] = 0
    q, r = (to_host(x) for x in batched.full_qr(xp.asarray(a)))
    close(q.swapaxes(1, 2) @ q, np.broadcast_to(np.eye(6, dtype=dtype), q.shape))
    close(q[:, :, :3] @ r, a)
    assert not r[1].any()


def spd_stack(nodes: int, n: int, dtype: Any) -> np.ndarray:
    return np.stack([dense_oracles.random_spd(n, seed) for seed in range(nodes)]).astype(dtype)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("nodes", "n"), [(1, 4), (5, 7), (2, 60)])
def test_cholesky(xp: ModuleType, dtype: Any, nodes: int, n: int, overwrite: bool):
    a = spd_stack(nodes, n, dtype)
    given = xp.array(a)
    lower, info = batched.cholesky(given, overwrite=overwrite)
    assert (lower is given) == overwrite
    assert overwrite or np.array_equal(to_host(given), a)
    assert not to_host(info).any()
    close(lower, np.linalg.cholesky(a))
    np.testing.assert_array_equal(to_host(lower), np.tril(to_host(lower)))


def test_cholesky_info_is_the_failing_minor(xp: ModuleType, dtype: Any):
    a = spd_stack(4, 6, dtype)
    a[1, 0, 0] = -1
    a[3, 4, 4] = -1
    info = to_host(batched.cholesky(xp.asarray(a))[1])
    np.testing.assert_array_equal(info, [0, 1, 0, 5])


def test_cholesky_of_nothing(xp: ModuleType, dtype: Any):
    lower, info = batched.cholesky(xp.zeros((3, 0, 0), dtype))
    assert lower.shape == (3, 0, 0)
    assert not to_host(info).any()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("columns", [1, 5])
def test_solve_triangular(xp: ModuleType, dtype: Any, transpose: bool, columns: int):
    lower = np.linalg.cholesky(spd_stack(4, 9, dtype))
    b = stack(4, 9, columns, dtype=dtype)
    got = batched.solve_triangular(xp.asarray(lower), xp.asarray(b), transpose=transpose)
    want = np.stack(
        [
            scipy.linalg.solve_triangular(a, y, lower=True, trans=int(transpose))
            for a, y in zip(lower, b, strict=True)
        ]
    )
    close(got, want)


@pytest.mark.parametrize("transpose", [False, True])
def test_solve_triangular_reads_the_lower_part_only(xp: ModuleType, transpose: bool):
    lower = np.linalg.cholesky(spd_stack(2, 5, np.float64))
    b = stack(2, 5, 3, dtype=np.float64)
    dirty = lower + np.triu(np.full((5, 5), 1e3), 1)
    got, want = (
        to_host(batched.solve_triangular(xp.asarray(a), xp.asarray(b), transpose=transpose))
        for a in (dirty, lower)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("n", "columns"), [(0, 3), (4, 0)])
@pytest.mark.parametrize("transpose", [False, True])
def test_solve_triangular_of_nothing(
    xp: ModuleType, dtype: Any, n: int, columns: int, transpose: bool
):
    lower = np.broadcast_to(np.eye(n, dtype=dtype), (2, n, n)).copy()
    b = xp.zeros((2, n, columns), dtype)
    got = batched.solve_triangular(xp.asarray(lower), b, transpose=transpose)
    assert got.shape == (2, n, columns)


# --- gathering and permuting -----------------------------------------------------------------


def test_gather_and_scatter_rows(xp: ModuleType, dtype: Any):
    x = stack(7, 3, dtype=dtype)
    index = np.array([[6, 0, 2], [1, 5, -1], [4, 3, -1], [-1, -1, -1]])
    blocks = batched.gather_rows(xp.asarray(x), xp.asarray(index))
    want = np.where((index >= 0)[:, :, None], x[index], 0)
    np.testing.assert_array_equal(to_host(blocks), want)
    back = batched.scatter_rows(blocks + (xp.asarray(index) < 0)[:, :, None], xp.asarray(index), 7)
    np.testing.assert_array_equal(to_host(back), x)
    assert to_host(back).dtype == dtype


def test_scatter_leaves_rows_without_an_index_zero(xp: ModuleType, dtype: Any):
    blocks = np.ones((1, 2, 2), dtype)
    got = to_host(batched.scatter_rows(xp.asarray(blocks), xp.asarray([[3, 1]]), 5))
    np.testing.assert_array_equal(got[:, 0], [0, 1, 0, 1, 0])


def test_gather_no_columns(xp: ModuleType, dtype: Any):
    index = xp.asarray([[0, 1], [2, -1]])
    blocks = batched.gather_rows(xp.zeros((3, 0), dtype), index)
    assert blocks.shape == (2, 2, 0)
    assert batched.scatter_rows(blocks, index, 3).shape == (3, 0)


def test_permute_and_unpermute(xp: ModuleType, dtype: Any):
    x = stack(4, 6, 3, dtype=dtype)
    order = np.stack([np.random.default_rng(t).permutation(6) for t in range(4)])
    permuted = batched.permute_rows(xp.asarray(x), xp.asarray(order))
    want = np.stack([a[o] for a, o in zip(x, order, strict=True)])
    np.testing.assert_array_equal(to_host(permuted), want)
    back = batched.unpermute_rows(permuted, xp.asarray(order))
    np.testing.assert_array_equal(to_host(back), x)


def test_permute_may_pick_fewer_rows(xp: ModuleType, dtype: Any):
    x = stack(2, 5, 2, dtype=dtype)
    got = batched.permute_rows(xp.asarray(x), xp.asarray([[4, 0], [1, 3]]))
    np.testing.assert_array_equal(to_host(got), np.stack([x[0, [4, 0]], x[1, [1, 3]]]))


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_over_columns(xp: ModuleType, dtype: Any, chunk: int):
    a, v = xp.asarray(stack(6, 5, dtype=dtype)), xp.asarray(stack(5, 7, dtype=dtype))
    out = xp.zeros((6, 7), dtype)
    widths = []

    def work(columns: slice) -> None:
        widths.append(v[:, columns].shape[1])
        out[:, columns] += a @ v[:, columns]

    batched.over_columns(work, v, chunk)
    close(out, to_host(a) @ to_host(v))
    assert sorted(widths) == sorted(min(chunk, 7 - i) for i in range(0, 7, chunk))


def test_over_columns_of_no_columns(xp: ModuleType, dtype: Any):
    batched.over_columns(lambda columns: pytest.fail("called"), xp.zeros((5, 0), dtype), 4)


# --- entries ---------------------------------------------------------------------------------

ROWS = np.array([[0, 3, 5, -1], [8, 2, -1, -1], [-1, -1, -1, -1]])
COLS = np.array([[3, 1, -1], [8, 8, 2], [4, 0, 1]])


def blocks_of(dense: np.ndarray) -> np.ndarray:
    """K[ROWS[t], COLS[t]] with zeros on the padding."""
    blocks = np.stack([dense[r][:, c] for r, c in zip(ROWS, COLS, strict=True)])
    real = (ROWS >= 0)[:, :, None] & (COLS >= 0)[:, None, :]
    return np.where(real, blocks, 0).astype(dense.dtype)


def test_dense_entries(xp: ModuleType, dtype: Any):
    a = stack(9, 9, dtype=dtype)
    got = batched.dense_entries(xp.asarray(a), xp.asarray(ROWS), xp.asarray(COLS))
    np.testing.assert_array_equal(to_host(got), blocks_of(a))


@pytest.mark.parametrize("dimension", [1, 3, 16, 17, 40])
@pytest.mark.parametrize(
    "kernel",
    ["gaussian", "laplace", "matern32", "matern52", "rational_quadratic", "spherical",
     "squared_distance"],
)  # fmt: skip
@pytest.mark.parametrize("every_row", [False, True])
def test_point_entries(xp: ModuleType, dtype: Any, kernel: str, dimension: int, every_row: bool):
    """Above 16 dimensions distances come from a matrix product."""
    points = stack(9, dimension, dtype=dtype) / dtype(0.7 * dimension**0.5)
    nugget = np.linspace(0.25, 2.0, 9 if every_row else 1).astype(dtype)
    how = batched.PointKernel(kernel, 1.3, 3.0)
    got = batched.point_entries(
        xp.asarray(points), how, xp.asarray(nugget), xp.asarray(ROWS), xp.asarray(COLS)
    )
    want = 3.0 * dense_oracles.kernel_matrix(points, kernel, alpha=1.3) + nugget * np.eye(9)
    close(got, blocks_of(want).astype(dtype))


class Table:
    """G[u, v, k] as a plain array behind the interface of `UnitGram`."""

    def __init__(self, g: Any) -> None:
        self.g = g

    def rows(self, u: int, units: Any) -> Any:
        return self.g[u, units]

    def pairs(self, u: Any, v: Any) -> Any:
        return namespace(self.g).asarray(to_host(self.g)[u, v])

    def coupled(self, u: Any, v: Any) -> Any:
        return to_host(self.g).any(axis=2)[u, v]


@pytest.mark.parametrize("sparse", [False, True])
def test_khatri_rao_entries(xp: ModuleType, dtype: Any, sparse: bool):
    """Also with units that share nothing (an elementwise output layer)."""
    features, c = stack(4, 6, dtype=dtype), stack(3, 2, 6, dtype=dtype)
    g = np.einsum("uok,vok->uvk", c, c)
    if sparse:
        g *= np.eye(3, dtype=dtype)[:, :, None]
    feature_of = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0])
    unit_of = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    x = features[feature_of]
    want = np.einsum("ik,jk,ijk->ij", x, x, g[unit_of][:, unit_of])
    got = batched.khatri_rao_entries(
        xp.asarray(features),
        feature_of,
        unit_of,
        Table(xp.asarray(g)),
        xp.asarray(ROWS),
        xp.asarray(COLS),
    )
    close(got, blocks_of(want))
    swapped = batched.khatri_rao_entries(
        xp.asarray(features),
        feature_of,
        unit_of,
        Table(xp.asarray(g)),
        xp.asarray(COLS),
        xp.asarray(ROWS),
    )
    close(swapped, blocks_of(want).swapaxes(1, 2))


def test_entries_of_empty_index_lists(xp: ModuleType, dtype: Any):
    rows, cols = xp.zeros((2, 0), np.int64), xp.zeros((2, 3), np.int64)
    assert batched.dense_entries(xp.ones((4, 4), dtype), rows, cols).shape == (2, 0, 3)
    points = xp.ones((4, 2), dtype)
    nothing, kernel = xp.zeros(1, dtype), batched.PointKernel("gaussian")
    assert batched.point_entries(points, kernel, nothing, cols, rows).shape == (2, 3, 0)


# --- the thread pool -------------------------------------------------------------------------


def test_the_first_exception_of_a_task_is_raised():
    from gpu_hodlr.batched.threads import over_nodes

    def work(i: int) -> None:
        if i >= 5:
            raise ZeroDivisionError(i)

    with pytest.raises(ZeroDivisionError, match="5"):
        over_nodes(work, 40)


def test_every_task_runs_once_and_blas_threads_are_restored():
    import threadpoolctl

    from gpu_hodlr.batched.threads import over_nodes, over_spans

    def limits() -> list[int]:
        return [lib["num_threads"] for lib in threadpoolctl.threadpool_info()]

    before = limits()
    for count in (0, 1, 2, 3, 17, 100):
        seen = np.zeros(count, int)
        over_nodes(lambda i, seen=seen: seen.__setitem__(i, seen[i] + 1), count)
        np.testing.assert_array_equal(seen, 1)
        spans = np.zeros(count, int)

        def add(start: int, stop: int, spans: np.ndarray = spans) -> None:
            spans[start:stop] += 1

        over_spans(add, count)
        np.testing.assert_array_equal(spans, 1)
    assert limits() == before


def test_few_multiplications_are_done_by_the_caller(monkeypatch: pytest.MonkeyPatch):
    """And by several threads from a number on; the limit of BLAS is set by neither, it is there."""
    import threadpoolctl

    from gpu_hodlr.batched import threads

    monkeypatch.setattr(threads, "num_threads", lambda: 3)
    with threadpoolctl.threadpool_limits(1):
        monkeypatch.setattr(threads, "_take_control", None)
        for multiplications, count in ((threads.FEW_MULTIPLICATIONS, 3), (100, 1)):
            seen: list[tuple[int, int]] = []
            threads.over_spans(lambda *span, seen=seen: seen.append(span), 9, multiplications)
            assert sorted(seen) == [(9 * p // count, 9 * (p + 1) // count) for p in range(count)]

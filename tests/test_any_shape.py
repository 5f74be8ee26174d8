"""Any shape: nothing, one, and sizes around those of warps, tiles and panels; any layout.

One body for every array library, checked against NumPy's implementation; see also
test_limits.py.
"""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stacks import close, stack
from test_limits import LAYOUTS, by_columns

from gpu_hodlr import batched
from gpu_hodlr.batched import level_products
from gpu_hodlr.devices import namespace, to_host

# One body of pytest's fixtures serves all examples: nothing is left behind in them.
examples = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
NODES = st.sampled_from([0, 1, 2, 3])
SIZE = st.one_of(st.integers(0, 4), st.sampled_from([7, 8, 9, 31, 32, 33, 63, 64, 65, 100]))
DTYPE = st.sampled_from([np.float32, np.float64])


def both(stand_in: HostCupy, call: Any, *arrays: Any, **options: Any) -> tuple[Any, Any]:
    """What a primitive gives for arrays of the stand-in, on the host, and for NumPy's."""
    given_arrays = [stand_in.cupy.asarray(a.copy()) for a in arrays]
    return call(*given_arrays, **options), call(*(a.copy() for a in arrays), **options)


@examples
@given(NODES, SIZE, SIZE, SIZE, DTYPE)
def test_matmul(stand_in: HostCupy, nodes: int, m: int, k: int, n: int, dtype: Any):
    got, want = both(
        stand_in, batched.matmul, stack(nodes, m, k, dtype=dtype), stack(nodes, k, n, dtype=dtype)
    )
    close(got, want)


@examples
@given(NODES, SIZE, SIZE, st.floats(0, 1), DTYPE)
def test_qr_and_interpolation(
    stand_in: HostCupy, nodes: int, m: int, s: int, part: float, dtype: Any
):
    """R^T R is the Gram matrix of the rows, and T gives the rows from the first of them."""
    S = stack(nodes, m, s, dtype=dtype)
    rank = round(part * m)
    qr = batched.pivoted_qr(stand_in.cupy.asarray(S))
    pivots, r = to_host(qr.pivots), to_host(qr.r)
    chosen = np.take_along_axis(S, pivots[:, :, None], axis=1)
    close(r.swapaxes(1, 2) @ r, chosen @ chosen.swapaxes(1, 2), factor=5)
    order, T, ranks = (
        to_host(x) for x in batched.interpolation(qr, rank, stand_in.cupy.zeros((nodes, m), bool))
    )
    assert order.shape == (nodes, m)
    assert T.shape == (nodes, m - rank, rank)
    np.testing.assert_array_equal(ranks, min(rank, m, s))
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(m), (nodes, 1)))
    if rank >= s:  # all of S
        rows = np.take_along_axis(S, order[:, :, None], axis=1)
        size = max(1.0, np.abs(T).max(initial=0.0))
        close(T @ rows[:, :rank], rows[:, rank:], factor=20 * size)


@examples
@given(NODES, SIZE, SIZE, DTYPE)
def test_full_qr(stand_in: HostCupy, nodes: int, extra: int, k: int, dtype: Any):
    a = stack(nodes, k + extra, k, dtype=dtype)
    q, r = (to_host(x) for x in batched.full_qr(stand_in.cupy.asarray(a)))
    close(q @ q.swapaxes(1, 2), np.broadcast_to(np.eye(k + extra, dtype=dtype), q.shape))
    close(q[:, :, :k] @ r, a)


@examples
@given(NODES, SIZE, st.integers(0, 12), DTYPE, st.booleans())
def test_cholesky_and_solves(
    stand_in: HostCupy, nodes: int, n: int, k: int, dtype: Any, transpose: bool
):
    lower = np.tril(stack(nodes, n, n, dtype=dtype)) / (n + 1) + 2 * np.eye(n, dtype=dtype)
    (got, info), (want, _) = both(stand_in, batched.cholesky, lower @ lower.swapaxes(1, 2))
    close(got, want, factor=2)
    assert not to_host(info).any()
    x, want = both(
        stand_in, batched.solve_triangular, lower, stack(nodes, n, k, dtype=dtype),
        transpose=transpose,
    )  # fmt: skip
    close(x, want, factor=2)


@examples
@given(NODES, SIZE, SIZE, st.integers(0, 10), DTYPE, st.booleans())
def test_products_with_bases(
    stand_in: HostCupy, nodes: int, rest: int, r: int, k: int, dtype: Any, ordered: bool
):
    rows = rest + r
    rng = np.random.default_rng(rows)
    order = np.stack([rng.permutation(rows) for _ in range(nodes)] or [np.zeros(rows, int)])
    order = order[:nodes]
    T, x = stack(nodes, rest, r, dtype=dtype), stack(nodes, rows, k, dtype=dtype)
    pick = [order] if ordered else []

    def restrict(T: Any, x: Any, order: Any = None) -> Any:
        return level_products.restrict(T, order, x)

    def prolong(T: Any, z: Any, x: Any, order: Any = None) -> Any:
        return level_products.prolong(T, order, z), level_products.prolong(T, order, z, add_to=x)

    got, want = both(stand_in, restrict, T, x, *pick)
    close(got, want, factor=2)
    for mine, right in zip(*both(stand_in, prolong, T, want, x, *pick), strict=True):
        close(mine, right, factor=4)


@examples
@given(NODES, SIZE, st.integers(0, 10), DTYPE)
def test_couplings_and_leaves(stand_in: HostCupy, pairs: int, r: int, k: int, dtype: Any):
    B, w = stack(pairs, r, r, dtype=dtype), stack(2 * pairs, r, k, dtype=dtype)
    close(*both(stand_in, level_products.couple, B, w), factor=2)
    v = stack(50, k, dtype=dtype)
    leaves = np.random.default_rng(r).integers(-1, 50, (pairs, r))
    for mine, right in zip(*both(stand_in, level_products.leaf_product, B, v, leaves), strict=True):
        close(mine, right, factor=2)


@examples
@given(st.integers(1, 4), SIZE, st.sampled_from([0, 1, 8, 9, 32, 33, 64, 65]), DTYPE)
def test_block_sparse(stand_in: HostCupy, nodes: int, m: int, k: int, dtype: Any):
    pairs = np.array([(a, b) for a in range(nodes) for b in range(a)]).reshape(-1, 2)
    blocks = stack(len(pairs), m, m, dtype=dtype)
    x, y = stack(nodes, m, k, dtype=dtype), stack(nodes, m, k, dtype=dtype, seed=1)

    def product(blocks: Any, x: Any, y: Any) -> Any:
        pattern = batched.block_pattern(pairs, nodes, blocks)
        return batched.block_sparse_matmul(blocks, pattern, x, y)

    close(*both(stand_in, product, blocks, x, y), factor=2)


@examples
@given(NODES, SIZE, SIZE, st.sampled_from([1, 2, 15, 16, 17, 40]), DTYPE)
def test_entries(stand_in: HostCupy, nodes: int, m: int, k: int, d: int, dtype: Any):
    rng = np.random.default_rng((nodes, m, k))
    rows, cols = rng.integers(-1, 30, (nodes, m)), rng.integers(-1, 30, (nodes, k))
    points = stack(30, d, dtype=dtype)

    def entries(points: Any, rows: Any, cols: Any) -> Any:
        nugget = namespace(points).full(1, 0.5, points.dtype)
        return batched.point_entries(
            points / 2, batched.PointKernel("matern52", variance=1.5), nugget, rows, cols
        )

    if k:
        close(*both(stand_in, entries, points, rows, cols))
    got, want = both(stand_in, batched.inner_products, points, rows, cols)
    real = (rows >= 0)[:, :, None] & (cols >= 0)[:, None, :]
    close(np.where(real, to_host(got), 0).astype(dtype), np.where(real, want, 0).astype(dtype))


@examples
@given(NODES, SIZE, SIZE, DTYPE)
def test_rows(stand_in: HostCupy, nodes: int, m: int, k: int, dtype: Any):
    rng = np.random.default_rng(m)
    order = np.argsort(rng.random((nodes, m)), axis=1)
    x = stack(nodes, m, k, dtype=dtype)
    permuted, want = both(stand_in, batched.permute_rows, x, order)
    np.testing.assert_array_equal(to_host(permuted), want)
    got, _ = both(stand_in, batched.unpermute_rows, want, order)
    np.testing.assert_array_equal(to_host(got), x)
    flat = np.argsort(rng.random(nodes * m)).reshape(nodes, m)

    def scatter(x: Any, flat: Any) -> Any:
        return batched.scatter_rows(x, flat, nodes * m)

    got, want = both(stand_in, scatter, x, flat)
    np.testing.assert_array_equal(to_host(got), want)
    got, _ = both(stand_in, batched.gather_rows, want, flat)
    np.testing.assert_array_equal(to_host(got), x)


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("k", [3, 9])
def test_products_of_any_layout(xp: ModuleType, dtype: Any, layout: Any, k: int):
    """Every operand of the products of a level, and the target, as a view."""
    T, B, D = (xp.asarray(stack(2, *s, dtype=dtype)) for s in ((4, 3), (3, 3), (7, 7)))
    x, w = xp.asarray(stack(2, 7, k, dtype=dtype)), xp.asarray(stack(4, 3, k, dtype=dtype))
    z, v = w[:2].copy(), xp.asarray(stack(14, k, dtype=dtype))
    order = xp.asarray(np.stack([np.random.default_rng(t).permutation(7) for t in range(2)]))
    leaves, turned = xp.arange(14).reshape(2, 7), order.T.copy().T
    for how, rows in ((None, None), (order, turned)):
        close(
            level_products.restrict(layout(T), rows, layout(x)),
            to_host(level_products.restrict(T, how, x)),
        )
        want = to_host(level_products.prolong(T, how, z, add_to=x.copy()))
        target = layout(x.copy())
        assert level_products.prolong(layout(T), rows, layout(z), add_to=target) is target
        close(target, want)
    want, target = to_host(level_products.couple(B, w, add_to=w.copy())), layout(w.copy())
    assert level_products.couple(layout(B), layout(w), add_to=target) is target
    close(target, want)
    for mine, right in zip(level_products.leaf_product(layout(D), by_columns(v[None])[0], leaves),
                           level_products.leaf_product(D, v, leaves), strict=True):  # fmt: skip
        close(mine, to_host(right))
    pattern = batched.block_pattern(np.array([[0, 1], [0, 2], [1, 3]]), 4, B)
    blocks = xp.asarray(stack(3, 3, 3, dtype=dtype))
    want = to_host(batched.block_sparse_matmul(blocks, pattern, w, w.copy()))
    target = layout(w.copy())
    assert batched.block_sparse_matmul(layout(blocks), pattern, layout(w), target) is target
    close(target, want)


def test_inner_products_of_nothing(xp: ModuleType, dtype: Any):
    """No rows; no coordinates."""
    rows, cols = xp.zeros((2, 0), np.int64), xp.zeros((2, 3), np.int64)
    assert batched.inner_products(xp.ones((4, 5), dtype), rows, cols).shape == (2, 0, 3)
    got = batched.inner_products(xp.ones((4, 0), dtype), cols, cols)
    np.testing.assert_array_equal(to_host(got), np.zeros((2, 3, 3), dtype))

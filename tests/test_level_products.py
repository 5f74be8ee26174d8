"""Products with a level's bases and couplings, and random numbers; one body for every library."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from stacks import close, stack

from gpu_hodlr import batched
from gpu_hodlr.batched import level_products
from gpu_hodlr.devices import device_of, to_host


def interpolative_bases(xp: ModuleType, nodes: int, rows: int, r: int, dtype: Any) -> Any:
    """T, an order of the rows, and U = P [I; T] in full."""
    T = stack(nodes, rows - r, r, dtype=dtype)
    rng = np.random.default_rng(5)
    order = np.stack([rng.permutation(rows) for _ in range(nodes)])
    U = np.zeros((nodes, rows, r), dtype)
    full = np.concatenate([np.tile(np.eye(r, dtype=dtype), (nodes, 1, 1)), T], axis=1)
    np.put_along_axis(U, order[:, :, None], full, axis=1)
    return xp.asarray(T), xp.asarray(order), U


@pytest.mark.parametrize("k", [1, 2, 3, 8, 9])
@pytest.mark.parametrize(("rows", "r"), [(7, 3), (40, 33), (5, 5), (6, 0)])
def test_products_with_bases(xp: ModuleType, dtype: Any, rows: int, r: int, k: int):
    """Narrow right-hand sides have kernels of their own on a GPU."""
    T, order, U = interpolative_bases(xp, 4, rows, r, dtype)
    x, z = stack(4, rows, k, dtype=dtype), stack(4, r, k, dtype=dtype, seed=1)
    for how in (order, None):
        full = U if how is not None else np.take_along_axis(U, to_host(order)[:, :, None], axis=1)
        close(level_products.restrict(T, how, xp.asarray(x)), full.swapaxes(1, 2) @ x, factor=10)
        close(level_products.prolong(T, how, xp.asarray(z)), full @ z, factor=10)
        target = xp.asarray(x.copy())
        assert level_products.prolong(T, how, xp.asarray(z), add_to=target) is target
        close(target, x + full @ z, factor=10)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_products_with_bases_of_rows_of_vectors(xp: ModuleType, dtype: Any, k: int):
    """Of the leaves, whose rows an index numbers as a whole; all the same by leaves."""
    D, T = stack(2, 5, 5, dtype=dtype), stack(2, 3, 2, dtype=dtype)
    v, z = stack(9, k, dtype=dtype), stack(2, 2, k, dtype=dtype, seed=1)
    leaves = np.array([[7, 0, 3, 8, -1], [1, 2, 4, 5, 6]])
    index, device = xp.asarray(leaves), xp.asarray(v)
    x = np.where(leaves[:, :, None] >= 0, v[leaves], 0)
    U = np.concatenate([np.tile(np.eye(2, dtype=dtype), (2, 1, 1)), T], axis=1)
    close(level_products.restrict(xp.asarray(T), index, device), U.swapaxes(1, 2) @ x, factor=10)
    want = v.copy()
    want[leaves[leaves >= 0]] += (U @ z)[leaves >= 0]
    target = device.copy()
    level_products.prolong(xp.asarray(T), index, xp.asarray(z), add_to=target)
    close(target, want, factor=10)
    rows, got = level_products.leaf_product(xp.asarray(D), device, index, gathered=False)
    if got.ndim == 3:
        close(rows, x)
        got = batched.scatter_rows(got, index, 9, every=True)
    else:
        close(rows, v)
    want[leaves[leaves >= 0]] = (D @ x)[leaves >= 0]
    close(got, want, factor=10)


@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("r", [1, 5, 40])
def test_couplings_of_siblings(xp: ModuleType, dtype: Any, r: int, k: int):
    B, w = stack(3, r, r, dtype=dtype), stack(6, r, k, dtype=dtype, seed=1)
    want = np.empty_like(w)
    want[0::2], want[1::2] = B @ w[1::2], B.swapaxes(1, 2) @ w[0::2]
    close(level_products.couple(xp.asarray(B), xp.asarray(w)), want, factor=10)
    target = xp.asarray(w.copy())
    level_products.couple(xp.asarray(B), xp.asarray(w), add_to=target)
    close(target, w + want, factor=10)


@pytest.mark.parametrize("k", [1, 7, 9])
def test_leaf_products(xp: ModuleType, dtype: Any, k: int):
    D, v = stack(3, 4, 4, dtype=dtype), stack(9, k, dtype=dtype)
    D = D + D.swapaxes(1, 2)
    leaves = np.array([[8, 0, 3, -1], [1, 2, 4, 5], [6, 7, -1, -1]])
    x = np.where(leaves[:, :, None] >= 0, v[leaves], 0)
    rows, got = level_products.leaf_product(xp.asarray(D), xp.asarray(v), xp.asarray(leaves))
    close(rows, x)
    close(got, D @ x, factor=10)


@pytest.mark.parametrize("count", [1, 4, 11])
def test_inner_products(xp: ModuleType, count: int):
    x = stack(30, 6, dtype=np.float32)
    rng = np.random.default_rng(0)
    rows, members = rng.integers(30, size=(3, 40)), rng.integers(30, size=(3, count))
    got = batched.inner_products(xp.asarray(x), xp.asarray(rows), xp.asarray(members))
    close(got, np.einsum("tid,tcd->tic", x[rows], x[members]), factor=10)


def test_products_are_added_and_subtracted_in_place(xp: ModuleType, dtype: Any):
    """Also into views, and with one column."""
    a, b = stack(3, 6, 5, dtype=dtype), stack(3, 5, 4, dtype=dtype)
    for columns in (4, 1):
        out = stack(3, 8, 7, dtype=dtype, seed=2)
        target = xp.asarray(out.copy())
        right = xp.asarray(b)[:, :, :columns]
        batched.matmul(xp.asarray(a), right, subtract_from=target[:, 1:7, 2 : 2 + columns])
        want = out.copy()
        want[:, 1:7, 2 : 2 + columns] -= a @ b[:, :, :columns]
        close(target, want, factor=5)
        view = target.swapaxes(1, 2)[:, 2 : 2 + columns, 1:7]  # columns are contiguous
        batched.matmul(right, xp.asarray(a), transpose_a=True, transpose_b=True, add_to=view)
        close(target, out, factor=5)


@pytest.mark.parametrize("seed", [(0,), (3, 0xA5), (2**40, 7)])
def test_normal_numbers(xp: ModuleType, dtype: Any, seed: tuple[int, ...]):
    """Moments within five standard deviations; no number twice; the same from the same seed."""
    device = device_of(xp.zeros(1))
    draw, again = (batched.normal_source(seed, device) for _ in range(2))
    first, second = (to_host(draw((101, 31), dtype)).astype(float) for _ in range(2))
    np.testing.assert_array_equal(first, to_host(again((101, 31), dtype)))
    both = np.concatenate([first.ravel(), second.ravel()])
    assert first.shape == (101, 31)
    assert len(np.unique(both)) > 0.999 * both.size
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((both**power).mean() - mean) < 5 * (variance / both.size) ** 0.5
    for order in (first, first.T):  # within a row, within a column
        correlation = (order.ravel()[:-1] * order.ravel()[1:]).mean()
        assert abs(correlation) < 5 / first.size**0.5


@pytest.mark.parametrize("n", [1, 2, 101])
def test_normal_columns(xp: ModuleType, dtype: Any, n: int):
    """A column is the same whichever others are drawn with it, and with more rows it goes on."""
    device = device_of(xp.zeros(1))
    whole = to_host(batched.normal_source((3, 1), device)((101, 12), dtype))
    source = batched.normal_source((3, 1), device)
    for k, part in ((4, slice(1, 3)), (5, slice(2, 2)), (3, slice(0, 3))):
        first = source._next
        got = source((n, k), dtype, part)
        assert (got.dtype, got.flags.f_contiguous) == (dtype, True)
        np.testing.assert_array_equal(to_host(got), whole[:n, first : first + k][:, part])

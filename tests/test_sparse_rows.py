"""Sparse rows: the kernels on the host, and every array library, against dense matrices."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cuda import launches, runner
from kernel_cases import DTYPES, built_for_host, needs_compiler, under_schedules

from gpu_hodlr import batched
from gpu_hodlr.devices import to_host

SHAPES = [(1, 1, 1.0), (7, 40, 0.3), (33, 20, 0.05), (50, 300, 0.4), (5, 5, 0.0)]
WIDTHS = (1, 3, 8, 9, 40)


def sparse(rows: int, width: int, share: float, dtype: Any) -> tuple[np.ndarray, ...]:
    """A dense matrix, and where its entries start in columns and values."""
    rng = np.random.default_rng(rows + width)
    dense = rng.standard_normal((rows, width)) * (rng.random((rows, width)) < share)
    dense = dense.astype(dtype)
    row, column = np.nonzero(dense)
    starts = np.searchsorted(row, np.arange(rows + 1))
    return dense, starts, column.astype(np.int32), dense[row, column]


@pytest.fixture(scope="module")
def kernels(host_library_folder: Any) -> runner.HostKernels:
    return built_for_host(host_library_folder)["sparse_rows"]


def close(got: Any, want: np.ndarray, terms: int) -> None:
    assert got.dtype == want.dtype
    eps = float(np.finfo(want.dtype).eps)
    np.testing.assert_allclose(to_host(got), want, rtol=0, atol=4 * eps * (terms + 1))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_on_host(kernels: Any, dtype: Any, shape: Any):
    """Both kernels for the same columns; wide ones in more tiles than one."""
    dense, starts, columns, values = sparse(*shape, dtype)
    for k in WIDTHS:
        x = np.random.default_rng(k).standard_normal((dense.shape[1], k)).astype(dtype)
        for kind in ("narrow", "wide") if k <= 8 else ("wide",):
            got = under_schedules(
                launches.sparse_rows, kernels, starts, columns, values, x, kind=kind
            )
            close(got, dense @ x, dense.shape[1])


@pytest.mark.parametrize("index", [np.int32, np.uint16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(xp: ModuleType, dtype: Any, index: Any, shape: Any):
    dense, *arrays = sparse(*shape, dtype)
    starts, columns, values = (xp.asarray(a) for a in arrays)
    rows = batched.sparse_rows(starts, columns.astype(index), values, dense.shape[1])
    for k in WIDTHS:
        rng = np.random.default_rng(k)
        x = rng.standard_normal((dense.shape[1], k)).astype(dtype)
        z = rng.standard_normal((len(dense), k)).astype(dtype)
        close(rows.matmul(xp.asarray(x)), dense @ x, dense.shape[1])
        close(rows.transposed_matmul(xp.asarray(z)), dense.T @ z, len(dense))


def test_views_and_no_columns(xp: ModuleType):
    dense, *arrays = sparse(9, 12, 0.5, np.float64)
    rows = batched.sparse_rows(*(xp.asarray(a) for a in arrays), 12)
    x = np.random.default_rng(0).standard_normal((12, 6))
    close(rows.matmul(xp.asarray(x)[:, ::2]), dense @ x[:, ::2], 12)
    assert rows.matmul(xp.asarray(x)[:, :0]).shape == (9, 0)
    assert rows.transposed_matmul(xp.zeros((9, 0))).shape == (12, 0)


def test_sums_by_key(xp: ModuleType, dtype: Any):
    """Keys met often, once and not at all; negative ones are none."""
    rng = np.random.default_rng(0)
    keys = rng.integers(-2, 40, 3000)
    keys[keys == 7] = 1 << 40
    values = rng.standard_normal(3000).astype(dtype)
    found, sums = batched.sums_by_key(xp.asarray(keys), xp.asarray(values))
    want = np.unique(keys[keys >= 0])
    np.testing.assert_array_equal(to_host(found), want)
    assert sums.dtype == dtype
    exact = [values[keys == key].astype(float).sum() for key in want]
    np.testing.assert_allclose(to_host(sums), exact, rtol=0, atol=100 * np.finfo(dtype).eps)
    again = batched.sums_by_key(xp.asarray(keys), xp.asarray(values))[1]
    np.testing.assert_array_equal(to_host(again), to_host(sums))


def test_nothing_is_waited_for(stand_in: Any):
    """Nor where the rows of the transpose are found."""
    xp = stand_in.cupy
    _, *arrays = sparse(9, 12, 0.5, np.float64)
    given = [xp.asarray(a) for a in arrays]
    stand_in.counters.reset()
    batched.sparse_rows(*given, 12).transposed_matmul(xp.ones((9, 1)))
    assert stand_in.counters.synchronizations == 0


@pytest.mark.parametrize("keys", [[], [-1, -1]])
def test_sums_of_no_keys(xp: ModuleType, dtype: Any, keys: list[int]):
    found, sums = batched.sums_by_key(
        xp.asarray(np.array(keys, np.int64)), xp.ones(len(keys), dtype)
    )
    assert found.shape == sums.shape == (0,)

"""Block-sparse products: kernel source executed on the host."""

from typing import Any

import numpy as np
import pytest
from block_cases import COLUMNS, NODES, PAIRS, SIZES, close, exact, stacks
from host_cuda import launches, runner
from kernel_cases import DTYPES, built_for_host, needs_compiler, under_schedules

from gpu_hodlr import batched

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def kernels(host_library_folder) -> runner.HostKernels:
    return built_for_host(host_library_folder)["block_sparse"]


def arguments(m: int, k: int, dtype: Any) -> tuple[np.ndarray, ...]:
    blocks, x, y = stacks(m, k, dtype)
    pattern = batched.block_pattern(PAIRS, NODES, blocks)
    return blocks, pattern.starts, pattern.terms, x, y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [k for k in (2, *COLUMNS, 65) if k > 0])
@pytest.mark.parametrize("m", SIZES)
def test_block_sparse_on_host(kernels, dtype, m, k) -> None:
    blocks, starts, terms, x, y = arguments(m, k, dtype)
    got = under_schedules(launches.block_sparse, kernels, blocks, starts, terms, x, y)
    reference = y.copy()
    pattern = batched.block_pattern(PAIRS, NODES, blocks)
    batched.block_sparse_matmul(blocks, pattern, x, reference)
    close(got, reference.astype(float), 3 * m)
    np.testing.assert_array_equal(got[2], y[2])


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_block_sparse_of_every_shape_on_host(kernels, warps, k) -> None:
    blocks, starts, terms, x, y = arguments(45, k, np.float32)
    got = under_schedules(
        launches.block_sparse, kernels, blocks, starts, terms, x, y, warps=warps
    )  # fmt: skip
    close(got, exact(blocks, x, y, PAIRS), 150)


def test_block_sparse_orders_of_terms_on_host(kernels) -> None:
    """Terms of a row whose orientation changes again and again."""
    rng = np.random.default_rng(0)
    blocks, x = rng.standard_normal((5, 20, 20)), rng.standard_normal((3, 20, 12))
    terms = np.array([[p, p % 3, flag] for p, flag in enumerate((1, 0, 0, 1, 0))], np.int32)
    starts = np.array([0, 0, 5, 5], np.int32)
    want = sum((blocks[p].T if flag else blocks[p]) @ x[j] for p, j, flag in terms)
    for k in (1, 8, 12):
        some, zero = np.ascontiguousarray(x[:, :, :k]), np.zeros((3, 20, k))
        got = under_schedules(launches.block_sparse, kernels, blocks, starts, terms, some, zero)
        close(got[1], want[:, :k], 100)
        assert not got[[0, 2]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 9), (20, 33)])
def test_terms_are_added_up_on_host(kernels, dtype, m, k) -> None:
    """Of all blocks, and of some after the others: where pairs are sorted, in the same order."""
    pairs = PAIRS[np.lexsort(PAIRS.T[::-1])]
    blocks, x, y = stacks(m, k, dtype, pairs)
    pattern = batched.block_pattern(pairs, NODES, blocks)
    starts, terms = pattern.starts, pattern.terms
    z = np.stack([blocks @ x[pairs[:, 1]], blocks.swapaxes(1, 2) @ x[pairs[:, 0]]])
    whole = under_schedules(launches.add_terms, kernels, starts, terms, z, y, 0)
    close(whole, exact(blocks, x, y, pairs), 3 * m)
    parts = y
    for first in range(0, len(blocks), 4):
        some = np.ascontiguousarray(z[:, first : first + 4])
        parts = launches.add_terms(kernels, starts, terms, some, parts, first)
    np.testing.assert_array_equal(parts, whole)

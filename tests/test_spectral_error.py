"""The spectral norm of what a compression misses: the space that it is sought in."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr.compression.spectral import _Space, sampled_spectral_error, spectral_error
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.errors import RankCapWarning
from gpu_hodlr.tree import rows_tree

N = 200


def owners_of(n: int) -> Ownership:
    """All rows in one leaf."""
    return Ownership(ALONE.comm, rows_tree(n, 1).leaves)


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_the_spectral_error_is_the_largest_singular_value(size: float):
    """Where no other is near it, however small it is."""
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
    exact = (Q * np.r_[10.0, 9.0, 8.0, size, np.full(N - 4, 0.05 * size)]) @ Q.T
    op = gh.DenseOperator((exact + exact.T) / 2)
    with pytest.warns(RankCapWarning):
        K = gh.compress(op, "lowrank", rtol=1e-3 * size, max_rank=3)
    first, second = np.linalg.svd(op.to_dense() - K.to_dense(), compute_uv=False)[:2]
    assert second < 0.7 * first
    assert 0.99 * first <= K.report.spectral_error <= 1.0001 * first


def test_the_space_of_errors_is_orthonormal():
    """And holds what was added to it, of small size too, but no more than eight at a time."""
    rng = np.random.default_rng(0)
    space = _Space(owners_of(60))
    x = rng.standard_normal((60, 5))
    added = x[:, :3] * np.array([1.0, 1e-2, 1e-3]), np.c_[x[:, 3:] + x[:, :2], x[:, 0]]
    blocks = [space.added(space.by_leaves(each)) for each in added]
    Q = np.hstack([space.by_rows(block) for block in blocks])
    np.testing.assert_allclose(Q.T @ Q, np.eye(5), rtol=0, atol=1e-8)
    np.testing.assert_allclose(Q @ (Q.T @ x), x, rtol=0, atol=1e-8)
    assert space.added(space.by_leaves(x)) is None
    assert space.added(space.by_leaves(rng.standard_normal((60, 9)))).shape[2] == 8


@pytest.mark.parametrize("n", [64, 300])
def test_an_error_that_every_column_shows(n: int):
    """Of rank one and equal entries: any columns tell all of it."""
    exact = toeplitz(n)
    K = gh.compress(exact, leaf_size=n)
    op = gh.DenseOperator(exact + 0.25 / n)
    job: Any = SimpleNamespace(operator=op, owners=owners_of(n), seed=0)
    for measure in (spectral_error, sampled_spectral_error):
        assert measure(job, K.structure) == pytest.approx(0.25, rel=1e-9)


def test_each_half_of_the_columns_is_measured_by_the_other():
    """Of a diagonal, which the columns of others do not show, is nothing seen."""
    K = gh.compress(toeplitz(64), leaf_size=64)
    op = gh.DenseOperator(toeplitz(64) + np.eye(64))
    job: Any = SimpleNamespace(operator=op, owners=owners_of(64), seed=0)
    assert sampled_spectral_error(job, K.structure) <= 1e-12
    assert spectral_error(job, K.structure) == pytest.approx(1.0)


def test_nothing_is_missed_of_entries_that_are_stored_whole():
    """Of which no product is formed."""
    report = gh.compress(toeplitz(60), leaf_size=64, sampler="entries").report
    assert (report.spectral_error, report.spectral_sampled) == (0.0, True)

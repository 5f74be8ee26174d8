"""The spectral norm of what a compression misses: the space that it is sought in."""

import numpy as np
import pytest
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr.compression.spectral import _Space
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.errors import RankCapWarning
from gpu_hodlr.tree import rows_tree

N = 200


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
    """And holds what was added to it."""
    space = _Space(Ownership(ALONE.comm, rows_tree(60, 1).leaves))
    x = np.random.default_rng(0).standard_normal((60, 5))
    added = x[:, :3], x[:, 1:] + x[:, :4]
    blocks = [space.added(space.by_leaves(each)) for each in added]
    Q = np.hstack([space.by_rows(block) for block in blocks])
    np.testing.assert_allclose(Q.T @ Q, np.eye(Q.shape[1]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(Q @ (Q.T @ x), x, rtol=0, atol=1e-12)
    assert Q.shape == (60, 5)
    assert space.added(space.by_leaves(x)) is None


def test_nothing_is_missed_of_entries_that_are_stored_whole():
    """Of which no product is formed."""
    report = gh.compress(toeplitz(60), leaf_size=64, sampler="entries").report
    assert (report.spectral_error, report.spectral_sampled) == (0.0, True)

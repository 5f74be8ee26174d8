"""The sweep that asks for products alone: what it gives is exact where the rank is, and cheap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from test_regions import DEPTH, TREE
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.bases import products_only
from gpu_hodlr.bases.products_only import sweep_products_only
from gpu_hodlr.bases.samplers import regression_inflation
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.operators import SketchColumns

RANK = 3


def blocks_and_low_rank() -> np.ndarray:
    """Dense leaves of 0 to 9 rows, and rank 3 everywhere else."""
    rng = np.random.default_rng(0)
    U = rng.standard_normal((TREE.n, RANK))
    A = U @ U.T
    for leaf in TREE.leaves:
        rows = leaf[leaf >= 0]
        G = rng.standard_normal((len(rows), len(rows)))
        A[np.ix_(rows, rows)] += G + G.T
    return A


def in_order() -> np.ndarray:
    """Smooth away from its diagonal, as the tree has its rows."""
    place = np.argsort(TREE.permutation)
    return toeplitz(TREE.n)[np.ix_(place, place)]


def swept(A: np.ndarray, tolerance: float, max_rank: int, first: int = 4, **options: Any) -> Any:
    """The form, the levels capped, and the columns that were multiplied."""
    owners = options.get("owners", ALONE)
    columns = SketchColumns(gh.DenseOperator(A), first, 0, owners.comm)
    sketch = columns.to_rows(owners)
    form, capped = sweep_products_only(sketch, TREE, tolerance, max_rank, 0, **options)
    return form, capped, sketch.num


def dense(form: Any) -> np.ndarray:
    return form.matmat(np.eye(TREE.n))


def test_a_matrix_of_small_rank_is_exact_from_few_products():
    A = blocks_and_low_rank()
    form, capped, columns = swept(A, 1e-8 * np.linalg.norm(A), 50)
    assert np.linalg.norm(dense(form) - A) <= 1e-11 * np.linalg.norm(A)
    assert capped == ()
    assert [level.rank for level in form.levels] == [RANK] * DEPTH
    sizes = TREE.leaf_sizes
    for level in form.levels:
        assert list(level.ranks) == np.minimum(sizes, RANK).tolist()
        sizes = np.minimum(sizes, RANK).reshape(-1, 2).sum(axis=1)
    rows = TREE.leaves.shape[1]
    assert columns == rows + int(1.5 * (rows // 2)) + 10


def test_the_null_space_hides_the_own_block():
    """S S^T is that of Y without what Omega's rows reach; rounding is that of all of Y."""
    y, omega = np.random.default_rng(1).standard_normal((2, 3, 5, 12))
    omega[:, :, 5:] *= 0.1
    node = products_only._Node(y, omega, np.zeros((3, 5), bool))
    sample, Q, R = products_only._hide_own_block(node)
    np.testing.assert_allclose(Q[:, :, :5] @ R, omega.swapaxes(1, 2), rtol=0, atol=1e-13)
    left = y - y @ np.linalg.pinv(omega) @ omega
    np.testing.assert_allclose(
        sample.S @ sample.S.swapaxes(1, 2), left @ left.swapaxes(1, 2), rtol=0, atol=1e-12
    )
    np.testing.assert_array_equal(sample.inflation, regression_inflation(7, 1.0))
    energy = (y**2).sum(axis=(1, 2))
    np.testing.assert_array_equal(sample.noise, batched.squared_rounding(energy, y.dtype))


def test_more_products_are_made_where_the_rank_needs_them():
    """As many as there are rows left to look at, at most; twice as many at a time."""
    A = in_order()
    needed = []
    for rtol in (1e-1, 1e-4, 1e-9):
        form, capped, columns = swept(A, rtol * np.linalg.norm(A), 50)
        assert capped == ()
        assert np.linalg.norm(dense(form) - A) <= 2 * rtol * np.linalg.norm(A)
        np.testing.assert_allclose(dense(form), dense(form).T, rtol=0, atol=1e-13)
        needed.append((columns, max(level.rank for level in form.levels)))
    assert needed == sorted(needed)
    assert needed[0][1] < needed[1][1] < needed[2][1]
    assert [columns for columns, _ in needed] == [25, 45, 75]
    assert swept(A, 1e-4 * np.linalg.norm(A), 50, first=70)[2] == 70  # enough at once


@pytest.mark.parametrize(
    ("cap", "levels", "ranks"), [(1, (4,), [1, 1, 0, 0]), (3, (4, 3, 2), [3, 3, 3, 2])]
)
def test_a_cap_is_told_and_what_it_leaves_is_not_fitted_above(
    cap: int, levels: tuple[int, ...], ranks: list[int]
):
    A = in_order()
    form, capped, columns = swept(A, 1e-8 * np.linalg.norm(A), cap)
    assert capped == levels
    assert [level.rank for level in form.levels] == ranks
    assert columns == TREE.leaves.shape[1] + int(1.5 * cap) + 10
    assert swept(A, 1e-8 * np.linalg.norm(A), 50)[1] == ()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_on_ranks_it_is_that_of_one(size: int):
    A = in_order()
    one = dense(swept(A, 1e-3, 50)[0])

    def job(comm: Any) -> Any:
        owners = Ownership(comm, TREE.leaves)
        form, _, columns = swept(A, 1e-3, 50, owners=owners)
        v = np.eye(TREE.n)[owners.rows.mine]
        return owners.rows.whole(form.matmat(v)), columns, [level.ranks for level in form.levels]

    alone = swept(A, 1e-3, 50)
    for product, columns, ranks in on_threads(size, job):
        np.testing.assert_allclose(product, one, rtol=0, atol=1e-12)
        assert columns == alone[2]
        assert ranks == [level.ranks for level in alone[0].levels]

"""More ranks than there are processors: the same matrices on threads."""

from __future__ import annotations

import math
import warnings
from typing import Any

import distributed_cases as cases
import numpy as np
import pytest
from marks import but_slow
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.distributed import Communicator, OneRank, Ownership
from gpu_hodlr.factor.residuals import relative_residuals
from gpu_hodlr.tree import rows_tree

# Of threads one may restore the filters while another warns.
pytestmark = pytest.mark.filterwarnings("ignore::gpu_hodlr.errors.AccuracyWarning")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_communication(size: int):
    cases.check_counts(on_threads(size, cases.operations))


@pytest.mark.parametrize("name", cases.FEW)
@pytest.mark.parametrize("size", but_slow([5, 7, 8], 5, 8))
def test_every_form_is_the_serial_one(size: int, name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        serial = cases.compressed(name, None)
        found = on_threads(size, lambda comm: cases.compressed(name, comm))
        for K in found:
            assert isinstance(K, gh.CompressedMatrix), K
        checked = on_threads(size, lambda comm: cases.the_same(found[comm.rank], serial, comm))
    assert checked == [None] * size, checked


@pytest.mark.parametrize("scheme", ["hss", "hodlr"])
@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 8, 11])
def test_bytes_of_a_product(size: int, scheme: str):
    """4 r k 8 P log2(P) in all, whatever the number of ranks."""
    columns = 3

    def job(comm: Communicator) -> tuple[int, int]:
        K = gh.compress(
            cases.plane(1600), scheme, rtol=1e-3, leaf_size=25, ordering="geometric", comm=comm
        )
        before = comm.sent["product"]
        K @ np.ones((len(K.rows), columns))
        ranks = [level.rank for level in K.structure.levels] if scheme == "hss" else (
            K.structure.widths
        )  # fmt: skip
        return comm.sent["product"] - before, max(ranks)

    results = on_threads(size, job)
    assert all(isinstance(result, tuple) for result in results), results
    sent, ranks = zip(*results, strict=True)
    assert 0 < sum(sent) <= 4 * max(ranks) * columns * 8 * size * math.log2(size)


@pytest.mark.parametrize("size", [1, 3])
def test_relative_residuals_of_any_size(size: int):
    """Of each column, on any number of ranks; where b is 0 it is what should be 0."""
    scale = np.array([1e-200, 1e200, 1.0, 0.0])
    b = np.random.default_rng(0).standard_normal((50, 4)) * scale
    product = b * np.array([0.99, 1.01, 0.5, 1.0])
    product[7, 3] = -2.0

    def job(comm: Communicator) -> Any:
        owners = Ownership(comm if size > 1 else OneRank(), rows_tree(50, 4).leaves)
        return relative_residuals(owners.take(b), owners.take(product), owners)

    for found in on_threads(size, job):
        np.testing.assert_allclose(found, [0.01, 0.01, 0.5, 2.0], rtol=1e-12)

"""Levels whose nodes all have rank 0: every scheme, its factor, its files, on ranks."""

from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host

N = 128


def far_apart() -> np.ndarray:
    """Of clusters that do not see each other."""
    points = np.random.default_rng(0).random((N, 2)) * 0.01 + np.repeat(np.arange(4.0), 32)[:, None]
    return dense_oracles.kernel_matrix(points, "laplace", 0.02)


MATRICES = {
    "blocks": np.kron(np.eye(4), 0.5 + 0.5 * np.eye(32)),  # upper levels alone have rank 0
    "clusters": far_apart(),
    "diagonal": np.diag(1.0 + np.arange(N)),
    "zero": np.zeros((N, N)),
}
FORMS: dict[str, dict[str, Any]] = {
    "hss": {"scheme": "hss"},
    "hss, products": {"scheme": "hss", "sampler": "products"},
    "hss, entries": {"scheme": "hss", "sampler": "entries"},
    "fmm": {"scheme": "fmm", "budget": 0.2},
    "fmm, entries": {"scheme": "fmm", "budget": 0.2, "sampler": "entries"},
    "fmm as hss": {"scheme": "fmm"},
    "hodlr": {"scheme": "hodlr"},
    "hodlr, products": {"scheme": "hodlr", "sampler": "products"},
    "hodlr, entries": {"scheme": "hodlr", "sampler": "entries"},
    "lowrank": {"scheme": "lowrank"},
}
OPTIONS: dict[str, Any] = {"leaf_size": 16, "rtol": 1e-2, "ordering": "natural"}


@pytest.mark.filterwarnings("ignore::gpu_hodlr.errors.AccuracyWarning")
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("form", FORMS)
def test_products_and_solves(xp: ModuleType, tmp_path: Path, form: str, name: str):
    exact = MATRICES[name]
    K = gh.compress(xp.asarray(exact), **OPTIONS | FORMS[form])
    assert form == "lowrank" or any(not any(level) for level in K.ranks)
    dense = to_host(K.to_dense())
    assert dense_oracles.frobenius_error(dense, exact) <= 3e-2
    F = K.factorize(0.5)
    b = np.random.default_rng(1).standard_normal((N, 2))
    K.save(tmp_path / "matrix.npz")
    F.save(tmp_path / "factor.npz")
    for solver in (F, gh.load(tmp_path / "factor.npz", device=K.device)):
        x = to_host(solver.solve(xp.asarray(b)))
        assert dense_oracles.backward_error(dense + 0.5 * np.eye(N), x, b) <= 1e-10
    again = gh.load(tmp_path / "matrix.npz", device=K.device)
    np.testing.assert_array_equal(to_host(again.to_dense()), dense)
    assert again.ranks == K.ranks


@pytest.mark.parametrize("form", ["hss", "fmm", "hodlr"])
@pytest.mark.parametrize("name", ["blocks", "diagonal"])
def test_on_ranks(form: str, name: str):
    b = np.random.default_rng(1).standard_normal(N)

    def job(comm: Any = None) -> tuple[Any, Any, Any]:
        K = gh.compress(MATRICES[name], **OPTIONS | FORMS[form], comm=comm)
        return K.ranks, K @ b, K.factorize(0.5).solve(b)

    ranks, product, solution = job()
    for size in (2, 3):
        for got in on_threads(size, job):
            assert not isinstance(got, Exception), got
            assert got[0] == ranks
            np.testing.assert_allclose(got[1], product, rtol=0, atol=1e-12 * abs(product).max())
            np.testing.assert_allclose(got[2], solution, rtol=0, atol=1e-9 * abs(solution).max())


@pytest.mark.parametrize(("n", "leaf_size"), [(5, 1), (9, 2), (17, 1)])
def test_empty_leaves(n: int, leaf_size: int):
    """Trees of more leaves than rows: nodes with no rows at all."""
    points = np.random.default_rng(n).random((n, 2))
    op = gh.KernelOperator(points, "laplace", 0.5, nugget=0.1)
    K = gh.compress(op, "fmm", leaf_size=leaf_size, budget=0.4, rtol=1e-2)
    x = K.factorize(1.0).solve(np.ones(n))
    np.testing.assert_allclose(K @ x + x, 1.0, atol=1e-8)

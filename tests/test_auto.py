"""scheme="auto": the choice against what every scheme turns out to store."""

import re
import warnings
from typing import Any

import dense_oracles
import numpy as np
import pytest
from marks import but_slow
from matrix_cases import entries_only, products_only, siblings_of_their_own, toeplitz

import gpu_hodlr as gh
from gpu_hodlr.compression import memory
from gpu_hodlr.compression.options import Options
from gpu_hodlr.distributed import ALONE
from gpu_hodlr.errors import ArgumentError, RankCapWarning
from gpu_hodlr.matrices import matrix
from gpu_hodlr.schemes import SCHEMES, Sampling, prediction

HIERARCHICAL = ("hss", "hodlr")


def stored(op: Any, scheme: str, **options: Any) -> float:
    """What a scheme stores; infinite where it misses the tolerance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        K = gh.compress(op, scheme, **options)
    return float(K.storage_fraction) if K.report.error <= 3 * options["rtol"] else np.inf


@pytest.mark.parametrize("name", ["K02", "K04", "K05", "K12", "G03"])
@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_the_choice_is_the_least_or_close(name: str, rtol: float):
    """Within a fifth of the best of the three, built one by one."""
    op = matrix(name, 1024)
    options: dict[str, Any] = {"rtol": rtol, "max_rank": 400, "leaf_size": 64}
    K = gh.compress(op, "auto", **options)
    assert K.report.scheme in K.report.choice
    every = {s: stored(op, s, **options) for s in (*HIERARCHICAL, "lowrank")}
    assert K.storage_fraction <= 1.2 * min(every.values()), every
    assert K.report.error <= 3 * rtol


A_MATRIX_FOR_EACH = {
    "hss": (lambda: toeplitz(1024), {"rtol": 1e-4}),
    "fmm": (lambda: matrix("K02", 4096), {"rtol": 1e-6, "max_rank": 1000}),
    "hodlr": (lambda: siblings_of_their_own(1024), {"rtol": 1e-8, "ordering": "natural"}),
    "lowrank": (lambda: matrix("K04", 1024), {"rtol": 1e-3}),
}


@pytest.mark.parametrize("scheme", but_slow(A_MATRIX_FOR_EACH, "fmm"))
def test_a_matrix_for_each_form(scheme: str):
    """Each form stores least of one matrix, at the same tolerance and leaf size."""
    make, given = A_MATRIX_FOR_EACH[scheme]
    op, options = make(), {"leaf_size": 32, **given}
    every = {s: stored(op, s, **options) for s in (*HIERARCHICAL, "lowrank")}
    every["fmm"] = stored(op, "fmm", budget=0.02, **options)
    assert min(every, key=lambda s: every[s]) == scheme, every


@pytest.mark.parametrize("scheme", ["hss", "hodlr", "lowrank"])
def test_auto_sees_it(scheme: str):
    make, options = A_MATRIX_FOR_EACH[scheme]
    assert gh.compress(make(), "auto", leaf_size=32, **options).report.scheme == scheme


@pytest.mark.parametrize("scheme", ["hss", "lowrank"])
def test_products_only_builds_both(scheme: str):
    exact = toeplitz(256)
    if scheme == "lowrank":
        V = np.random.default_rng(0).standard_normal((256, 4))
        exact = V @ V.T
    K = gh.compress(products_only(exact), "auto", rtol=1e-3, leaf_size=16)
    assert K.report.scheme == scheme
    assert "without entries" in K.report.choice
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 3e-3


def test_products_only_builds_hodlr_where_no_cheap_form_keeps_rtol():
    exact = np.eye(127, dtype=np.float32)
    options: dict[str, Any] = {
        "rtol": 1e-9, "leaf_size": 300, "sampler": "products", "max_rank": 64
    }  # fmt: skip
    K = gh.compress(exact, "auto", **options)  # a warning fails the test
    assert K.report.scheme == "hodlr"
    assert K.report.error == 0


def test_entries_only_leaves_low_rank_out():
    K = gh.compress(entries_only(toeplitz(256)), "auto", rtol=1e-3, leaf_size=32)
    assert K.report.scheme in HIERARCHICAL
    assert "lowrank" not in K.report.choice


def test_point_kernels_may_get_a_low_rank_form():
    """Sampled by entries, built from products."""
    points = np.random.default_rng(0).random((600, 6))
    K = gh.compress(gh.KernelOperator(points, "gaussian", 3.0, 1e-6), "auto", rtol=1e-2)
    assert K.report.scheme == "lowrank"
    assert K.report.error <= 3e-2


def test_budget_lets_the_near_field_compete():
    points = np.random.default_rng(0).random((1500, 2))
    op = gh.KernelOperator(points, "laplace", 0.05, 0.1)
    options: dict[str, Any] = {"rtol": 1e-4, "leaf_size": 32, "budget": 0.1}
    K = gh.compress(op, "auto", **options)
    assert "fmm" in K.report.choice
    if K.report.scheme == "fmm":
        assert K.report.neighbour_recall is not None
    with pytest.raises(ArgumentError, match="budget"):
        gh.compress(op, "hss", budget=0.1)


def test_out_of_reach_is_said():
    """A random matrix: nothing compresses, and the choice says so."""
    V = np.random.default_rng(0).standard_normal((800, 800))
    with pytest.warns(gh.errors.RankCapWarning):
        K = gh.compress(V @ V.T, "auto", rtol=1e-6, max_rank=20, leaf_size=64)
    assert "no sampled rank reaches rtol" in K.report.choice


def uneven(n: int = 1024, leaves: int = 32) -> np.ndarray:
    """A^T A where two of the leaves alone have more than a few ranks, as one layer of a network."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((100, n)) * (0.9 ** np.arange(100))[:, None]
    A = A.reshape(100, leaves, -1)
    A[:, np.delete(np.arange(leaves), [5, 22])] *= 1e-4
    A[:4] += 0.3 * rng.standard_normal((4, leaves, n // leaves))
    A = A.reshape(100, n)
    return A.T @ A


@pytest.mark.parametrize("rtol", [1e-2, 1e-3])
def test_the_few_nodes_that_decide_the_ranks_are_found(rtol: float):
    """By every seed: HSS would store twice of what three nodes of a level at random show."""
    exact = uneven()
    options: dict[str, Any] = {"rtol": rtol, "leaf_size": 32, "ordering": "natural"}
    built = stored(exact, "hss", **options)
    for seed in range(6):
        choice = gh.compress(exact, "auto", seed=seed, **options).report.choice
        said = re.search(r"hss ([\d.]+) %", choice)
        assert said is not None, choice
        assert float(said[1]) == pytest.approx(100 * built, rel=0.25)


def test_same_seed_same_choice():
    op = matrix("K05", 700)
    first, again = (gh.compress(op, "auto", rtol=1e-3, seed=3) for _ in range(2))
    assert first.report.choice == again.report.choice
    np.testing.assert_array_equal(first.to_dense(), again.to_dense())


def test_choice_is_saved(tmp_path: Any):
    K = gh.compress(toeplitz(128), "auto", rtol=1e-3, leaf_size=16)
    K.save(tmp_path / "m.npz")
    assert gh.load(tmp_path / "m.npz").report.choice == K.report.choice
    assert gh.compress(toeplitz(128), "hss", rtol=1e-3).report.choice is None


def test_a_single_leaf():
    K = gh.compress(toeplitz(40), "auto", rtol=1e-3, leaf_size=64)
    assert K.report.error <= 3e-3


def in_three_dimensions(n: int) -> gh.KernelOperator:
    points = np.random.default_rng(0).random((n, 3))
    return gh.KernelOperator(points, "matern32", 0.1, nugget=0.1)


def test_the_default_cap_is_raised_for_what_is_within_reach():
    """At a rank of 256, which named schemes have by default, rtol is missed."""
    K = gh.compress(in_three_dimensions(4096), "auto", rtol=1e-4)
    assert not K.report.rank_cap_hit
    assert K.report.error <= 1e-4
    assert 256 < max(map(max, K.ranks)) < 512
    with pytest.warns(RankCapWarning, match="max_rank 256 was hit"):
        gh.compress(in_three_dimensions(4096), "auto", rtol=1e-4, max_rank=256)


@pytest.mark.parametrize(
    ("n", "scheme", "free", "cap"),
    [(4095, "hss", 1e12, 256), (4096, "hss", 1e12, 512), (8192, "hodlr", 1e12, 1024),
     (8192, "lowrank", 1e12, 256), (8192, "hss", 1e6, 256)],
)  # fmt: skip
def test_how_far_it_is_raised(
    monkeypatch: pytest.MonkeyPatch, n: int, scheme: str, free: float, cap: int
):
    """To N / 8, as far as memory goes; a global low-rank form is not worth it."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free))
    options = Options(
        "auto", None, None, None, 256, 256, "auto", 0.0, 0, None, None, None, "auto", True
    )  # fmt: skip
    op = in_three_dimensions(n)
    found = memory.largest_cap(op, options, SCHEMES[scheme], Sampling.ENTRIES, ALONE.comm)
    assert found == cap


def test_predictions_by_squares_are_those_by_singular_values():
    block = np.random.default_rng(0).standard_normal((30, 50)) * 10.0 ** -np.arange(50.0)
    exact = np.linalg.svd(block, compute_uv=False) ** 2
    for a in (block, block.T):
        rough = prediction._squared_singular_values(a, 1e-12 * exact.sum())
        np.testing.assert_allclose(rough, exact, atol=1e-13 * exact.sum())
        assert not np.array_equal(rough, exact)
        strict = prediction._squared_singular_values(a, 1e-16 * exact.sum())
        np.testing.assert_allclose(strict, exact, rtol=1e-8, atol=1e-24)

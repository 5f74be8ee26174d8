"""The FMM form against dense matrices: promise, product, storage, solver, files, bad input."""

import itertools
import warnings
from typing import Any

import dense_oracles
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matrix_cases import MATRICES, Clustered, entries_only, products_only, toeplitz

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.compressed.weak_form import weak_form
from gpu_hodlr.errors import (
    AccuracyWarning,
    ArgumentError,
    DtypeError,
    InexactError,
    NotPositiveDefiniteError,
    RankCapWarning,
    ShapeError,
)
from gpu_hodlr.factor import MultipoleSolver, Solver, SymmetricFactor, ULVCholesky

SAMPLERS = ("entries", "products+entries")
FLOOR = {np.dtype(np.float64): 1e-13, np.dtype(np.float32): 2e-6}


def points(n: int = 900, dimension: int = 2) -> np.ndarray:
    return np.random.default_rng(0).random((n, dimension))


def kernel(n: int = 900, nugget: float = 0.1, dtype: Any = np.float64) -> gh.KernelOperator:
    """Rough, in the plane: the case for a near field."""
    return gh.KernelOperator(points(n).astype(dtype), "laplace", 0.3, nugget=nugget)


@pytest.fixture(scope="module")
def compressed() -> gh.FMMMatrix:
    return gh.compress(kernel(), "fmm", rtol=1e-5, leaf_size=32, budget=0.1)


def keeps_its_promise(op: Any, exact: np.ndarray, rtol: float, **options: Any) -> gh.FMMMatrix:
    K = gh.compress(op, "fmm", rtol=rtol, **{"max_rank": len(exact), **options})
    floor = FLOOR[K.dtype]
    error = dense_oracles.frobenius_error(K.to_dense(), exact)
    assert isinstance(K, gh.FMMMatrix)
    assert error <= 3 * rtol + floor
    assert not K.report.rank_cap_hit
    factor = 4 if K.report.sampler == "entries" else 2
    assert K.report.error <= factor * error + floor
    assert error <= factor * K.report.error + floor
    assert K.near_fraction <= options.get("budget", 0)
    return K


# --- block-sparse products -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_block_sparse_matmul(share: float, m: int, k: int, dtype: Any):
    """Every stored block is used both ways, and added into the argument, views included."""
    rng = np.random.default_rng(0)
    every = np.argwhere(np.triu(np.ones((7, 7)), 1))
    pairs = every[rng.random(len(every)) < share]
    blocks = rng.standard_normal((len(pairs), m, m)).astype(dtype)
    x, y = rng.standard_normal((2, 7, m + 2, k)).astype(dtype)
    want = y.astype(np.float64)
    for (a, b), block in zip(pairs, blocks, strict=True):
        want[a, 2:] += block @ x[b, 1:-1]
        want[b, 2:] += block.T @ x[a, 1:-1]
    target = y[:, 2:]
    pattern = batched.block_pattern(pairs, 7, blocks)
    assert batched.block_sparse_matmul(blocks, pattern, x[:, 1:-1], target) is target
    np.testing.assert_allclose(y, want, rtol=0, atol=200 * np.finfo(dtype).eps)


def test_block_pattern_lists_the_terms_row_by_row():
    pattern = batched.block_pattern(np.array([[0, 3], [1, 3], [0, 1]]), 4, np.empty(0))
    np.testing.assert_array_equal(pattern.starts, [0, 2, 4, 4, 6])
    np.testing.assert_array_equal(
        pattern.terms, [[2, 1, 0], [0, 3, 0], [2, 0, 1], [1, 3, 0], [0, 0, 1], [1, 1, 1]]
    )


# --- the promise -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("rtol", [1e-2, 1e-5])
@pytest.mark.parametrize("dimension", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_kernels(name: str, dimension: int, rtol: float, sampler: str):
    x = points(500, dimension)
    exact = dense_oracles.kernel_matrix(x, name, 0.5, nugget=0.1)
    op = gh.KernelOperator(x, name, 0.5, nugget=0.1)
    K = keeps_its_promise(op, exact, rtol, leaf_size=32, budget=0.1, sampler=sampler)
    assert K.report.scheme == "fmm"
    assert K.report.neighbour_recall >= 0.8
    assert len(K.structure.near_pairs)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name: str, sampler: str):
    exact = MATRICES[name](240)
    options = {"leaf_size": 20, "budget": 0.1, "ordering": "natural", "sampler": sampler}
    keeps_its_promise(gh.DenseOperator(exact), exact, 1e-4, **options)


@pytest.mark.parametrize("ordering", ["natural", "gram", "angle", "random", "auto"])
def test_every_order(ordering: str):
    exact = MATRICES["low rank + diagonal"](300)
    keeps_its_promise(exact, exact, 1e-6, leaf_size=20, budget=0.1, ordering=ordering)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seed", range(3))
def test_leaves_of_unequal_size(seed: int, sampler: str):
    exact = dense_oracles.distance_matrix(257, lambda d: np.exp(-d / 300))
    options = {"leaf_size": 20, "budget": 0.1, "ordering": "natural", "sampler": sampler}
    K = keeps_its_promise(Clustered(exact, seed), exact, 1e-6, **options)
    assert np.ptp(K.tree.leaf_sizes) > 1


@given(
    n=st.integers(2, 80),
    leaf_size=st.integers(1, 16),
    rank=st.integers(0, 8),
    share=st.floats(0, 1),
    sampler=st.sampled_from(SAMPLERS),
)
@settings(max_examples=60)
@example(n=2, leaf_size=1, rank=1, share=0.0, sampler="entries")
@example(n=2, leaf_size=1, rank=1, share=1.0, sampler="products+entries")
@example(n=3, leaf_size=1, rank=2, share=1.0, sampler="entries")
def test_any_shape(n: int, leaf_size: int, rank: int, share: float, sampler: str):
    """From one neighbour a leaf to no far field at all."""
    factor = np.random.default_rng((n, rank)).standard_normal((n, rank))
    exact = factor @ factor.T + 0.1 * np.eye(n)
    leaves = len(gh.compress(exact, leaf_size=leaf_size, rtol=1.0, ordering="natural").tree.leaves)
    budget = 0.5 / leaves + share * (1 - 0.5 / leaves)
    options = {"leaf_size": leaf_size, "budget": budget, "sampler": sampler}
    K = keeps_its_promise(exact, exact, 1e-9, ordering="natural", **options)
    b = np.random.default_rng(n).standard_normal((n, 2))
    np.testing.assert_allclose(K @ b, K.to_dense() @ b, rtol=0, atol=1e-11 * np.abs(exact).max())
    x = K.factorize(0.2).solve(b)
    assert dense_oracles.backward_error(exact + 0.2 * np.eye(n), x, b) < 1e-8


def test_everything_near_is_exact():
    exact = dense_oracles.random_spd(130)
    K = gh.compress(exact, "fmm", rtol=1e-8, leaf_size=10, budget=1.0)
    assert dense_oracles.frobenius_error(K.to_dense(), exact) < 1e-14
    assert K.ranks == ()
    assert len(K.structure.near_pairs) == 16 * 15 // 2
    x = K.factorize(0.1).solve(np.ones(130))
    np.testing.assert_allclose(exact @ x + 0.1 * x, 1, atol=1e-8)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_budget_is_the_hss_form(sampler: str):
    op = kernel(400)
    options = {"rtol": 1e-4, "leaf_size": 30, "sampler": sampler}
    fmm, hss = gh.compress(op, "fmm", **options), gh.compress(op, "hss", **options)
    for a, b in zip(fmm.structure.telescope().arrays(), hss.structure.arrays(), strict=True):
        np.testing.assert_array_equal(a, b)
    v = np.random.default_rng(0).standard_normal((400, 3))
    np.testing.assert_allclose(fmm @ v, hss @ v, rtol=0, atol=1e-11)
    assert fmm.report.neighbour_recall is None
    F = fmm.factorize(0.1)
    assert isinstance(F, ULVCholesky)
    assert F.logdet() == hss.factorize(0.1).logdet()


def test_a_near_field_needs_less_rank():
    options = {"rtol": 1e-4, "leaf_size": 32}
    op = kernel(2000, nugget=0.0)
    hss, fmm = gh.compress(op, **options), gh.compress(op, "fmm", budget=0.06, **options)
    assert max(map(max, fmm.ranks)) < 0.5 * max(map(max, hss.ranks))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float32(sampler: str):
    op = kernel(600, dtype=np.float32)
    exact = dense_oracles.kernel_matrix(op.points, "laplace", 0.3, nugget=0.1)
    K = keeps_its_promise(op, exact, 1e-3, leaf_size=32, budget=0.1, sampler=sampler)
    assert {a.dtype for a in K.structure.arrays()} == {np.dtype(np.float32)}
    F = K.factorize(0.5)
    x = F.solve(np.random.default_rng(0).standard_normal((600, 2)).astype(np.float32))
    assert x.dtype == np.float32
    assert F.residual < 1e-4


def test_stored_in_another_precision():
    K = gh.compress(kernel(400), "fmm", rtol=1e-3, leaf_size=32, budget=0.1, dtype=np.float32)
    assert {a.dtype for a in K.structure.arrays()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("power", [-500, 500])
def test_scale_does_not_matter(power: int):
    unit = toeplitz(200)
    options = {"rtol": 1e-3, "leaf_size": 20, "ordering": "natural", "budget": 0.1}
    want, K = (gh.compress(np.ldexp(unit, p), "fmm", **options) for p in (0, power))
    assert K.ranks == want.ranks
    np.testing.assert_array_equal(K.structure.near_pairs, want.structure.near_pairs)
    np.testing.assert_array_equal(K.structure.near, np.ldexp(want.structure.near, power))


def test_gauss_newton():
    pytest.importorskip("torch")
    from network_cases import data, image_network, images

    inputs, model = images(8, n=25, border=1), image_network(64, 6, 10)
    targets = data((64,), 10, "cross_entropy", n=25)[1]
    op = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    K = keeps_its_promise(op, op.to_dense(), 1e-4, leaf_size=20, budget=0.1)
    assert K.report.sampler == "products+entries"


@pytest.mark.parametrize("make", [entries_only, gh.DenseOperator], ids=["entries", "dense"])
def test_the_same_seed_gives_the_same_bits(make: Any):
    options = {"rtol": 1e-4, "leaf_size": 20, "budget": 0.1, "seed": 4}
    first, again = (gh.compress(make(toeplitz(300)), "fmm", **options) for _ in range(2))
    for a, b in zip(first.structure.arrays(), again.structure.arrays(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_cap_is_reported(sampler: str):
    op = kernel(1500)
    options = {"rtol": 1e-6, "leaf_size": 32, "budget": 0.05, "max_rank": 3, "sampler": sampler}
    with pytest.warns(RankCapWarning, match=r"max_rank 3 was hit on level"):
        K = gh.compress(op, "fmm", **options)
    assert K.report.rank_cap_hit
    assert K.report.capped_levels
    assert max(map(max, K.ranks)) == 3
    error = dense_oracles.frobenius_error(K.to_dense(), op.to_dense())
    assert error / 4 < K.report.error < 4 * error
    assert K.report.error > 1e-6


# --- algebra and storage ---------------------------------------------------------------------


def test_algebra(compressed: gh.FMMMatrix):
    dense = compressed.to_dense()
    np.testing.assert_allclose(dense, dense.T, rtol=0, atol=1e-13)
    v = np.random.default_rng(0).standard_normal((900, 4))
    np.testing.assert_allclose(compressed @ v, dense @ v, rtol=0, atol=1e-11)
    np.testing.assert_allclose(compressed @ v[:, 1], dense @ v[:, 1], rtol=0, atol=1e-11)
    np.testing.assert_array_equal(compressed @ v, compressed @ v)
    assert compressed.matmat(v[:, :0]).shape == (900, 0)
    np.testing.assert_array_equal(compressed.diagonal(), np.full(900, 1.1))
    assert compressed.trace() == pytest.approx(990)
    assert repr(compressed).startswith("FMMMatrix(900 x 900, float64, cpu, ")


def test_torch_in_torch_out(compressed: gh.FMMMatrix):
    torch = pytest.importorskip("torch")
    v = torch.randn(900, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = compressed @ v
    assert isinstance(got, torch.Tensor)
    np.testing.assert_array_equal(got.numpy(), compressed @ v.numpy())
    assert isinstance(compressed.factorize(0.2).solve(v), torch.Tensor)


def test_counts(compressed: gh.FMMMatrix):
    """Of two symmetric blocks one is stored; pairs and orders count as bytes."""
    form = compressed.structure
    levels = itertools.chain.from_iterable((a.T, a.B) for a in form.levels)
    arrays = [form.D, form.near, *levels]
    assert compressed.num_stored == sum(a.size for a in arrays)
    assert compressed.storage_fraction == compressed.num_stored / 900**2
    index = [form.leaves, form.near_pairs, *form.far_pairs]
    index += [a.order for a in form.levels if a.order is not None]
    assert compressed.nbytes == sum(a.nbytes for a in (*arrays, *index))
    assert form.near.shape == (len(form.near_pairs), *form.D.shape[1:])
    for level, pairs in zip(form.levels, form.far_pairs, strict=True):
        assert level.B.shape == (len(pairs), level.rank, level.rank)
    assert [len(r) for r in compressed.ranks] == [len(a.T) for a in form.levels]


def test_near_blocks_are_entries(compressed: gh.FMMMatrix):
    form, exact = compressed.structure, kernel().to_dense()
    for (a, b), block in zip(form.near_pairs, form.near, strict=True):
        rows, cols = (leaf[leaf >= 0] for leaf in form.leaves[[a, b]])
        np.testing.assert_array_equal(block[: len(rows), : len(cols)], exact[np.ix_(rows, cols)])


# --- solver ----------------------------------------------------------------------------------


def test_solve(compressed: gh.FMMMatrix):
    F = compressed.factorize(0.2)
    assert isinstance(F, MultipoleSolver)
    assert (F.shape, F.damping, F.info, F.residual) == ((900, 900), 0.2, None, None)
    A = compressed.to_dense() + 0.2 * np.eye(900)
    b = np.random.default_rng(0).standard_normal((900, 3))
    x = F.solve(b)
    assert F.info.converged
    assert 0 < F.info.iterations < 30
    left = np.linalg.norm(A @ x - b, axis=0) / np.linalg.norm(b, axis=0)
    assert left.max() <= 2e-10
    assert F.residual == pytest.approx(left.max(), rel=0.1, abs=1e-13)
    assert F.solve(b[:, 0], rtol=1e-3).shape == (900,)
    assert 1e-10 < F.residual <= 1e-3
    assert F.nbytes == F.preconditioner.nbytes


def test_solve_for_nothing(compressed: gh.FMMMatrix):
    F = compressed.factorize(0.2)
    assert not F.solve(np.zeros((900, 2))).any()
    assert F.residual == 0
    assert not F.solve(np.stack([np.zeros(900), np.ones(900)], axis=1))[:, 0].any()


def test_it_preconditions_the_exact_matrix(compressed: gh.FMMMatrix):
    op, b = kernel(), np.random.default_rng(0).standard_normal(900)
    F = compressed.factorize(0.2)
    x, info = gh.cg(op, b, damping=0.2, M=F, rtol=1e-10)
    assert info.converged
    assert info.iterations <= 5
    assert np.linalg.norm(op @ x + 0.2 * x - b) <= 1e-9 * np.linalg.norm(b)
    assert gh.cg(op, b, damping=0.2, M=F.preconditioner)[1].converged


def test_what_it_has_not(compressed: gh.FMMMatrix):
    F = compressed.factorize(0.2)
    for name in ("logdet", "sqrt_matmat", "sqrt_solve", "sample"):
        assert not hasattr(F, name)
        assert name not in dir(F)
        for kind in (InexactError, AttributeError, NotImplementedError):
            with pytest.raises(kind, match="compress with scheme 'hss'"):
                getattr(F, name)
    with pytest.raises(InexactError, match="square root to sample with"):
        F.sample(1)
    with pytest.raises(AttributeError, match="'MultipoleSolver' object has no attribute 'nothing'"):
        F.nothing  # noqa: B018


def test_it_is_no_factor(compressed: gh.FMMMatrix):
    F = compressed.factorize(0.2)
    assert isinstance(F, Solver)
    assert not isinstance(F, SymmetricFactor)


def test_not_positive_definite():
    exact = toeplitz(300) - 0.5 * np.eye(300)
    K = gh.compress(exact, "fmm", rtol=1e-8, leaf_size=20, budget=0.1)
    smallest = np.linalg.eigvalsh(exact)[0]
    assert smallest < -0.05
    with pytest.raises(NotPositiveDefiniteError, match="not positive definite") as caught:
        K.factorize(0.01).solve(np.random.default_rng(0).standard_normal(300))
    assert caught.value.damping == pytest.approx(-smallest, rel=0.1)
    b = np.ones(300)
    x = K.factorize(caught.value.damping).solve(b, rtol=1e-6)
    assert np.linalg.norm(exact @ x + caught.value.damping * x - b) < 1e-4


def test_too_few_iterations_are_a_warning(compressed: gh.FMMMatrix):
    F = compressed.factorize(1e-3)
    b = np.random.default_rng(0).standard_normal(900)
    with pytest.warns(AccuracyWarning, match="after 1 iterations exceeds rtol 1e-10") as caught:
        x = F.solve(b, maxiter=1)
    assert caught[0].filename == __file__
    assert not F.info.converged
    left = b - (compressed.to_dense() @ x + 1e-3 * x)
    assert F.residual == pytest.approx(np.linalg.norm(left) / np.linalg.norm(b), rel=1e-9)


def test_a_residual_ten_times_too_large_is_warned_of():
    """And a smaller one is not; never mind how far it is."""
    points = np.random.default_rng(0).random((400, 2))
    op = gh.KernelOperator(points, "laplace", 0.5, nugget=1e-3)
    K = gh.compress(op, "fmm", budget=0.1, leaf_size=25, rtol=1e-6)
    F, b, near = K.factorize(0.1), np.ones(400), 0
    for maxiter in range(1, 30):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            F.solve(b, rtol=1e-10, maxiter=maxiter)
        assert F.residual is not None
        assert bool(caught) == (F.residual > 1e-9)
        near += 1e-9 < F.residual < 1e-6
    assert near
    assert F.residual < 1e-9


def test_the_weak_form_is_about_the_same_matrix(compressed: gh.FMMMatrix):
    dense = compressed.to_dense()
    for tolerance in (1e-1, 1e-3, 1e-8):
        telescope = weak_form(compressed.structure, tolerance, 900)
        assert np.linalg.norm(telescope.matmat(np.eye(900)) - dense, 2) < 20 * tolerance
        assert len(telescope.levels) == compressed.tree.depth


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_zero_matrix(damping: float):
    K = gh.compress(np.zeros((200, 200)), "fmm", leaf_size=20, budget=0.1)
    assert not (K @ np.ones(200)).any()
    assert K.report.error == 0
    assert not len(K.structure.near_pairs)  # nobody votes
    if damping:
        np.testing.assert_allclose(K.factorize(damping).solve(np.ones(200)), 2.0)
    else:
        with pytest.raises(NotPositiveDefiniteError):
            K.factorize(damping)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [-0.01, 1.01, float("nan"), float("inf")])
def test_bad_budgets(budget: float):
    with pytest.raises(ArgumentError, match="budget"):
        gh.compress(toeplitz(100), "fmm", budget=budget)


def test_a_budget_of_the_wrong_type():
    with pytest.raises(DtypeError, match="budget must be a real number, got str"):
        gh.compress(toeplitz(100), "fmm", budget="3%")


def test_a_budget_too_small_to_be_of_use():
    with pytest.raises(ArgumentError, match=r"smallest useful budget of 16 leaves is 0\.031"):
        gh.compress(toeplitz(160), "fmm", leaf_size=10, budget=0.03)
    assert gh.compress(toeplitz(160), "fmm", leaf_size=10, budget=0.032).near_fraction > 0


def test_a_budget_without_a_near_field():
    with pytest.raises(ArgumentError, match=r"budget is for scheme 'fmm', got 0\.1 with"):
        gh.compress(toeplitz(100), "hss", budget=0.1)


def test_products_alone():
    for op, options in ((products_only(toeplitz(90)), {}), (toeplitz(90), {"sampler": "products"})):
        with pytest.raises(ArgumentError, match="scheme 'fmm' needs entries"):
            gh.compress(op, "fmm", budget=0.1, leaf_size=10, **options)


def test_bad_right_hand_sides_and_options(compressed: gh.FMMMatrix):
    F = compressed.factorize(0.1)
    with pytest.raises(ShapeError, match=r"b must have shape \(900,\)"):
        F.solve(np.ones(899))
    with pytest.raises(ArgumentError, match="b has 1 entries that are NaN"):
        F.solve(np.where(np.arange(900) == 3, np.nan, 1.0))
    with pytest.raises(ArgumentError, match="rtol"):
        F.solve(np.ones(900), rtol=-1.0)
    with pytest.raises(ArgumentError, match="maxiter"):
        F.solve(np.ones(900), maxiter=0)
    for damping in (-1.0, float("nan")):
        with pytest.raises(ArgumentError, match="damping"):
            compressed.factorize(damping)

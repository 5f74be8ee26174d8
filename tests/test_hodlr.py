"""The HODLR form against dense matrices: promise, product, factor, files, counts of products."""

from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from dense_oracles import backward_error
from matrix_cases import (
    MATRICES,
    Clustered,
    entries_only,
    oscillating,
    products_only,
    siblings_of_their_own,
    toeplitz,
)

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import (
    ArgumentError,
    NotPositiveDefiniteError,
    RankCapWarning,
    ShapeError,
)
from gpu_hodlr.structures.hodlr_blocks import columns_of

SAMPLERS = ("entries", "products+entries", "products")
FLOOR = {np.dtype(np.float64): 1e-13, np.dtype(np.float32): 4e-6}


def kernel(n: int = 600, dtype: Any = np.float64, nugget: float = 0.1) -> gh.KernelOperator:
    points = np.random.default_rng(0).random((n, 2)).astype(dtype)
    return gh.KernelOperator(points, "laplace", 0.3, nugget=nugget)


def keeps_its_promise(op: Any, exact: np.ndarray, rtol: float, **options: Any) -> gh.HODLRMatrix:
    K = gh.compress(op, "hodlr", rtol=rtol, **{"max_rank": len(exact), **options})
    assert isinstance(K, gh.HODLRMatrix)
    assert K.report.scheme == "hodlr"
    assert not K.report.rank_cap_hit
    floor = FLOOR[K.dtype]
    error = dense_oracles.frobenius_error(to_host(K.to_dense()), exact)
    assert error <= 3 * rtol + floor
    assert error <= 4 * K.report.error + floor
    np.testing.assert_allclose(to_host(K.diagonal()), np.diag(exact), rtol=0, atol=2 * rtol * (
        np.linalg.norm(exact)) + floor)  # fmt: skip
    return K


def is_the_factor(
    K: gh.HODLRMatrix, damping: float, accuracy: float, condition: float = 1e3
) -> None:
    """Of K~ + damping I: solves, log-determinant, W W^T and all four applications of W."""
    F = K.factorize(damping)
    assert isinstance(F, gh.HODLRCholesky)
    assert (F.shape, F.dtype, F.damping) == (K.shape, K.dtype, damping)
    n = K.shape[0]
    A = to_host(K.to_dense()).astype(np.float64) + damping * np.eye(n)
    xp = batched.namespace(K.structure.D)
    unit = xp.eye(n, dtype=K.dtype)
    W = to_host(F.sqrt_matmat(unit)).astype(np.float64)
    scale = np.linalg.norm(W)
    assert np.linalg.norm(W @ W.T - A) <= accuracy * np.linalg.norm(A)
    assert np.linalg.norm(to_host(F.sqrt_matmat(unit, transpose=True)) - W.T) <= accuracy * scale
    z = xp.asarray(np.random.default_rng(1).standard_normal((n, 3)).astype(K.dtype))
    for transpose in (False, True):
        x = to_host(F.sqrt_solve(z, transpose=transpose))
        assert backward_error(W.T if transpose else W, x, to_host(z)) <= accuracy
    assert backward_error(A, to_host(F.solve(z)), to_host(z)) <= accuracy
    one = F.solve(z[:, 1])
    assert one.shape == (n,)
    assert backward_error(A, to_host(one), to_host(z[:, 1])) <= accuracy
    sign, want = np.linalg.slogdet(A)
    assert sign == 1
    assert F.logdet() == pytest.approx(want, rel=condition * accuracy, abs=n * accuracy)


# --- the promise -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name: str, sampler: str):
    exact = MATRICES[name](240)
    options = {"leaf_size": 20, "ordering": "natural", "sampler": sampler}
    keeps_its_promise(gh.DenseOperator(exact), exact, 1e-5, **options)


@pytest.mark.parametrize("sampler", ["entries", "products+entries"])
@pytest.mark.parametrize("rtol", [1e-2, 1e-5])
@pytest.mark.parametrize(("name", "dimension"), [("gaussian", 1), ("laplace", 2), ("laplace", 6)])
def test_kernels(name: str, dimension: int, rtol: float, sampler: str):
    x = np.random.default_rng(0).random((500, dimension))
    exact = dense_oracles.kernel_matrix(x, name, 0.5, nugget=0.1)
    op = gh.KernelOperator(x, name, 0.5, nugget=0.1)
    K = keeps_its_promise(op, exact, rtol, leaf_size=32, sampler=sampler)
    assert [len(level) for level in K.ranks] == [16, 8, 4, 2]
    assert [max(level) for level in K.ranks[::-1]] <= list(K.structure.widths)
    assert all(level[0::2] == level[1::2] for level in K.ranks)


@pytest.mark.parametrize("make", [products_only, entries_only, gh.DenseOperator])
def test_every_library(make: Any, xp: ModuleType, dtype: Any):
    """The same lines on NumPy and CuPy: product, factor, samples."""
    exact = toeplitz(203).astype(dtype)
    array = xp.asarray(exact)
    device = "cpu" if xp is np else "cuda"
    if make is gh.DenseOperator:
        op = make(array)
    elif make is products_only:
        op = gh.FunctionOperator(203, matmat=lambda v: array @ v, dtype=dtype, device=device)
    else:
        op = gh.FunctionOperator(
            203, entries=lambda r, c: array[xp.asarray(r)[:, None], xp.asarray(c)], dtype=dtype,
            device=device,
        )  # fmt: skip
    K = keeps_its_promise(op, exact.astype(np.float64), 1e-4, leaf_size=20, ordering="natural")
    assert (K.device, K.dtype) == (device, dtype)
    accuracy = 1e-13 if dtype == np.float64 else 4e-6
    is_the_factor(K, 0.3, accuracy)
    F = K.factorize(0.3)
    z = F.sample(3, seed=2)
    assert z.shape == (203, 3)
    assert isinstance(z, xp.ndarray)
    np.testing.assert_array_equal(to_host(z), to_host(F.sample(3, seed=2)))
    for k in (0, 1, 9):
        v = xp.asarray(np.random.default_rng(k).standard_normal((203, k)).astype(dtype))
        want = to_host(K.to_dense()).astype(np.float64) @ to_host(v)
        for _ in range(2):  # the second is a replayed graph on a GPU
            np.testing.assert_allclose(to_host(K @ v), want, rtol=0, atol=30 * accuracy)
            assert F.solve(v).shape == (203, k)


def test_gauss_newton():
    pytest.importorskip("torch")
    from network_cases import data, image_network, images

    inputs, model = images(8, n=25, border=1), image_network(64, 6, 10)
    targets = data((64,), 10, "cross_entropy", n=25)[1]
    op = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    exact = op.to_dense()
    for sampler in ("products+entries", "products"):
        K = keeps_its_promise(op, exact, 1e-4, leaf_size=40, sampler=sampler)
        assert K.report.sampler == sampler
        is_the_factor(K, 1e-2, 1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seed", range(2))
def test_leaves_of_unequal_size(seed: int, sampler: str):
    exact = dense_oracles.distance_matrix(257, lambda d: np.exp(-d / 300))
    options = {"leaf_size": 20, "ordering": "natural", "sampler": sampler}
    K = keeps_its_promise(Clustered(exact, seed), exact, 1e-7, **options)
    assert np.ptp(K.tree.leaf_sizes) > 1
    assert not K.structure.U[K.structure.leaves.ravel() < 0].any()
    is_the_factor(K, 0.1, 1e-13)


@pytest.mark.parametrize("n", [2, 3, 31, 97])
@pytest.mark.parametrize("leaf_size", [1, 5, 64])
def test_small_and_prime_orders(n: int, leaf_size: int):
    exact = toeplitz(n)
    for sampler in SAMPLERS:
        K = keeps_its_promise(exact, exact, 1e-12, leaf_size=leaf_size, sampler=sampler)
        is_the_factor(K, 0.0, 1e-13)


def test_ranks_above_the_rows_of_a_leaf():
    exact = dense_oracles.random_spd(130)
    K = keeps_its_promise(exact, exact, 1e-9, leaf_size=3, ordering="random")
    assert max(K.structure.widths) == 65
    is_the_factor(K, 0.0, 1e-13)


def test_what_capped_levels_miss_leaks_into_no_empty_column():
    """Of leaves with unequal rows: a column of zeros on one side is one on the other as well."""
    exact = dense_oracles.random_spd(150)
    op = gh.FunctionOperator(150, matmat=lambda v: exact @ v)
    with pytest.warns(RankCapWarning):
        K = gh.compress(op, "hodlr", rtol=1e-9, leaf_size=5, max_rank=20, ordering="natural")
    form = K.structure
    assert len(set((form.leaves >= 0).sum(axis=1))) == 2
    blocks = form.U.reshape(*form.leaves.shape, -1)
    for level, columns in enumerate(columns_of(form.widths), 1):
        L = blocks[:, :, columns].reshape(1 << level, -1, columns.stop - columns.start)[0::2]
        gram = L.swapaxes(1, 2) @ L
        kept = np.diagonal(gram, axis1=1, axis2=2) > 0
        np.testing.assert_allclose(gram, kept[:, None] * np.eye(gram.shape[1]), atol=1e-12)
    smallest = np.linalg.eigvalsh(K.to_dense())[0]
    is_the_factor(K, 1.5 - min(smallest, 0.0), 1e-12)


def test_one_leaf():
    exact = toeplitz(50)
    for sampler in SAMPLERS:
        K = keeps_its_promise(exact, exact, 1e-12, leaf_size=64, sampler=sampler)
        assert (K.ranks, K.structure.widths, K.structure.U.shape) == ((), (), (50, 0))
        is_the_factor(K, 0.1, 1e-14)


def test_one_row():
    with pytest.raises(ShapeError, match="at least 2 x 2"):
        gh.compress(np.ones((1, 1)), "hodlr")


def test_float32_points():
    op = kernel(500, np.float32)
    exact = dense_oracles.kernel_matrix(op.points, "laplace", 0.3, nugget=0.1)
    K = keeps_its_promise(op, exact, 1e-3, leaf_size=32)
    assert {a.dtype for a in K.structure.arrays()} == {np.dtype(np.float32)}
    is_the_factor(K, 0.1, 1e-5)


def test_blocks_stored_in_float32():
    K = gh.compress(kernel(400), "hodlr", rtol=1e-3, leaf_size=32, storage_dtype=np.float32)
    assert (K.dtype, K.structure.dtype) == (np.float64, np.float32)
    assert (K @ np.ones(400)).dtype == np.float64
    assert K.factorize(0.1).dtype == np.float64


@pytest.mark.parametrize("sampler", ["entries", "products"])
@pytest.mark.parametrize("power", [-400, 400])
def test_scale_does_not_matter(power: int, sampler: str):
    unit = toeplitz(200)
    options = {"rtol": 1e-3, "leaf_size": 20, "ordering": "natural", "sampler": sampler}
    want, K = (gh.compress(np.ldexp(unit, p), "hodlr", **options) for p in (0, power))
    assert K.ranks == want.ranks
    np.testing.assert_array_equal(K.to_dense(), np.ldexp(want.to_dense(), power))
    x = np.ones(200)
    np.testing.assert_allclose(
        np.ldexp(K.factorize().solve(x), power), want.factorize().solve(x), rtol=1e-10
    )


@pytest.mark.parametrize("make", [products_only, entries_only, gh.DenseOperator])
def test_the_same_seed_gives_the_same_bits(make: Any):
    options = {"rtol": 1e-4, "leaf_size": 20, "seed": 4, "ordering": "natural"}
    first, again = (gh.compress(make(toeplitz(300)), "hodlr", **options) for _ in range(2))
    for a, b in zip(first.structure.arrays(), again.structure.arrays(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bases_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch):
    """They grow level by level: what the ranks will be is not known at the door."""
    free = iter([1 << 40] * 3)
    monkeypatch.setattr("gpu_hodlr.devices.free_bytes", lambda device="cpu": next(free, 1000))
    with pytest.raises(gh.errors.MemoryEstimateError, match=r"bases of a HODLR form.*max_rank"):
        gh.compress(toeplitz(300), "hodlr", leaf_size=20)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_cap_is_reported(sampler: str):
    exact = dense_oracles.kernel_matrix(kernel(600).points, "laplace", 0.3)
    options = {"rtol": 1e-6, "leaf_size": 40, "max_rank": 3, "sampler": sampler}
    with pytest.warns(RankCapWarning, match="max_rank 3 was hit on level 1, 2, 3, 4"):
        K = gh.compress(exact, "hodlr", **options)
    assert K.report.capped_levels == (1, 2, 3, 4)
    assert max(K.structure.widths) == 3
    error = dense_oracles.frobenius_error(K.to_dense(), exact)
    assert error / 3 < K.report.error < 3 * error


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ranks_are_nearly_those_of_singular_values(sampler: str):
    """At most a tenth more columns than the best ranks for half of the error reached."""
    exact = dense_oracles.kernel_matrix(kernel(512).points, "laplace", 0.3)
    options = {"rtol": 1e-4, "leaf_size": 64, "sampler": sampler}
    K = keeps_its_promise(exact, exact, **options)
    order = K.tree.permutation
    A = exact[np.ix_(order, order)]
    allowed = (0.5 * K.report.error * np.linalg.norm(A)) ** 2 / 3 / 2
    best = []
    for level in (1, 2, 3):
        half = 512 >> level
        left = range(0, 512, 2 * half)
        values = [np.linalg.svd(A[s : s + half, s + half : s + 2 * half])[1] for s in left]
        tails = np.cumsum((np.array(values) ** 2).sum(axis=0)[::-1])[::-1]
        best.append(int(np.count_nonzero(tails > allowed)))
    assert sum(K.structure.widths) <= 1.1 * sum(best)


def test_a_replayed_product_or_solve_waits_for_nothing(stand_in: Any):
    """One graph: no copy from the host, no wait, no cudaMalloc, as for the other forms."""
    K = gh.compress(toeplitz(200), "hodlr", rtol=1e-6, leaf_size=20, device="cuda")
    F = K.factorize(0.1)
    v = stand_in.cupy.ones((200, 1))
    for call in (K.matmat, F.solve):
        call(v)
        counters = stand_in.counters
        counters.reset()
        call(v)
        assert counters.graph_launches == 1
        assert counters.launches == counters.library_calls == 0
        assert counters.synchronizations == counters.host_to_device == 0
        assert counters.device_allocations == 0


def test_products_of_a_level_do_not_grow_with_its_nodes():
    """Each level: one product for the sample, one for the other side; one for the leaves.

    Their columns are counted: a product may be several calls.
    """
    counts = []
    for n in (128, 256, 512):
        calls: list[int] = []
        exact = dense_oracles.distance_matrix(n, lambda d: np.exp(-d / 100))

        def matmat(v: np.ndarray, a: Any = exact, seen: list[int] = calls) -> np.ndarray:
            seen.append(v.shape[1])
            return a @ v

        op = gh.FunctionOperator(n, matmat=matmat)
        options = {"leaf_size": 16, "rtol": 1e-8, "ordering": "natural", "max_rank": 20}
        K = gh.compress(op, "hodlr", **options)
        assert set(K.structure.widths) == {1}
        counts.append((sum(calls) - (40 + 1) * K.tree.depth, K.tree.depth))
    assert [depth for _, depth in counts] == [3, 4, 5]
    # check, probe, sketch, leaves, spectral error
    assert {rest for rest, _ in counts} == {4 + 10 + 40 + 16 + 24}


def test_a_matrix_whose_bases_are_not_nested():
    """Random bases of rank 5 on each of five levels: a block row has rank 25."""
    depth, rank = 5, 5
    exact = siblings_of_their_own(1024, depth, rank)
    options = {"rtol": 1e-8, "leaf_size": 32, "ordering": "natural"}
    hodlr, hss = (gh.compress(exact, scheme, **options) for scheme in ("hodlr", "hss"))
    assert hodlr.structure.widths == (rank,) * depth
    assert max(hss.ranks[0]) == rank * depth
    for K in (hodlr, hss):
        assert dense_oracles.frobenius_error(K.to_dense(), exact) < 1e-8
    assert hodlr.storage_fraction < 0.9 * hss.storage_fraction


# --- algebra ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compressed() -> gh.HODLRMatrix:
    return gh.compress(kernel(), "hodlr", rtol=1e-5, leaf_size=32)


def test_algebra(compressed: gh.HODLRMatrix):
    dense = compressed.to_dense()
    np.testing.assert_allclose(dense, dense.T, rtol=0, atol=1e-13)
    v = np.random.default_rng(0).standard_normal((600, 4))
    np.testing.assert_allclose(compressed @ v, dense @ v, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(compressed.diagonal(), np.full(600, 1.1))
    assert compressed.trace() == pytest.approx(660)
    assert repr(compressed).startswith("HODLRMatrix(600 x 600, float64, cpu, ")
    form = compressed.structure
    assert compressed.num_stored == form.D.size + form.U.size
    assert compressed.nbytes == form.D.nbytes + form.U.nbytes + form.leaves.nbytes
    scaled = form.scaled(4.0)
    np.testing.assert_array_equal(scaled.matmat(v), 4 * form.matmat(v))


def test_a_new_damping_does_not_compress_again(compressed: gh.HODLRMatrix):
    before = [a.copy() for a in compressed.structure.arrays()]
    for damping in (0.0, 0.1, 10.0):
        is_the_factor(compressed, damping, 1e-13)
    for a, kept in zip(compressed.structure.arrays(), before, strict=True):
        np.testing.assert_array_equal(a, kept)
    F = compressed.factorize(1.0)
    steps = sum(a.Q.size + a.P.size + a.Y.size for a in F._steps)
    assert F.nbytes == 8 * (steps + compressed.structure.D.size)


def test_the_factor_of_a_nearly_singular_matrix():
    """The backward error is at most rounding times the square root of the condition number."""
    x = np.linspace(0, 1, 300)
    exact = dense_oracles.kernel_matrix(x, "gaussian", 0.2, nugget=1e-8)
    K = gh.compress(exact, "hodlr", rtol=1e-14, leaf_size=20, ordering="natural")
    assert np.linalg.cond(exact) > 1e9
    condition = np.linalg.cond(exact)
    is_the_factor(K, 0.0, 1e-16 * condition**0.5, condition**0.5)


def test_bad_right_hand_sides(compressed: gh.HODLRMatrix):
    F = compressed.factorize(0.1)
    with pytest.raises(ShapeError, match=r"b must have shape \(600,\)"):
        F.solve(np.ones(599))
    with pytest.raises(ArgumentError, match="z has 1 entries that are NaN"):
        F.sqrt_solve(np.where(np.arange(600) == 3, np.nan, 1.0))
    with pytest.raises(ArgumentError, match="num must be >= 1, got 0"):
        F.sample(0)
    with pytest.raises(ArgumentError, match="budget is for scheme 'fmm'"):
        gh.compress(toeplitz(100), "hodlr", budget=0.1)


# --- not positive definite -------------------------------------------------------------------

INDEFINITE = {
    "oscillating": lambda: oscillating(300),
    "shifted": lambda: toeplitz(300) - 0.8 * np.eye(300),
    "negative": lambda: -toeplitz(200),
    "two rows": lambda: np.array([[1.0, 2.0], [2.0, 1.0]]),
}


@pytest.mark.parametrize("name", INDEFINITE)
def test_the_damping_that_would_do(name: str):
    exact = INDEFINITE[name]()
    K = gh.compress(exact, "hodlr", rtol=1e-6, leaf_size=1 if len(exact) == 2 else 20)
    with pytest.raises(NotPositiveDefiniteError, match="is not positive definite") as caught:
        K.factorize()
    smallest = np.linalg.eigvalsh(to_host(K.to_dense()))[0]
    assert -smallest < caught.value.damping <= -1.25 * smallest
    is_the_factor(K, caught.value.damping, 1e-12)
    with pytest.raises(NotPositiveDefiniteError):
        K.factorize(0.9 * caught.value.damping)


def test_the_zero_matrix():
    K = gh.compress(np.zeros((200, 200)), "hodlr", leaf_size=20)
    assert not (K @ np.ones(200)).any()
    assert (K.report.error, K.structure.widths) == (0, (0, 0, 0, 0))
    with pytest.raises(NotPositiveDefiniteError):
        K.factorize()
    np.testing.assert_allclose(K.factorize(0.5).solve(np.ones(200)), 2.0)
    assert K.factorize(0.5).logdet() == pytest.approx(200 * np.log(0.5))


# --- the neighbours' problems ----------------------------------------------------------------


@pytest.mark.parametrize("n", [200, 499, 500, 1000])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strumpacks_toeplitz(n: int, sampler: str):
    exact = toeplitz(n)
    K = keeps_its_promise(exact, exact, 1e-8, leaf_size=50, ordering="natural", sampler=sampler)
    b = np.random.default_rng(0).standard_normal((n, 2))
    want = np.linalg.solve(exact, b)
    assert np.linalg.norm(K.factorize().solve(b) - want) <= 1e-5 * np.linalg.norm(want)

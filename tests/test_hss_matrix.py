"""The compressed matrix: its algebra, what it stores, seeds, caps, and what compression costs."""

import dataclasses
import itertools
import sys
import tracemalloc
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import (
    MATRICES,
    Clustered,
    entries_only,
    low_rank_plus_diagonal,
    products_only,
    toeplitz,
)

import gpu_hodlr as gh
from gpu_hodlr.errors import AccuracyWarning, ArgumentError, RankCapWarning

SAMPLERS = ("entries", "products+entries", "products")


def smooth(n: int = 300) -> np.ndarray:
    return dense_oracles.distance_matrix(n, lambda d: np.exp(-d / n))


@pytest.fixture(scope="module", params=["balanced", "clusters", "one leaf", "float32"])
def compressed(request: pytest.FixtureRequest) -> gh.HSSMatrix:
    n = 301
    if request.param == "clusters":
        return gh.compress(Clustered(smooth(n), 3), rtol=1e-6, leaf_size=40, ordering="natural")
    if request.param == "one leaf":
        return gh.compress(smooth(n), leaf_size=n)
    dtype = np.float32 if request.param == "float32" else np.float64
    return gh.compress(smooth(n).astype(dtype), rtol=1e-5, leaf_size=20)


def eps(K: gh.HSSMatrix) -> float:
    return float(np.finfo(K.dtype).eps)


# --- algebra ---------------------------------------------------------------------------------


def test_products_agree_with_the_dense_form(compressed: gh.HSSMatrix):
    dense = compressed.to_dense().astype(np.float64)
    v = np.random.default_rng(0).standard_normal((301, 5)).astype(compressed.dtype)
    allowed = 100 * eps(compressed) * np.linalg.norm(dense) * np.linalg.norm(v)
    assert np.linalg.norm(compressed.matmat(v) - dense @ v) < allowed
    assert np.linalg.norm(compressed @ v[:, 2] - dense @ v[:, 2]) < allowed


def test_two_equal_products_are_equal(compressed: gh.HSSMatrix):
    v = np.random.default_rng(0).standard_normal((301, 3)).astype(compressed.dtype)
    np.testing.assert_array_equal(compressed @ v, compressed @ v)


def test_shapes_are_kept(compressed: gh.HSSMatrix):
    v = np.random.default_rng(0).standard_normal(301).astype(compressed.dtype)
    column = compressed @ v[:, None]
    assert column.shape == (301, 1)
    np.testing.assert_array_equal(compressed @ v, column[:, 0])
    assert compressed.matmat(np.zeros((301, 0), compressed.dtype)).shape == (301, 0)
    assert column.dtype == compressed.dtype == compressed.to_dense().dtype
    strided = np.repeat(v, 3)[::3]
    np.testing.assert_array_equal(compressed @ strided, column[:, 0])


def test_linearity(compressed: gh.HSSMatrix):
    x, y = np.random.default_rng(0).standard_normal((2, 301, 2)).astype(compressed.dtype)
    together = compressed @ (2 * x - 3 * y)
    apart = 2 * (compressed @ x) - 3 * (compressed @ y)
    allowed = 100 * eps(compressed) * np.abs(together).max()
    np.testing.assert_allclose(together, apart, rtol=0, atol=allowed)
    assert not (compressed @ np.zeros_like(x)).any()


def test_symmetry(compressed: gh.HSSMatrix):
    dense = compressed.to_dense()
    np.testing.assert_allclose(dense, dense.T, rtol=0, atol=20 * eps(compressed))


def test_diagonal_and_trace(compressed: gh.HSSMatrix):
    """Both are exact: the diagonal blocks are entries of K, and K has ones there."""
    np.testing.assert_array_equal(compressed.diagonal(), 1)
    assert compressed.diagonal().dtype == compressed.dtype
    assert compressed.trace() == 301.0
    rounding = 20 * eps(compressed)
    np.testing.assert_allclose(np.diagonal(compressed.to_dense()), 1, rtol=0, atol=rounding)


def test_torch_in_torch_out(compressed: gh.HSSMatrix):
    torch = pytest.importorskip("torch")
    v = torch.randn(301, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = compressed @ v
    assert isinstance(got, torch.Tensor)
    assert got.shape == (301, 2)
    np.testing.assert_array_equal(got.numpy(), compressed @ v.numpy())
    assert (compressed @ v[:, 0]).shape == (301,)


def test_dense_arrays_are_taken_as_they_are():
    exact = smooth(100)
    K = gh.compress(exact, leaf_size=20)
    same = gh.compress(gh.DenseOperator(exact), leaf_size=20)
    np.testing.assert_array_equal(K.to_dense(), same.to_dense())
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(
        gh.compress(torch.from_numpy(exact), leaf_size=20).to_dense(), K.to_dense()
    )


def test_repr_names_the_main_facts():
    text = repr(gh.compress(smooth(100), leaf_size=20))
    assert text.startswith("HSSMatrix(100 x 100, float64, cpu, ")
    assert "% stored, error " in text


# --- what is stored --------------------------------------------------------------------------


def test_counts(compressed: gh.HSSMatrix):
    t = compressed.structure
    arrays = [t.D, *itertools.chain.from_iterable((a.T, a.B) for a in t.levels)]
    stored = sum(a.size for a in arrays)
    assert compressed.num_stored == stored
    assert compressed.storage_fraction == stored / 301**2
    index = t.leaves.nbytes + sum(a.order.nbytes for a in t.levels if a.order is not None)
    assert compressed.nbytes == sum(a.nbytes for a in arrays) + index
    depth = compressed.tree.depth
    assert [len(r) for r in compressed.ranks] == [1 << level for level in range(depth, 0, -1)]
    for level, ranks in zip(t.levels, compressed.ranks, strict=True):
        assert max(ranks) <= level.rank
    assert compressed.shape == (301, 301)
    assert compressed.device == "cpu"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("name", "rank"), [("zero", 0), ("identity", 0), ("rank 1", 1)])
def test_ranks_are_the_ranks_of_the_blocks(name: str, rank: int, sampler: str):
    K = gh.compress(MATRICES[name](200), rtol=1e-8, leaf_size=25, sampler=sampler)
    assert set(itertools.chain.from_iterable(K.ranks)) == {rank}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ranks_of_low_rank_plus_diagonal(sampler: str):
    K = gh.compress(low_rank_plus_diagonal(200, 4), rtol=1e-8, leaf_size=25, sampler=sampler)
    assert set(itertools.chain.from_iterable(K.ranks)) == {4}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_ranks_are_near_the_least_possible(rtol: float, sampler: str):
    """At most those of truncated SVDs of the block rows for a tenth of the tolerance, plus two."""
    exact = toeplitz(512)
    K = gh.compress(exact, rtol=rtol, leaf_size=64, sampler=sampler, ordering="natural")
    allowed = (0.1 * rtol * np.linalg.norm(exact)) ** 2 / 3
    for depth, ranks in zip((3, 2, 1), K.ranks, strict=True):
        size = 512 >> depth
        tails = np.zeros(size + 1)
        for start in range(0, 512, size):
            outside = np.delete(exact[start : start + size], np.s_[start : start + size], axis=1)
            squares = np.linalg.svd(outside, compute_uv=False) ** 2
            tails[: len(squares)] += np.cumsum(squares[::-1])[::-1]
        assert max(ranks) <= np.argmax(tails <= allowed) + 2


@pytest.mark.parametrize(("kernel", "dimension"), [("gaussian", 2), ("laplace", 3)])
def test_samplers_need_about_the_same_storage(kernel: str, dimension: int):
    points = np.random.default_rng(dimension).random((1000, dimension))
    op = gh.KernelOperator(points, kernel, 0.7)
    stored = [
        gh.compress(op, rtol=1e-4, leaf_size=32, sampler=sampler, max_rank=500).num_stored
        for sampler in SAMPLERS
    ]
    assert max(stored) < 1.4 * min(stored)


def test_zero_blocks_have_rank_zero_nodes():
    """Leaves of 50 rows, one smooth or zero block each, coupled to nothing but one partner."""
    block = smooth(50)
    exact = np.kron(np.diag([1.0, 0, 1, 0]), block)
    exact[:50, 100:150] = exact[100:150, :50] = 0.5 * block
    K = gh.compress(exact, rtol=1e-8, leaf_size=50, ordering="natural")
    leaves, upper = K.ranks
    assert leaves[1] == leaves[3] == 0
    assert leaves[0] > 0 < leaves[2]
    assert min(upper) > 0
    assert dense_oracles.frobenius_error(K.to_dense(), exact) < 3e-8


def test_float32_storage_of_a_float64_matrix():
    exact = smooth()
    K = gh.compress(exact, rtol=1e-4, leaf_size=30, dtype=np.float32)
    assert K.dtype == np.float32
    assert all(a.dtype == np.float32 for a in K.structure.arrays())
    assert dense_oracles.frobenius_error(K.to_dense(), exact) < 3e-4
    wide = gh.compress(exact, rtol=1e-4, leaf_size=30)
    assert K.num_stored == wide.num_stored
    assert (K @ np.ones(300)).dtype == np.float32
    assert gh.compress(exact.astype(np.float32), leaf_size=30, dtype="float64").dtype == float


def test_the_error_is_that_of_what_is_stored():
    """Storing in float32 costs accuracy: the report and a warning say so."""
    exact = smooth()
    with pytest.warns(AccuracyWarning, match="exceeds rtol 1e-10"):
        K = gh.compress(exact, rtol=1e-10, leaf_size=30, dtype=np.float32)
    error = dense_oracles.frobenius_error(K.to_dense(), exact)
    assert error / 3 < K.report.error < 3 * error


def test_tighter_tolerances_store_more():
    fractions = [
        gh.compress(toeplitz(500), rtol=rtol, leaf_size=30).storage_fraction
        for rtol in (1e-2, 1e-5, 1e-8)
    ]
    assert fractions[0] < fractions[1] < fractions[2] < 1


# --- seeds -----------------------------------------------------------------------------------


def arrays_of(K: gh.HSSMatrix) -> list[np.ndarray]:
    t = K.structure
    return [t.leaves, *t.arrays(), *(a.order for a in t.levels if a.order is not None)]


def same_bits(K: gh.HSSMatrix, other: gh.HSSMatrix) -> bool:
    pairs = list(zip(arrays_of(K), arrays_of(other), strict=False))
    return all(np.array_equal(a, b) for a, b in pairs) and K.ranks == other.ranks


@pytest.mark.parametrize("ordering", ["natural", "gram", "random", "auto"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_gives_the_same_bits(sampler: str, ordering: str):
    exact = dense_oracles.random_spd(300, smallest=0.01) + smooth()

    def run(seed: int) -> gh.HSSMatrix:
        return gh.compress(
            exact, rtol=1e-1, leaf_size=20, seed=seed, sampler=sampler, ordering=ordering
        )

    first, again, other = run(7), run(7), run(8)
    assert first.report.seed == 7
    assert same_bits(first, again)
    assert not same_bits(first, other)
    reports = [dataclasses.asdict(K.report) for K in (first, again)]
    for report in reports:
        report.pop("seconds")
        report.pop("cpu_seconds")
    assert reports[0] == reports[1]


def test_the_same_seed_gives_the_same_bits_for_a_network():
    pytest.importorskip("torch")
    from network_cases import case

    model, inputs, targets = case("wide output, deep", "cross_entropy")
    first, again, other = (
        gh.compress(
            gh.GGNOperator(model, "cross_entropy", inputs, targets),
            rtol=1e-2,
            leaf_size=8,
            seed=seed,
        )
        for seed in (1, 1, 2)
    )
    assert same_bits(first, again)
    assert not same_bits(first, other)


def test_the_global_random_state_is_left_alone():
    before = np.random.get_state()[1].copy()
    gh.compress(smooth(100), leaf_size=10, ordering="random").factorize(1.0).sample(2)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


# --- the cap ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_hit_cap_is_a_warning_that_names_the_levels(sampler: str):
    exact = dense_oracles.random_spd(256)
    with pytest.warns(RankCapWarning, match=r"max_rank 3 was hit on level (\d, )*\d \(root = 0\)"):
        K = gh.compress(exact, rtol=1e-6, leaf_size=32, max_rank=3, sampler=sampler)
    assert K.report.rank_cap_hit
    assert K.report.capped_levels
    assert set(K.report.capped_levels) <= {1, 2, 3}
    assert max(itertools.chain.from_iterable(K.ranks)) <= 3
    assert all(level.rank <= 3 for level in K.structure.levels)
    error = dense_oracles.frobenius_error(K.to_dense(), exact)
    assert 1e-2 < error < 2
    assert error / 2 < K.report.error < 2 * error


def test_the_warning_says_which_level():
    """Only the leaves' siblings couple at rank 8; above them everything has rank 1."""
    rng = np.random.default_rng(0)
    exact = np.ones((128, 128))
    for start in range(0, 128, 32):
        coupling = rng.standard_normal((16, 8)) @ rng.standard_normal((8, 16))
        exact[start : start + 16, start + 16 : start + 32] += coupling
        exact[start + 16 : start + 32, start : start + 16] += coupling.T
    with pytest.warns(RankCapWarning, match=r"max_rank 4 was hit on level 3 \(root = 0\)"):
        K = gh.compress(exact, rtol=1e-6, leaf_size=16, max_rank=4, ordering="natural")
    assert K.report.capped_levels == (3,)


def test_no_cap_no_warning():
    K = gh.compress(low_rank_plus_diagonal(200, 4), rtol=1e-8, leaf_size=25, max_rank=4)
    assert not K.report.rank_cap_hit
    assert K.report.capped_levels == ()


def test_max_rank_one():
    with pytest.warns(RankCapWarning):
        K = gh.compress(toeplitz(128), rtol=1e-8, leaf_size=8, max_rank=1)
    assert set(K.ranks[0]) == {1}
    assert max(itertools.chain.from_iterable(K.ranks)) == 1


# --- cost ------------------------------------------------------------------------------------


class Counter:
    """Counts columns multiplied and entries asked for."""

    def __init__(self, a: np.ndarray) -> None:
        self.a, self.columns, self.entries = a, 0, 0

    def matmat(self, v: np.ndarray) -> np.ndarray:
        self.columns += v.shape[1]
        return self.a @ v

    def block(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        self.entries += rows.size * cols.size
        return self.a[np.ix_(rows, cols)]


def test_samplers_use_what_they_say():
    exact = smooth(1000)
    used = {}
    for sampler in SAMPLERS:
        counter = Counter(exact)
        op = gh.FunctionOperator(1000, matmat=counter.matmat, entries=counter.block)
        K = gh.compress(op, rtol=1e-3, leaf_size=25, sampler=sampler, ordering="natural")
        used[sampler] = counter
        if sampler != "entries":  # the sketch, and the vectors that measure the errors
            assert counter.columns <= K.report.num_samples + 10 + 24 + 4
    assert (
        used["entries"].columns == 10 + 4
    )  # that measure the error, and are compared with entries
    assert used["products"].entries == 0
    assert used["products+entries"].entries < 0.1 * 1000**2
    assert used["entries"].entries < 1000**2


def test_products_of_a_large_matrix_are_few():
    """A matrix with fast products: columns do not grow with N."""
    columns = []
    for n in (512, 2048):
        x = np.linspace(0, 1, n)
        factor = np.stack([np.cos(k * x) / (1 + k) ** 2 for k in range(12)], axis=1)
        counted = [0]

        def matmat(v: np.ndarray, factor: Any = factor, counted: list[int] = counted) -> Any:
            counted[0] += v.shape[1]
            return factor @ (factor.T @ v)

        op = gh.FunctionOperator(n, matmat=matmat)
        gh.compress(op, rtol=1e-4, leaf_size=32)
        columns += counted
    assert columns[0] == columns[1] < 200


def peak_of_compression(n: int) -> int:
    points = np.random.default_rng(0).random((n, 2))
    op = gh.KernelOperator(points, "gaussian", 0.5)
    tracemalloc.start()
    try:
        gh.compress(op, rtol=1e-3, leaf_size=64)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_peak_memory_is_far_from_dense():
    """It grows like N, not like N^2 (times 16 here)."""
    small, large = peak_of_compression(1024), peak_of_compression(4096)
    assert large < 0.25 * 8 * 4096**2
    assert large < 6 * small


def test_report_of_the_phases():
    report = gh.compress(smooth(), leaf_size=30).report
    assert {"sampling", "pivoted QR", "couplings", "measuring"} <= set(report.seconds)
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert report.cpu_seconds > 0
    assert report.scheme == "hss"
    assert report.passes >= 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.error = 0.0


def test_no_tqdm_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ArgumentError, match=r"progress needs tqdm.*pip install tqdm"):
        gh.compress(np.full((8, 8), np.nan), progress=True)  # whose entries are not looked at yet


def test_progress_bar_goes_to_stderr(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("tqdm")
    gh.compress(smooth(), leaf_size=30, progress=True)
    captured = capsys.readouterr()
    assert "compress" in captured.err
    assert captured.out == ""
    gh.compress(smooth(), leaf_size=30)
    assert capsys.readouterr().err == ""


def test_constructors_of_functions_choose_their_way():
    exact = smooth()
    assert gh.compress(entries_only(exact), leaf_size=30).report.sampler == "entries"
    assert gh.compress(products_only(exact), leaf_size=30).report.sampler == "products"
    both = gh.FunctionOperator(
        300, matmat=lambda v: exact @ v, entries=lambda r, c: exact[np.ix_(r, c)]
    )
    assert gh.compress(both, leaf_size=30).report.sampler == "products+entries"

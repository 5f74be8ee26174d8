"""The measured error tells the true one, whatever the sample has missed, and warnings say why."""

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import entries_only, heavy_rows, siblings_of_their_own, toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.compression import probe as probe_module
from gpu_hodlr.compression.options import Options
from gpu_hodlr.compression.probe import CONFIDENCE, ErrorProbe, _largest_mean
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.errors import AccuracyWarning, ArgumentError, RankCapWarning
from gpu_hodlr.schemes import SCHEMES
from gpu_hodlr.structures import LowRank
from gpu_hodlr.tree import rows_tree


def compressed(op: Any, *args: Any, **options: Any) -> tuple[gh.CompressedMatrix, list[str]]:
    """A matrix and the names of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        K = gh.compress(op, *args, **options)
    return K, [w.category.__name__ for w in caught]


def isolated(n: int = 1000, pairs: int = 3) -> np.ndarray:
    """The identity and a few entries that sampled columns miss."""
    exact, rng = np.eye(n), np.random.default_rng(5)
    for _ in range(pairs):
        i, j = rng.choice(n, 2, replace=False)
        exact[i, j] = exact[j, i] = 0.9
    return exact


def laplacian(m: int = 30) -> np.ndarray:
    """Five points on a square grid."""
    line = 2 * np.eye(m) - np.eye(m, k=1) - np.eye(m, k=-1)
    return np.kron(line, np.eye(m)) + np.kron(np.eye(m), line)


# --- entries that a sample misses --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scheme", ["hss", "hodlr"])
@pytest.mark.parametrize("make", [gh.DenseOperator, entries_only], ids=["dense", "entries"])
def test_isolated_entries_are_not_missed(make: Callable[[Any], Any], scheme: str, seed: int):
    exact = isolated()
    K, warned = compressed(
        make(exact), scheme, rtol=1e-4, leaf_size=32, ordering="natural", sampler="entries",
        seed=seed,
    )  # fmt: skip
    error = dense_oracles.frobenius_error(K.to_dense(), exact)
    assert not warned
    assert error <= 3e-4
    assert K.report.error_bound >= error - 1e-15


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sampler", ["auto", "entries"])
def test_a_grid_laplacian_by_angles(sampler: str, seed: int):
    exact = laplacian()
    K, warned = compressed(
        exact, "fmm", rtol=1e-3, leaf_size=32, ordering="angle", budget=0.1, sampler=sampler,
        seed=seed,
    )  # fmt: skip
    assert not warned
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 3e-3


def test_products_take_over_where_columns_miss():
    K, _ = compressed(
        isolated(), rtol=1e-4, leaf_size=32, ordering="natural", sampler="entries", seed=7
    )
    assert K.report.sampler == "products+entries"
    assert K.report.passes == 3
    assert K.report.measured_by == "10 products with random vectors"


def test_what_measures_is_said():
    exact = toeplitz(2500)
    options: dict[str, Any] = {"rtol": 1e-3, "leaf_size": 64, "ordering": "natural"}
    dense = gh.compress(exact, sampler="entries", **options).report
    assert dense.measured_by == "10 products with random vectors"
    assert dense.error_bound == pytest.approx(1.593 * dense.error, rel=1e-3)
    few = gh.compress(entries_only(exact), **options).report
    assert few.measured_by.endswith("of 2500 rows, drawn at random")
    assert few.error_bound > (3 / 512) ** 0.5 / 2  # what a sample can miss at the least
    every = gh.compress(entries_only(exact[:900, :900]), **options).report
    assert every.measured_by == "all rows"
    assert every.error_bound == every.error


def test_products_of_points_are_too_dear():
    """They are made of all entries: as many rows as are cheap are read."""
    points = np.random.default_rng(0).random((3000, 2))
    report = gh.compress(gh.KernelOperator(points, "laplace", 0.3), rtol=1e-3).report
    assert "of 3000 rows" in report.measured_by
    assert int(report.measured_by.split()[0]) > 256


def test_the_bound_holds_after_a_change():
    K = gh.compress(toeplitz(300), rtol=1e-3, leaf_size=32)
    assert (3.0 * K).report.error_bound == K.report.error_bound
    plus = K + gh.Diagonal(np.full(300, 5.0))
    assert plus.report.error_bound / plus.report.error == pytest.approx(1.593, rel=1e-3)


def options(**given: Any) -> Options:
    values: dict[str, Any] = {
        "scheme": "hss", "rtol": 1e-4, "max_rank": 256, "leaf_size": 256, "ordering": "auto",
        "budget": 0.0, "seed": 0, "dtype": None, "storage_dtype": None, "device": None,
        "sampler": "auto", "atol": None, "damping": None,
    }  # fmt: skip
    return Options(**{**values, **given})


def test_dear_products_are_not_made_to_measure():
    exact = toeplitz(100)
    for cost, measured in ((1e3, True), (1e10, True), (1e14, False)):
        op = gh.FunctionOperator(
            100,
            matmat=lambda v: exact @ v,
            entries=lambda r, c: exact[np.ix_(r, c)],
            product_cost=cost,
        )
        given = options(sampler="entries")
        assert given.measured_by_products(op, given.sampling(op)) == measured


# --- the probe ---------------------------------------------------------------------------------

ONE_RANK = Ownership(ALONE.comm, rows_tree(600, 1).leaves)


def zero(n: int) -> LowRank:
    return LowRank(np.zeros((n, 0)), np.zeros(0))


@pytest.mark.parametrize("make", [heavy_rows, toeplitz], ids=["heavy rows", "toeplitz"])
def test_rows_are_weighted(monkeypatch: pytest.MonkeyPatch, make: Callable[[int], Any]):
    """The mean over draws is the squared norm, and so is that of what a structure misses."""
    monkeypatch.setattr(probe_module, "EVERY_ROW", 1)
    exact = make(600)
    norms, errors = [], []
    for seed in range(40):
        probe = ErrorProbe(entries_only(exact), False, seed, rows=128)
        norms.append(probe.norm**2)
        spread = probe.to_rows(ONE_RANK)
        found = spread.measure(LowRank(np.full((600, 1), 600**-0.5), np.array([30.0])))
        errors.append((found.error * probe.norm) ** 2)
    truth = np.linalg.norm(exact - np.full((600, 600), 30.0 / 600)) ** 2
    assert np.mean(norms) == pytest.approx(np.linalg.norm(exact) ** 2, rel=0.05)
    assert np.mean(errors) == pytest.approx(truth, rel=0.05)
    assert np.std(norms) < 0.3 * np.mean(norms)  # the heavy rows are in every sample


def test_rows_drawn_twice_count_twice(monkeypatch: pytest.MonkeyPatch):
    """Far more draws than heavy rows."""
    monkeypatch.setattr(probe_module, "EVERY_ROW", 1)
    exact = np.diag([1000.0, *np.ones(299)])
    norms = [ErrorProbe(entries_only(exact), False, s, rows=128).norm for s in range(20)]
    np.testing.assert_allclose(norms, np.linalg.norm(exact), rtol=0.35)
    assert np.mean(norms) == pytest.approx(np.linalg.norm(exact), rel=0.05)


def test_the_bound_is_exceeded_as_rarely_as_said(monkeypatch: pytest.MonkeyPatch):
    """By rows: a structure that is wrong in a few rows alone, which a sample often misses."""
    monkeypatch.setattr(probe_module, "EVERY_ROW", 1)
    exact, low = np.eye(600), 0
    exact[:3, 3:6] = exact[3:6, :3] = 0.5
    owners = Ownership(ALONE.comm, np.arange(600)[None])
    diagonal = LowRank(np.zeros((600, 0)), np.zeros(0), np.ones(600))
    truth = np.linalg.norm(exact - np.eye(600)) / np.linalg.norm(exact)
    missed = 0
    for seed in range(200):
        found = ErrorProbe(entries_only(exact), False, seed, rows=128).to_rows(owners)
        measured = found.measure(diagonal)
        low += measured.bound < truth
        missed += measured.error == 0
    assert low <= (1 - CONFIDENCE) * 200
    assert missed > 20  # where the error says nothing


def test_the_bound_by_products_is_exceeded_as_rarely_as_said():
    """Of a residual of rank one, the worst case."""
    exact = np.outer(np.ones(300), np.ones(300)) / 300 + np.eye(300)
    op, owners = gh.DenseOperator(exact), Ownership(ALONE.comm, np.arange(300)[None])
    identity = LowRank(np.zeros((300, 0)), np.zeros(0), np.ones(300))
    low = 0
    for seed in range(400):
        probe = ErrorProbe(op, True, seed)
        measured = probe.to_rows(owners).measure(identity)
        low += measured.bound * probe.norm < 1.0
    assert 0.02 * 400 < low < 0.09 * 400


def test_the_largest_mean_is_the_rule_of_three():
    assert _largest_mean(0.0, 500) == pytest.approx(3 / 500, rel=1e-2)
    assert _largest_mean(1.0, 500) == 1.0
    u = _largest_mean(0.3, 500)
    apart = 0.3 * math.log(0.3 / u) + 0.7 * math.log(0.7 / (1 - u))
    assert u > 0.3
    assert apart == pytest.approx(-math.log(1 - CONFIDENCE) / 500)


def test_the_zero_matrix_is_measured():
    for products in (True, False):
        op = gh.DenseOperator(np.zeros((50, 50)))
        probe = ErrorProbe(op, products, 0)
        assert (probe.norm, probe.scale_to_one()) == (0.0, 1.0)
        found = probe.to_rows(Ownership(ALONE.comm, np.arange(50)[None])).measure(zero(50))
        assert (found.error, found.bound) == (0.0, 0.0)


def test_huge_entries_do_not_overflow_by_rows():
    exact = 1e300 * toeplitz(80)
    probe = ErrorProbe(entries_only(exact), False, 0)
    assert probe.norm == pytest.approx(1e300 * np.linalg.norm(toeplitz(80)))
    assert probe.scale_to_one() < 1e-290


@pytest.mark.parametrize("ranks", [2, 3])
def test_products_take_over_on_all_ranks(ranks: int):
    """As on one: the same bits of nested bases."""
    exact = isolated(256, 2)

    def job(comm: Any) -> Any:
        K = gh.compress(
            exact, rtol=1e-4, leaf_size=16, ordering="natural", sampler="entries", seed=1,
            comm=comm,
        )  # fmt: skip
        return K.report.sampler, K.report.error, K.report.error_bound, K.to_dense()

    (alone,) = on_threads(1, job)
    for got in on_threads(ranks, job):
        assert got[0] == alone[0]
        assert got[1:3] == pytest.approx(alone[1:3], abs=1e-15)
        np.testing.assert_allclose(got[3], alone[3], rtol=0, atol=1e-13)


# --- max_rank ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["lowrank", "hss", "hodlr"])
@pytest.mark.parametrize("sampler", ["auto", "entries", "products"])
def test_rounding_is_no_cap(scheme: str, sampler: str):
    """The floor of float32 is named, and what is finer."""
    if scheme == "lowrank" and sampler == "entries":
        pytest.skip("a low-rank form is made of products")
    exact = toeplitz(300).astype(np.float32)
    with pytest.warns(AccuracyWarning, match=r"rounding of float32.*use dtype float64"):
        K = gh.compress(
            exact, scheme, rtol=1e-10, max_rank=400, leaf_size=32, ordering="natural",
            sampler=sampler,
        )  # fmt: skip
    assert not K.report.rank_cap_hit
    assert K.report.passes >= 2  # none is stopped by a cap


def test_rounding_of_a_low_rank_form_is_no_cap():
    points = np.random.default_rng(0).random((400, 2)).astype(np.float32)
    op = gh.KernelOperator(points, "gaussian", 0.5)
    with pytest.warns(AccuracyWarning, match="rounding of float32"):
        K = gh.compress(op, "lowrank", rtol=1e-9)
    assert max(map(max, K.ranks)) < 256
    assert not K.report.rank_cap_hit


@pytest.mark.parametrize("sampler", ["products+entries", "entries", "products"])
def test_a_sample_that_falls_short_is_no_cap(sampler: str, monkeypatch: pytest.MonkeyPatch):
    """An error that a level has left for another reason, at ranks below the cap."""

    def doubted(choose: Callable[..., Any], place: int) -> Callable[..., Any]:
        def chosen(*args: Any, **options: Any) -> Any:
            found = list(choose(*args, **options))
            found[place] = 1e3
            return tuple(found)

        return chosen

    for module, name in (("sweep", "bases_of_level"), ("products_only", "choose_rank")):
        module = importlib.import_module(f"gpu_hodlr.bases.{module}")
        monkeypatch.setattr(module, name, doubted(getattr(module, name), 1))
    for max_rank, capped in ((100, False), (3, True)):
        K, _ = compressed(
            toeplitz(256), rtol=1e-6, leaf_size=32, max_rank=max_rank, ordering="natural",
            sampler=sampler,
        )  # fmt: skip
        assert K.report.rank_cap_hit == capped


def moler(n: int = 512) -> np.ndarray:
    exact = np.minimum.outer(np.arange(n), np.arange(n)) - 1.0
    np.fill_diagonal(exact, np.arange(1.0, n + 1))
    order = np.random.default_rng(0).permutation(n)
    return exact[np.ix_(order, order)]


@pytest.mark.parametrize("leaf_size", [16, 64])
def test_a_cap_is_hit_by_the_ranks_that_are_kept(leaf_size: int):
    """Interpolation needs more columns than truncation leaves: they are not the user's rank."""
    given: dict[str, Any] = {"max_rank": 20, "leaf_size": leaf_size, "ordering": "natural"}
    K = gh.compress(moler(), "hodlr", rtol=1e-2, **given)
    assert max(map(max, K.ranks)) < 20
    assert not K.report.rank_cap_hit
    with pytest.warns(RankCapWarning, match="max_rank 20 was hit on level 1, 2"):
        K = gh.compress(moler(), "hodlr", rtol=1e-4, **given)
    depth = K.tree.depth
    for level in K.report.capped_levels:
        assert max(K.ranks[depth - level]) == 20


@pytest.mark.parametrize("sampler", ["products+entries", "entries", "products"])
@pytest.mark.parametrize("scheme", ["hss", "hodlr", "lowrank"])
@pytest.mark.parametrize("rtol", [1e-2, 1e-6])
def test_a_cap_that_is_said_is_reached(scheme: str, sampler: str, rtol: float):
    if scheme == "lowrank" and sampler == "entries":
        pytest.skip("a low-rank form is made of products")
    exact = siblings_of_their_own(512)
    K, warned = compressed(
        exact, scheme, rtol=rtol, max_rank=12, leaf_size=32, ordering="natural", sampler=sampler
    )
    error = dense_oracles.frobenius_error(K.to_dense(), exact)
    assert max(map(max, K.ranks)) <= 12
    if K.report.rank_cap_hit:
        assert max(map(max, K.ranks)) == 12
    assert (error > 3 * rtol) <= bool(warned)


# --- symmetry ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(3, 7), (1500, 20), (20, 1500), (1201, 1402), (1599, 1598)])
def test_one_entry_that_is_not_symmetric(place: tuple[int, int]):
    """Wherever it stands, in strips of rows that are looked at together or beyond."""
    exact = np.eye(1600)
    exact[place] = 1e-3
    with pytest.raises(ArgumentError, match="must be symmetric"):
        gh.DenseOperator(exact)


# --- auto --------------------------------------------------------------------------------------


def classes() -> Any:
    """6-4-700 ReLU, 64 samples: low rank is predicted to be least, and misses rtol."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 700)
    model = torch.nn.Sequential(*layers).double()
    inputs = torch.randn(64, 6, dtype=torch.float64)
    return gh.GGNOperator(model, "cross_entropy", inputs, torch.randint(0, 700, (64,)))


def test_auto_keeps_what_keeps_the_promise():
    K, warned = compressed(classes(), "auto", rtol=1e-2)
    assert not warned
    assert K.report.scheme != "lowrank"
    assert K.report.error <= 3e-2
    assert K.storage_fraction < 0.09


def test_auto_goes_on_to_the_next_form(monkeypatch: pytest.MonkeyPatch):
    """However wrong the prediction is, and the report says what was tried."""
    exact = dense_oracles.distance_matrix(512, lambda d: np.exp(-d / 5))
    for name, fraction in (("lowrank", 0.01), ("hodlr", 0.3), ("hss", 0.2)):
        scheme = SCHEMES[name]
        monkeypatch.setitem(
            SCHEMES, name, replaced(scheme, predict=lambda *_, fraction=fraction: fraction)
        )
    K, warned = compressed(exact, "auto", rtol=1e-3, max_rank=40, leaf_size=32)
    assert not warned
    assert K.report.scheme == "hss"
    assert "lowrank 1 %, hss 20 %, hodlr 30 %" in K.report.choice
    assert "lowrank: error" in K.report.choice
    assert "max_rank hit, not kept" in K.report.choice
    assert "hodlr: error" not in K.report.choice
    assert K.report.choice.endswith("kept: hss")


def replaced(scheme: Any, **changed: Any) -> Any:
    return type(scheme)(**{**vars(scheme), **changed})


def test_auto_passes_over_a_form_that_cannot_be(monkeypatch: pytest.MonkeyPatch):
    """Declared definite, but not: a low-rank form refuses it, the next does not."""
    exact = toeplitz(300) - 0.5 * np.eye(300)
    low = replaced(SCHEMES["lowrank"], predict=lambda *_: 0.001)
    monkeypatch.setitem(SCHEMES, "lowrank", low)
    K, warned = compressed(exact, "auto", rtol=1e-3, leaf_size=32)
    assert not warned
    assert "lowrank: not positive semi-definite" in K.report.choice
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 3e-3


def test_auto_keeps_the_least_error_where_none_keeps_the_promise():
    V = np.random.default_rng(0).standard_normal((400, 400))
    exact = V @ V.T
    with pytest.warns(RankCapWarning):
        K = gh.compress(exact, "auto", rtol=1e-6, max_rank=20, leaf_size=32)
    errors = []
    for scheme in ("hss", "hodlr", "lowrank"):
        other, _ = compressed(exact, scheme, rtol=1e-6, max_rank=20, leaf_size=32)
        errors.append(dense_oracles.frobenius_error(other.to_dense(), exact))
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 1.3 * min(errors)
    assert "none keeps rtol" in K.report.choice

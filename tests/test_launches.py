"""What the CUDA path waits for, counted on the host stand-in for CuPy (not a GPU run)."""

from typing import Any

import dense_oracles
import numpy as np
import pytest
from host_cupy import HostCupy
from matrix_cases import toeplitz
from scripts import script

import gpu_hodlr as gh
from gpu_hodlr.devices import steps_between_reads, to_host, to_hosts
from gpu_hodlr.factor import eigenbasis_factor, vecchia_entries
from gpu_hodlr.krylov import extreme_eigenvalues, gradients
from gpu_hodlr.operators import SketchColumns
from gpu_hodlr.ordering import auto, build_tree
from gpu_hodlr.schemes import kfe

launches = script("launches")
MOST_WAITS_A_LEVEL = 4


def columns(host: HostCupy, n: int, k: int, dtype: Any = np.float64) -> Any:
    return host.cupy.asarray(np.random.default_rng(n + k).standard_normal((n, k)).astype(dtype))


# --- the sweep, products, solves -------------------------------------------------------------


@pytest.mark.parametrize("name", launches.COMPRESSED)
def test_waits_of_a_level(stand_in: HostCupy, name: str):
    """Of every sampler and form: of the dozen there were, the phase timer's were half."""
    ops = launches.operators(stand_in)
    kind = launches.COMPRESSED[name][0]
    if kind not in ops:
        pytest.skip("needs torch")
    counts, _ = launches.compression(stand_in, name, ops[kind])
    if name not in ("lowrank", "kfe, network"):  # which have no levels
        assert counts.waits_a_level <= MOST_WAITS_A_LEVEL
    assert counts.waits <= 40


@pytest.mark.parametrize("name", ["hss, products+entries, dense", "hodlr, products"])
def test_waits_of_another_level(stand_in: HostCupy, name: str):
    """Of the whole compression, the choice among all orderings included."""
    kind, scheme, options = launches.COMPRESSED[name]
    op, waits = launches.operators(stand_in)[kind], []
    for leaf_size in (64, 16):  # three levels, and five
        options = {**options, "rtol": 1e-2, "leaf_size": leaf_size}
        counts, _ = launches.counted(stand_in, "", lambda: gh.compress(op, scheme, **options))  # noqa: B023
        waits.append(counts.waits)
    assert waits[1] - waits[0] <= 2 * MOST_WAITS_A_LEVEL


@pytest.mark.parametrize("name", [name for name in launches.MULTIPLIED if "fmm" not in name])
def test_products_and_solves_wait_for_nothing(stand_in: HostCupy, name: str):
    kind = launches.COMPRESSED[name][0]
    _, K = launches.compression(stand_in, name, launches.operators(stand_in)[kind])
    F, v = K.factorize(0.1), columns(stand_in, launches.N, 1)
    for call in (K.matmat, F.solve):
        for _ in range(2):  # as it is, and as a graph
            counts, _ = launches.counted(stand_in, name, lambda: call(v))  # noqa: B023
            assert counts.waits == counts.copies == 0


def test_an_hss_factor_waits_once_for_all_levels(stand_in: HostCupy):
    """Nor does another level ask for more than a constant number of launches."""
    found = []
    for n in (256, 512):
        op = gh.DenseOperator(stand_in.cupy.asarray(toeplitz(n)))
        K = gh.compress(op, "hss", leaf_size=32, rtol=1e-3, ordering="natural")
        K.factorize(0.1)
        counts, _ = launches.counted(stand_in, "factor", lambda K=K: K.factorize(0.1))
        found.append(counts)
    assert found[0].waits == found[1].waits <= 2
    assert found[1].launches - found[0].launches <= 13


def test_an_ordering_is_chosen_by_one_read(stand_in: HostCupy):
    """The probes of all trees and levels together; and one of the sketch's energies."""
    op = gh.DenseOperator(stand_in.cupy.asarray(toeplitz(300)))
    names = ("natural", "gram", "angle", "random")
    trees = {name: build_tree(op, name, 20, 0, 1e-3)[0] for name in names}
    for sketch in (SketchColumns(op, 40, 0), None):
        stand_in.counters.reset()
        auto.cheapest(op, trees, 0, 1e-3, sketch)
        assert stand_in.counters.synchronizations == 2


def test_several_arrays_are_read_at_once(xp: Any):
    a, b = np.arange(6.0).reshape(2, 3), np.array(7.0)
    got = to_hosts(xp.asarray(a), xp.asarray(b), xp.asarray(a)[:0])
    for one, want in zip(got, (a, b, a[:0]), strict=True):
        assert isinstance(one, np.ndarray)
        np.testing.assert_array_equal(one, want)
    assert to_hosts() == []


def test_several_arrays_are_one_wait(stand_in: HostCupy):
    a = stand_in.cupy.ones((2, 3))
    stand_in.counters.reset()
    to_hosts(a, a[0], a.T)
    assert stand_in.counters.synchronizations == 1


# --- in the eigenbasis of a network ----------------------------------------------------------


def rotated(host: HostCupy, widths: tuple[int, ...], rtol: float, n: int = 60) -> Any:
    """Counts of a compression, how many strips of entries it looked at, and the matrix."""
    pytest.importorskip("torch")
    from eigenbasis_cases import network

    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((n, widths[0])) * 0.9 ** np.arange(widths[0])
    targets = rng.standard_normal((n, widths[-1]))
    op = gh.GGNOperator(network(widths), "mse", inputs, targets, device="cuda")
    strips: list[Any] = []
    chosen = kfe._chosen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kfe, "_chosen", lambda some, *given: strips.extend(some) or chosen(some, *given)
        )
        counts, K = launches.counted(host, "kfe", lambda: gh.compress(op, "kfe", rtol=rtol))
    assert K.report.passes == 1
    return counts, len(strips), K


def test_launches_of_a_strip_of_entries(stand_in: HostCupy):
    """Whatever its rows, columns and entries; a unit has six strips at most."""
    (few, fewer, _), (many, more, _) = (
        rotated(stand_in, (24, units, 28), rtol=1e-2) for units in (12, 24)
    )
    assert many.launches - few.launches <= 4 * (more - fewer)
    assert many.waits == few.waits <= 40
    again, same, _ = rotated(stand_in, (24, 12, 28), rtol=1e-3)  # four times the entries
    assert (again.launches, again.waits, same) == (few.launches, few.waits, fewer)
    larger = rotated(stand_in, (100, 12, 28), rtol=1e-2, n=100)[1]
    assert larger <= 6 * 2 * 2 * 12  # units of both layers by both layers


def test_waits_of_another_layer(stand_in: HostCupy):
    """In the eigenbasis: that of a layer takes two, and nothing else does."""
    waits = [
        rotated(stand_in, (24, *hidden, 28), rtol=1e-2)[0].waits
        for hidden in ((12,), (12, 12), (12, 12, 12))
    ]
    assert waits[2] - waits[1] <= MOST_WAITS_A_LEVEL
    assert waits[1] - waits[0] <= MOST_WAITS_A_LEVEL


def test_launches_of_a_product_in_the_eigenbasis(stand_in: HostCupy):
    """As many for four times the rows; one graph from the second on; nothing is waited for."""
    first = []
    for widths in ((12, 6, 14), (48, 6, 56)):
        K = rotated(stand_in, widths, rtol=1e-2)[2]
        v = columns(stand_in, K.shape[0], 1)
        counts = [launches.counted(stand_in, "", lambda: K.matmat(v))[0] for _ in range(3)]  # noqa: B023
        first.append(counts[0].launches)
        assert [c.launches for c in counts[1:]] == [3, 3]
        assert {(c.waits, c.copies) for c in counts} == {(0, 0)}
    assert first[0] == first[1] <= 60


def test_launches_of_a_factor_in_the_eigenbasis(stand_in: HostCupy):
    """Rows are factorized in batches: as many for four times the rows."""
    found = []
    for widths in ((12, 6, 14), (48, 6, 56)):
        K = rotated(stand_in, widths, rtol=1e-2)[2]
        counts, F = launches.counted(stand_in, "", lambda: K.factorize(1.0))  # noqa: B023
        v = columns(stand_in, K.shape[0], 1)
        applied = launches.counted(stand_in, "", lambda: F.precondition(v))[0]  # noqa: B023
        assert (applied.waits, applied.copies) == (0, 0)
        found.append(applied.launches)
        assert counts.launches <= 1100  # most of them of the iterations that verify it
        assert counts.waits <= 40
    assert found[0] == found[1] <= 60


@pytest.mark.parametrize("fraction", [None, 0.05], ids=["sparse", "some of low rank"])
def test_waits_of_a_factor_of_many_entries(stand_in: HostCupy, fraction: float | None):
    """A device looks at all of them at once, where the CPU has parts; widths of rows take more."""
    pytest.importorskip("torch")
    from eigenbasis_cases import operator

    K = gh.compress(operator("larger classifier", device="cuda"), "kfe", rtol=1e-4, max_rank=200)
    assert K.ranks[0][0] > 5
    waits = []
    for together in (1 << 23, 2000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vecchia_entries, "_TOGETHER", together)
            patch.setattr(eigenbasis_factor.KFEFactor, "verified", lambda self: True)
            counts, _ = launches.counted(
                stand_in, "", lambda: K.factorize(1.0, storage_fraction=fraction)
            )
        waits.append(counts.waits)
    assert waits[0] == waits[1] <= 30


def test_waits_of_eigenpairs_and_of_a_determinant(stand_in: HostCupy):
    """Residuals of all pairs are read together, and so are what the levels of a factor add."""
    K = gh.compress(launches.operators(stand_in)["points"], "hss", **launches.OPTIONS)
    waits = [
        launches.counted(stand_in, "", lambda: gh.eigsh(K, k))[0].waits  # noqa: B023
        for k in (2, 8)
    ]
    assert max(waits) <= 5
    F = K.factorize(0.1)
    assert launches.counted(stand_in, "", F.logdet)[0].waits <= 2


# --- conjugate gradients ---------------------------------------------------------------------


def test_steps_between_reads():
    assert {steps_between_reads("cpu", done) for done in range(100)} == {1}
    steps = [steps_between_reads("cuda", done) for done in range(100)]
    assert steps[:4] == [1, 1, 1, 1]
    assert max(steps) == 8
    assert all(step <= max(1, done // 4) for done, step in enumerate(steps))


class Counted(gh.DenseOperator):
    """Counts its products."""

    products = 0

    def _matmat(self, v: Any) -> Any:
        self.products += 1
        return super()._matmat(v)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rtol", [1e-2, 1e-6, 1e-10])
def test_iterations_beyond_convergence_change_nothing(
    stand_in: HostCupy, dtype: Any, rtol: float, k: int, monkeypatch: pytest.MonkeyPatch
):
    """The same as a run that is read after every iteration: solution, history, every bit."""
    rtol = rtol if dtype == np.float64 else max(rtol, 1e-5)
    exact = dense_oracles.random_spd(120, smallest=0.02).astype(dtype)
    op, b = Counted(stand_in.cupy.asarray(exact)), columns(stand_in, 120, k, dtype)
    stand_in.counters.reset()
    x, info = gh.cg(op, b, rtol=rtol)
    assert info.converged
    assert info.residuals[-1] <= rtol < info.residuals[-2]
    assert len(info.residuals) == info.iterations + 1
    assert info.iterations <= op.products <= 1.25 * info.iterations + 1
    assert stand_in.counters.synchronizations <= 1 + info.iterations
    if info.iterations > 20:
        assert stand_in.counters.synchronizations <= info.iterations / 2
    monkeypatch.setattr(gradients, "steps_between_reads", lambda device, done: 1)
    y, again = gh.cg(op, b, rtol=rtol)
    np.testing.assert_array_equal(to_host(x), to_host(y))
    assert again.residuals == info.residuals
    host, on_host = gh.cg(gh.DenseOperator(exact), to_host(b), rtol=rtol)
    assert abs(on_host.iterations - info.iterations) <= 1
    np.testing.assert_allclose(to_host(x), host, rtol=0, atol=100 * rtol * np.abs(host).max())


def test_so_many_products_at_most(stand_in: HostCupy):
    op = Counted(stand_in.cupy.asarray(dense_oracles.random_spd(120, smallest=1e-4)))
    for maxiter in (1, 7, 13, 30):
        op.products = 0
        _, info = gh.cg(op, columns(stand_in, 120, 1), maxiter=maxiter)
        assert op.products == info.iterations == maxiter
        assert not info.converged


@pytest.mark.parametrize("scale", [0.0, np.nan])
def test_what_cannot_converge_ends(stand_in: HostCupy, scale: float):
    """Zero right-hand sides at once, NaN at the first look, as on the CPU."""
    op, b = gh.DenseOperator(stand_in.cupy.asarray(toeplitz(50))), columns(stand_in, 50, 2) * scale
    _, info = gh.cg(op, b)
    assert info.iterations == 0
    assert info.converged == (scale == 0)


def test_fmm_solves_wait_once_an_iteration_at_most(stand_in: HostCupy):
    name = "fmm, entries"
    kind = launches.COMPRESSED[name][0]
    _, K = launches.compression(stand_in, name, launches.operators(stand_in)[kind])
    v = columns(stand_in, launches.N, 1)
    counts, F = launches.counted(stand_in, name, lambda: K.factorize(0.1))
    assert counts.waits <= 50  # 60 steps of Lanczos among them
    counts, _ = launches.counted(stand_in, name, lambda: F.solve(v))
    assert F.info.converged
    assert counts.waits <= F.info.iterations + 2
    assert counts.copies == 0


# --- Lanczos ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 7, 29, 120])
def test_lanczos_reads_once(stand_in: HostCupy, dtype: Any, rank: int):
    """An invariant subspace ends it, wherever it is noticed: the Ritz values are the CPU's."""
    vectors = np.linalg.qr(np.random.default_rng(rank).standard_normal((120, rank)))[0]
    exact = (vectors * np.linspace(1, 5, rank)) @ vectors.T
    exact = ((exact + exact.T) / 2).astype(dtype)
    op = gh.DenseOperator(stand_in.cupy.asarray(exact))
    stand_in.counters.reset()
    found = extreme_eigenvalues(op)
    assert stand_in.counters.synchronizations == 1  # there were two a step
    assert np.isfinite(found).all()
    eps = float(np.finfo(dtype).eps)
    eigenvalues = np.linalg.eigvalsh(exact.astype(float))
    assert eigenvalues[0] - 500 * eps <= found[0] <= found[1] <= eigenvalues[-1] + 500 * eps
    if rank < 20:
        assert found[1] == pytest.approx(eigenvalues[-1], rel=1e3 * eps)

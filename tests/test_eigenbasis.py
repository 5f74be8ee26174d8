"""The Kronecker-factored eigenbasis against the dense matrix, rotated."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch")

from eigenbasis_cases import CASES, operator

from gpu_hodlr.eigenbasis import Energies, Rotated, energies

rotated_module = importlib.import_module("gpu_hodlr.eigenbasis.rotated")


def dense_basis(matrix: Rotated) -> np.ndarray:
    """Q (N, M)."""
    return matrix.basis.rotate_back(np.eye(matrix.size))


def rotated_dense(name: str) -> tuple[Rotated, np.ndarray]:
    op = operator(name)
    matrix = op.eigenbasis()
    Q = dense_basis(matrix)
    return matrix, Q.T @ op.to_dense() @ Q


@pytest.mark.parametrize("name", CASES)
def test_the_basis_is_orthonormal_and_turns_back(name: str):
    matrix, _ = rotated_dense(name)
    Q = dense_basis(matrix)
    np.testing.assert_allclose(Q.T @ Q, np.eye(matrix.size), rtol=0, atol=1e-13)
    v = np.random.default_rng(0).standard_normal((len(Q), 3))
    np.testing.assert_allclose(matrix.basis.rotate(v), Q.T @ v, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost_outside_the_basis(name: str):
    """K = Q K' Q^T plus what the basis knows of the rest, to rounding."""
    matrix, R = rotated_dense(name)
    dense = operator(name).to_dense()
    again = matrix.basis.matmat(lambda c: R @ c, np.eye(len(dense)))
    np.testing.assert_allclose(again, dense, rtol=0, atol=1e-13 * abs(dense).max())


@pytest.mark.parametrize("name", CASES)
def test_what_is_outside_the_basis_has_known_eigenvalues(name: str):
    """The smallest, and the log-determinant of all of them."""
    matrix = operator(name).eigenbasis()
    dense, Q = operator(name).to_dense(), dense_basis(matrix)
    outside = np.linalg.svd(Q, full_matrices=True)[0][:, matrix.size :]
    values = np.linalg.eigvalsh(outside.T @ dense @ outside)
    lowest = matrix.basis.lowest_outside()
    assert lowest == pytest.approx(values.min(initial=np.inf), rel=1e-9, abs=1e-12)
    for damping in (1e-2, 3.0):
        want = np.log(values + damping).sum()
        assert matrix.basis.log_outside(damping) == pytest.approx(want, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_entries(name: str):
    """Diagonal, whole rows, and strips: with threshold 0 they are the whole lower triangle."""
    matrix, R = rotated_dense(name)
    atol = 1e-13 * abs(R).max(initial=0.0)
    np.testing.assert_allclose(matrix.d, np.diagonal(R), rtol=0, atol=atol)
    some = np.arange(0, matrix.size, 3)
    np.testing.assert_allclose(matrix.rows(some), R[some], rtol=0, atol=atol)
    np.testing.assert_allclose(lower(matrix, 0.0), np.tril(R, -1), rtol=0, atol=atol)


def lower(matrix: Rotated, tau: float) -> np.ndarray:
    """What the strips hold, strictly below the diagonal."""
    found = np.zeros((matrix.size, matrix.size))
    for rows, strips in matrix.block_rows(range(int(matrix.first_units[-1])), tau):
        for strip in strips:
            assert rows.start <= strip.row < rows.stop
            for unit, block in enumerate(strip.entries):
                column = strip.column + unit * strip.stride
                found[strip.row : strip.row + len(block), column : column + block.shape[1]] = block
    return np.tril(found, -1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [1e-1, 1e-3])
def test_what_is_ruled_out_is_small(name: str, share: float):
    """Every entry above the threshold is computed, and fewer are computed than there are."""
    matrix, R = rotated_dense(name)
    tau = share * abs(R).max(initial=0.0)
    found, exact = lower(matrix, tau), np.tril(R, -1)
    above = abs(exact) > tau
    np.testing.assert_allclose(found[above], exact[above], rtol=1e-10)
    assert matrix.work(tau).sum() <= matrix.work(0.0).sum()
    assert np.count_nonzero(found) <= matrix.work(tau).sum()


def test_work_counts_what_strips_compute():
    matrix, R = rotated_dense("classifier")
    tau = 1e-3 * abs(R).max()
    units = range(int(matrix.first_units[-1]))
    computed = [
        sum(strip.entries.size for strip in strips) for _, strips in matrix.block_rows(units, tau)
    ]
    np.testing.assert_array_equal(matrix.work(tau), computed)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("lengths", [(1, 1), (40, 7), (300, 90), (0, 5), (5, 0)])
def test_strips_hold_what_may_exceed_a_threshold(lengths: tuple[int, int], scale: float):
    """All of it once, of every strip no column and at the end no row more than that takes."""
    rng = np.random.default_rng(0)
    rows, columns = (scale * np.sort(rng.random(k))[::-1] ** 3 for k in lengths)
    for share in (0.0, 1e-3, 0.1, 2.0):
        tau = share * scale**2
        exceeds = rows[:, None] * columns > tau
        held, last = np.zeros(exceeds.shape, int), 0
        for strip, wide in rotated_module._strips(rows, columns, tau):
            held[strip, :wide] += 1
            assert wide == exceeds[strip.start].sum()
            assert strip.start == last < strip.stop
            last = strip.stop
        assert (held[exceeds] == 1).all()
        assert last == exceeds.any(axis=1).sum()
        assert held.max(initial=0) <= 1
    assert not list(rotated_module._strips(rows, 0 * columns, 0.0))


def test_outputs_of_a_constant_loss_are_reduced():
    """784 outputs of 6 hidden units would couple as 6: here 17 as 6, and one layer not at all."""
    assert operator("autoencoder").eigenbasis().basis.layers[-1].units == 6
    assert operator("few outputs").eigenbasis().basis.layers[-1].units == 2
    assert operator("one layer").eigenbasis().size == 0
    assert operator("activated outputs").eigenbasis().basis.layers[-1].U is None


def test_inputs_that_are_always_zero_leave_the_basis():
    assert operator("classifier").eigenbasis().basis.layers[0].features == 12 + 1 - 2


def test_without_a_low_rank_part():
    matrix, R = rotated_dense("classifier")
    values, vectors = np.linalg.eigh(R)
    P, C = vectors[:, -5:], values[-5:]
    rest = matrix.without(P, C)
    left = R - (P * C) @ P.T
    atol = 1e-13 * abs(R).max()
    np.testing.assert_allclose(rest.d, np.diagonal(left), rtol=0, atol=atol)
    np.testing.assert_allclose(rest.rows(np.arange(9)), left[:9], rtol=0, atol=atol)
    np.testing.assert_allclose(lower(rest, 0.0), np.tril(left, -1), rtol=0, atol=atol)


@pytest.mark.parametrize("name", [name for name in CASES if name != "one layer"])
def test_energies_are_those_of_the_matrix(name: str):
    """Of so small a matrix all rows are read, and what a threshold drops is known but for bins."""
    matrix, R = rotated_dense(name)
    off = R - np.diag(np.diagonal(R))
    found = energies(matrix, seed=0)
    norm = np.linalg.norm(R)
    for rtol in (1e-1, 1e-2, 1e-3):
        tau = found.threshold(rtol * norm)
        dropped = np.linalg.norm(off[abs(off) <= tau])
        assert dropped <= rtol * norm
        assert found.above(tau) == pytest.approx(np.count_nonzero(abs(off) > tau) / 2, rel=0.05)
    assert np.linalg.norm(off[abs(off) <= found.threshold(0.0)]) <= 1e-15 * norm
    assert found.above(found.threshold(2 * norm)) == 0


def test_energies_on_every_library(cupy: ModuleType):
    """Two reads; entries that rounding puts into the next bin are few."""
    want, found = (
        energies(operator("classifier", device=device).eigenbasis(), seed=0)
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(found.edges, want.edges, rtol=1e-12)
    np.testing.assert_allclose(found.counts.sum(), want.counts.sum(), rtol=1e-12)
    np.testing.assert_allclose(found.squares.sum(), want.squares.sum(), rtol=1e-9)
    for tau in want.edges[:600:50] * 1.01:
        assert found.above(tau) == pytest.approx(want.above(tau), rel=0.01, abs=3)
    for share in (1e-1, 1e-3):
        tolerance = share * want.squares.sum() ** 0.5
        assert found.threshold(tolerance) == pytest.approx(want.threshold(tolerance), rel=0.05)


def test_energies_of_sampled_rows():
    """Within what is promised of 400 rows, here of 661."""
    matrix, R = rotated_dense("larger classifier")
    off = R - np.diag(np.diagonal(R))
    norm = np.linalg.norm(R)
    for seed in range(5):
        found = energies(matrix, seed)
        for rtol in (1e-1, 1e-2, 1e-3):
            tau = found.threshold(rtol * norm)
            dropped = np.linalg.norm(off[abs(off) <= tau])
            assert 0.8 * rtol * norm <= dropped <= 1.15 * rtol * norm
            above = np.count_nonzero(abs(off) > tau) / 2
            assert found.above(tau) == pytest.approx(above, rel=0.15)


@pytest.mark.parametrize("some", [True, False], ids=["some rows are 0", "all are"])
def test_rows_are_drawn_by_the_root_of_the_diagonal(some: bool, monkeypatch: pytest.MonkeyPatch):
    """Three in ten evenly; each is weighted by how often it is expected, and none is lost."""
    module, seen = importlib.import_module("gpu_hodlr.eigenbasis.energies"), []
    histogram = module._histogram

    def noted(matrix: Rotated, *given: np.ndarray) -> np.ndarray:
        rows, weights, edges = given
        seen.append((rows, weights, edges[0]))
        return histogram(matrix, *given)

    monkeypatch.setattr(module, "_histogram", noted)
    matrix = operator("few outputs").eigenbasis()
    M = matrix.size
    s = np.sqrt(matrix.d) * (np.arange(M) % 3 > 0) * some
    matrix = replace(matrix, d=s**2)

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        seen.clear()
        found = energies(matrix, seed=0)
        assert found.edges[0] == seen[0][2] == (pytest.approx(s.max() ** 2) if some else 1.0)
        assert max(len(each) for each, _, _ in seen) == 16
        rows, weights = (np.concatenate(each) for each in list(zip(*seen, strict=True))[:2])
        return rows, weights

    monkeypatch.setattr(module, "_ROWS", M - 1)
    rows, weights = drawn()
    p = 0.3 / M + 0.7 * s / s.sum() if some else np.full(M, 1 / M)
    assert len(rows) == M - 1
    np.testing.assert_allclose(weights, 1 / (len(rows) * p[rows]), rtol=1e-12)
    assert np.bincount(rows, minlength=M).std() > 0
    monkeypatch.setattr(module, "_ROWS", M)
    rows, weights = drawn()
    np.testing.assert_array_equal(rows, np.arange(M))  # all are read where they are few
    np.testing.assert_array_equal(weights, np.ones(M))


@pytest.mark.parametrize("name", CASES)
def test_a_basis_from_narrower_numbers_is_made_orthonormal(name: str):
    """To the square of what it lacks, and stays where it is."""
    basis = operator(name).eigenbasis().basis
    rounded = basis.mapped(lambda a: a.astype(np.float32).astype(np.float64))
    again = rounded.orthonormal()
    before, Q = (b.rotate_back(np.eye(b.size)) for b in (rounded, again))
    eye = np.eye(basis.size)
    np.testing.assert_allclose(Q.T @ Q, eye, rtol=0, atol=2e-13)
    np.testing.assert_allclose(Q, before, rtol=0, atol=5e-7)
    if basis.size:
        assert abs(before.T @ before - eye).max() > 1e-8
    for layer, was in zip(again.layers, basis.layers, strict=True):
        assert (layer.U is None) == (was.U is None)


def test_thresholds_of_a_histogram():
    """Of 2, 4, 6 and 8 entries, the squares of the last, the last two and so on 1, 9, 25, 125."""
    found = Energies(
        np.array([8.0, 4.0, 2.0, 1.0]), np.array([2.0, 4, 6, 8]), np.array([100.0, 16, 8, 1])
    )
    tolerances = (0.9, 1.0, 2.9, 3.0, 5.0, 11.1, 11.2)
    assert [found.threshold(t) for t in tolerances] == [0.0, 1.0, 1.0, 2.0, 4.0, 4.0, 8.0]
    assert [found.above(tau) for tau in (0.0, 1.0, 2.0, 3.9, 4.0, 8.0)] == [10, 6, 3, 3, 1, 0]


def test_scaled_and_in_single_precision():
    matrix, R = rotated_dense("classifier")
    again = matrix.scaled(4.0).rows(np.arange(5))
    np.testing.assert_allclose(again, 4 * R[:5], rtol=0, atol=1e-13)
    single = matrix.astype(np.float32)
    assert single.rows(np.arange(5)).dtype == np.float32
    np.testing.assert_allclose(single.rows(np.arange(5)), R[:5], rtol=0, atol=1e-6 * R.max())

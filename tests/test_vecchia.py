"""The sparse inverse factor in a network's eigenbasis, its parts against dense matrices."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from eigenbasis_cases import operator
from saved_files import rewritten
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.factor import vecchia_entries, vecchia_pattern
from gpu_hodlr.factor.solver import IndefiniteError
from gpu_hodlr.factor.vecchia import vecchia
from gpu_hodlr.factor.vecchia_entries import Entries
from gpu_hodlr.factor.vecchia_pattern import Pattern, index_type, neighbours
from gpu_hodlr.structures import dealt_rows

module = importlib.import_module("gpu_hodlr.factor.vecchia")
C = np.array([5.0, -0.4, 2.0])  # of a low-rank part
PARTS = pytest.mark.parametrize(
    "left", [(), (1,), (0, 1, 2)], ids=["sparse", "with low rank", "all of it"]
)


@cache
def form_of_few_entries() -> Any:
    return gh.compress(operator("classifier"), "kfe", rtol=1e-3, max_rank=1).structure


def sparse_part(
    left: tuple[int, ...] = (), scale: float = 1.0
) -> tuple[Any, np.ndarray, float]:
    """A form of few entries and low rank, D + S + S^T + F G^T, dense, and a damping it bears.

    Args:
        left: columns of the low-rank part that F G^T is.
        scale: of S.
    """
    form = form_of_few_entries()
    form = replace(form, values=scale * form.values)
    lengths, columns, values = form.rows.gathered()
    assert len(form.C) == 0
    M = form.basis.size
    P = np.linalg.qr(np.random.default_rng(0).standard_normal((M, len(C))))[0]
    S = np.zeros((M, M))
    S[np.repeat(np.arange(M), lengths), columns] = values
    some = list(left)
    R = np.diag(form.D) + S + S.T + (P[:, some] * C[some]) @ P[:, some].T
    damping = 1e-3 * float(R.max()) - min(float(np.linalg.eigvalsh(R)[0]), 0.0)
    return replace(form, P=P, C=C), R, damping


# --- entries -------------------------------------------------------------------------------------


@PARTS
@pytest.mark.parametrize("entries", ["few", "none"])
def test_blocks_are_principal_submatrices(left: tuple[int, ...], entries: str):
    form, R, damping = sparse_part(left)
    M = len(R)
    if entries == "none":
        S, none = form.rows, slice(0)
        R = R - sparse_part()[1] + np.diag(form.D)
        form = replace(
            form, starts=0 * S.starts, columns=S.columns[none], values=S.values[none]
        )  # fmt: skip
    got = Entries(form, damping, np.array(left, int))
    A = R + damping * np.eye(M)
    np.testing.assert_allclose(got.diagonal, np.diagonal(A), rtol=1e-14)
    np.testing.assert_array_equal(got.order, np.argsort(-got.diagonal))
    np.testing.assert_array_equal(got.place[got.order], np.arange(M))
    index = np.random.default_rng(0).permuted(np.tile(np.arange(M), (7, 1)), axis=1)[:, :9]
    index[2, 4:] = index[3] = -1
    for block, rows in zip(got.blocks(index), index, strict=True):
        real = rows >= 0
        want = np.eye(9)
        want[np.ix_(real, real)] = A[np.ix_(rows[real], rows[real])]
        np.testing.assert_allclose(block, want, rtol=0, atol=1e-15 * A.max() if left else 0)


def strengths(A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order of the rows, their places in it, and correlations."""
    order = np.argsort(-np.diagonal(A))
    scale = np.diagonal(A) ** -0.5
    return order, np.argsort(order), abs(A) * scale * scale[:, None]


def strongest(A: np.ndarray, row: int, most: int) -> list[int]:
    """Rows of larger diagonal that are most correlated with one, the strongest first."""
    order, place, strength = strengths(A)
    earlier = order[: place[row]]
    earlier = earlier[strength[row, earlier] > 3e-3]
    found: list[int] = earlier[np.argsort(-strength[row, earlier])][:most].tolist()
    return found


@PARTS
@pytest.mark.parametrize("step", [1, 3], ids=["all rows", "some rows"])
@pytest.mark.parametrize("head", [0, 12])
def test_neighbours_are_the_most_correlated_of_larger_diagonal(
    left: tuple[int, ...], head: int, step: int, monkeypatch: pytest.MonkeyPatch
):
    form, R, damping = sparse_part(left)
    monkeypatch.setattr(vecchia_entries, "_TOGETHER", 5 * len(R) - 1)  # as of a large matrix
    entries = Entries(form, damping, np.array(left, int))
    A = R + damping * np.eye(len(R))
    order = strengths(A)[0]
    places = np.arange(head, len(R), step)
    batches = list(entries.correlations(places))
    assert len(batches) > 3
    later, earlier = neighbours(batches, 4)
    assert (np.diff(later) >= 0).all()
    assert np.isin(later, places).all()
    for place in places:
        found = order[earlier[later == place]].tolist()
        assert found == strongest(A, order[place], 4)
    assert len(later) > 2.5 * len(places)


@PARTS
def test_rows_at_no_places_have_no_neighbours(left: tuple[int, ...]):
    form, _, damping = sparse_part(left)
    entries = Entries(form, damping, np.array(left, int))
    later, earlier = neighbours(entries.correlations(np.arange(0)), 4)
    assert len(later) == len(earlier) == 0


# --- the inverse of blocks -----------------------------------------------------------------------


def test_a_block_that_is_not_positive_definite_is_damped_off_its_diagonal():
    """The largest share of 1, 3/4, 1/2, 1/4 and 0 of it that makes it so."""
    off = np.array([3.9, 0.9, 50.0, 1.2, 1.9])
    d = np.array([2.0, 3.0])
    blocks = np.stack([np.array([[1.0, x], [x, 1.0]]) for x in off]) * np.outer(d, d)
    R: Any = SimpleNamespace(blocks=lambda index: blocks[index[:, 0]], diagonal=d)
    index = np.arange(5)[:, None].repeat(2, axis=1)
    lower, rows = module._cholesky(R, index), module._last_rows(R, index)
    for x, share, L, last in zip(off, (0.25, 1.0, 0.0, 0.75, 0.5), lower, rows, strict=True):
        scaled = np.array([[1.0, share * x], [share * x, 1.0]]) * np.outer(d, d)
        np.testing.assert_allclose(L @ L.T, scaled, rtol=1e-12)
        assert L[0, 1] == 0
        np.testing.assert_allclose(last, np.linalg.inv(np.linalg.cholesky(scaled))[1], rtol=1e-12)


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_last_rows_of_many_blocks(at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Some at a time."""
    monkeypatch.setattr(module.batched, "columns_at_once", lambda like, size: at_once)
    form, R, damping = sparse_part()
    index = np.random.default_rng(0).permuted(np.tile(np.arange(len(R)), (9, 1)), axis=1)[:, :6]
    got = module._last_rows(Entries(form, damping, np.arange(0)), index)
    A = R + damping * np.eye(len(R))
    for row, some in zip(got, index, strict=True):
        want = np.linalg.inv(np.linalg.cholesky(A[np.ix_(some, some)]))[-1]
        np.testing.assert_allclose(row, want, rtol=1e-9, atol=1e-12)


def test_rows_of_like_lengths_are_taken_together():
    """A row is padded to less than twice its neighbours."""
    lengths = np.array([5, 0, 1, 2, 3, 4, 8, 9, 0, 1, 31, 32, 33])
    seen = {width: rows.tolist() for width, rows in module._by_width(lengths)}
    assert seen == {
        0: [1, 8], 1: [2, 9], 2: [3], 4: [4, 5], 8: [0, 6], 16: [7], 32: [10, 11], 64: [12]
    }  # fmt: skip


# --- the inverse factor --------------------------------------------------------------------------


def damped_cholesky(A: np.ndarray) -> np.ndarray:
    """Of A, or of what is left with less off the diagonal."""
    for share in (1.0, 0.75, 0.5, 0.25):
        try:
            return np.linalg.cholesky(share * A + (1 - share) * np.diag(np.diagonal(A)))
        except np.linalg.LinAlgError:
            continue
    return np.diag(np.diagonal(A) ** 0.5)


def dense_inverse_factor(A: np.ndarray, head: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """L, row by row, and its pattern."""
    order = strengths(A)[0]
    L, pattern = np.zeros_like(A), np.zeros(A.shape, bool)
    top = order[:head]
    L[np.ix_(top, top)] = np.linalg.inv(damped_cholesky(A[np.ix_(top, top)]))
    pattern[np.ix_(top, top)] = np.tril(np.ones((len(top), len(top)), bool))
    for row in order[head:]:
        some = [*strongest(A, row, most), row]
        L[row, some] = np.linalg.inv(damped_cholesky(A[np.ix_(some, some)]))[-1]
        pattern[row, some] = True
    return L, pattern


@pytest.mark.parametrize("scale", [1.0, 5.0], ids=["definite", "indefinite"])
@pytest.mark.parametrize("left", [(), (1,)], ids=["sparse", "with low rank"])
@pytest.mark.parametrize(("head", "most"), [(0, 3), (12, 4), (60, 0), (300, 5)])
@pytest.mark.parametrize("part", [1 << 20, 30], ids=["one part", "parts"])
def test_every_row_is_that_of_its_block(
    left: tuple[int, ...], scale: float, head: int, most: int, part: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Also where blocks are damped; what low-rank part there is is negative, and in them."""
    monkeypatch.setattr(dealt_rows, "A_PART", part)
    form, R, damping = sparse_part(left, scale)
    form = replace(form, P=form.P[:, list(left)], C=form.C[list(left)])
    if scale > 1:
        damping = 1e-2 * damping - min(float(np.diagonal(R).min()), 0.0)
    A = R + damping * np.eye(len(R))
    assert (np.linalg.eigvalsh(A)[0] > 0) == (scale == 1)
    factor = vecchia(form, damping, Pattern(0, most, head))
    want, pattern = dense_inverse_factor(A, head, most)
    got = factor.half(np.eye(len(A)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * abs(want).max())
    np.testing.assert_allclose(factor.half_transposed(np.eye(len(A))), got.T, rtol=0, atol=1e-12)
    assert factor.logdet == pytest.approx(-2 * np.log(np.diagonal(want)).sum(), rel=1e-9)
    assert factor.head == min(head, len(A))
    lengths, columns, _ = factor.L.gathered()
    row = np.repeat(np.arange(len(A)), lengths)
    assert np.count_nonzero(pattern) == len(columns) == factor.L.entries()
    assert pattern[row, columns].all()
    assert (len(factor.L.cuts) > 2) == (part == 30)


@pytest.mark.parametrize("columns", [(), (0,), (0, 1, 2)])
def test_the_whole_head_is_the_inverse_and_its_determinant(columns: tuple[int, ...]):
    """With a low-rank part too, which takes half the square root of its own, and what is < 0."""
    form, R, damping = sparse_part()
    some, M = list(columns), len(R)
    P, c = form.P[:, some], form.C[some]
    damping += 0.5
    factor = vecchia(replace(form, P=P, C=c), damping, Pattern(0, 0, M))
    A = R + damping * np.eye(M) + (P * c) @ P.T
    N = factor.half(np.eye(M))
    np.testing.assert_allclose(N @ A @ N.T, np.eye(M), rtol=0, atol=1e-9)
    np.testing.assert_allclose(factor.apply(A), np.eye(M), rtol=0, atol=1e-8)
    np.testing.assert_allclose(factor.half_transposed(np.eye(M)), N.T, rtol=0, atol=1e-12)
    assert factor.logdet == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-10)
    kept = np.count_nonzero(c > 0)
    assert factor.X.shape == (M, kept)
    np.testing.assert_allclose(factor.X.T @ factor.X, np.eye(kept), rtol=0, atol=1e-9)
    assert factor.L.entries() == M * (M + 1) // 2
    assert factor.num_stored() == M * (M + 1) // 2 + M * kept + (M * (M + 1) + 4 * M) // 8


def test_a_diagonal_that_is_not_positive_is_refused():
    form, _, _ = sparse_part()
    lowest = float(form.D.min())
    form = replace(form, P=form.P[:, :0], C=form.C[:0], D=form.D - 2 * lowest)
    with pytest.raises(IndefiniteError):
        vecchia(form, lowest, Pattern(0, 0, 0))
    vecchia(form, 1.01 * lowest, Pattern(0, 0, 0))


def test_of_equal_diagonals_and_correlations_every_row_has_its_neighbours():
    """As many as there are, the first of equal ones."""
    form, _, _ = sparse_part()
    M = form.basis.size
    every = np.arange(M)
    form = replace(
        form, P=form.P[:, :0], C=form.C[:0], D=np.ones(M), starts=every * (every + 1) // 2
    )  # fmt: skip

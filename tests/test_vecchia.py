"""The sparse inverse factor in a network's eigenbasis, its parts against dense matrices."""

from __future__ import annotations

import copy
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
from gpu_hodlr.devices import to_host
from gpu_hodlr.distributed import Ownership
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.factor import vecchia_entries, vecchia_pattern
from gpu_hodlr.factor.solver import IndefiniteError
from gpu_hodlr.factor.vecchia import vecchia
from gpu_hodlr.factor.vecchia_entries import Entries
from gpu_hodlr.factor.vecchia_pattern import Pattern, index_type, neighbours
from gpu_hodlr.structures import dealt_rows
from gpu_hodlr.tree import rows_tree

module = importlib.import_module("gpu_hodlr.factor.vecchia")
C = np.array([5.0, -0.4, 2.0])  # of a low-rank part
PARTS = pytest.mark.parametrize(
    "left", [(), (1,), (0, 1, 2)], ids=["sparse", "with low rank", "all of it"]
)


@cache
def form_of_few_entries() -> Any:
    return gh.compress(operator("classifier"), "kfe", rtol=1e-3, max_rank=1).structure


def sparse_part(left: tuple[int, ...] = (), scale: float = 1.0) -> tuple[Any, np.ndarray, float]:
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
    assert len(batches) == (-(-len(places) // 4) if left else -(-form.entries // (5 * len(R) - 1)))
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


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_rows_are_cut_into_parts_of_about_as_many_entries(
    parts: int, monkeypatch: pytest.MonkeyPatch
):
    form, _, damping = sparse_part()
    form, pattern = replace(form, P=form.P[:, :0], C=form.C[:0]), Pattern(0, 4, 12)
    entries = vecchia(form, damping, pattern).L.entries()
    monkeypatch.setattr(dealt_rows, "A_PART", entries // parts)
    L = vecchia(form, damping, pattern).L
    taken = np.diff(to_host(L.starts)[L.cuts])
    assert len(taken) == parts
    assert max(abs(taken - entries / parts)) <= 12


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
    assert ((factor.w > 0) & (factor.w < 1)).all()
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


@pytest.mark.parametrize("left", [(), (0, 1, 2)], ids=["sparse", "with low rank"])
@pytest.mark.parametrize("part", [1 << 20, 200], ids=["one part", "parts"])
def test_ranks_have_the_same_rows(
    left: tuple[int, ...], part: int, monkeypatch: pytest.MonkeyPatch
):
    """To the bit, also where some make rows of the head alone, or none."""
    monkeypatch.setattr(dealt_rows, "A_PART", part)
    form, R, damping = sparse_part()
    M = len(R)
    form = replace(form, P=form.P[:, list(left)], C=-abs(form.C[list(left)]))
    patterns = Pattern(0, 4, 12), Pattern(0, 3, M - 2), Pattern(0, 0, M)

    def job(comm: Any) -> Any:
        own = form if comm is None else of_ranks(form, comm)
        made = [vecchia(own, damping + 7.0, pattern) for pattern in patterns]
        said = [(factor.logdet, factor.head, factor.num_stored()) for factor in made]
        return said, [factor.L.gathered() for factor in made], [f.L.entries() for f in made]

    said, rows, entries = job(None)
    for size in (2, 5):
        for result in on_threads(size, job):
            assert isinstance(result, tuple), result
            assert result[0] == said
            assert result[2] == entries
            for mine, one in zip(result[1], rows, strict=True):
                for a, b in zip(mine, one, strict=True):
                    np.testing.assert_array_equal(a, b)


def of_ranks(form: Any, comm: Any) -> Any:
    """A form that every rank has all of."""
    tree = rows_tree(form.n, comm.size)
    return replace(form, owners=Ownership(comm, tree.leaves))


def test_a_head_of_all_rows_beside_a_low_rank_part_without_room():
    """No row has neighbours, nor any entry of the rest that is of low rank."""
    K = gh.compress(operator("larger classifier"), "kfe", rtol=1e-4, max_rank=200)
    damping = 0.1 * K.trace() / K.shape[0]
    F = K.factorize(damping, storage_fraction=0.0, head=K.structure.basis.size)
    assert len(K.structure.C) > 5
    b = np.ones(K.shape[0])
    F.solve(b)
    assert F.info.iterations <= 2
    np.testing.assert_allclose(K @ F.solve(b) + damping * F.solve(b), b, rtol=0, atol=1e-9)


# --- how large it is -----------------------------------------------------------------------------


def test_which_columns_of_a_low_rank_part_are_kept():
    """Those of the largest positive numbers that a quarter of the storage has room for."""
    numbers = np.array([1.0, -3.0, 5.0, 0.0, 2.0])
    for room, kept in ((0, []), (1, [2]), (2, [2, 4]), (3, [0, 2, 4]), (5, [0, 2, 4])):
        for more in (0, 39):
            found = Pattern(40 * room + more, whole=False).kept(numbers, 10)
            assert np.nonzero(found)[0].tolist() == kept
    assert np.nonzero(Pattern(0).kept(numbers, 10))[0].tolist() == [0, 2, 4]
    assert Pattern(0, whole=False).kept(numbers[:0], 0).shape == (0,)


@pytest.mark.parametrize("M", [100, 1 << 16, (1 << 16) + 1])
@pytest.mark.parametrize("rank", [0, 3])
def test_entries_are_as_many_as_fit(M: int, rank: int):
    """With the low-rank part, the indices and where rows start."""
    index = np.dtype(index_type(M))
    assert np.iinfo(index).max >= M - 1
    assert index.itemsize == (2 if M <= 1 << 16 else 4)
    for numbers in (5 * M, 20 * M + 3):
        entries = Pattern(numbers).entries(M, rank)
        taken = [rank * M + e + (index.itemsize * e + 4 * M) / 8 for e in (entries, entries + 1)]
        assert taken[0] <= numbers < taken[1]
    assert Pattern(M // 2 - 1).entries(M, rank) == 0


def test_the_head_has_nearly_half_of_the_entries(monkeypatch: pytest.MonkeyPatch):
    for entries in (0, 10, 1000, 12345):
        head = Pattern(0).head_of(400, entries)
        assert head**2 / 2 <= 0.45 * entries < (head + 1) ** 2 / 2
    assert Pattern(0).head_of(30, 1000) == 30
    assert Pattern(0, head=7).head_of(30, 10**6) == 7
    assert Pattern(0, head=40).head_of(30, 0) == 30
    monkeypatch.setattr(vecchia_pattern, "_WORK", 1000.0)
    head = Pattern(0).head_of(400, 10**6)
    assert 2 / 3 * head**3 <= 1000 < 2 / 3 * (head + 1) ** 3


@pytest.mark.parametrize("work", [1e10, 3000.0])
def test_neighbours_are_as_many_as_fit(work: float, monkeypatch: pytest.MonkeyPatch):
    """Entries or operations: a third of the cube of what a block has."""
    monkeypatch.setattr(vecchia_pattern, "_WORK", work)
    counts = np.random.default_rng(0).integers(0, 30, 50)
    for entries in (0, 49, 60, 400, 10**6):
        most = Pattern(0).neighbours_of(counts, entries)
        fits = []
        for m in range(1, counts.max() + 1):
            blocks = np.minimum(counts, m) + 1
            fits.append(blocks.sum() <= entries and ((blocks**3 - 1) / 3).sum() <= work)
        assert most == sum(fits)
        assert fits == sorted(fits, reverse=True)
    assert Pattern(0, neighbours=9).neighbours_of(counts, 0) == 9
    assert Pattern(0).neighbours_of(counts[:0], 10) == 0


@pytest.mark.parametrize("name", ["autoencoder", "classifier"])
def test_what_the_inverse_takes(name: str):
    """What it has room for, and one neighbour more does not fit."""
    K = gh.compress(operator(name), "kfe", rtol=1e-4)
    N, M, damping = K.shape[0], K.structure.basis.size, 0.1 * K.trace() / K.shape[0]
    F = K.factorize(damping, storage_fraction=0.1)
    inverse = F._vecchia
    L = inverse.L
    entries = Pattern(int(0.1 * N**2)).entries(M, len(inverse.w))
    assert inverse.head**2 / 2 <= 0.45 * entries < (inverse.head + 1) ** 2 / 2
    behind = np.argsort(-K.structure.D)[inverse.head :]
    most = int(np.diff(L.starts)[behind].max()) - 1
    assert 0 < most < inverse.head
    given = {"head": inverse.head, "neighbours": most + 1}
    more = K.factorize(damping, storage_fraction=0.1, **given)
    assert L.entries() <= entries < more._vecchia.L.entries()
    arrays = L.starts, L.columns, L.values, inverse.X, inverse.w
    assert F.nbytes == inverse.nbytes == sum(a.nbytes for a in arrays)
    bytes_of_indices = L.columns.nbytes + 4 * M
    stored = L.values.size + inverse.X.size + bytes_of_indices // 8
    assert F.num_stored == stored <= 0.1 * N**2
    assert f"{100 * F.num_stored / N**2:.3g} % stored, head {inverse.head}" in repr(F)


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a factor with a low-rank part, of 12 rows in the head and 4 neighbours."""
    form, _, damping = sparse_part()
    path = tmp_path_factory.mktemp("factor") / "F.npz"
    K = gh.compress(operator("classifier"), "kfe", rtol=1e-3)
    matrix = copy.copy(K)
    matrix.structure = replace(form, P=form.P[:, ::2], C=form.C[::2])
    matrix.factorize(damping, neighbours=4, head=12).save(path)
    return path.read_bytes()


def changed(a: np.ndarray, index: Any, value: Any) -> np.ndarray:
    """Of a type that the value has room in."""
    a = a.astype(np.int64)
    a[index] = value
    return a


M = 205
FIT = "do not fit 205 coordinates"
BROKEN: list[tuple[str, Callable[[np.ndarray], np.ndarray], str]] = [
    ("values", lambda a: a.astype(np.float32), "not of type float64"),
    ("X", lambda a: a.astype(np.float32), "not of type float64"),
    ("w", lambda a: a.astype(np.float32), "not of type float64"),
    ("X", lambda a: a[:-1], FIT),
    ("X", lambda a: a[:, 0], FIT),
    ("w", lambda a: a[:-1], FIT),
    ("w", lambda a: a[:, None], FIT),
    ("lengths", lambda a: a[:-1], FIT),
    ("lengths", lambda a: changed(a, 3, a[3] + 1), FIT),
    ("lengths", lambda a: changed(changed(a, 3, -1), 4, a[3] + a[4] + 1), FIT),
    ("lengths", lambda a: changed(a, slice(5), [1 << 62] * 4 + [a[:5].sum()]), FIT),
    ("lengths", lambda a: a.astype(float), "no lists of integers"),
    ("values", lambda a: a[:-1], FIT),
    ("columns", lambda a: a[:-1], "no column"),
    ("columns", lambda a: changed(a, 3, -1), "outside"),
    ("columns", lambda a: changed(a, 3, M), "outside"),
    ("columns", lambda a: a.astype(float), "no lists of integers"),
    ("cuts", lambda a: np.array([1, M]), "parts of the rows"),
    ("cuts", lambda a: np.array([0, M - 1]), "parts of the rows"),
    ("cuts", lambda a: np.array([0, 9, 8, M]), "parts of the rows"),
    ("cuts", lambda a: np.array([0, 9, 8, M], np.uint16), "parts of the rows"),
    ("cuts", lambda a: a[:1], "parts of the rows"),
    ("cuts", lambda a: a[None], "no lists of integers"),
    ("cuts", lambda a: a.astype(float), "no lists of integers"),
    ("values", lambda a: np.where(np.arange(len(a)) == 3, np.nan, a), "NaN"),
]


@pytest.mark.parametrize(("name", "change", "said"), BROKEN)
def test_arrays_that_do_not_fit_together_are_refused(
    name: str, change: Callable[[np.ndarray], np.ndarray], said: str, saved: bytes, tmp_path: Path
):
    path = tmp_path / "F.npz"
    path.write_bytes(saved)
    gh.load(path)

    def broken(arrays: dict[str, Any]) -> None:
        arrays[f"inverse.{name}"] = change(arrays[f"inverse.{name}"])

    rewritten(path, arrays=broken)
    with pytest.raises(FileFormatError, match=said):
        gh.load(path)


@pytest.mark.parametrize(
    ("name", "value"), [("logdet", np.inf), ("logdet", "much"), ("head", -1), ("head", M + 1)]
)
def test_numbers_that_cannot_be_are_refused(name: str, value: Any, saved: bytes, tmp_path: Path):
    path = tmp_path / "F.npz"
    path.write_bytes(saved)

    def broken(header: dict[str, Any]) -> None:
        assert name in header
        header[name] = value

    rewritten(path, header=broken)
    with pytest.raises(FileFormatError):
        gh.load(path)

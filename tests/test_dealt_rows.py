"""Sparse rows dealt out to ranks, against dense matrices."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from thread_ranks import on_threads

from gpu_hodlr.devices import to_host
from gpu_hodlr.distributed import ALONE, shares
from gpu_hodlr.structures import dealt_rows
from gpu_hodlr.structures.dealt_rows import (
    DealtRows,
    check_rows,
    cuts_by_work,
    gathered,
    number_of_parts,
    own_rows,
)

M = 23
PARTS = pytest.mark.parametrize(
    "cuts", [[0, M], [0, 5, 6, 14, M], [0, 4, 4, M], [0, 0, M]],
    ids=["one part", "four", "an empty one", "an empty first"],
)  # fmt: skip


def matrix() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S, and lengths, columns and values of its rows; some rows are empty."""
    rng = np.random.default_rng(0)
    S = rng.standard_normal((M, M)) * (rng.random((M, M)) < 0.3)
    S[3:6] = 0
    row, column = np.nonzero(S)
    return S, np.bincount(row, minlength=M), column.astype(np.int32), S[row, column]


def dealt(cuts: list[int], comm: Any, xp: ModuleType = np, dtype: Any = np.float64) -> DealtRows:
    _, lengths, columns, values = matrix()
    arrays = (xp.asarray(a) for a in (lengths, columns, values.astype(dtype)))
    return DealtRows.part_of(*arrays, np.array(cuts), comm)


@PARTS
def test_products_on_every_library(cuts: list[int], xp: ModuleType, dtype: Any):
    S, _, columns, _ = matrix()
    rows = dealt(cuts, ALONE.comm, xp, dtype)
    c = np.random.default_rng(1).standard_normal((M, 3)).astype(dtype)
    for product, dense in (
        (rows.matmul, S), (rows.transposed_matmul, S.T), (rows.symmetric_matmul, S + S.T)
    ):  # fmt: skip
        got = product(xp.asarray(c))
        assert isinstance(got, xp.ndarray)
        assert got.dtype == dtype
        np.testing.assert_allclose(to_host(got), dense @ c, atol=50 * np.finfo(dtype).eps)
    assert (rows.size, rows.entries(), rows.rows) == (M, len(columns), slice(0, M))
    assert rows.whole == (len(cuts) == 2)
    for mine, given in zip(rows.gathered(), matrix()[1:], strict=True):
        np.testing.assert_array_equal(to_host(mine), given.astype(mine.dtype))


@PARTS
@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_have_the_same_bits(cuts: list[int], size: int):
    """No rank has all rows, but where they are one part."""
    columns = matrix()[2]
    c = np.random.default_rng(1).standard_normal((M, 3))

    def job(comm: Any) -> Any:
        rows = dealt(cuts, comm)
        products = rows.matmul(c), rows.transposed_matmul(c), rows.symmetric_matmul(c)
        return *products, *rows.gathered(), rows.entries(), rows.rows, len(rows.starts)

    alone = job(ALONE.comm)
    results = on_threads(size, job)
    for result in results:
        assert isinstance(result, tuple), result
        for mine, one in zip(result[:6], alone[:6], strict=True):
            np.testing.assert_array_equal(mine, one)
        assert result[6] == len(columns)
    owned = [result[7] for result in results]
    assert [rows.stop - rows.start + 1 for rows in owned] == [result[8] for result in results]
    if len(cuts) == 2:
        assert owned == [slice(0, M)] * size
        return
    assert [row for rows in owned for row in range(M)[rows]] == list(range(M))
    assert {rows.start for rows in owned} | {rows.stop for rows in owned} <= set(cuts)
    first = np.array([part.start for part in shares(len(cuts) - 1, size)])
    assert [rows.start for rows in owned] == np.array(cuts)[first].tolist()


@pytest.mark.parametrize("size", [1, 3])
def test_rows_of_ranks_are_brought_together(size: int):
    """Of any number, also none."""
    _, lengths, columns, values = matrix()
    edges = [0, 0, 9, M] if size == 3 else [0, M]
    ends = np.concatenate([[0], np.cumsum(lengths)])

    def job(comm: Any) -> Any:
        first, last = edges[comm.rank : comm.rank + 2]
        here = slice(ends[first], ends[last])
        return gathered(comm, lengths[first:last], columns[here], values[here])

    for result in on_threads(size, job) if size > 1 else [job(ALONE.comm)]:
        for mine, given in zip(result, (lengths, columns, values), strict=True):
            np.testing.assert_array_equal(mine, given)


def test_parts_have_about_equal_shares_of_the_work():
    each = np.random.default_rng(0).integers(1, 9, 200)
    work = np.cumsum(each)
    for parts in (1, 2, 7, 30):
        cuts = cuts_by_work(work, parts)
        assert len(cuts) == parts + 1
        assert (cuts[0], cuts[-1]) == (0, 200)
        taken = [each[a:b].sum() for a, b in pairwise(cuts)]
        assert max(abs(one - work[-1] / parts) for one in taken) <= each.max()
    assert cuts_by_work(work[:0], 3) == [0, 0, 0, 0]
    assert cuts_by_work(np.array([4.0, 8.0, 12.0]), 3) == [0, 1, 2, 3]


def test_so_many_parts_as_are_worth_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dealt_rows, "A_PART", 10)
    said = [number_of_parts(entries, 50) for entries in (0, 19, 20, 499, 509, 10**9)]
    assert said == [1, 1, 2, 49, 50, 50]
    assert number_of_parts(10**9, 10**9) == 64


def test_rows_of_a_file_may_be_none():
    none = np.zeros(0, np.int64)
    check_rows(none, none, np.zeros(0), np.array([0, 0]), 0)
    _, lengths, columns, values = matrix()
    for kind in (np.int32, np.uint16, np.uint64):
        cuts = np.array([0, 5, 5, M])
        check_rows(*(a.astype(kind) for a in (lengths, columns)), values, cuts.astype(kind), M)
    assert own_rows(np.array([0, 5, 5, M]), ALONE.comm) == slice(0, M)


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("lengths", 0, -1), ("lengths", 0, 10), ("lengths", 0, M * M), ("columns", 7, -1),
        ("columns", 7, M), ("cuts", 0, 1), ("cuts", 1, 6), ("cuts", 3, M - 1),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_are_refused(name: str, index: int, value: int):
    """One number is another; what the last one may be is not refused."""
    _, lengths, columns, values = matrix()
    columns[7] = M - 1
    given = {"lengths": lengths, "columns": columns, "cuts": np.array([0, 5, 5, M])}
    check_rows(**given, values=values, M=M)
    given[name][index] = value
    with pytest.raises(ValueError, match=r"the (rows|parts)"):
        check_rows(**given, values=values, M=M)

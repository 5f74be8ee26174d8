"""Factors on disk, saved and loaded by several ranks."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_factor_storage import CLASSES, ROWS, B, compressed, results, same_bits
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.distributed import OneRank
from gpu_hodlr.errors import ArgumentError


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind: in threads of Python 3.11 a near field cannot be looked for."""
    folder = tmp_path_factory.mktemp("matrices")
    for kind in CLASSES:
        compressed(kind).save(folder / kind)
    return folder


@pytest.mark.parametrize("rows", [False, True], ids=["one damping", "of every row"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_same_ranks_get_the_same_bits(
    kind: str, size: int, rows: bool, matrices: Path, tmp_path: Path
):
    def job(comm: Any) -> bool:
        K = gh.load(matrices / kind, comm=comm)
        F = K.factorize(ROWS if rows else 0.3)
        F.save(tmp_path / "F")
        G = gh.load(tmp_path / "F", comm=comm)
        here = np.array_equal(G.damping, ROWS[K.rows]) if rows else G.damping == 0.3
        return here and type(G) is CLASSES[kind] and same_bits(results(F), results(G))

    assert on_threads(size, job) == [True] * size
    assert len(os.listdir(tmp_path)) == 1 + size


@pytest.mark.parametrize("rows", [False, True], ids=["one damping", "of every row"])
@pytest.mark.parametrize("kind", CLASSES)
def test_any_other_number_of_ranks(kind: str, rows: bool, matrices: Path, tmp_path: Path):
    """Saved by three, and by one; loaded by one to four."""
    damping = ROWS if rows else 0.3

    def save(comm: Any) -> None:
        gh.load(matrices / kind, comm=comm).factorize(damping).save(tmp_path / "three")

    assert on_threads(3, save) == [None] * 3
    F = compressed(kind).factorize(damping)
    F.save(tmp_path / "one")
    solution, expected = F.solve(B), None if kind == "fmm" else F.logdet()

    def load(comm: Any, name: str) -> tuple[Any, Any]:
        G = gh.load(tmp_path / name, comm=comm)
        return G.solve(B), None if kind == "fmm" else G.logdet()

    for name in ("three", "one"):
        for size in (1, 2, 3, 4):
            for x, logdet in on_threads(size, lambda comm, name=name: load(comm, name)):
                np.testing.assert_allclose(x, solution, rtol=0, atol=1e-8)
                assert logdet == (None if expected is None else pytest.approx(expected, abs=1e-9))


def test_saved_by_ranks_the_whole_has_the_bits_of_any(tmp_path: Path):
    """An array is put together from its parts, and saved again by one rank it is the same file."""

    def save(comm: Any) -> None:
        gh.load(tmp_path / "one", comm=comm).save(tmp_path / "two")

    for kind in CLASSES:
        F = compressed(kind).factorize(ROWS)
        F.save(tmp_path / "one")
        assert on_threads(2, save) == [None] * 2
        assert same_bits(results(gh.load(tmp_path / "two", comm=OneRank())), results(F))


def test_different_paths_are_refused(tmp_path: Path):
    def job(comm: Any) -> None:
        compressed("hss", comm=comm).factorize(0.1).save(tmp_path / str(comm.rank))

    assert all(isinstance(e, ArgumentError) for e in on_threads(2, job))
    assert os.listdir(tmp_path) == []

"""Matrices spread over ranks on disk: whatever number of ranks, and whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from saved_files import (
    Change,
    contents,
    fail,
    flip,
    on_named_threads,
    parts,
    rewritten,
    snapshot,
    truncate,
)
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.compression.load import load_structure
from gpu_hodlr.distributed import OneRank
from gpu_hodlr.errors import ArgumentError, FileFormatError
from gpu_hodlr.files.storage import FORMAT_VERSION, save_structure

N = 300


@pytest.fixture(scope="module", name="K")
def compressed() -> gh.HSSMatrix:
    return gh.compress(toeplitz(N), rtol=1e-6, leaf_size=20, seed=3)


def spread(source: Path, target: Path, size: int) -> list[Any]:
    """Save a saved matrix again, as so many ranks do; what they raise."""

    def job(comm: Any) -> None:
        save_structure(target, *load_structure(source, comm))

    return on_threads(size, job)


@pytest.fixture
def serial(K: gh.HSSMatrix, tmp_path: Path) -> Path:
    path = tmp_path / "serial"
    K.save(path)
    return path


@pytest.fixture
def index(serial: Path, tmp_path: Path) -> Path:
    """Of a matrix that three ranks have saved, in a folder of its own."""
    folder = tmp_path / "spread"
    folder.mkdir()
    assert spread(serial, folder / "matrix.npz", 3) == [None] * 3
    return folder / "matrix.npz"


def same(K: gh.HSSMatrix, L: gh.HSSMatrix) -> bool:
    s, t = K.structure, L.structure
    pairs = zip([*s.arrays(), *s.index_arrays()], [*t.arrays(), *t.index_arrays()], strict=True)
    equal = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
    return equal and K.report == L.report and K.dtype == L.dtype and K.ranks == L.ranks


@pytest.mark.parametrize("size", [2, 3, 4, 7, 16])
def test_spread_and_whole_again(size: int, K: gh.HSSMatrix, serial: Path, tmp_path: Path):
    assert spread(serial, tmp_path / "m", size) == [None] * size
    assert len(os.listdir(tmp_path)) == 2 + size
    assert same(gh.load(tmp_path / "m"), K)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16])
def test_any_other_number_of_ranks(size: int, K: gh.HSSMatrix, index: Path):
    v = np.random.default_rng(0).standard_normal((N, 2))

    def product(comm: Any) -> Any:
        structure = load_structure(index, comm)[0]
        owners = structure.owners
        return owners.whole(structure.matmat(v if owners.alone else owners.rows.take(v)))

    for y in on_threads(size, product):
        np.testing.assert_allclose(y, K @ v, rtol=0, atol=1e-12 * np.abs(K @ v).max())


def test_the_same_number_of_ranks_gets_the_same_bits(serial: Path, index: Path):
    def job(comm: Any) -> bool:
        mine, again = (load_structure(path, comm)[0] for path in (serial, index))
        ones = [*mine.arrays(), *mine.index_arrays()]
        others = [*again.arrays(), *again.index_arrays()]
        return all(np.array_equal(a, b) for a, b in zip(ones, others, strict=True))

    assert on_threads(3, job) == [True] * 3


def test_a_rank_has_no_more_than_its_part(serial: Path):
    def stored(comm: Any) -> int:
        return load_structure(serial, comm)[0].D.nbytes

    assert on_threads(4, stored) == [gh.load(serial).structure.D.nbytes // 4] * 4


def test_one_rank_gets_it_all(K: gh.HSSMatrix, serial: Path, index: Path):
    for path in (serial, index):
        assert same(gh.load(path, comm=OneRank()), K)


def test_versions(serial: Path, index: Path):
    """A file that has it all is what older versions of the package read."""
    for path, version in ((serial, 2), (index, 3)):
        assert contents(path)[0]["version"] == version


def test_more_ranks_than_leaves(serial: Path, index: Path):
    for path in (serial, index):
        for error in on_threads(17, lambda comm, path=path: load_structure(path, comm)):
            assert isinstance(error, ArgumentError)
            assert "17 ranks" in str(error)


@pytest.mark.parametrize("scheme", ["hodlr", "lowrank"])
@pytest.mark.parametrize("size", [2, 3])
def test_other_forms_whole_again(scheme: str, size: int, tmp_path: Path):
    K = gh.compress(toeplitz(60), scheme=scheme, leaf_size=10, max_rank=60)
    K.save(tmp_path / "m")
    assert spread(tmp_path / "m", tmp_path / "s", size) == [None] * size
    assert same(gh.load(tmp_path / "s"), K)


def test_an_order_of_rows_that_is_none(tmp_path: Path):
    gh.compress(toeplitz(60), "lowrank", max_rank=60).save(tmp_path / "m")
    spread(tmp_path / "m", tmp_path / "s", 2)
    rewritten(tmp_path / "s", arrays=lambda a: a["rows"].__setitem__(3, a["rows"][4]))
    with pytest.raises(FileFormatError, match="not in an order"):
        gh.load(tmp_path / "s")


def test_an_fmm_matrix_whole_again(tmp_path: Path):
    points = np.random.default_rng(0).random((400, 2))
    op = gh.KernelOperator(points, "gaussian", 0.2, 1e-2)
    F = gh.compress(op, scheme="fmm", budget=0.2, leaf_size=30, rtol=1e-4)
    assert len(F.structure.near)
    F.save(tmp_path / "m")
    for size in (3, 4):
        assert spread(tmp_path / "m", tmp_path / "s", size) == [None] * size
        assert same(gh.load(tmp_path / "s"), F)


# --- an older matrix is whole until the new one is -----------------------------------------------


class Killed(BaseException):
    """What no program catches."""


@pytest.mark.parametrize("error", [OSError, MemoryError, Killed])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("function", ["np.savez", "os.fsync"])
def test_a_failing_rank_leaves_the_old_matrix(
    function: str, rank: int, error: type[BaseException], K: gh.HSSMatrix, index: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    before = snapshot(index.parent)
    fail(monkeypatch, function, error, rank)
    errors = on_named_threads(3, lambda comm: save_structure(index, *load_structure(index, comm)))
    assert isinstance(errors[rank], error)
    assert all(isinstance(e, error if error is not Killed else BaseException) for e in errors)
    assert snapshot(index.parent) == before
    assert same(gh.load(index), K)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("late", [False, True])
def test_a_failing_index(
    error: type[BaseException], late: bool, K: gh.HSSMatrix, index: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Before the index is replaced the old matrix stays, after it the new one."""
    before = {path.name for path in index.parent.iterdir()}
    real = os.replace

    def fails(*args: Any) -> None:
        if late:
            real(*args)
        raise error

    monkeypatch.setattr("gpu_hodlr.files.writing.os.replace", fails)
    errors = on_threads(3, lambda comm: save_structure(index, *load_structure(index, comm)))
    assert isinstance(errors[0], error)
    assert all(isinstance(e, BaseException) for e in errors)
    assert same(gh.load(index), K)
    assert late or {path.name for path in index.parent.iterdir()} == before


def test_no_such_folder(serial: Path, tmp_path: Path):
    for error in spread(serial, tmp_path / "nowhere" / "m", 3):
        assert isinstance(error, FileNotFoundError)


def test_the_old_files_go(serial: Path, index: Path, K: gh.HSSMatrix):
    before = set(os.listdir(index.parent))
    assert spread(serial, index, 2) == [None] * 2
    after = set(os.listdir(index.parent))
    assert before & after == {"matrix.npz"}
    assert len(after) == 3
    K.save(index)
    assert os.listdir(index.parent) == ["matrix.npz"]


def test_no_other_files_go(index: Path, K: gh.HSSMatrix):
    """An index that names what is no rank's file is not followed."""
    precious = index.parent / "precious.npz"
    precious.touch()
    rewritten(index, lambda header: header.update(files=["precious.npz"]))
    K.save(index)
    assert precious.exists()


# --- files that do not fit -----------------------------------------------------------------------


def swap(part: Path) -> None:
    part.write_bytes(parts(part.parent / "matrix.npz")[0].read_bytes())


def pickled(part: Path) -> None:
    rewritten(part, arrays=lambda a: a.update(D=np.array([{}], object)))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda part: part.write_bytes(b""),
    "truncated": truncate,
    "a byte changed": flip,
    "pickled": pickled,
    "of another rank": swap,
    "of another save": lambda part: rewritten(
        part, lambda h: h.update(file=h["file"].replace(".1-of", "0.1-of"))
    ),
    "of another format": lambda part: rewritten(part, lambda h: h.update(format="gpu_hodlr")),
    "an array lost": lambda part: rewritten(part, arrays=lambda a: a.pop("T0")),
    "a node lost": lambda part: rewritten(part, arrays=lambda a: a.update(D=a["D"][:-1])),
    "a column lost": lambda part: rewritten(part, arrays=lambda a: a.update(D=a["D"][:, :-1])),
    "NaN": lambda part: rewritten(part, arrays=lambda a: a["D"].__setitem__((0, 0, 0), np.nan)),
    "of another version": lambda part: rewritten(part, lambda h: h.update(version=2)),
    "another type": lambda part: rewritten(part, arrays=lambda a: a.update(D=a["D"].astype("f4"))),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_damaged_part_is_named(damage: Callable[[Path], None], size: int, index: Path):
    part = parts(index)[1]
    damage(part)
    for error in on_threads(size, lambda comm: load_structure(index, comm)):
        assert isinstance(error, FileFormatError)
        assert part.name in str(error)


CHANGES: dict[str, Change] = {
    "no files": lambda h: h.pop("files"),
    "a file fewer": lambda h: h["files"].pop(),
    "another order": lambda h: h["files"].reverse(),
    "files elsewhere": lambda h: h.update(files=["../" + name for name in h["files"]]),
    "files of two saves": lambda h: h["files"].__setitem__(
        0, h["files"][0].replace(h["files"][0].split(".")[-3], "0" * 16)
    ),
    "no stacks": lambda h: h.pop("stacks"),
    "a stack lost": lambda h: h["stacks"].pop("D"),
    "other rows": lambda h: h["stacks"]["D"].update(rows=[1, 2, 3]),
    "negative rows": lambda h: h["stacks"]["D"].update(rows=[-1, 8, 9]),
    "rows that are text": lambda h: h["stacks"]["D"].update(rows="abc"),
    "another shape": lambda h: h["stacks"]["D"].update(shape=[2, 2]),
    "huge rows": lambda h: h["stacks"]["D"].update(rows=[1 << 60] * 3),
    "another structure": lambda h: h.update(structure="HODLR"),
    "version -1": lambda h: h.update(version=-1),
    "version 2.5": lambda h: h.update(version=2.5),
    "a rank above the width": lambda h: h["ranks"][0].__setitem__(0, 1000),
    "error is text": lambda h: h["report"].update(error="abc"),
    "older version": lambda h: h.update(version=2),
    "newer version": lambda h: h.update(version=FORMAT_VERSION + 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_wrong_index(change: Change, index: Path):
    rewritten(index, change)
    with pytest.raises(FileFormatError, match=r"matrix\.npz"):
        gh.load(index)


def test_a_part_alone(index: Path):
    with pytest.raises(FileFormatError, match="load the file that names it"):
        gh.load(parts(index)[0])


def test_no_index(tmp_path: Path):
    for error in on_threads(2, lambda comm: load_structure(tmp_path / "m", comm)):
        assert isinstance(error, FileNotFoundError)


def test_an_index_elsewhere_names_what_is_missing(index: Path, tmp_path: Path):
    (tmp_path / "moved").write_bytes(index.read_bytes())
    with pytest.raises(FileFormatError, match=parts(index)[0].name):
        gh.load(tmp_path / "moved")

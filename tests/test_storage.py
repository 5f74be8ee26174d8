"""Saving and loading: bit for bit, whole or not at all, never pickle."""

import dataclasses
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import Clustered, toeplitz
from saved_files import Change, as_header, fail, npz, rewritten

import gpu_hodlr as gh
from gpu_hodlr.errors import FileFormatError, RankCapWarning
from gpu_hodlr.files import storage


def clustered() -> gh.HSSMatrix:
    exact = dense_oracles.distance_matrix(257, lambda d: np.exp(-d / 300))
    return gh.compress(Clustered(exact, 1), rtol=1e-6, leaf_size=40, ordering="natural")


MATRICES: dict[str, Callable[[], gh.HSSMatrix]] = {
    "balanced": lambda: gh.compress(toeplitz(300), rtol=1e-6, leaf_size=20, seed=3),
    "clusters": clustered,
    "one leaf": lambda: gh.compress(toeplitz(20)),
    "float32": lambda: gh.compress(toeplitz(100), leaf_size=10, dtype=np.float32),
    "rank 0": lambda: gh.compress(np.eye(64), leaf_size=8),
}


def arrays_of(K: gh.HSSMatrix) -> list[np.ndarray]:
    t = K.structure
    return [t.leaves, *t.arrays(), *(a.order for a in t.levels if a.order is not None)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "matrix.npz"
    gh.compress(toeplitz(120), rtol=1e-6, leaf_size=20).save(path)
    return path


@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_round_trip(make: Callable[[], gh.HSSMatrix], tmp_path: Path):
    K = make()
    K.save(tmp_path / "matrix.npz")
    again = gh.load(tmp_path / "matrix.npz")
    assert again.report == K.report
    assert again.dtype == K.dtype
    assert again.ranks == K.ranks
    assert again.nbytes == K.nbytes
    for a, b in zip(arrays_of(again), arrays_of(K), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    v = np.random.default_rng(0).standard_normal((K.shape[0], 2)).astype(K.dtype)
    np.testing.assert_array_equal(again @ v, K @ v)
    assert [p.name for p in tmp_path.iterdir()] == ["matrix.npz"]


def test_a_loaded_matrix_factorizes(saved: Path):
    K = gh.load(saved)
    assert K.factorize(0.1).logdet() == pytest.approx(
        np.linalg.slogdet(K.to_dense() + 0.1 * np.eye(120))[1], rel=1e-10
    )


def test_report_of_a_capped_matrix(tmp_path: Path):
    with pytest.warns(RankCapWarning):
        K = gh.compress(toeplitz(200), rtol=1e-8, leaf_size=20, max_rank=2, seed=9)
    K.save(tmp_path / "m")
    report = gh.load(tmp_path / "m").report
    assert dataclasses.asdict(report) == dataclasses.asdict(K.report)
    assert report.capped_levels
    assert isinstance(report.capped_levels, tuple)


@pytest.mark.parametrize("name", ["matrix", "matrix.npz", "matrix.with.dots", "m ü.hss"])
@pytest.mark.parametrize("kind", [str, Path])
def test_the_name_is_kept(name: str, kind: Callable[[str], Any], tmp_path: Path):
    """NumPy would add .npz."""
    path = kind(os.fspath(tmp_path / name))
    K = gh.compress(toeplitz(20))
    K.save(path)
    assert os.listdir(tmp_path) == [name]
    assert gh.load(path).shape == (20, 20)


def test_a_file_name_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    gh.compress(toeplitz(20)).save("m")
    assert gh.load("m").shape == (20, 20)


def test_saving_replaces_an_old_file(saved: Path):
    gh.compress(toeplitz(40)).save(saved)
    assert gh.load(saved).shape == (40, 40)
    assert os.listdir(saved.parent) == ["matrix.npz"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("function", ["np.savez", "os.fsync", "os.replace"])
def test_an_interrupted_save_leaves_the_old_file_whole(
    function: str, error: type[BaseException], saved: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever stops it, after part of the new file was written, and no stray file stays."""
    before = saved.read_bytes()
    K = gh.compress(toeplitz(40))
    fail(monkeypatch, function, error)
    with pytest.raises(error):
        K.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["matrix.npz"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path):
    old = os.umask(0o027)
    try:
        gh.compress(toeplitz(20)).save(tmp_path / "m")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o640


def test_saving_to_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        gh.compress(toeplitz(20)).save(tmp_path / "nowhere" / "m")


# --- files that are not ours -----------------------------------------------------------------


def test_no_such_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        gh.load(tmp_path / "nothing")


def npy(array: Any, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


FOREIGN: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"not a matrix",
    "zip signature alone": lambda: b"PK\x03\x04",
    "npy": lambda: npy(np.eye(3)),
    "pickle": lambda: pickle.dumps({"a": 1}),
    "npy with a pickle inside": lambda: npy(np.array([{}], object), allow_pickle=True),
    "npz of something else": lambda: npz(weights=np.eye(3)),
    "header that is no JSON": lambda: npz(header=np.frombuffer(b"\xff{", np.uint8)),
    "header that is a list": lambda: npz(header=as_header([1])),
    "header of another format": lambda: npz(header=as_header({"format": "other"})),
    "header alone": lambda: npz(header=as_header({"format": "gpu_hodlr", "version": 1})),
    "no version": lambda: npz(header=as_header({"format": "gpu_hodlr"})),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files(content: Callable[[], bytes], tmp_path: Path):
    path = tmp_path / "foreign"
    path.write_bytes(content())
    with pytest.raises(FileFormatError, match="foreign"):
        gh.load(path)


def test_a_later_version_may_say_more(saved: Path):
    """What is not known of a report is left out; the matrix is the same."""
    before = gh.load(saved)

    def more(header: Any) -> None:
        header["report"].update(error_in_another_norm=0.5)
        header.update(written_by="later")

    after = gh.load(rewritten(saved, header=more))
    assert dataclasses.asdict(after.report) == dataclasses.asdict(before.report)
    np.testing.assert_array_equal(after.to_dense(), before.to_dense())


def test_rewriting_alone_changes_nothing(saved: Path):
    before = gh.load(saved)
    after = gh.load(rewritten(saved))
    assert after.report == before.report


def test_a_newer_format_version(saved: Path):
    newer = storage.FORMAT_VERSION + 1
    rewritten(saved, lambda header: header.update(version=newer))
    with pytest.raises(FileFormatError, match=f"version {newer}.*up to {storage.FORMAT_VERSION}"):
        gh.load(saved)


HEADERS: dict[str, Change] = {
    "version is text": lambda h: h.update(version="1"),
    "version -1": lambda h: h.update(version=-1),
    "version 0": lambda h: h.update(version=0),
    "version 2.5": lambda h: h.update(version=2.5),
    "version 2.0": lambda h: h.update(version=2.0),
    "version true": lambda h: h.update(version=True),
    "no type": lambda h: h.update(dtype=None),
    "no report": lambda h: h.pop("report"),
    "a field of the report missing": lambda h: h["report"].pop("error"),
    "error is text": lambda h: h["report"].update(error="abc"),
    "error is not a number": lambda h: h["report"].update(error=float("nan")),
    "error below 0": lambda h: h["report"].update(error=-1e-3),
    "error is true": lambda h: h["report"].update(error=True),
    "no error": lambda h: h["report"].update(error=None),
    "cap is a number": lambda h: h["report"].update(rank_cap_hit=1),
    "passes 1.5": lambda h: h["report"].update(passes=1.5),
    "a capped level is text": lambda h: h["report"].update(capped_levels="12"),
    "seconds of text": lambda h: h["report"].update(seconds={"sample": "1"}),
    "a list of seconds": lambda h: h["report"].update(seconds=[1.0]),
    "choice is a number": lambda h: h["report"].update(choice=3),
    "no ranks": lambda h: h.pop("ranks"),
    "a rank below 0": lambda h: h["ranks"][0].__setitem__(0, -1),
    "a rank above the width": lambda h: h["ranks"][0].__setitem__(1, 1000),
    "a rank of 1.5": lambda h: h["ranks"][1].__setitem__(0, 1.5),
    "a rank of text": lambda h: h["ranks"][1].__setitem__(0, "2"),
    "a rank that is true": lambda h: h["ranks"][1].__setitem__(0, True),
    "an infinite rank": lambda h: h["ranks"][1].__setitem__(0, float("inf")),
    "a node's rank lost": lambda h: h["ranks"][1].pop(),
    "a level lost": lambda h: h["ranks"].pop(),
}  # fmt: skip


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_headers_that_cannot_be(change: Change, saved: Path):
    rewritten(saved, header=change)
    with pytest.raises(FileFormatError, match=r"matrix\.npz"):
        gh.load(saved)


def test_ranks_that_are_whole_floats_are_read(saved: Path):
    """As three ranks once wrote them."""
    ranks = gh.load(saved).ranks
    rewritten(saved, lambda h: h["ranks"].__setitem__(-1, [float(r) for r in h["ranks"][-1]]))
    assert gh.load(saved).ranks == ranks
    assert all(type(r) is int for level in gh.load(saved).ranks for r in level)


ARRAYS: dict[str, Change] = {
    "no diagonal blocks": lambda a: a.pop("D"),
    "an order lost": lambda a: a.pop("order1"),
    "no coupling": lambda a: a.pop("B1"),
    "a pickled array": lambda a: a.update(D=np.array([{}], object)),
    "leaves not a power of two": lambda a: a.update(leaves=a["leaves"][:3]),
    "wrong shape": lambda a: a.update(D=a["D"][:, :2]),
    "NaN in D": lambda a: a["D"].__setitem__((0, 1, 1), np.nan),
    "infinity in D": lambda a: a["D"].__setitem__((2, 0, 0), np.inf),
    "NaN in T": lambda a: a["T0"].__setitem__((0, 0, 0), np.nan),
    "NaN in B": lambda a: a["B1"].__setitem__((0, 0, 0), np.nan),
}


@pytest.mark.parametrize("change", ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_cannot_be(change: Change, saved: Path):
    rewritten(saved, arrays=change)
    with pytest.raises(FileFormatError, match=r"matrix\.npz"):
        gh.load(saved)


OTHER_FORMS: list[tuple[str, str, Change, Change]] = [
    ("hodlr", "a rank above the width", lambda h: h["ranks"][0].__setitem__(0, 99), id),
    ("hodlr", "siblings of two ranks", lambda h: h["ranks"][0].__setitem__(0, 0), id),
    ("hodlr", "NaN", id, lambda a: a["U"].__setitem__((0, 0), np.nan)),
    ("lowrank", "NaN", id, lambda a: a["U"].__setitem__((0, 0), np.nan)),
    ("lowrank", "infinity", id, lambda a: a["eigenvalues"].__setitem__(0, np.inf)),
    ("lowrank", "a rank that is true", lambda h: h.update(ranks=[[True]]), id),
    ("fmm", "a rank above the width", lambda h: h["ranks"][0].__setitem__(0, 99), id),
    ("fmm", "NaN in the near field", id, lambda a: a["near"].__setitem__((0, 0, 0), np.nan)),
]


@pytest.mark.parametrize(
    ("scheme", "header", "arrays"), [(s, h, a) for s, _, h, a in OTHER_FORMS],
    ids=[f"{s}, {what}" for s, what, _, _ in OTHER_FORMS],
)  # fmt: skip
def test_files_of_other_forms_that_cannot_be(
    scheme: str, header: Change, arrays: Change, tmp_path: Path
):
    budget = 0.2 if scheme == "fmm" else 0.0
    K = gh.compress(toeplitz(120), scheme, leaf_size=15, max_rank=120, budget=budget)
    K.save(tmp_path / "m")
    gh.load(rewritten(tmp_path / "m"))
    with pytest.raises(FileFormatError, match="m"):
        gh.load(rewritten(tmp_path / "m", header, arrays))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(share: float, saved: Path):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FileFormatError, match=r"matrix\.npz"):
        gh.load(saved)


def test_damaged_files(saved: Path):
    """One byte changed anywhere: refused, or (in bytes without a meaning) the same matrix."""
    content = saved.read_bytes()
    whole = arrays_of(gh.load(saved))
    rng = np.random.default_rng(0)
    directory = content.index(b"PK\x01\x02")
    places = np.concatenate(
        [rng.integers(len(content), size=60), np.arange(directory, len(content), 3)]
    )
    refused = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        saved.write_bytes(damaged)
        try:
            loaded = arrays_of(gh.load(saved))
        except FileFormatError:
            refused += 1
            continue
        for a, b in zip(loaded, whole, strict=True):
            np.testing.assert_array_equal(a, b)
    assert refused > 40


def test_loading_never_unpickles(saved: Path, tmp_path: Path):
    """A file whose array would run code is refused, and the code does not run."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    rewritten(saved, arrays=lambda a: a.update(D=np.array([Trap()], object)))
    with pytest.raises(FileFormatError):
        gh.load(saved)
    assert not (tmp_path / "sprung").exists()

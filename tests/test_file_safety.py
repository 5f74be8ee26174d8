"""Files and what is around them: killed saves, links, modes, paths, archives made to do harm."""

import os
import signal
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from saved_files import contents, parts, rewritten
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.errors import ArgumentError, DtypeError, FileFormatError
from gpu_hodlr.files import writing

N = 60


def saves(kind: str) -> Callable[[Any], None]:
    """A save of a matrix or a factor to a path, by one rank or by several, as `kind` says."""
    what, _, size = kind.partition(" of ")

    def save(path: Any, comm: Any = None) -> None:
        K = gh.compress(toeplitz(N), leaf_size=10, comm=comm)
        (K if what == "matrix" else K.factorize(0.1)).save(path)

    def by_all(path: Any) -> None:
        assert on_threads(int(size), lambda comm: save(path, comm)) == [None] * int(size)

    return by_all if size else save


KINDS = ["matrix", "factor", "matrix of 3", "factor of 2"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def save(kind: str) -> Callable[[Any], None]:
    return saves(kind)


def loads(path: Any) -> bool:
    return gh.load(path).shape == (N, N)


# --- saves that were killed ------------------------------------------------------------------


KILLED = """
import os, sys
import numpy as np
import gpu_hodlr as gh
os.fsync = lambda file: os.kill(os.getpid(), int(sys.argv[2]))
gh.compress(np.eye(32), leaf_size=8).save(sys.argv[1])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_save_removes_what_a_killed_one_left(number: int, tmp_path: Path):
    path = tmp_path / "m.npz"
    saves("matrix")(path)
    command = [sys.executable, "-c", KILLED, path, str(int(number))]
    assert subprocess.run(command, check=False, timeout=60).returncode == -number
    assert len(os.listdir(tmp_path)) == 2
    assert loads(path)
    saves("factor")(path)
    assert os.listdir(tmp_path) == ["m.npz"]


LEFT = [
    "m.npz.0123456789abcdef.part",
    "m.npz.0123456789abcdef.2-of-3.npz.fedcba9876543210.part",
]
OTHERS = [
    "m.npz.part",
    "m.npz.backup.part",
    "n.npz.0123456789abcdef.part",
    "am.npz.0123456789abcdef.part",
    "m.npz.0123456789abcdef.0-of-3.npz",  # of an index that was moved, for all that is known
    "m.npz.0123456789abcdef.part.txt",
]


def test_only_what_a_killed_save_left_goes(save: Callable[[Any], None], tmp_path: Path):
    for name in [*LEFT, *OTHERS]:
        (tmp_path / name).write_text("half a file")
    save(tmp_path / "m.npz")
    names = set(os.listdir(tmp_path))
    assert names >= {"m.npz", *OTHERS}
    assert not names & set(LEFT)


def test_what_another_save_is_writing_stays(save: Callable[[Any], None], tmp_path: Path):
    path = tmp_path / "m.npz"
    with writing.unfinished(path, path) as f:
        f.write(b"half")
        save(path)
        assert os.path.exists(f.name)
    assert not list(tmp_path.glob("*.part"))
    assert loads(path)


# --- what is replaced ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_the_mode_of_an_old_file_is_kept(mode: int, save: Callable[[Any], None], tmp_path: Path):
    path = tmp_path / "m.npz"
    path.touch()
    path.chmod(mode)
    save(path)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {mode}  # those of the ranks' files as well
    assert loads(path)


def test_a_private_file_is_never_open_to_others(
    save: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, seen = tmp_path / "m.npz", []
    path.touch(0o600)
    real = os.open

    def opened(name: Any, flags: int, mode: int) -> int:
        seen.append(mode)
        return real(name, flags, mode)

    monkeypatch.setattr(writing.os, "open", opened)
    save(path)
    assert set(seen) == {0o600}


@pytest.mark.parametrize("relative", [False, True])
def test_a_link_stays_and_leads_to_the_new_file(
    relative: bool, kind: str, save: Callable[[Any], None], tmp_path: Path
):
    for name in ("real", "here"):
        (tmp_path / name).mkdir()
    real, link = tmp_path / "real" / "m.npz", tmp_path / "here" / "link"
    link.symlink_to("../real/m.npz" if relative else real)
    for _ in range(2):  # a link to nothing, then to an old file
        save(link)
        assert link.is_symlink()
        assert not real.is_symlink()
        assert os.listdir(link.parent) == ["link"]
        assert len(parts(real)) == int(kind.partition(" of ")[2] or 0)
        assert loads(real)
        assert loads(link)


def test_links_in_a_circle(save: Callable[[Any], None], tmp_path: Path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.symlink_to(b)
    b.symlink_to(a)
    for job in (saves("matrix"), gh.load):
        with pytest.raises(OSError, match="symbolic links"):
            job(a)
    assert a.is_symlink()


def test_folders_and_devices_are_not_replaced(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        saves("matrix")(tmp_path / "folder")
    with pytest.raises(OSError, match="Invalid argument"):
        saves("factor")(tmp_path / "pipe")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


# --- paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["matrix", "factor"])
def test_a_folder_that_is_not_there_is_said_of_the_path(what: str, tmp_path: Path):
    """And not of the file beside it that is written first."""
    path = tmp_path / "nowhere" / "m.npz"
    with pytest.raises(FileNotFoundError) as said:
        saves(what)(path)
    assert said.value.filename == str(path)


def test_paths_of_bytes(save: Callable[[Any], None], tmp_path: Path):
    path = os.fsencode(tmp_path / "m ü")
    save(path)
    assert loads(path)
    assert loads(tmp_path / "m ü")


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("a\0b", ArgumentError, r"path.*'a\\x00b'"),
        (b"a\0b", ArgumentError, r"path.*'a\\x00b'"),
        ("", ArgumentError, "path.*''"),
        (0, DtypeError, "path.*int"),
        (None, DtypeError, "path.*NoneType"),
        (True, DtypeError, "path.*bool"),
    ],
)
def test_what_is_no_path(path: Any, error: type[Exception], words: str):
    K = gh.compress(toeplitz(20))
    for job in (K.save, K.factorize(0.1).save, gh.load):
        with pytest.raises(error, match=words):
            job(path)


def test_what_is_no_path_on_ranks(tmp_path: Path):
    """Every rank is told, whichever has it."""

    def job(comm: Any) -> None:
        K = gh.compress(toeplitz(N), leaf_size=10, comm=comm)
        K.save(tmp_path / "m" if comm.rank else "a\0b")

    assert all(isinstance(e, ArgumentError) for e in on_threads(3, job))
    assert os.listdir(tmp_path) == []


# --- archives made to do harm ----------------------------------------------------------------


@pytest.fixture
def saved(save: Callable[[Any], None], tmp_path: Path) -> Path:
    save(tmp_path / "m.npz")
    return tmp_path / "m.npz"


def large(saved: Path) -> tuple[Path, str]:
    """The file that has a stack of arrays, and the name of one of them."""
    file = [*parts(saved), saved][0]
    return file, max(contents(file)[1].items(), key=lambda item: item[1].nbytes)[0]


def refused(saved: Path, file: Path, words: str) -> None:
    """By one rank and by two; the file at fault is named."""
    for error in on_threads(2, lambda comm: gh.load(saved, comm=comm)):
        assert isinstance(error, FileFormatError)
        assert file.name in str(error)
    with pytest.raises(FileFormatError, match=words):
        gh.load(saved)


def test_an_array_that_is_there_twice(saved: Path):
    file, name = large(saved)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(f"{name}.npy", archive.read(f"{name}.npy"))
    refused(saved, file, "twice")


def test_an_archive_that_is_compressed_is_not_inflated(saved: Path):
    """64 MB in 64 kB; nothing of them comes to be."""
    file, name = large(saved)
    with zipfile.ZipFile(file) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content if entry != f"{name}.npy" else b"\0" * (1 << 26))
    del entries
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match="compressed"):
            gh.load(saved)
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_an_entry_that_is_said_to_be_longer_than_the_file(saved: Path):
    """Memory would be taken for it before it is found to end early."""
    file, name = large(saved)
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        entry = archive.getinfo(f"{name}.npy")
    place = content.rindex(entry.filename.encode()) - 46  # its record in the directory
    assert content[place : place + 4] == b"PK\1\2"
    content[place + 20 : place + 28] = struct.pack("<II", 1 << 31, 1 << 31)
    file.write_bytes(content)
    refused(saved, file, "longer than the file")


@pytest.mark.parametrize("shape", [(1 << 40,), (-2, -450), (1 << 62, 1 << 62)])
def test_an_array_whose_shape_is_not_that_of_its_bytes(shape: tuple[int, ...], saved: Path):
    file, name = large(saved)
    rewritten(file, arrays=lambda a: a.update({name: np.zeros(900)}))
    with zipfile.ZipFile(file) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    said, lie = b"'shape': (900,), }", f"'shape': {shape}, }}".encode()
    entries[f"{name}.npy"] = entries[f"{name}.npy"].replace(said.ljust(len(lie)), lie)
    assert lie in entries[f"{name}.npy"]
    with zipfile.ZipFile(file, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    refused(saved, file, "bytes")

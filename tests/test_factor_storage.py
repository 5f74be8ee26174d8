"""Factors on disk: the same bits and nothing factorized, whole or not at all, arrays checked."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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
)
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError, FileFormatError, NotPositiveDefiniteError
from gpu_hodlr.factor import HODLRCholesky, MultipoleSolver, ULVCholesky, Woodbury
from gpu_hodlr.files.storage import FORMAT_VERSION
from gpu_hodlr.structures.stored import check_cholesky

N = 126  # leaves are padded
A = toeplitz(N) + 0.1 * np.eye(N)
CLASSES = {
    "hss": ULVCholesky,
    "hodlr": HODLRCholesky,
    "lowrank": Woodbury,
    "fmm": MultipoleSolver,
    "fmm, budget 0": ULVCholesky,
}
ROWS = np.random.default_rng(3).uniform(0.5, 3.0, N)
B = np.random.default_rng(0).standard_normal((N, 3))


def compressed(kind: str, dtype: Any = np.float64, xp: Any = np, **options: Any) -> Any:
    scheme = kind.partition(",")[0]
    if kind == "fmm":
        options["budget"] = 0.2
    rtol = 1e-6 if dtype == np.float64 else 1e-3
    return gh.compress(
        xp.asarray(A.astype(dtype)), scheme, rtol=rtol, max_rank=N, leaf_size=20, **options
    )


def results(F: Any, xp: Any = np) -> list[np.ndarray]:
    """All that a factor or solver can give, on the host."""
    b = xp.asarray(B.astype(F.dtype))
    if isinstance(F, MultipoleSolver):
        return [to_host(F.solve(b)), np.array(F.residual)]
    found = [F.solve(b), F.solve(b[:, 0]), F @ b]
    for transpose in (False, True):
        found += [F.sqrt_matmat(b, transpose=transpose), F.sqrt_solve(b, transpose=transpose)]
    found += [F.sample(2, seed=3), F.sample(2, seed=3, inverse=True), np.array(F.logdet())]
    return [to_host(x) for x in found]


def same_bits(xs: list[np.ndarray], ys: list[np.ndarray]) -> bool:
    pairs = zip(xs, ys, strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("it factorizes")


@pytest.mark.parametrize("rows", [False, True], ids=["one damping", "of every row"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("kind", CLASSES)
def test_round_trip(
    kind: str, dtype: Any, rows: bool, xp: ModuleType, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    K = compressed(kind, dtype, xp)
    F = K.factorize(xp.asarray(ROWS.astype(dtype)) if rows else 0.3)
    assert type(F) is CLASSES[kind]
    expected = results(F, xp)
    F.save(tmp_path / "F.npz")
    assert os.listdir(tmp_path) == ["F.npz"]
    with monkeypatch.context() as patched:
        for name in ("cholesky", "solve_triangular", "matmul"):
            patched.setattr(f"gpu_hodlr.batched.{name}", never)
        G = gh.load(tmp_path / "F.npz", device=F.device)
    assert type(G) is type(F)
    assert (G.shape, G.dtype, G.device) == (F.shape, F.dtype, F.device)
    if rows:
        assert isinstance(G.damping, xp.ndarray)
        np.testing.assert_array_equal(to_host(G.damping), ROWS.astype(dtype))
        assert "damping of every row" in repr(G)
    else:
        assert G.damping == 0.3
    for _ in range(2):  # as it is, and as a graph
        assert same_bits(results(G, xp), expected)
    assert G.nbytes >= F.nbytes
    G.save(tmp_path / "again")
    assert same_bits(results(gh.load(tmp_path / "again", device=F.device), xp), expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_file_of_a_device_can_be_read_on_the_host(kind: str, cupy: ModuleType, tmp_path: Path):
    compressed(kind, xp=cupy).factorize(0.3).save(tmp_path / "F")
    G = gh.load(tmp_path / "F")
    assert G.device == "cpu"
    x = G.solve(B)
    exact = compressed(kind).to_dense() + 0.3 * np.eye(N)
    np.testing.assert_allclose(exact @ x, B, rtol=0, atol=1e-4)


ODD: dict[str, Callable[[], Any]] = {
    "one leaf": lambda: gh.compress(A, leaf_size=N).factorize(0.1),
    "one leaf, hodlr": lambda: gh.compress(A, "hodlr", leaf_size=N).factorize(0.1),
    "rank 0": lambda: gh.compress(np.eye(N), leaf_size=20).factorize(0.1),
    "rank 0, hodlr": lambda: gh.compress(np.eye(N), "hodlr", leaf_size=20).factorize(0.1),
    "rank 0, lowrank": lambda: gh.compress(np.zeros((N, N)), "lowrank").factorize(0.1),
    "damping 0, lowrank": lambda: compressed("lowrank").factorize(),
    "all near": lambda: gh.compress(A, "fmm", leaf_size=20, budget=1.0).factorize(0.1),
    "narrow blocks": lambda: compressed("hss", storage_dtype="float32").factorize(0.1),
    "plus a diagonal": lambda: (compressed("lowrank") + gh.Diagonal(ROWS)).factorize(0.1),
}  # fmt: skip


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_round_trip_of_unusual_ones(make: Callable[[], Any], tmp_path: Path):
    F = make()
    F.save(tmp_path / "F")
    assert same_bits(results(gh.load(tmp_path / "F")), results(F))


def test_a_solver_without_a_preconditioner(tmp_path: Path):
    K = compressed("fmm")
    F = MultipoleSolver(K.structure, 0.3, None, rtol=1e-6)
    F.save(tmp_path / "F")
    G = gh.load(tmp_path / "F")
    assert G.preconditioner is None
    np.testing.assert_array_equal(G.solve(B), F.solve(B))


def test_a_loaded_solver_still_says_what_would_do(tmp_path: Path):
    exact = toeplitz(300) - 0.5 * np.eye(300)
    K = gh.compress(exact, "fmm", rtol=1e-8, leaf_size=20, budget=0.1)
    F = MultipoleSolver(K.structure, 0.01, None, rtol=1e-8)
    F.save(tmp_path / "F")
    said = []
    for solver in (F, gh.load(tmp_path / "F")):
        with pytest.raises(NotPositiveDefiniteError, match="would do, or for damping") as caught:
            solver.solve(np.ones(300))
        said.append((str(caught.value), caught.value.damping, caught.value.rtol))
    assert said[0] == said[1]


def test_a_loaded_factor_has_bytes_of_its_own(tmp_path: Path):
    """T of ULV, U of Woodbury and the FMM form were the matrix's."""
    for kind in ("hss", "lowrank", "fmm"):
        K = compressed(kind)
        F = K.factorize(0.3)
        F.save(tmp_path / "F")
        own = {
            "hss": sum(a.T.nbytes for a in getattr(K.structure, "levels", ())),
            "lowrank": getattr(K.structure, "U", B).nbytes,
            "fmm": sum(a.nbytes for a in K.structure.arrays()),
        }[kind]
        if kind == "fmm":
            own += sum(step.T.nbytes for step in F.preconditioner._steps)
        assert gh.load(tmp_path / "F").nbytes == F.nbytes + own


def test_more_ranks_than_leaves(saved: Path):
    for error in on_threads(9, lambda comm: gh.load(saved, comm=comm)):
        assert isinstance(error, ArgumentError)
        assert "9 ranks" in str(error)


# --- an older file is whole until the new one is -------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "F.npz"
    compressed("hss").factorize(0.1).save(path)
    return path


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("function", ["np.savez", "os.fsync", "os.replace"])
def test_an_interrupted_save_leaves_the_old_file_whole(
    function: str, error: type[BaseException], saved: Path, monkeypatch: pytest.MonkeyPatch
):
    before, F = saved.read_bytes(), compressed("hodlr").factorize(0.2)
    fail(monkeypatch, function, error)
    with pytest.raises(error):
        F.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["F.npz"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_rank_leaves_the_old_factor(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def save(comm: Any, damping: float) -> None:
        compressed("hodlr", comm=comm).factorize(damping).save(tmp_path / "F")

    assert on_threads(2, lambda comm: save(comm, 0.1)) == [None] * 2
    before = snapshot(tmp_path)
    fail(monkeypatch, "os.fsync", OSError, rank)
    errors = on_named_threads(2, lambda comm: save(comm, 0.2))
    assert all(isinstance(e, OSError) for e in errors)
    assert snapshot(tmp_path) == before
    assert gh.load(tmp_path / "F").damping == 0.1


def test_a_factor_and_a_matrix_replace_each_other(saved: Path):
    K = compressed("hss")
    K.save(saved)
    assert isinstance(gh.load(saved), gh.HSSMatrix)
    K.factorize(0.1).save(saved)
    assert isinstance(gh.load(saved), ULVCholesky)


# --- files that do not fit -----------------------------------------------------------------------


def changed(name: str, place: Any, value: Any) -> Change:
    """An entry of an array is another."""

    def change(arrays: dict[str, Any]) -> None:
        assert arrays[name].size
        arrays[name][place] = value

    return change


def shaped(name: str, part: Any) -> Change:
    return lambda arrays: arrays.update({name: arrays[name][part]})


def typed(name: str, dtype: Any) -> Change:
    return lambda arrays: arrays.update({name: arrays[name].astype(dtype)})


INNER = "preconditioner."
ARRAYS: list[tuple[str, str, Change]] = [
    ("hss", "no root", lambda a: a.pop("root")),
    ("hss", "no leaves", lambda a: a.pop("leaves")),
    ("hss", "no order", lambda a: a.pop("order1")),
    ("hss", "an order of the leaves", lambda a: a.update(order0=a["order1"])),
    ("hss", "a level lost", lambda a: [a.pop(f"{name}2") for name in "TLW"]),
    ("hss", "NaN", changed("T0", (0, 0, 0), np.nan)),
    ("hss", "infinity", changed("W1", (0, 0, 0), np.inf)),
    ("hss", "above the diagonal", changed("L0", (0, 0, -1), 1.0)),
    ("hss", "a diagonal of 0", changed("L0", (0, 0, 0), 0.0)),
    ("hss", "a negative diagonal", changed("root", (0, 1, 1), -1.0)),
    ("hss", "root not triangular", changed("root", (0, 0, 1), 1e-3)),
    ("hss", "no permutation", changed("order1", (0, 0), 1)),
    ("hss", "a node fewer", shaped("L0", np.s_[1:])),
    ("hss", "a column fewer", shaped("W0", np.s_[:, :, 1:])),
    ("hss", "root too small", shaped("root", np.s_[:, 1:, 1:])),
    ("hss", "root flat", shaped("root", np.s_[0])),
    ("hss", "another type", typed("T1", "f4")),
    ("hss", "integers", typed("root", int)),
    ("hss", "complex", typed("L0", complex)),
    ("hss", "leaves twice", changed("leaves", (0, 0), 5)),
    ("hss", "pickled", lambda a: a.update(root=np.array([{}], object))),
    ("hodlr", "no C", lambda a: a.pop("C")),
    ("hodlr", "no step", lambda a: a.pop("Y1")),
    ("hodlr", "C not triangular", changed("C", (0, 0, 1), 1.0)),
    ("hodlr", "Y not triangular", changed("Y1", (0, 0, 1), 1.0)),
    ("hodlr", "NaN", changed("QP1", (0, 0, 0), np.nan)),
    ("hodlr", "padding", lambda a: a["QP2"].__setitem__(a["leaves"] < 0, 1.0)),
    ("hodlr", "a pair fewer", shaped("Y3", np.s_[1:])),
    ("hodlr", "a column fewer", shaped("QP1", np.s_[:, :, 1:])),
    ("hodlr", "another type", typed("QP1", "f4")),
    ("hodlr", "C too small", shaped("C", np.s_[:, 1:, 1:])),
    ("lowrank", "no scale", lambda a: a.pop("scale")),
    ("lowrank", "no U", lambda a: a.pop("U")),
    ("lowrank", "NaN", changed("U", (0, 0), np.nan)),
    ("lowrank", "negative", changed("eigenvalues", -1, -1.0)),
    ("lowrank", "another type", typed("U", "f4")),
    ("lowrank", "a row fewer", shaped("scale", np.s_[1:])),
    ("lowrank", "a scale of 0", changed("scale", 3, 0.0)),
    ("lowrank", "a diagonal", lambda a: a.update(D=a["scale"])),
    ("lowrank", "dampings fewer", shaped("row_damping", np.s_[1:])),
    ("lowrank", "dampings flat", lambda a: a.update(row_damping=a["row_damping"][:, None])),
    ("lowrank", "damping negative", changed("row_damping", 3, -1.0)),
    ("lowrank", "damping not a number", changed("row_damping", 3, np.nan)),
    ("lowrank", "damping of another type", typed("row_damping", "f4")),
    ("fmm", "no near field", lambda a: a.pop("near")),
    ("fmm", "NaN in the form", changed("B0", (0, 0, 0), np.nan)),
    ("fmm", "no preconditioner", lambda a: a.pop(INNER + "root")),
    ("fmm", "no leaves", lambda a: a.pop(INNER + "leaves")),
    ("fmm", "another tree", lambda a: a.update({INNER + "leaves": a["leaves"][::-1]})),
    ("fmm", "NaN in it", changed(INNER + "L0", (0, 0, 0), np.nan)),
    ("fmm", "not triangular", changed(INNER + "L0", (0, 0, -1), 1.0)),
    ("fmm", "a node fewer", shaped(INNER + "T0", np.s_[1:])),
    ("fmm", "all of it of another type", lambda a: a.update({
        name: x.astype("f4") for name, x in a.items() if name.startswith(INNER) and x.dtype == "f8"
    })),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A file of every kind; with a damping of every row where it leaves a trace."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for kind in ("hss", "hodlr", "lowrank", "fmm"):
        compressed(kind).factorize(ROWS if kind == "lowrank" else 0.3).save(folder / kind)
        found[kind] = (folder / kind).read_bytes()
    return found


@pytest.mark.parametrize(
    ("kind", "change"), [(k, c) for k, _, c in ARRAYS], ids=[f"{k}, {s}" for k, s, _ in ARRAYS]
)
def test_arrays_that_cannot_be(kind: str, change: Change, whole: dict[str, bytes], tmp_path: Path):
    path = tmp_path / "F.npz"
    path.write_bytes(whole[kind])
    rewritten(path)
    gh.load(path)  # rewriting alone changes nothing
    rewritten(path, arrays=change)
    with pytest.raises(FileFormatError, match=r"F\.npz"):
        gh.load(path)


HEADERS: list[tuple[str, str, Change]] = [
    ("hss", "no name", lambda h: h.pop("factor")),
    ("hss", "no damping", lambda h: h.pop("damping")),
    ("hss", "negative", lambda h: h.update(damping=-1.0)),
    ("hss", "not a number", lambda h: h.update(damping=float("nan"))),
    ("hss", "text", lambda h: h.update(damping="0.3")),
    ("hss", "none", lambda h: h.update(damping=None)),
    ("hss", "unknown", lambda h: h.update(factor="QR")),
    ("hss", "a structure", lambda h: h.update(factor="Telescope")),
    ("hss", "another factor", lambda h: h.update(factor="HODLRCholesky")),
    ("hss", "a matrix", lambda h: h.update(version=2)),
    ("hss", "an index", lambda h: h.update(version=5)),
    ("hss", "version -1", lambda h: h.update(version=-1)),
    ("hss", "version 4.0", lambda h: h.update(version=4.0)),
    ("hss", "newer", lambda h: h.update(version=FORMAT_VERSION + 1)),
    ("lowrank", "not scaled", lambda h: h.pop("scaled")),
    ("lowrank", "no scale", lambda h: h.update(scaled=False)),
    ("lowrank", "ranks", lambda h: h.update(ranks=[[1]])),
    ("fmm", "no rtol", lambda h: h.pop("rtol")),
    ("fmm", "added", lambda h: h.update(added=float("inf"))),
    ("fmm", "preconditioner", lambda h: h.pop("preconditioner")),
    ("fmm", "its damping", lambda h: h["preconditioner"].update(damping=None)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change"), [(k, c) for k, _, c in HEADERS], ids=[f"{k}, {s}" for k, s, _ in HEADERS]
)
def test_headers_that_cannot_be(kind: str, change: Change, whole: dict[str, bytes], tmp_path: Path):
    path = tmp_path / "F.npz"
    path.write_bytes(whole[kind])
    rewritten(path, header=change)
    with pytest.raises(FileFormatError, match=r"F\.npz"):
        gh.load(path)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_files(share: float, saved: Path):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FileFormatError, match=r"F\.npz"):
        gh.load(saved)


def test_damaged_files(saved: Path):
    """One byte changed anywhere: refused, or (in bytes without a meaning) the same factor."""
    content, expected = saved.read_bytes(), gh.load(saved).solve(B)
    rng, refused = np.random.default_rng(0), 0
    for place in rng.integers(len(content), size=60):
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        saved.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(gh.load(saved).solve(B), expected)
        except FileFormatError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_damaged_part_is_named(size: int, tmp_path: Path):
    def save(comm: Any) -> None:
        compressed("hodlr", comm=comm).factorize(0.1).save(tmp_path / "F")

    assert on_threads(2, save) == [None] * 2
    part = parts(tmp_path / "F")[1]
    flip(part)
    for error in on_threads(size, lambda comm: gh.load(tmp_path / "F", comm=comm)):
        assert isinstance(error, FileFormatError)
        assert part.name in str(error)


def test_versions(saved: Path, tmp_path: Path):
    """Older versions of the package refuse a factor by its version."""

    def save(comm: Any) -> None:
        compressed("hss", comm=comm).factorize(0.1).save(tmp_path / "spread")

    on_threads(2, save)
    for path, version in ((saved, 4), (tmp_path / "spread", 5)):
        header = contents(path)[0]
        assert (header["version"], header["factor"]) == (version, "ULVCholesky")


def test_loading_never_unpickles(saved: Path, tmp_path: Path):
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    rewritten(saved, arrays=lambda a: a.update(T0=np.array([Trap()], object)))
    with pytest.raises(FileFormatError):
        gh.load(saved)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("entry", "value"), [((1, 0, 1), 1e-9), ((0, 0, 2), 1.0), ((1, 2, 2), 0.0), ((0, 1, 1), -1.0)]
)
def test_what_is_no_cholesky_factor(entry: tuple[int, ...], value: float):
    """One entry of a stack is enough."""
    L = np.tril(np.ones((2, 3, 3)))
    check_cholesky(L, "L")
    L[entry] = value
    with pytest.raises(ValueError, match="L is not lower triangular with a positive diagonal"):
        check_cholesky(L, "L")
    for shape in ((2, 3, 2), (2, 2, 3), (3, 3)):
        with pytest.raises(ValueError, match="it is no stack"):
            check_cholesky(np.ones(shape), "L")

"""Far fields kept in bfloat16 and TF32: rounding, products, the error reported, files, ranks."""

import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import toeplitz
from saved_files import contents, rewritten
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.batched import level_products, stored
from gpu_hodlr.devices import device_of, to_host
from gpu_hodlr.errors import AccuracyWarning, ArgumentError, DtypeError, FileFormatError

N = 160
EXACT = toeplitz(N)
BITS = {"bfloat16": np.uint16, "tfloat32": np.uint32}
DIGITS = {"bfloat16": 8, "tfloat32": 11}
KINDS = tuple(BITS)
SCHEMES = ("hss", "hodlr", "lowrank", "fmm")


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """To the nearest number of so many digits, ties to even: by another way than by bits."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    size = 2.0 ** DIGITS[kind]
    return np.ldexp(np.rint(mantissa * size) / size, exponent)


def compressed(scheme: str, kind: Any, xp: Any = np, **options: Any) -> Any:
    options = {"rtol": 1e-2, "leaf_size": 20, "max_rank": N, **options}
    if scheme == "fmm":
        options["budget"] = 0.2
    return gh.compress(xp.asarray(EXACT), scheme, storage_dtype=kind, **options)


def far(K: Any) -> list[Any]:
    structure = K.structure
    if hasattr(structure, "levels"):
        return [a for level in structure.levels for a in (level.T, level.B)]
    return [structure.U]


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_to_the_nearest_and_to_even(kind: str, xp: ModuleType):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(2000) * 10.0 ** rng.uniform(-30, 30, 2000)).astype(np.float32)
    low = {"bfloat16": 16, "tfloat32": 13}[kind]
    ties = (rng.integers(0x3F00_0000, 0x4100_0000, 200) >> low << low) + (1 << (low - 1))
    x = np.concatenate([x, ties.astype(np.uint32).view(np.float32), np.float32([0, -0.0, 1, -3])])
    bits = stored.packed(xp.asarray(x), kind)
    assert bits.dtype == BITS[kind]
    assert stored.all_finite(bits)
    for dtype in (np.float32, np.float64):
        back = stored.unpacked(bits, np.dtype(dtype))
        assert back.dtype == dtype
        np.testing.assert_array_equal(to_host(back), rounded(x, kind).astype(dtype))
    for bad in (np.inf, -np.inf, np.nan):
        assert not stored.all_finite(stored.packed(xp.asarray(np.float32([1, bad])), kind))


@pytest.mark.parametrize("columns", [1, 3, 8, 20])
@pytest.mark.parametrize("at_once", [None, 700])
@pytest.mark.parametrize(
    ("kept_in", "dtype"),
    [(None, np.float64), ("bfloat16", np.float32), ("bfloat16", np.float64),
     ("tfloat32", np.float32), ("tfloat32", np.float64)],
)  # fmt: skip
def test_products_of_blocks_stored_narrower(
    kept_in: str | None, dtype: Any, at_once: int | None, columns: int, xp: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Whole stacks, and some rows at a time."""
    if at_once is not None:
        monkeypatch.setattr(stored, "_AT_ONCE", dict.fromkeys(("numpy", "cupy"), at_once))
    rng = np.random.default_rng(columns)
    a = rng.standard_normal((3, 17, 13)).astype(np.float32)
    blocks, values = xp.asarray(a), a.astype(np.float64)
    if kept_in is not None:
        blocks, values = stored.packed(blocks, kept_in), rounded(a, kept_in)
    # float32 vectors are multiplied by 16 bits of them, by TF32 of 11.
    digits = 1e-13 if dtype == np.float64 else 4e-3 if kept_in == "tfloat32" else 1e-4
    for transpose_a in (False, True):
        left = values.swapaxes(1, 2) if transpose_a else values
        for transpose_b in (False, True):
            b = rng.standard_normal((3, left.shape[2], columns)).astype(dtype)
            x = xp.asarray(np.ascontiguousarray(b.swapaxes(1, 2)) if transpose_b else b)
            want, how = left @ b.astype(np.float64), (transpose_a, transpose_b)
            flags = dict(zip(("transpose_a", "transpose_b"), how, strict=True))
            got = batched.matmul(blocks, x, **flags)
            assert got.dtype == dtype
            np.testing.assert_allclose(to_host(got), want, rtol=0, atol=digits * 10)
            target = rng.standard_normal(want.shape).astype(dtype)
            for name, sign in (("add_to", 1), ("subtract_from", -1)):
                out = xp.asarray(target.copy())
                assert batched.matmul(blocks, x, **flags, **{name: out}) is out
                np.testing.assert_allclose(
                    to_host(out), target + sign * want, rtol=0, atol=digits * 10
                )


@pytest.mark.parametrize("columns", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("kept_in", KINDS)
def test_products_of_a_level(kept_in: str, columns: int, xp: ModuleType):
    rng = np.random.default_rng(columns)
    T, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 30, 9), (2, 9, 9)))
    order = xp.asarray(np.argsort(rng.random((4, 39)), axis=1))
    x, w = (rng.standard_normal((4, m, columns)).astype(np.float32) for m in (39, 9))
    packed = [stored.packed(xp.asarray(a), kept_in) for a in (T, B)]
    plain = [xp.asarray(rounded(a, kept_in).astype(np.float32)) for a in (T, B)]
    x, w = xp.asarray(x), xp.asarray(w)
    atol = 3e-2 if kept_in == "tfloat32" else 1e-3
    for how in (order, None):
        for product in (
            lambda T, B, how=how: level_products.restrict(T, how, x),
            lambda T, B, how=how: level_products.prolong(T, how, w),
            lambda T, B, how=how: level_products.prolong(T, how, w, add_to=x.copy()),
            lambda T, B: level_products.couple(B, w),
            lambda T, B: level_products.couple(B, w, add_to=w.copy()),
        ):
            got, want = product(*packed), product(*plain)
            assert got.dtype == np.float32
            np.testing.assert_allclose(to_host(got), to_host(want), rtol=0, atol=atol)


def test_on_a_gpu_bfloat16_is_read_as_it_is(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """By kernels and by cuBLAS: nothing is widened."""
    K = compressed("hss", "bfloat16", cupy)
    dense = to_host(K._exact().to_dense())

    def never(*args: Any) -> None:
        raise AssertionError("blocks are widened")

    monkeypatch.setattr(stored, "widened_matmul", never)
    for columns in (1, 20):
        v = np.random.default_rng(0).standard_normal((N, columns))
        got, want = K @ cupy.asarray(v), dense @ v
        np.testing.assert_allclose(to_host(got), want, rtol=0, atol=1e-4 * abs(want).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_far_field_alone_is_rounded_and_reported(scheme: str, kind: str, xp: ModuleType):
    K, wide = compressed(scheme, kind, xp), compressed(scheme, "float32", xp)
    assert K.dtype == np.float64
    assert K.structure.dtype == np.float32
    assert {a.dtype for a in far(K)} == {np.dtype(BITS[kind])}
    assert device_of(far(K)[0]) == K.device
    lost = sum(a.nbytes for a in far(wide)) - sum(a.nbytes for a in far(K))
    assert wide.nbytes - K.nbytes == lost
    assert lost == (sum(a.nbytes for a in far(K)) if kind == "bfloat16" else 0)
    for a, b in zip(far(K), far(wide), strict=True):
        np.testing.assert_array_equal(
            to_host(stored.unpacked(a, stored.FLOAT32)), rounded(to_host(b), kind)
        )
    if scheme != "lowrank":  # what is dense, is not
        np.testing.assert_array_equal(to_host(K.structure.D), to_host(wide.structure.D))
    assert K.num_stored == wide.num_stored
    assert f"in {kind}" in repr(K)
    error = dense_oracles.frobenius_error(to_host(K.to_dense()), EXACT)
    assert error <= 1.3 * K.report.error
    assert K.report.error <= 1.3 * error
    assert K.report.error <= 2e-2
    v = np.random.default_rng(0).standard_normal((N, 12))
    dense = to_host(K._exact().to_dense())
    atol = (2e-3 if kind == "tfloat32" else 1e-4) * np.linalg.norm(dense @ v, axis=0).max()
    np.testing.assert_allclose(to_host(K @ xp.asarray(v)), dense @ v, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tolerance_that_rounding_breaks_is_a_warning(kind: str):
    said = rf"rounding of {kind}, not the rank, is the floor; use storage_dtype float32"
    with pytest.warns(AccuracyWarning, match=said):
        K = compressed("hss", kind, rtol=1e-6)
    assert K.report.passes == 1  # no rank would mend it
    assert 1e-5 < K.report.error < 3e-3


def test_of_a_float32_matrix_too():
    K = gh.compress(
        EXACT.astype(np.float32), leaf_size=25, rtol=1e-2, storage_dtype="bfloat16", max_rank=N
    )
    v = np.random.default_rng(0).standard_normal((N, 2)).astype(np.float32)
    assert K.dtype == (K @ v).dtype == np.float32
    F = K.factorize(0.5)
    A = to_host(K._exact().to_dense()) + 0.5 * np.eye(N)
    assert dense_oracles.backward_error(A, F.solve(v), v) <= 1e-6


@pytest.mark.parametrize("kind", [*KINDS, "float32"])
@pytest.mark.parametrize("scheme", ["hss", "hodlr", "lowrank"])
def test_factors_are_exact_of_what_is_stored(scheme: str, kind: str):
    """A low-rank form's eigenvectors, rounded, are not orthonormal; its factor's are."""
    K = compressed(scheme, kind)
    A = K.scale * K.structure.matmat(np.eye(N))  # in float64, of what is stored
    A = (A + A.T) / 2 + 0.5 * np.eye(N)
    b = np.random.default_rng(0).standard_normal((N, 2))
    assert dense_oracles.backward_error(A, K.factorize(0.5).solve(b), b) <= 1e-14


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_and_diagonals(scheme: str, kind: str):
    K = compressed(scheme, kind)
    v = np.random.default_rng(0).standard_normal((N, 2))
    np.testing.assert_array_equal((-4 * K) @ v, -4 * (K @ v))
    assert {a.dtype for a in far(-4 * K)} == {np.dtype(BITS[kind])}
    size = np.linalg.norm(K @ v)
    rounding = 2e-3 if kind == "tfloat32" else 1e-6  # of the vectors
    assert np.linalg.norm((0.3 * K) @ v - 0.3 * (K @ v)) <= rounding * size  # not rounded again
    d = np.random.default_rng(1).random(N)
    plus = K + gh.Diagonal(d)
    np.testing.assert_allclose(plus.diagonal(), K.diagonal() + d, rtol=1e-6)
    assert np.linalg.norm(plus @ v - K @ v - d[:, None] * v) <= 1e-6 * size


def test_bad_types():
    for wrong in ("float16", "tf32", "bfloat"):
        with pytest.raises(DtypeError, match="storage_dtype must be float32"):
            compressed("hss", wrong)
    with pytest.raises(DtypeError, match="dtype must be float32 or float64"):
        compressed("hss", None, dtype="bfloat16")
    torch = pytest.importorskip("torch")
    assert compressed("hss", torch.bfloat16).structure.kept_in == "bfloat16"
    from eigenbasis_cases import operator

    with pytest.raises(ArgumentError, match="far field, which scheme 'kfe' has not"):
        gh.compress(operator("classifier"), "kfe", storage_dtype="bfloat16")


# --- files and ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded(scheme: str, kind: str, xp: ModuleType, tmp_path: Path):
    K = compressed(scheme, kind, xp)
    K.save(tmp_path / "K")
    again = gh.load(tmp_path / "K", device=K.device)
    assert again.dtype == np.float64
    for a, b in zip(K.structure.arrays(), again.structure.arrays(), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(to_host(a), to_host(b))
    v = xp.ones((N, 2))
    np.testing.assert_array_equal(to_host(again @ v), to_host(K @ v))
    assert contents(tmp_path / "K")[0]["version"] == 8  # which earlier ones refuse


def _nan(arrays: dict[str, Any]) -> None:
    arrays["T0"].flat[0] = 0x7FC0


def _wider(arrays: dict[str, Any]) -> None:
    arrays["D"] = arrays["D"].astype(np.float64)


@pytest.mark.parametrize("change", [_nan, _wider], ids=["not a number", "float64 beside it"])
def test_damaged_files_are_noticed(change: Any, tmp_path: Path):
    compressed("hss", "bfloat16").save(tmp_path / "K")
    with pytest.raises(FileFormatError, match=re.escape("T0 has")):
        gh.load(rewritten(tmp_path / "K", arrays=change))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["hss", "hodlr", "lowrank"])
def test_on_ranks(scheme: str, kind: str, tmp_path: Path):
    alone = compressed(scheme, kind)
    alone.save(tmp_path / "one")
    v = np.random.default_rng(0).standard_normal((N, 3))

    def job(comm: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            K = compressed(scheme, kind, comm=comm)
        K.save(tmp_path / "K")
        loaded = gh.load(tmp_path / "K", comm=comm)
        one = gh.load(tmp_path / "one", comm=comm)
        F = K.factorize(0.5)
        return K @ v, loaded @ v, one @ v, K.report.error, F.solve(v), K

    found = on_threads(2, job)
    for each in found:
        assert not isinstance(each, Exception), each
        product, again, one, error, x, K = each
        np.testing.assert_array_equal(product, found[0][0])
        np.testing.assert_array_equal(product, again)
        np.testing.assert_array_equal(x, found[0][4])
        np.testing.assert_allclose(one, alone @ v, rtol=0, atol=1e-3)
        assert {a.dtype for a in far(K)} == {np.dtype(BITS[kind])}
        if scheme == "hss":
            assert error == alone.report.error
            np.testing.assert_array_equal(product, alone @ v)
    whole = gh.load(tmp_path / "K") @ v  # on one rank, what two have saved
    np.testing.assert_allclose(whole, found[0][0], rtol=0, atol=1e-3)

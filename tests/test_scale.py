"""The scale of a matrix changes nothing but the scale of what it gives: 1e-290 to 1e300."""

from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.files.archive import Archive

N = 200
EXACT = toeplitz(N) + 2 * np.eye(N)
POWERS = [-963, -199, 0, 199, 996]
FORMS: dict[str, dict[str, Any]] = {
    "hss": {"scheme": "hss"},
    "hss, products": {"scheme": "hss", "sampler": "products"},
    "hss, entries": {"scheme": "hss", "sampler": "entries"},
    "fmm": {"scheme": "fmm", "budget": 0.2},
    "hodlr": {"scheme": "hodlr"},
    "lowrank": {"scheme": "lowrank"},
}


def compressed(power: int, form: str, stored: Any, xp: ModuleType = np, comm: Any = None) -> Any:
    return gh.compress(
        xp.asarray(np.ldexp(EXACT, power)), rtol=1e-4, leaf_size=25, max_rank=N,
        storage_dtype=stored, comm=comm, **FORMS[form],
    )  # fmt: skip


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", ["float32", "float64"])
def test_everything_has_the_scale(tmp_path: Path, stored: str, form: str, power: int):
    one = np.ldexp(1.0, power)
    K = compressed(power, form, stored)
    rounding = 1e-5 if stored == "float32" else 1e-12
    v = np.random.default_rng(0).standard_normal((N, 2))

    def close(got: Any, want: Any, more: float = 1.0) -> None:
        want = np.asarray(want)
        np.testing.assert_allclose(got, want, rtol=0, atol=more * rounding * abs(want).max())

    assert {a.dtype for a in K.structure.arrays()} == {np.dtype(stored)}
    dense = K.to_dense() / one
    assert dense_oracles.frobenius_error(dense, EXACT) <= 3e-4
    assert dense_oracles.frobenius_error(dense, EXACT) <= 2 * K.report.error
    norm = np.linalg.norm(EXACT)
    assert K.report.frobenius_norm / one == pytest.approx(norm, rel=0.1)
    assert K.diagonal().dtype == np.float64
    close(K.diagonal() / one, dense.diagonal())
    close(K.trace() / one, dense.trace())
    close((2 * K) @ v / one, 2 * dense @ v)
    close((K * 0.3) @ v / one, 0.3 * dense @ v)
    # Vectors of any size as well; stored blocks may have a smaller range.
    close(K @ (v / one), dense @ v)
    more = K + gh.Diagonal(np.full(N, one))
    close(more @ v / one, dense @ v + v)
    shifted = np.linalg.norm(EXACT + np.eye(N))
    assert more.report.frobenius_norm / one == pytest.approx(shifted, rel=0.1)
    assert more.report.error <= 3e-4
    F = K.factorize(one)
    A = dense + np.eye(N)
    assert dense_oracles.backward_error(A, F.solve(v) * one, v) <= 10 * rounding
    if form != "fmm":
        want = np.linalg.slogdet(A)[1] + N * power * np.log(2)
        assert F.logdet() == pytest.approx(want, abs=N * rounding, rel=1e-12)
    every = K.factorize(np.full(N, one))
    assert dense_oracles.backward_error(A, every.solve(v) * one, v) <= 10 * rounding
    K.save(tmp_path / "m.npz")
    again = gh.load(tmp_path / "m.npz")
    np.testing.assert_array_equal(again @ v, K @ v)


@pytest.mark.parametrize("form", ["hss", "lowrank"])
@pytest.mark.parametrize("power", [-199, 199])
def test_on_every_library(xp: ModuleType, form: str, power: int):
    one = np.ldexp(1.0, power)
    K = compressed(power, form, "float32", xp)
    v = np.random.default_rng(0).standard_normal((N, 2))
    np.testing.assert_allclose(to_host(K @ xp.asarray(v)) / one, EXACT @ v, atol=1e-2)
    np.testing.assert_allclose(to_host(K.diagonal()) / one, EXACT.diagonal(), rtol=1e-3)
    assert K.trace() / one == pytest.approx(np.trace(EXACT), rel=1e-3)


def test_a_large_diagonal_on_small_blocks():
    """Whose numbers the range of float32 does not hold at once."""
    K = compressed(-199, "hss", "float32") + gh.Diagonal(np.ones(N))
    np.testing.assert_allclose(K @ np.ones(N), 1.0, rtol=1e-6)
    assert K.report.error < 1e-6
    assert K.report.frobenius_norm == pytest.approx(N**0.5)


@pytest.mark.parametrize("size", [2, 3])
def test_on_ranks(size: int, tmp_path: Path):
    v = np.random.default_rng(0).standard_normal(N)
    alone = compressed(199, "hss", "float32")

    def job(comm: Any) -> tuple[Any, Any]:
        K = compressed(199, "hss", "float32", comm=comm)
        K.save(tmp_path / "spread.npz")
        return K @ v, gh.load(tmp_path / "spread.npz", comm=comm) @ v

    for got in on_threads(size, job):
        assert not isinstance(got, Exception), got
        for product in got:
            np.testing.assert_allclose(product, alone @ v, rtol=0, atol=1e-5 * abs(product).max())
    loaded = gh.load(tmp_path / "spread.npz")
    assert loaded.scale == alone.scale > 1


@pytest.mark.parametrize("scale", ["3.0", "-1.0", "0.0", '"x"', "1e999", "null"])
def test_a_file_with_a_scale_that_is_none(tmp_path: Path, scale: str):
    path = tmp_path / "m.npz"
    K = compressed(199, "hss", "float32")
    K.save(path)
    with open(path, "rb") as stream:
        archive = Archive(stream)
        header = archive.read("header").tobytes().decode()
    said = f'"scale": {K.scale!r}'
    assert said in header
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    changed = header.replace(said, f'"scale": {scale}')
    arrays["header"] = np.frombuffer(changed.encode(), np.uint8)
    np.savez(path, **arrays)
    with pytest.raises(FileFormatError):
        gh.load(path)

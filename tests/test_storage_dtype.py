"""Blocks stored narrower than the vectors: float32 in a float64 matrix."""

from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import toeplitz
from test_memory import estimates

import gpu_hodlr as gh
from gpu_hodlr import devices
from gpu_hodlr.compressed import structured
from gpu_hodlr.compression import memory
from gpu_hodlr.compression.options import Options
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError, DtypeError, MemoryEstimateError
from gpu_hodlr.schemes import SCHEMES, Sampling
from gpu_hodlr.structures import Structure

N = 200
OPTIONS: dict[str, Any] = {"leaf_size": 25, "rtol": 1e-10, "max_rank": N}


@pytest.fixture
def narrow(xp: ModuleType) -> gh.HSSMatrix:
    with pytest.warns(gh.errors.AccuracyWarning, match="exceeds rtol"):  # float32 has no 1e-10
        return gh.compress(xp.asarray(toeplitz(N)), storage_dtype="float32", **OPTIONS)


def test_half_the_bytes_and_the_rounding_in_the_report(xp: ModuleType, narrow: gh.HSSMatrix):
    wide = gh.compress(xp.asarray(toeplitz(N)), **OPTIONS)
    assert narrow.dtype == wide.dtype == np.float64
    assert {a.dtype for a in narrow.structure.arrays()} == {np.dtype(np.float32)}
    # of the floating numbers: indices take what they take
    numbers, wide_numbers = (sum(a.nbytes for a in K.structure.arrays()) for K in (narrow, wide))
    assert numbers / narrow.num_stored == 0.5 * wide_numbers / wide.num_stored == 4
    exact = toeplitz(N)
    error = dense_oracles.frobenius_error(to_host(narrow.to_dense()), exact)
    assert 1e-9 < error < 1e-6
    assert error <= narrow.report.error < 1e-6  # the report's has the vectors' rounding as well


def test_vectors_and_factor_are_float64(xp: ModuleType, narrow: gh.HSSMatrix):
    v = xp.asarray(np.random.default_rng(0).standard_normal((N, 3)))
    product = narrow @ v
    assert product.dtype == np.float64
    dense = to_host(narrow.to_dense())
    np.testing.assert_allclose(to_host(product), dense @ to_host(v), atol=1e-4)
    F = narrow.factorize(0.5)
    assert F.dtype == np.float64
    stored = to_host(gh.HSSMatrix(narrow.structure.astype(np.float64), narrow.report).to_dense())
    A = stored + 0.5 * np.eye(N)
    assert dense_oracles.backward_error(A, to_host(F.solve(v)), to_host(v)) <= 1e-13


@pytest.mark.parametrize("scheme", ["hss", "hodlr", "lowrank", "fmm"])
@pytest.mark.parametrize("kept_in", ["float32", "bfloat16"])
def test_a_factor_is_of_a_copy_for_which_there_must_be_room(
    scheme: str, kept_in: str, monkeypatch: pytest.MonkeyPatch
):
    given: dict[str, Any] = {"rtol": 1e-2, "leaf_size": 30, "max_rank": 300}
    K = gh.compress(toeplitz(300), scheme, storage_dtype=kept_in, **given)
    wide = K.structure.astype(np.float64)
    said = estimates(monkeypatch, structured)
    K.factorize(0.5)
    assert said == [sum(a.nbytes for a in wide.arrays())]
    monkeypatch.setattr(devices, "free_bytes", lambda device="cpu": said[0] - 1)
    refused = "a copy in float64 needs about .* lower max_rank, or use float32"
    with pytest.raises(MemoryEstimateError, match=refused):
        K.factorize(0.5)


def test_saved_and_loaded(xp: ModuleType, narrow: gh.HSSMatrix, tmp_path: Path):
    narrow.save(tmp_path / "m.npz")
    again = gh.load(tmp_path / "m.npz", device=narrow.device)
    assert again.dtype == np.float64
    assert again.structure.D.dtype == np.float32
    v = xp.ones(N)
    np.testing.assert_array_equal(to_host(again @ v), to_host(narrow @ v))


@pytest.mark.parametrize("scheme", ["hss", "hodlr", "lowrank", "fmm", "auto"])
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"storage_dtype": "float32"}])
def test_compressed_in_float32_and_measured_in_float64(
    scheme: str, options: dict[str, Any], xp: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """The operator's own numbers are never rounded; samples are, where rtol has room for it."""
    asked: list[Any] = []
    exact = toeplitz(N)
    matrix = xp.asarray(exact)

    class Counted(gh.Operator):
        def _matmat(self, v: Any) -> Any:
            asked.append(v.dtype)
            return matrix @ v

        def _block(self, rows: Any, cols: Any) -> Any:
            return matrix[xp.asarray(rows)[:, None], xp.asarray(cols)]

    made: list[Any] = []
    astype = Structure.astype

    def noted(structure: Structure, dtype: Any) -> Any:
        made.append(structure.dtype)
        return astype(structure, dtype)

    monkeypatch.setattr(Structure, "astype", noted)
    if scheme == "fmm":
        options = {**options, "budget": 0.3}
    for rtol, built in ((1e-4, np.float32), (1e-5, np.float64)):
        made.clear()
        op = Counted(N, np.float64, "cpu" if xp is np else "cuda")
        K = gh.compress(op, scheme, rtol=rtol, leaf_size=25, max_rank=N, **options)
        assert {np.dtype(d) for d in asked} == {np.dtype(np.float64)}
        assert made[0] == built
        error = dense_oracles.frobenius_error(to_host(K.to_dense()), exact)
        assert error <= 3 * rtol
        assert error <= 1.5 * K.report.error + 1e-7


def test_what_float32_needs_of_memory():
    op = gh.DenseOperator(toeplitz(N))

    def needed(**given: Any) -> int:
        values: dict[str, Any] = dict.fromkeys(("atol", "damping", "dtype", "storage_dtype"))
        values |= {"rtol": 1e-3, "max_rank": N, "leaf_size": 25, "ordering": "natural", **given}
        asked = Options("hss", budget=0.0, seed=0, device=None, sampler="auto", **values)
        return memory.needed(op, asked, SCHEMES["hss"], Sampling.PRODUCTS, 100)

    assert needed(dtype="float32") == needed(storage_dtype="bfloat16") == needed() / 2
    assert needed(dtype="float32", damping=0.1) == needed()


def test_bad_storage_dtypes():
    matrix = toeplitz(30).astype(np.float32)
    with pytest.raises(ArgumentError, match=r"storage_dtype float64 is wider.*float32"):
        gh.compress(matrix, leaf_size=10, storage_dtype=np.float64)
    for wrong in ("float16", int, "no dtype"):
        with pytest.raises(DtypeError, match="storage_dtype must be float32 or float64"):
            gh.compress(matrix, leaf_size=10, storage_dtype=wrong)

"""Right-hand sides, indices, damping and memory: what bad values get."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from test_bad_input import INF, NAN, refused

import gpu_hodlr as gh
from gpu_hodlr import devices
from gpu_hodlr.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    GpuHodlrError,
    MemoryEstimateError,
    ShapeError,
)

OPERATOR = gh.DenseOperator(toeplitz(20))
COMPRESSED = gh.compress(OPERATOR, leaf_size=5)
FACTOR = COMPRESSED.factorize(0.1)

DOORS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "operator": ("v", OPERATOR.matmat),
    "operator @": ("v", lambda v: OPERATOR @ v),
    "kernel": ("v", gh.KernelOperator(np.linspace(0, 1, 20)).matmat),
    "compressed": ("v", COMPRESSED.matmat),
    "compressed @": ("v", lambda v: COMPRESSED @ v),
    "solve": ("b", FACTOR.solve),
    "sqrt_matmat": ("z", FACTOR.sqrt_matmat),
    "sqrt_solve": ("z", FACTOR.sqrt_solve),
    "sqrt_matmat, transposed": ("z", lambda z: FACTOR.sqrt_matmat(z, transpose=True)),
    "sqrt_solve, transposed": ("z", lambda z: FACTOR.sqrt_solve(z, transpose=True)),
    "cg": ("b", lambda b: gh.cg(OPERATOR, b)),
}

VECTORS: dict[str, tuple[type[GpuHodlrError], Any, tuple[str, ...]]] = {
    "too short": (ShapeError, np.ones(19), ("(20,) or (20, k)", "(19,)")),
    "too long": (ShapeError, np.ones((21, 2)), ("(20,) or (20, k)", "(21, 2)")),
    "transposed": (ShapeError, np.ones((2, 20)), ("(20, k)", "(2, 20)")),
    "three axes": (ShapeError, np.ones((20, 2, 2)), ("(20, k)", "(20, 2, 2)")),
    "a number": (ShapeError, np.array(1.0), ("(20, k)", "()")),
    "integer": (DtypeError, np.ones(20, int), ("float32 or float64", "int64")),
    "complex": (DtypeError, np.ones(20, complex), ("float32 or float64", "complex128")),
    "half": (DtypeError, np.ones(20, np.float16), ("float32 or float64", "float16")),
    "objects": (DtypeError, np.ones(20, object), ("float32 or float64", "object")),
    "text": (DtypeError, np.full(20, "1"), ("float32 or float64", "<U1")),
    "masked": (
        ArgumentError,
        np.ma.masked_array(np.ones(20), np.arange(20) < 2),
        ("is a masked array with 2 masked entries", "filled(0.0)"),
    ),
    "a row as np.matrix": (
        ShapeError,
        np.ones((1, 20)).view(np.matrix),
        ("(20, k)", "(1, 20)"),
    ),
    "a list": (DtypeError, [1.0] * 20, ("NumPy, CuPy or torch", "list")),
    "none": (DtypeError, None, ("NumPy, CuPy or torch", "NoneType")),
    "NaN": (ArgumentError, np.full((20, 2), NAN), ("40 entries", "NaN or infinite")),
    "infinity": (ArgumentError, np.append(np.ones(19), INF), ("1 entries", "NaN or infinite")),
    "infinities that cancel": (
        ArgumentError,
        np.append(np.ones(18), [INF, -INF]),
        ("2 entries", "NaN or infinite"),
    ),
}


@pytest.mark.parametrize(("kind", "vector", "words"), VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize(("name", "door"), DOORS.values(), ids=DOORS)
def test_right_hand_sides(
    name: str,
    door: Callable[[Any], Any],
    kind: type[GpuHodlrError],
    vector: Any,
    words: tuple[str, ...],
):
    message = refused(kind, lambda: door(vector), *words)
    assert re.match(rf"{name}\b", message)


def test_finite_vectors_whose_sum_overflows_are_fine():
    v = np.full(20, 1e307)
    assert np.isfinite(1e-300 * (COMPRESSED @ v)).all()


@pytest.mark.parametrize("dtype", ["int64", "complex64", "bfloat16", "float16", "bool"])
def test_torch_dtypes(dtype: str):
    torch = pytest.importorskip("torch")
    v = torch.ones(20, dtype=getattr(torch, dtype))
    refused(DtypeError, lambda: COMPRESSED @ v, "v", "float32 or float64", dtype)


def test_torch_layouts():
    torch = pytest.importorskip("torch")
    v = torch.ones(20, 2, dtype=torch.float64).to_sparse()
    refused(DtypeError, lambda: COMPRESSED @ v, "v must be a dense tensor", "sparse_coo", "dense()")


def test_torch_on_another_device():
    torch = pytest.importorskip("torch")
    v = torch.ones(20, dtype=torch.float64, device="meta")
    refused(DeviceError, lambda: COMPRESSED @ v, "v", "meta")


def test_values_too_large_for_the_matrix():
    """Finite in float64, infinite in the float32 of the matrix."""
    small = gh.compress(toeplitz(20).astype(np.float32), rtol=1e-3)
    refused(ArgumentError, lambda: small @ np.full(20, 1e300), "v ", "float32")


INDICES: dict[str, tuple[type[GpuHodlrError], Any, Any, tuple[str, ...]]] = {
    "too large": (ArgumentError, [0, 20], [1], ("rows", "0 .. 19", "20")),
    "negative": (ArgumentError, [0], [-1, 3], ("cols", "0 .. 19", "-1")),
    "floats": (DtypeError, [0.0], [1], ("rows", "integers", "float64")),
    "booleans": (DtypeError, [0], np.ones(20, bool), ("cols", "integers", "bool")),
    "one 2-D": (ShapeError, [[0]], [1], ("1-D or 2-D", "(1, 1)", "(1,)")),
    "numbers": (ShapeError, 0, 1, ("1-D or 2-D", "()")),
    "3-D": (ShapeError, [[[0]]], [[[1]]], ("1-D or 2-D", "(1, 1, 1)")),
    "batches differ": (ShapeError, [[0], [1]], [[1]], ("same length", "2, 1")),
}


@pytest.mark.parametrize(("kind", "rows", "cols", "words"), INDICES.values(), ids=INDICES)
def test_indices(kind: type[GpuHodlrError], rows: Any, cols: Any, words: tuple[str, ...]):
    refused(kind, lambda: OPERATOR.entries(rows, cols), *words)


NUMBERS: dict[str, tuple[type[GpuHodlrError], Any, tuple[str, ...]]] = {
    "negative": (ArgumentError, -0.5, (">= 0", "-0.5")),
    "NaN": (ArgumentError, NAN, (">= 0", "nan")),
    "infinite": (ArgumentError, INF, (">= 0", "inf")),
    "text": (DtypeError, "0.5", ("real number", "str")),
    "none": (DtypeError, None, ("real number", "NoneType")),
    "complex": (DtypeError, 1j, ("real number", "complex")),
}


@pytest.mark.parametrize(("kind", "value", "words"), NUMBERS.values(), ids=NUMBERS)
def test_damping_and_tolerance(kind: type[GpuHodlrError], value: Any, words: tuple[str, ...]):
    b = np.ones(20)
    refused(kind, lambda: COMPRESSED.factorize(value), "damping", *words)
    refused(kind, lambda: COMPRESSED.factorize(damping=value), "damping", *words)
    refused(kind, lambda: gh.cg(OPERATOR, b, damping=value), "damping", *words)
    refused(kind, lambda: gh.cg(OPERATOR, b, rtol=value), "rtol", *words)


def test_numpy_numbers_are_numbers():
    assert COMPRESSED.factorize(np.float32(0.5)).damping == 0.5
    assert COMPRESSED.factorize(np.int64(2)).damping == 2.0
    assert gh.compress(toeplitz(20), rtol=np.float32(0.5), max_rank=np.int32(5)).report.rtol == 0.5


CG: dict[str, tuple[type[GpuHodlrError], Callable[[], Any], tuple[str, ...]]] = {
    "no matrix": (DtypeError, lambda: gh.cg("K", np.ones(20)), ("must be an Operator", "str")),
    "M is none": (
        DtypeError,
        lambda: gh.cg(OPERATOR, np.ones(20), M="F"),
        ("M must", "solve", "matmat", "str"),
    ),
    "M is an array of another order": (
        ShapeError,
        lambda: gh.cg(OPERATOR, np.ones(20), M=np.eye(21)),
        ("M must", "(20, 20)", "(21, 21)"),
    ),
    "x0 of another order": (
        ShapeError,
        lambda: gh.cg(OPERATOR, np.ones(20), x0=np.ones(19)),
        ("x0 must", "(20,)", "(19,)"),
    ),
    "x0 of other columns": (
        ShapeError,
        lambda: gh.cg(OPERATOR, np.ones((20, 3)), x0=np.ones((20, 2))),
        ("x0 must be like b", "3 columns", "got 2"),
    ),
    "x0 is NaN": (
        ArgumentError,
        lambda: gh.cg(OPERATOR, np.ones(20), x0=np.full(20, np.nan)),
        ("x0 has 20 entries that are NaN",),
    ),
    "callback": (
        DtypeError,
        lambda: gh.cg(OPERATOR, np.ones(20), callback=3),
        ("callback must be callable", "int"),
    ),
    "M is of another order": (
        ShapeError,
        lambda: gh.cg(OPERATOR, np.ones(20), M=gh.compress(toeplitz(21)).factorize()),
        ("M must", "(20, 20)", "(21, 21)"),
    ),
    "damping -1": (
        ArgumentError,
        lambda: gh.cg(OPERATOR, np.ones(20), damping=-1.0),
        ("damping must be >= 0", "-1.0"),
    ),
    "maxiter 0": (
        ArgumentError,
        lambda: gh.cg(OPERATOR, np.ones(20), maxiter=0),
        ("maxiter", ">= 1", "0"),
    ),
    "maxiter None": (
        DtypeError,
        lambda: gh.cg(OPERATOR, np.ones(20), maxiter=None),
        ("maxiter", "NoneType"),
    ),
    "num 0": (ArgumentError, lambda: FACTOR.sample(0), ("num", ">= 1", "0")),
    "num 2.5": (DtypeError, lambda: FACTOR.sample(2.5), ("num", "float")),
    "seed -1": (ArgumentError, lambda: FACTOR.sample(1, seed=-1), ("seed", "-1")),
}


@pytest.mark.parametrize(("kind", "call", "words"), CG.values(), ids=CG)
def test_cg_and_samples(kind: type[GpuHodlrError], call: Callable[[], Any], words: tuple[str, ...]):
    refused(kind, call, *words)


# --- memory ----------------------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_bytes", lambda device="cpu": 10_000)


@pytest.mark.usefixtures("little_memory")
def test_memory_is_estimated_before_anything_is_allocated():
    """The message has the size needed, the size there, and what to lower."""
    words = ("GB", "1e-05 GB are free", "lower")
    refused(MemoryEstimateError, lambda: gh.compress(OPERATOR, leaf_size=5), "leaf_size", *words)
    big = gh.KernelOperator(np.linspace(0, 1, 500))
    refused(MemoryEstimateError, big.to_dense, "dense 500 x 500", *words)
    one_leaf = gh.FunctionOperator(500, matmat=lambda v: v)
    refused(MemoryEstimateError, one_leaf.diagonal, "diagonal", *words)


def test_memory_of_a_dense_form(monkeypatch: pytest.MonkeyPatch):
    K = gh.compress(toeplitz(200), leaf_size=20)
    monkeypatch.setattr(devices, "free_bytes", lambda device="cpu": 10_000)
    refused(MemoryEstimateError, K.to_dense, "dense 200 x 200", "are free")


def test_memory_of_a_network(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    from network_cases import case

    model, inputs, targets = case("deep", "cross_entropy")
    monkeypatch.setattr(devices, "free_bytes", lambda device="cpu": 1_000)
    refused(
        MemoryEstimateError,
        lambda: gh.GGNOperator(model, "cross_entropy", inputs, targets),
        "GB",
        "are free",
        "number of samples",
    )


def test_a_compression_at_every_stage_of_memory(monkeypatch: pytest.MonkeyPatch):
    """With little memory it is refused before the operator is used at all."""
    asked = []

    def matmat(v: np.ndarray) -> np.ndarray:
        asked.append(v.shape)
        return v

    op = gh.FunctionOperator(1000, matmat=matmat)
    monkeypatch.setattr(devices, "free_bytes", lambda device="cpu": 100_000)
    refused(MemoryEstimateError, lambda: gh.compress(op), "order 1000", "leaf_size")
    assert not asked


def test_free_bytes_is_plausible():
    assert 1e6 < devices.free_bytes() <= 1 << 62


# --- devices ---------------------------------------------------------------------------------


def test_resolve_device():
    assert devices.resolve_device(None, np.ones(2)) == "cpu"
    assert devices.resolve_device("cpu") == "cpu"
    for wrong in ("gpu", "cuda:", "cuda:one", "cpu:1", "cuda:0:0", 0, "", b"cpu", np.dtype("f4")):
        with pytest.raises(ArgumentError, match="device must be"):
            devices.resolve_device(wrong)

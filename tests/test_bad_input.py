"""What bad input gets: a package exception that is also the built-in one, named and explained."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matrix_cases import products_only, toeplitz

import gpu_hodlr as gh
from gpu_hodlr import devices
from gpu_hodlr.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    FileFormatError,
    GpuHodlrError,
    MemoryEstimateError,
    NotPositiveDefiniteError,
    ShapeError,
    UnsupportedLayerError,
)

NAN, INF = float("nan"), float("inf")


def refused(kind: type[GpuHodlrError], call: Callable[[], Any], *words: str) -> str:
    """The call raises `kind`, and the message, which is returned, has all the words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    return message


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (ArgumentError, ValueError),
        (ShapeError, ValueError),
        (DtypeError, TypeError),
        (UnsupportedLayerError, TypeError),
        (DeviceError, RuntimeError),
        (MemoryEstimateError, RuntimeError),
        (FileFormatError, ValueError),
        (NotPositiveDefiniteError, np.linalg.LinAlgError),
    ],
)
def test_exceptions_are_builtin_ones_too(kind: type, builtin: type):
    assert issubclass(kind, GpuHodlrError)
    assert issubclass(kind, builtin)


# --- dense matrices --------------------------------------------------------------------------


def with_entry(value: float, i: int = 3, j: int = 5) -> np.ndarray:
    a = toeplitz(20)
    a[i, j] = a[j, i] = value
    return a


DENSE: dict[str, tuple[type[GpuHodlrError], Any, tuple[str, ...]]] = {
    "not square": (ShapeError, np.ones((3, 4)), ("array", "square", "(3, 4)")),
    "a vector": (ShapeError, np.ones(3), ("array", "square", "(3,)")),
    "a stack": (ShapeError, np.ones((2, 2, 2)), ("array", "square", "(2, 2, 2)")),
    "of order 0": (ShapeError, np.ones((0, 0)), ("at least 2 x 2", "0 x 0")),
    "of order 1": (ShapeError, np.ones((1, 1)), ("at least 2 x 2", "1 x 1")),
    "integer": (DtypeError, np.eye(3, dtype=int), ("array", "float32 or float64", "int64")),
    "boolean": (DtypeError, np.eye(3, dtype=bool), ("array", "float32 or float64", "bool")),
    "complex": (DtypeError, np.eye(3, dtype=complex), ("array", "float32", "complex128")),
    "half": (DtypeError, np.eye(3, dtype=np.float16), ("array", "float32", "float16")),
    "objects": (DtypeError, np.eye(3).astype(object), ("array", "float32", "object")),
    "foreign bytes": (DtypeError, np.eye(3, dtype=">i8"), ("array", "float32", ">i8")),
    "masked": (
        ArgumentError,
        np.ma.masked_less(toeplitz(20), 0.1),
        ("array is a masked array", "masked entries", "filled"),
    ),
    "a list": (DtypeError, [[1.0, 0.0], [0.0, 1.0]], ("list",)),
    "NaN": (ArgumentError, with_entry(NAN), ("array", "2 entries", "NaN or infinite")),
    "infinity": (ArgumentError, with_entry(INF), ("array", "2 entries", "NaN or infinite")),
    "infinities that cancel": (
        ArgumentError,
        with_entry(INF) - with_entry(INF, 1, 2),
        ("array", "NaN or infinite"),
    ),
    "not symmetric": (
        ArgumentError,
        toeplitz(20) + np.triu(np.full((20, 20), 0.25), 1),
        ("array", "symmetric", "0.25"),
    ),
    "skew": (ArgumentError, np.array([[0.0, 1.0], [-1.0, 0.0]]), ("array", "symmetric", "2")),
}


@pytest.mark.parametrize(("kind", "array", "words"), DENSE.values(), ids=DENSE)
def test_dense(kind: type[GpuHodlrError], array: Any, words: tuple[str, ...]):
    refused(kind, lambda: gh.DenseOperator(array), *words)
    refused(kind, lambda: gh.compress(array), *words)


def test_slightly_nonsymmetric():
    """Ten thousand roundings apart is refused, in float32 a hundred are not."""
    a = toeplitz(50)
    a[2, 9] *= 1 + 1e-11
    refused(ArgumentError, lambda: gh.DenseOperator(a), "symmetric")
    gh.DenseOperator(a.astype(np.float32))


@pytest.mark.parametrize("op", [None, 3.0, "matrix", [[1.0]], object(), {"shape": (4, 4)}])
def test_what_is_no_matrix(op: Any):
    refused(DtypeError, lambda: gh.compress(op), "op must be", type(op).__name__)


# --- kernels ---------------------------------------------------------------------------------

POINTS = np.random.default_rng(0).random((30, 2))

KERNEL: dict[str, tuple[type[GpuHodlrError], Callable[[], Any], tuple[str, ...]]] = {
    "no dimension": (ShapeError, lambda: {"points": np.ones((5, 0))}, ("points", "(5, 0)")),
    "three axes": (ShapeError, lambda: {"points": np.ones((5, 2, 2))}, ("points", "(5, 2, 2)")),
    "one number": (ShapeError, lambda: {"points": np.array(1.0)}, ("points", "()")),
    "one point": (ShapeError, lambda: {"points": np.ones((1, 2))}, ("1 x 1",)),
    "no point": (ShapeError, lambda: {"points": np.ones((0, 2))}, ("0 x 0",)),
    "integers": (DtypeError, lambda: {"points": np.ones((5, 2), int)}, ("points", "int64")),
    "complex": (DtypeError, lambda: {"points": np.ones((5, 2), complex)}, ("points", "complex")),
    "a list": (DtypeError, lambda: {"points": [[1.0], [2.0]]}, ("points", "list")),
    "NaN": (ArgumentError, lambda: {"points": POINTS * NAN}, ("points", "60 entries", "NaN")),
    "infinity": (ArgumentError, lambda: {"points": POINTS / 0.0}, ("points", "infinite")),
    "unknown": (ArgumentError, lambda: {"kernel": "cubic"}, ("kernel", "matern52", "'cubic'")),
    "no name": (ArgumentError, lambda: {"kernel": None}, ("kernel", "None")),
    "length 0": (ArgumentError, lambda: {"lengthscale": 0.0}, ("lengthscale", "0.0")),
    "length < 0": (ArgumentError, lambda: {"lengthscale": -1}, ("lengthscale", "-1")),
    "length NaN": (ArgumentError, lambda: {"lengthscale": NAN}, ("lengthscale", "nan")),
    "length inf": (ArgumentError, lambda: {"lengthscale": INF}, ("lengthscale", "inf")),
    "length text": (DtypeError, lambda: {"lengthscale": "1"}, ("lengthscale", "str")),
    "overflow": (ArgumentError, lambda: {"lengthscale": 1e-200}, ("points", "length scales")),
    "nugget < 0": (ArgumentError, lambda: {"nugget": -0.5}, ("nugget", "-0.5")),
    "nugget NaN": (ArgumentError, lambda: {"nugget": NAN}, ("nugget", "nan")),
    "nugget None": (DtypeError, lambda: {"nugget": None}, ("nugget", "NoneType")),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("kind", "arguments", "words"), KERNEL.values(), ids=KERNEL)
def test_kernel(kind: type[GpuHodlrError], arguments: Any, words: tuple[str, ...]):
    given = {"points": POINTS, **arguments()}
    refused(kind, lambda: gh.KernelOperator(**given), *words)


# --- functions -------------------------------------------------------------------------------

A = toeplitz(20)


def one_off(v: np.ndarray) -> np.ndarray:
    return (A @ v)[:-1]


FUNCTION: dict[str, tuple[type[GpuHodlrError], Callable[[], Any], tuple[str, ...]]] = {
    "neither": (ArgumentError, lambda: gh.FunctionOperator(20), ("matmat or entries", "neither")),
    "diagonal alone": (
        ArgumentError,
        lambda: gh.FunctionOperator(20, diagonal=lambda: np.ones(20)),
        ("matmat or entries",),
    ),
    "not callable": (DtypeError, lambda: gh.FunctionOperator(20, matmat=A), ("matmat", "ndarray")),
    "entries not callable": (
        DtypeError,
        lambda: gh.FunctionOperator(20, entries=A),
        ("entries", "callable", "ndarray"),
    ),
    "order 1": (ShapeError, lambda: gh.FunctionOperator(1, matmat=one_off), ("1 x 1",)),
    "order 0": (ShapeError, lambda: gh.FunctionOperator(0, matmat=one_off), ("0 x 0",)),
    "order -3": (ShapeError, lambda: gh.FunctionOperator(-3, matmat=one_off), ("-3",)),
    "order 2.5": (DtypeError, lambda: gh.FunctionOperator(2.5, matmat=one_off), ("n ", "float")),
    "dtype": (
        DtypeError,
        lambda: gh.FunctionOperator(20, matmat=one_off, dtype=int),
        ("dtype", "float32 or float64", "int"),
    ),
    "dtype name": (
        DtypeError,
        lambda: gh.FunctionOperator(20, matmat=one_off, dtype="float3"),
        ("dtype", "float3"),
    ),
    "matmat's shape": (
        ShapeError,
        lambda: gh.FunctionOperator(20, matmat=one_off) @ np.ones((20, 2)),
        ("matmat", "(20, 2)", "(19, 2)"),
    ),
    "matmat's NaN": (
        ArgumentError,
        lambda: gh.FunctionOperator(20, matmat=lambda v: NAN * v) @ np.ones(20),
        ("result of matmat", "20 entries", "NaN"),
    ),
    "matmat's type": (
        DtypeError,
        lambda: gh.FunctionOperator(20, matmat=lambda v: v.tolist()) @ np.ones(20),
        ("result of matmat", "list"),
    ),
    "entries' shape": (
        ShapeError,
        lambda: gh.FunctionOperator(20, entries=lambda r, c: A).entries([1], [2, 3]),
        ("entries", "(1, 2)", "(20, 20)"),
    ),
    "entries' NaN": (
        ArgumentError,
        lambda: gh.compress(
            gh.FunctionOperator(20, entries=lambda r, c: np.full((len(r), len(c)), NAN))
        ),
        ("result of entries", "NaN"),
    ),
    "entries' dtype": (
        DtypeError,
        lambda: gh.FunctionOperator(
            20, entries=lambda r, c: np.ones((len(r), len(c)), int)
        ).to_dense(),
        ("result of entries", "int64"),
    ),
    "diagonal's shape": (
        ShapeError,
        lambda: gh.FunctionOperator(
            20, matmat=lambda v: v, diagonal=lambda: np.ones(19)
        ).diagonal(),
        ("diagonal", "(20,)", "(19,)"),
    ),
}


@pytest.mark.parametrize(("kind", "call", "words"), FUNCTION.values(), ids=FUNCTION)
def test_function(kind: type[GpuHodlrError], call: Callable[[], Any], words: tuple[str, ...]):
    refused(kind, call, *words)


# --- arguments of compress -------------------------------------------------------------------

COMPRESS: dict[str, tuple[type[GpuHodlrError], dict[str, Any], tuple[str, ...]]] = {
    "scheme": (ArgumentError, {"scheme": "hmatrix"}, ("scheme", "hss", "'hmatrix'")),
    "ordering": (ArgumentError, {"ordering": "sorted"}, ("ordering", "natural", "'sorted'")),
    "sampler": (ArgumentError, {"sampler": "guess"}, ("sampler", "entries", "'guess'")),
    "geometric": (ArgumentError, {"ordering": "geometric"}, ("'geometric'", "points")),
    "rtol < 0": (ArgumentError, {"rtol": -1e-3}, ("rtol", ">= 0", "-0.001")),
    "rtol NaN": (ArgumentError, {"rtol": NAN}, ("rtol", "nan")),
    "rtol inf": (ArgumentError, {"rtol": INF}, ("rtol", "inf")),
    "rtol text": (DtypeError, {"rtol": "1e-3"}, ("rtol", "str")),
    "rtol complex": (DtypeError, {"rtol": 1e-3 + 0j}, ("rtol", "complex")),
    "max_rank 0": (ArgumentError, {"max_rank": 0}, ("max_rank", ">= 1", "0")),
    "max_rank < 0": (ArgumentError, {"max_rank": -5}, ("max_rank", ">= 1", "-5")),
    "max_rank 2.0": (DtypeError, {"max_rank": 2.0}, ("max_rank", "integer", "float")),
    "max_rank '8'": (DtypeError, {"max_rank": "8"}, ("max_rank", "str")),
    "leaf_size 0": (ArgumentError, {"leaf_size": 0}, ("leaf_size", ">= 1", "0")),
    "leaf_size True": (DtypeError, {"leaf_size": True}, ("leaf_size", "bool")),
    "leaf_size 8.0": (DtypeError, {"leaf_size": 8.0}, ("leaf_size", "float")),
    "dtype": (DtypeError, {"dtype": np.int32}, ("dtype", "float32 or float64", "int32")),
    "complex dtype": (DtypeError, {"dtype": complex}, ("dtype", "complex")),
    "device": (ArgumentError, {"device": "gpu"}, ("device", "'cuda'", "'gpu'")),
    "cuda": (DeviceError, {"device": "cuda"}, ("'cuda'", "device='cpu'")),
    "seed -1": (ArgumentError, {"seed": -1}, ("seed", "-1")),
    "seed 1.5": (DtypeError, {"seed": 1.5}, ("seed", "float")),
    "seed None": (DtypeError, {"seed": None}, ("seed", "NoneType")),
}


@pytest.mark.parametrize(("kind", "options", "words"), COMPRESS.values(), ids=COMPRESS)
def test_compress(kind: type[GpuHodlrError], options: dict[str, Any], words: tuple[str, ...]):
    """Before any heavy work: no product and no entry has been asked for."""
    if options.get("device") == "cuda":
        try:
            devices.resolve_device("cuda")
        except DeviceError:
            pass
        else:
            pytest.skip("this machine has a usable CUDA device")
    asked = []

    def matmat(v: np.ndarray) -> np.ndarray:
        asked.append("matmat")
        return A @ v

    def entries(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        asked.append("entries")
        return A[np.ix_(rows, cols)]

    op = gh.FunctionOperator(20, matmat=matmat, entries=entries)
    refused(kind, lambda: gh.compress(op, **options), *words)
    assert not asked


@pytest.mark.parametrize("sampler", ["entries", "products+entries"])
def test_samplers_that_need_entries(sampler: str):
    op = products_only(A)
    refused(ArgumentError, lambda: gh.compress(op, sampler=sampler), f"'{sampler}'", "entries")


@pytest.mark.parametrize("sampler", ["products", "products+entries"])
def test_samplers_that_need_products(sampler: str):
    op = gh.FunctionOperator(20, entries=lambda r, c: A[np.ix_(r, c)])
    refused(ArgumentError, lambda: gh.compress(op, sampler=sampler), f"'{sampler}'", "products")


@pytest.mark.parametrize("ordering", ["gram", "angle"])
def test_orderings_that_need_entries(ordering: str):
    op = products_only(A)
    refused(ArgumentError, lambda: gh.compress(op, ordering=ordering, leaf_size=4), "need entries")

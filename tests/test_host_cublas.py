"""The stand-in for cuBLAS and cuSOLVER (tests/host_cupy/host_cublas.cpp) against NumPy."""

import ctypes
import importlib
import itertools
from types import ModuleType

import numpy as np
import pytest
from host_cupy.blas import Blas, address
from host_cupy.fixtures import host_library_folder, stand_in  # noqa: F401

from gpu_hodlr.batched import stored


@pytest.fixture
def cp(stand_in) -> ModuleType:  # noqa: F811
    return stand_in.cupy


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def blas(cp, request) -> Blas:
    return Blas(cp, request.param)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize(("op_a", "op_b"), list(itertools.product((0, 1), repeat=2)))
def test_gemm(blas, op_a: int, op_b: int, beta: float) -> None:
    m, n, k, count = 5, 3, 4, 2
    a = blas.random(count, *((m, k) if op_a == 0 else (k, m)))
    b = blas.random(count, *((k, n) if op_b == 0 else (n, k)))
    c = blas.random(count, m, n) if beta else np.full((count, m, n), np.nan, blas.dtype)
    A, B, C = blas.store(a, 1, 3), blas.store(b, 2, 0), blas.store(c, 3, 1)
    status = blas(
        "gemmStridedBatched", op_a, op_b, m, n, k, blas.number(-2.0), address(A[0]), *A[1:],
        address(B[0]), *B[1:], blas.number(beta), address(C[0]), *C[1:], count,
    )  # fmt: skip
    assert status == 0
    product = (a if op_a == 0 else a.swapaxes(1, 2)) @ (b if op_b == 0 else b.swapaxes(1, 2))
    want = -2 * product + (beta * c if beta else 0)
    np.testing.assert_allclose(blas.load(C, c.shape), want, rtol=blas.rtol, atol=blas.rtol)
    assert np.isnan(C[0].get()).sum() == C[0].size - c.size
    one = blas.store(np.zeros((1, m, n)), 0, 0)
    status = blas(
        "gemm_v2", op_a, op_b, m, n, k, blas.number(1.0), address(A[0]), A[1], address(B[0]), B[1],
        blas.number(0.0), address(one[0]), m,
    )  # fmt: skip
    assert status == 0
    np.testing.assert_allclose(
        blas.load(one, (1, m, n))[0], product[0], rtol=blas.rtol, atol=blas.rtol
    )


@pytest.mark.parametrize(("op_a", "op_b"), list(itertools.product((0, 1), repeat=2)))
def test_gemm_of_bfloat16_and_in_tf32(cp, op_a: int, op_b: int) -> None:
    """bfloat16 with sums in float32; float32 of which 10 bits behind the point are multiplied."""
    blas = Blas(cp, np.float32)
    m, n, k, count = 5, 3, 4, 2
    a = blas.random(count, *((m, k) if op_a == 0 else (k, m)))
    b = blas.random(count, *((k, n) if op_b == 0 else (n, k)))
    for kind, of_type, compute in (("bfloat16", 14, 68), ("tfloat32", 0, 77)):
        bits = [stored.packed(x, kind) for x in (a, b)]
        left, right = (stored.unpacked(x, np.dtype(np.float64)) for x in bits)
        if op_a:
            left = left.swapaxes(1, 2)
        product = left @ (right.swapaxes(1, 2) if op_b else right)
        A, B = (_columns(cp, x) for x in (bits if kind == "bfloat16" else (a, b)))
        C = cp.asarray(np.full((count, n, m), np.nan, np.float32))
        status = blas.library.cublasGemmStridedBatchedEx(
            blas.handle, op_a, op_b, m, n, k, _one(), address(A), of_type, A.shape[2],
            ctypes.c_longlong(A[0].size), address(B), of_type, B.shape[2],
            ctypes.c_longlong(B[0].size), _zero(), address(C), 0, m, ctypes.c_longlong(m * n),
            count, compute, -1,
        )  # fmt: skip
        assert status == 0
        np.testing.assert_allclose(C.get().swapaxes(1, 2), product, rtol=1e-6, atol=1e-6)


def _columns(cp: ModuleType, x: np.ndarray):
    """A stack column by column."""
    return cp.asarray(np.ascontiguousarray(x.swapaxes(1, 2)))


def _one():
    return ctypes.byref(ctypes.c_float(1.0))


def _zero():
    return ctypes.byref(ctypes.c_float(0.0))


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize(("op", "incx", "incy"), list(itertools.product((0, 1), (1, 3), (1, 2))))
def test_gemv(blas, op: int, incx: int, incy: int, beta: float) -> None:
    m, n, count = 5, 3, 4
    a = blas.random(count, m, n)
    x = blas.random(count, n if op == 0 else m)
    y = blas.random(count, m if op == 0 else n) if beta else np.full((count, 5 - 2 * op), np.nan)
    A = blas.store(a, 2, 1)
    X, Y = (blas.store(v[:, None, :], step - 1, 0) for v, step in ((x, incx), (y, incy)))
    status = blas(
        "gemvStridedBatched", op, m, n, blas.number(2.0), address(A[0]), *A[1:], address(X[0]),
        *X[1:], blas.number(beta), address(Y[0]), *Y[1:], count,
    )  # fmt: skip
    assert status == 0
    want = 2 * np.einsum("nij,nj->ni" if op == 0 else "nij,ni->nj", a, x)
    want = want + beta * y if beta else want
    result = blas.load(Y, (count, 1, y.shape[1]))[:, 0]
    np.testing.assert_allclose(result, want, rtol=blas.rtol, atol=blas.rtol)


@pytest.mark.parametrize(("side", "uplo", "op", "diag"), list(itertools.product((0, 1), repeat=4)))
def test_trsm(cp, blas, side: int, uplo: int, op: int, diag: int) -> None:
    m, n, count = 5, 3, 2
    order = m if side == 0 else n
    full = blas.random(count, order, order) + 4 * np.eye(order, dtype=blas.dtype)
    triangle = np.triu(full) if uplo else np.tril(full)
    a = np.where(triangle == 0, blas.dtype(np.nan), full)  # the other triangle is not read
    if diag:
        triangle = triangle - triangle * np.eye(order) + np.eye(order)
        a[:, range(order), range(order)] = np.nan
    b = blas.random(count, m, n)
    A, B = blas.store(a, 1, 2), blas.store(b, 2, 1)
    starts = [
        cp.arange(count, dtype=np.int64) * (s.value * x.itemsize) + x.data.ptr for x, _, s in (A, B)
    ]
    status = blas(
        "trsmBatched", side, uplo, op, diag, m, n, blas.number(2.0), address(starts[0]), A[1],
        address(starts[1]), B[1], count,
    )  # fmt: skip
    assert status == 0
    x = blas.load(B, b.shape)
    T = triangle.swapaxes(1, 2) if op else triangle
    np.testing.assert_allclose(
        T @ x if side == 0 else x @ T, 2 * b, rtol=blas.rtol, atol=10 * blas.rtol
    )


def test_potrf(cp, blas) -> None:
    cusolver = importlib.import_module("cupy_backends.cuda.libs").cusolver
    potrf = cusolver.spotrfBatched if blas.dtype == np.float32 else cusolver.dpotrfBatched
    root = blas.random(3, 6, 6)
    spd = root @ root.swapaxes(1, 2) + np.eye(6, dtype=blas.dtype)
    spd[1, 3, 3] = -1.0
    for uplo in (0, 1):
        A = blas.store(spd, 1, 2)
        starts = cp.arange(3, dtype=np.int64) * (A[2].value * A[0].itemsize) + A[0].data.ptr
        info = cp.empty(3, np.int32)
        handle = cp.cuda.device.get_cusolver_handle()
        potrf(handle, uplo, 6, starts.data.ptr, A[1], info.data.ptr, 3)
        assert info.tolist() == [0, 4, 0]
        lower = blas.load(A, spd.shape)
        other = np.triu(lower, 1) if uplo == 0 else np.tril(lower, -1)
        np.testing.assert_array_equal(other, np.triu(spd, 1) if uplo == 0 else np.tril(spd, -1))
        lower = np.tril(lower) if uplo == 0 else np.triu(lower).swapaxes(1, 2)
        np.testing.assert_allclose(lower[[0, 2]], np.linalg.cholesky(spd[[0, 2]]),
                                   rtol=100 * blas.rtol, atol=10 * blas.rtol)  # fmt: skip


def test_blas_refuses_what_the_documentation_refuses(cp, stand_in, blas) -> None:  # noqa: F811
    a, c = cp.zeros(64, blas.dtype), cp.zeros(64, blas.dtype)
    stride = ctypes.c_longlong

    def gemm(m=3, n=3, k=3, lda=3, ldb=3, ldc=3, step=9, count=2, start=a, op=0):
        one = blas.number(1.0)
        where = address(start) if isinstance(start, cp.ndarray) else start
        return blas(
            "gemmStridedBatched", op, 0, m, n, k, one, where, lda, stride(9), address(a), ldb,
            stride(9), one, address(c), ldc, stride(step), count,
        )  # fmt: skip

    assert gemm() == 0
    for bad in ({"m": -1}, {"k": -1}, {"count": -1}, {"lda": 2}, {"ldb": 2}, {"ldc": 2},
                {"op": 3}, {"step": 0}, {"step": -9}):  # fmt: skip
        assert gemm(**bad) == 7, bad
    assert gemm(count=8) == 13  # past the operand's memory
    outside = np.zeros(64, blas.dtype)
    assert gemm(start=ctypes.c_void_p(outside.ctypes.data)) == 13
    assert "not in a device array" in str(stand_in.problem)
    assert blas.library.cublasSetStream_v2(None, None) == 1
    assert blas.library.cublasSetPointerMode_v2(blas.handle, 1) == 0
    assert gemm() == 15
    assert blas.library.cublasSetPointerMode_v2(blas.handle, 0) == 0

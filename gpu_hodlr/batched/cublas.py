"""cuBLAS on stacks of row-major matrices, by CuPy's handle on the current stream.

It is called through ctypes: CuPy's own wrappers refuse to be captured into a CUDA graph and have
no strided-batched GEMV. A row-major (p, q) matrix is a column-major (q, p) matrix to cuBLAS; the
functions here take row-major views and turn the sides.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import cupy
import numpy as np

from gpu_hodlr.devices import Array
from gpu_hodlr.errors import DeviceError

_TF32_MATH = 3  # CUBLAS_TF32_TENSOR_OP_MATH
_FLOAT32, _BFLOAT16 = 0, 14  # CUDA_R_32F, CUDA_R_16BF
_SUMS_FLOAT32, _DEFAULT_ALGORITHM = 68, -1  # CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
_NO, _TRANSPOSE = 0, 1
_LOWER, UPPER, _NON_UNIT, _LEFT, _RIGHT = 0, 1, 0, 0, 1
_MOST_MATRICES = 65_535  # a call: blocks of a grid in y and z, documented nowhere
_MOST_SIZE = 2**31 - 1
WORKSPACE = 32 << 20  # bytes, what NVIDIA recommends for the largest GPUs


class _OfThread(threading.local):
    """As CuPy's handles, one for each thread."""

    calls = 0
    workspace: tuple[cupy.cuda.MemoryPointer, int] | None = None  # and its size; None: cuBLAS's own


_mine = _OfThread()


def calls() -> int:
    """How many calls this thread has made."""
    return _mine.calls


@contextmanager
def own_workspace(memory: cupy.cuda.MemoryPointer | None, size: int = WORKSPACE) -> Iterator[None]:
    """Calls of this thread use so many bytes of memory of ours, as those of a graph must.

    Otherwise cuBLAS puts an allocation of its own into the graph, outside of CuPy's pool. The
    graph must keep the memory. None: there are no calls.
    """
    before, _mine.workspace = _mine.workspace, None if memory is None else (memory, size)
    try:
        yield
    finally:
        _mine.workspace = before
        if memory is not None:
            _use_current_stream()  # which sets cuBLAS's own workspace again


@lru_cache(maxsize=1)
def _cublas() -> ctypes.CDLL:
    """The cuBLAS that CuPy has loaded, found again by its name."""
    cupy.cuda.device.get_cublas_handle()
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    return ctypes.CDLL(f"libcublas.so.{major}")


def _use_current_stream() -> ctypes.c_void_p:
    """CuPy's handle, set to the current stream."""
    handle = ctypes.c_void_p(cupy.cuda.device.get_cublas_handle())
    stream = ctypes.c_void_p(cupy.cuda.get_current_stream().ptr)
    _succeed("SetStream", _cublas().cublasSetStream_v2(handle, stream))
    return handle


def _call(name: str, dtype: np.dtype[Any], *arguments: object, tensor_float: bool = False) -> None:
    """Call cublas<S or D><name>, of bfloat16 cublas<name>, on the current stream."""
    library, handle = _cublas(), _use_current_stream()
    _mine.calls += 1
    if _mine.workspace is not None:  # SetStream has set cuBLAS's own
        memory, size = _mine.workspace
        block, bytes_ = ctypes.c_void_p(memory.ptr), ctypes.c_size_t(size)
        _succeed("SetWorkspace", library.cublasSetWorkspace_v2(handle, block, bytes_))
    if dtype == np.float32:  # CuPy's own switch; float32 sums stay float32 without it
        mode = _TF32_MATH if tensor_float or os.environ.get("CUPY_TF32") == "1" else 0
        _succeed("SetMathMode", library.cublasSetMathMode(handle, mode))
    letter = {"f": "S" if dtype.itemsize == 4 else "D", "u": ""}[dtype.kind]
    function = getattr(library, f"cublas{letter}{name}")
    status = function(handle, *arguments)
    if tensor_float:  # the handle is CuPy's, and so the user's
        _succeed("SetMathMode", library.cublasSetMathMode(handle, 0))
    _succeed(name, status)


def _succeed(name: str, status: int) -> None:
    if status:
        raise DeviceError(f"cuBLAS {name} failed with status {status}")


def batches(nodes: int) -> Iterator[slice]:
    """Parts of a stack that one call may have."""
    return (slice(i, i + _MOST_MATRICES) for i in range(0, nodes, _MOST_MATRICES))


def _check_sizes(name: str, *sizes: int) -> None:
    """What is past 32 bits ctypes would cut off in silence."""
    if max(sizes) > _MOST_SIZE:
        raise DeviceError(
            f"cuBLAS {name}: a size or leading dimension of {max(sizes)} is past its 32 bits"
        )


def _number(value: float, dtype: np.dtype[Any]) -> Any:
    kind = ctypes.c_float if dtype == np.float32 else ctypes.c_double
    return ctypes.byref(kind(value))


class _Stack:
    """A stack (nodes, p, q) as cuBLAS sees it: pointer, leading dimension, stride, transposed.

    `array` is the stack, or a copy by rows where its strides are not such ones.
    """

    def __init__(self, x: Array) -> None:
        item = x.itemsize
        by_node, by_row, by_column = (s // item for s in x.strides)
        nodes, p, q = x.shape
        if q == 1 or by_column == 1:
            self.transposed, ld, wide, lines = False, by_row, q, p
        elif p == 1 or by_row == 1:
            self.transposed, ld, wide, lines = True, by_column, p, q
        else:
            ld, wide, lines = 0, 1, p
        if (lines > 1 and ld < wide) or (nodes > 1 and by_node < 0):
            x = cupy.ascontiguousarray(x)
            self.transposed, ld, wide, by_node = False, q, q, p * q
        self.array = x  # a copy must outlive the call's enqueueing
        self.ld = max(ld, wide)
        self.stride = ctypes.c_longlong(by_node if nodes > 1 else p * q)
        self.pointer = ctypes.c_void_p(x.data.ptr)


def gemm(
    a: Array,
    b: Array,
    c: Array,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    tensor_float: bool = False,
) -> None:
    """C = alpha op(A) op(B) + beta C for stacks, in place; with `tensor_float` in TF32.

    The product with a single column is in float32 all the same.
    """
    nodes, m, n = c.shape
    k = a.shape[1] if transpose_a else a.shape[2]
    again = partial(
        gemm, transpose_a=transpose_a, transpose_b=transpose_b, alpha=alpha, beta=beta,
        tensor_float=tensor_float,
    )  # fmt: skip
    if nodes > _MOST_MATRICES:
        for part in batches(nodes):
            again(a[part], b[part], c[part])
        return
    if c.size == 0 or k == 0:
        if beta == 0.0:
            c.fill(0)
        return
    dtype = c.dtype
    A, B, C = _Stack(a), _Stack(b), _Stack(c)
    if C.transposed or C.array is not c:
        rows = cupy.ascontiguousarray(c)
        again(A.array, B.array, rows)
        c[...] = rows
        return
    _check_sizes("GEMM", m, n, k, A.ld, B.ld, C.ld)
    flip_a, flip_b = A.transposed != transpose_a, B.transposed != transpose_b
    one, two = _number(alpha, dtype), _number(beta, dtype)
    if n == 1:  # a GEMV reaches the memory's bandwidth where a GEMM of one column does not
        rows, columns = (k, m) if not flip_a else (m, k)
        step = B.array.strides[2 if transpose_b else 1] // b.itemsize if k > 1 else 1
        _check_sizes("GEMV", step)
        _call(
            "gemvStridedBatched", dtype, _TRANSPOSE if not flip_a else _NO, rows, columns, one,
            A.pointer, A.ld, A.stride, B.pointer, step, B.stride, two, C.pointer, C.ld,
            C.stride, nodes,
        )  # fmt: skip
        return
    _call(
        "gemmStridedBatched", dtype, _TRANSPOSE if flip_b else _NO, _TRANSPOSE if flip_a else _NO,
        n, m, k, one, B.pointer, B.ld, B.stride, A.pointer, A.ld, A.stride, two, C.pointer,
        C.ld, C.stride, nodes, tensor_float=tensor_float,
    )  # fmt: skip


def gemm_bfloat16(
    a: Array, b: Array, c: Array, *, transpose_a: bool = False, alpha: float = 1.0
) -> None:
    """C = alpha op(A) B for stacks of bfloat16 (uint16); C by rows and sums in float32."""
    nodes, m, n = c.shape
    k = a.shape[1] if transpose_a else a.shape[2]
    if c.size == 0 or k == 0:
        c.fill(0)
        return
    for part in batches(nodes):
        A, B, C = _Stack(a[part]), _Stack(b[part]), _Stack(c[part])
        _check_sizes("GEMM", m, n, k, A.ld, B.ld, C.ld)
        flip_a, flip_b = A.transposed != transpose_a, B.transposed
        _call(
            "GemmStridedBatchedEx", a.dtype, _TRANSPOSE if flip_b else _NO,
            _TRANSPOSE if flip_a else _NO, n, m, k, _number(alpha, c.dtype), B.pointer, _BFLOAT16,
            B.ld, B.stride, A.pointer, _BFLOAT16, A.ld, A.stride, _number(0.0, c.dtype), C.pointer,
            _FLOAT32, C.ld, C.stride, len(C.array), _SUMS_FLOAT32, _DEFAULT_ALGORITHM,
        )  # fmt: skip


def pointers(x: Array) -> Array:
    """Device addresses of a stack's matrices, by one launch."""
    first, step = x.data.ptr, max(1, x.strides[0])
    return cupy.arange(first, first + len(x) * step, step, dtype=np.int64)


def trsm(lower: Array, x: Array, *, transpose: bool, right: bool) -> None:
    """In place: x <- L^-1 x or L^-T x, or from the right x <- x L^-T."""
    if x.size == 0:
        return
    L, X = _Stack(lower), _Stack(x)
    if X.array is not x:
        trsm(L.array, X.array, transpose=transpose, right=right)
        x[...] = X.array
        return
    # To cuBLAS, an L by rows is the upper triangle L^T, and of an x by rows the sides change.
    by_rows = not X.transposed
    side = _LEFT if right == by_rows else _RIGHT
    triangle = _LOWER if L.transposed else UPPER
    flag = _TRANSPOSE if ((transpose or right) != by_rows) == L.transposed else _NO
    p, q = x.shape[:0:-1] if by_rows else x.shape[1:]
    _check_sizes("TRSM", p, q, L.ld, X.ld)
    at, to = pointers(L.array), pointers(x)
    for part in batches(len(x)):
        _call(
            "trsmBatched", x.dtype, side, triangle, flag, _NON_UNIT, p, q, _number(1.0, x.dtype),
            ctypes.c_void_p(at[part].data.ptr), L.ld, ctypes.c_void_p(to[part].data.ptr), X.ld,
            len(to[part]),
        )  # fmt: skip

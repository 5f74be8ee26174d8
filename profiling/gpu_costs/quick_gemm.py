"""GEMMs of cuBLAS by NumPy: the stand-in's own are three loops, too slow for true sizes."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np

_NAME = re.compile(r"cublas([SD])gemmStridedBatched")


def multiplied(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the call was a strided batched GEMM, C = alpha op(A) op(B) + beta C, and is done.

    Args:
        name: of the function of cuBLAS.
        args: as cuBLAS takes them: handle, op(A), op(B), m, n, k, alpha, A, lda, stride, B, ldb,
            stride, beta, C, ldc, stride, count; matrices by columns, in host memory.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return False
    dtype = np.dtype(np.float32 if found[1] == "S" else np.float64)
    _, op_a, op_b, m, n, k, alpha, *operands, count = args
    a, b, c = operands[:3], operands[3:6], operands[7:]
    A = _matrices(a, (k, m) if op_a else (m, k), count, dtype)
    B = _matrices(b, (n, k) if op_b else (k, n), count, dtype)
    C = _matrices(c, (m, n), count, dtype)
    beta = dtype.type(operands[6]._obj.value)
    product = np.matmul(A.swapaxes(1, 2) if op_a else A, B.swapaxes(1, 2) if op_b else B)
    product *= dtype.type(alpha._obj.value)
    C[...] = product + beta * C if beta else product  # C is not read where beta is 0
    return True


def _matrices(
    place: tuple[Any, ...], shape: tuple[int, int], count: int, dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    """(count, rows, columns) at (pointer, leading dimension, stride)."""
    pointer, ld, stride = (getattr(x, "value", x) for x in place)
    rows, columns = shape
    size = (count - 1) * stride + (columns - 1) * ld + rows
    memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(pointer)
    item = dtype.itemsize
    strides = stride * item, item, ld * item
    return np.ndarray((count, *shape), dtype, memory, strides=strides)

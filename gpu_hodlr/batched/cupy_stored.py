"""CuPy implementation of products with blocks of fewer bits than float32: cuBLAS's tensor cores."""

from __future__ import annotations

from functools import cache

import cupy
import numpy as np

from gpu_hodlr.batched import stored
from gpu_hodlr.batched.cublas import gemm, gemm_bfloat16
from gpu_hodlr.devices import Array

_BFLOAT16_CORES = 80  # compute capability of the first GPUs whose cuBLAS multiplies it


def reduced_matmul(
    a: Array, b: Array, transpose_a: bool, transpose_b: bool, out: Array, sign: int
) -> Array:
    """See `stored.matmul`."""
    if stored.kind_of(a.dtype) == "tfloat32":
        gemm(
            a.view(np.float32), b, out, transpose_a=transpose_a, transpose_b=transpose_b,
            alpha=sign, beta=1.0, tensor_float=True,
        )  # fmt: skip
        return out
    if not _multiplies(cupy.cuda.Device().id):
        return stored.widened_matmul(a, b, transpose_a, transpose_b, out, sign)
    columns = b.shape[1 if transpose_b else 2]
    terms = _two_terms(b.swapaxes(1, 2) if transpose_b else b)
    products = cupy.empty((len(a), out.shape[1], 2 * columns), np.float32)
    gemm_bfloat16(a, terms, products, transpose_a=transpose_a, alpha=sign)
    out += products[:, :, :columns]
    out += products[:, :, columns:]
    return out


@cache
def _multiplies(device: int) -> bool:
    """Whether a GPU's cuBLAS multiplies bfloat16."""
    return int(cupy.cuda.Device(device).compute_capability) >= _BFLOAT16_CORES


def _two_terms(b: Array) -> Array:
    """[high low] in bfloat16, (nodes, rows, 2 k), whose sum is b to 16 bits."""
    nodes, rows, k = b.shape
    terms = cupy.empty((nodes, rows, 2 * k), np.uint16)
    terms[:, :, :k] = stored.packed(b, "bfloat16")
    high = stored.unpacked(terms[:, :, :k], b.dtype)
    terms[:, :, k:] = stored.packed(b - high, "bfloat16")
    return terms

"""Blocks stored narrower than what they are multiplied by: float32, TF32 and bfloat16.

NumPy has no bfloat16, the upper half of float32's bits: it is kept as uint16. TF32, float32 with 10
bits of mantissa, is kept as the uint32 that float32's bits are, which tells the two apart.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import numpy as np

from gpu_hodlr.devices import Array, namespace

FLOAT32 = np.dtype(np.float32)
WIDTHS = {"bfloat16": 8, "tfloat32": 11}  # bits of a number's digits, the leading one counted
_BITS = {"bfloat16": np.dtype(np.uint16), "tfloat32": np.dtype(np.uint32)}
_KINDS = {dtype: kind for kind, dtype in _BITS.items()}
_LOWEST = {"bfloat16": 16, "tfloat32": 13}  # bits of float32 below those that are kept
_EXPONENT = 0x7F80_0000  # of float32; all ones: infinite or NaN
_AT_ONCE = {"numpy": 1 << 24, "cupy": 1 << 28}  # bytes widened together


def kind_of(dtype: np.dtype[Any]) -> str | None:
    """Of the type that keeps its bits "bfloat16" or "tfloat32"; None of others."""
    return _KINDS.get(dtype)


def packed(x: Array, kind: str) -> Array:
    """The bits of x rounded to the nearest, ties to even."""
    low = _LOWEST[kind]
    bits = namespace(x).ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32((1 << (low - 1)) - 1) + ((bits >> np.uint32(low)) & np.uint32(1))
    if kind == "bfloat16":
        return (bits >> np.uint32(16)).astype(np.uint16)
    return bits & np.uint32(0xFFFF_FFFF << low & 0xFFFF_FFFF)


def unpacked(x: Array, dtype: np.dtype[Any]) -> Array:
    """Stored numbers in a floating type, exactly; x itself where they are of it."""
    if x.dtype == _BITS["bfloat16"]:
        x = (x.astype(np.uint32) * np.uint32(1 << 16)).view(np.float32)
    elif x.dtype == _BITS["tfloat32"]:
        x = x.view(np.float32)
    return x.astype(dtype, copy=False)


def times(x: Array, number: Any) -> Array:
    """A stored x times a number; see `repacked`."""
    kind = kind_of(x.dtype)
    return x * number if kind is None else repacked(unpacked(x, FLOAT32) * number, x.dtype, number)


def repacked(product: Array, like: np.dtype[Any], number: float) -> Array:
    """Numbers of a type times a number, as they were stored: where that is a power of two.

    Else they stay float32: to round again would be a second error, of which no report tells.
    """
    kind = kind_of(like)
    exact = abs(math.frexp(float(number))[0]) in (0.0, 0.5)
    return packed(product, kind) if kind and exact else product


def digits(kept_in: str) -> int:
    """Bits of a number's digits, of a floating type or a kind of `WIDTHS`, by name."""
    return WIDTHS.get(kept_in) or int(np.finfo(kept_in).nmant) + 1


def all_finite(x: Array) -> bool:
    """Whether packed x has no NaN and no infinity."""
    ones = x.dtype.type(_EXPONENT >> 32 - 8 * x.dtype.itemsize)
    return not bool(((x & ones) == ones).any())


def matmul(
    a: Array, b: Array, transpose_a: bool, transpose_b: bool, out: Array | None, sign: int
) -> Array:
    """See `batched.matmul`, for blocks a of another type than b.

    The sums are in the type of b. A GPU multiplies bfloat16 as it is by two terms of b, 16 bits of
    it, and rounds b to TF32 as its tensor cores do; what there is no such product for, and what is
    multiplied by float64, is widened some at a time.
    """
    if out is None:
        shape = (len(a), a.shape[2 if transpose_a else 1], b.shape[1 if transpose_b else 2])
        out = namespace(a).zeros(shape, b.dtype)
    elif sign == 0:  # written, and not added
        out[...] = 0
    sign = sign or 1
    if b.dtype == FLOAT32 and kind_of(a.dtype) is not None:
        return _module(a, "stored").reduced_matmul(a, b, transpose_a, transpose_b, out, sign)
    return widened_matmul(a, b, transpose_a, transpose_b, out, sign)


def widened_matmul(
    a: Array, b: Array, transpose_a: bool, transpose_b: bool, out: Array, sign: int
) -> Array:
    """See `matmul`; some matrices, or some rows of one, are widened at a time."""
    nodes, rows, columns = a.shape
    most = max(1, _AT_ONCE[_library(a)] // max(1, columns * b.itemsize))  # rows
    together, step = max(1, most // max(1, rows)), max(1, min(most, rows))
    multiply = _module(a, "linalg").matmul
    for first in range(0, nodes, together):
        some = slice(first, first + together)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            x, y = b[some], out[some]
            if not transpose_a:
                y = y[:, part]
            else:
                x = x[:, :, part] if transpose_b else x[:, part]
            multiply(unpacked(a[some, part], b.dtype), x, transpose_a, transpose_b, y, sign)
    return out


def _library(x: Array) -> str:
    return str(namespace(x).__name__)


def _module(x: Array, part: str) -> ModuleType:
    return importlib.import_module(f"gpu_hodlr.batched.{_library(x)}_{part}")

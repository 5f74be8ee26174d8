"""NumPy implementation of products with blocks of fewer bits than float32."""

from __future__ import annotations

from gpu_hodlr.batched import stored
from gpu_hodlr.devices import Array


def reduced_matmul(
    a: Array, b: Array, transpose_a: bool, transpose_b: bool, out: Array, sign: int
) -> Array:
    """See `stored.matmul`; of TF32 b is rounded as tensor cores do."""
    if stored.kind_of(a.dtype) == "tfloat32":
        b = stored.unpacked(stored.packed(b, "tfloat32"), stored.FLOAT32)
    stored.widened_matmul(a, b, transpose_a, transpose_b, out, sign)
    return out

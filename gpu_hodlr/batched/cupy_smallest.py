"""CuPy implementation of the merge of short sorted lists; kernels/merge_smallest.cu."""

from __future__ import annotations

import cupy

from gpu_hodlr.batched.cuda import device_index, launch, suffix
from gpu_hodlr.devices import Array

_MOST_WARPS = 8
_SHARED = 32 * 1024  # bytes for the lists of a block


def merge_smallest(
    values: Array, index: Array, rows: Array, found: Array, candidates: Array
) -> None:
    """See `batched.merge_smallest`; one warp a row. Long lists are left in global memory."""
    nodes, m, c = found.shape
    count = values.shape[1]
    if found.size == 0 or count == 0:
        return
    list_bytes = count * (8 + values.itemsize)
    warps, which = min(_MOST_WARPS, _SHARED // list_bytes), ""
    if warps == 0:
        warps, which, list_bytes = _MOST_WARPS, "long_", 0
    launch(
        "merge_smallest", f"merge_smallest_{which}{suffix(values.dtype)}",
        (-(-nodes * m // warps),), (32 * warps,),
        (values, index, device_index(rows), cupy.ascontiguousarray(found),
         device_index(candidates), nodes, m, c, count),
        warps * list_bytes,
    )  # fmt: skip

"""`cupy.einsum` of the stand-in, with the memory layout that CuPy's results have.

CuPy 14 contracts two operands by one matmul, (shared, free of the first, free of the second), each
group in alphabetical order, and returns a transposed view of it: not always C-contiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from host_cupy.array import HostArray, apply, arrays_only, ndarray, product


def einsum(*operands: Any, **kwargs: Any) -> ndarray:
    if set(kwargs) - {"dtype", "optimize"}:
        raise TypeError(f"unexpected keyword arguments {sorted(kwargs)}")
    subscripts, *arrays = operands
    if not isinstance(subscripts, str):
        raise TypeError("the stand-in takes einsum's subscripts as a string")
    arrays_only(*arrays)
    dtype = kwargs.get("dtype")

    def sum_up(*values: HostArray) -> Any:
        return np.einsum(subscripts, *values, dtype=dtype, optimize=len(values) > 1)

    order, calls_cublas = _layout(subscripts, arrays)
    if order == "view" and dtype is None:
        return arrays[0]._view_or_copy(sum_up)
    out = None
    if isinstance(order, list):
        output = subscripts.replace(" ", "").partition("->")[2]
        sizes = _sizes(subscripts, arrays)
        kind = np.result_type(*(a.dtype for a in arrays)) if dtype is None else dtype
        stored = ndarray([sizes[label] for label in order], kind)
        turned = stored.transpose([order.index(label) for label in output if label in order])
        out = turned.reshape([sizes[label] for label in output])
    return (product if calls_cublas else apply)(sum_up, *arrays, out=out)


def _sizes(subscripts: str, arrays: list[ndarray]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for labels, a in zip(_inputs(subscripts), arrays, strict=True):
        for label, n in zip(labels, a.shape, strict=True):
            sizes[label] = max(n, sizes.get(label, 1)) if n else 0
    return sizes


def _inputs(subscripts: str) -> list[str]:
    return subscripts.replace(" ", "").partition("->")[0].split(",")


def _layout(subscripts: str, arrays: list[ndarray]) -> tuple[list[str] | str, bool]:
    """The labels of the result in the order of its memory, and whether cuBLAS is called."""
    inputs, (_, arrow, output) = _inputs(subscripts), subscripts.replace(" ", "").partition("->")
    if not arrow or "." in subscripts or len(arrays) > 2:
        return "C", len(arrays) > 1
    if any(a.size == 0 for a in arrays):
        return "C", False
    if len(arrays) == 1:
        left = list(dict.fromkeys(label for label in inputs[0] if label in output))
        return ("view" if set(inputs[0]) == set(output) else left), False
    first, second = (
        {label for label, n in zip(labels, a.shape, strict=True) if n > 1}
        for labels, a in zip(inputs, arrays, strict=True)
    )
    # What only one operand has and the result has not is summed up before.
    first, second = (
        mine & (other | set(output)) for mine, other in ((first, second), (second, first))
    )
    shared = first & second
    if not shared - set(output):
        return "C", False
    return [*sorted(shared & set(output)), *sorted(first - shared), *sorted(second - shared)], True

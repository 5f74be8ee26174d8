"""Functions of the `cupy` module of the stand-in, with CuPy's signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from host_cupy import state
from host_cupy.array import (
    HostArray,
    _like,
    apply,
    arrays_only,
    checked_dtype,
    host,
    ndarray,
    product,
)

# ---- Making arrays ------------------------------------------------------------------------------


def array(
    obj: Any, dtype: Any = None, copy: bool = True, order: str = "K", *, blocking: bool = False
) -> ndarray:
    if isinstance(obj, ndarray):
        return obj.astype(obj.dtype if dtype is None else dtype, order=order, copy=copy)
    if isinstance(obj, list | tuple) and obj and all(isinstance(x, ndarray) for x in obj):
        joined = stack(obj)
        return joined if dtype is None else joined.astype(dtype, copy=False)
    values = np.array(obj, dtype=dtype)
    checked_dtype(values.dtype)
    f_order = order in "KA" and values.flags.fnc
    out = ndarray(values.shape, values.dtype, order="F" if f_order or order == "F" else "C")
    if values.ndim == 0:  # passed by value
        out.fill(values[()])
        return out
    state.send("asarray")
    if blocking:
        state.wait("asarray(blocking=True)")
    out._host[...] = values
    return out


def asarray(
    a: Any,
    dtype: Any = None,
    order: str | None = None,
    *,
    copy: bool | None = None,
    blocking: bool = False,
) -> ndarray:
    return array(a, dtype, bool(copy), order or "K", blocking=blocking)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    arrays_only(a)
    if a.ndim == 0:
        a = a.reshape(1)
    return a.astype(a.dtype if dtype is None else dtype, order="C", copy=False)


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    if dtype is None:
        arrays_only(*([fill_value] if isinstance(fill_value, np.ndarray) else []))
        dtype = np.asarray(fill_value).dtype
    out = ndarray(shape, dtype, order=order)
    out[...] = fill_value
    return out


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 0, dtype, order)


def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, dtype, order)


def empty_like(
    prototype: ndarray, dtype: Any = None, order: str = "K", subok: None = None, shape: Any = None
) -> ndarray:
    arrays_only(prototype)
    return _like(prototype, prototype.dtype if dtype is None else dtype, order, shape)


def full_like(
    a: ndarray,
    fill_value: Any,
    dtype: Any = None,
    order: str = "K",
    subok: None = None,
    shape: Any = None,
) -> ndarray:
    out = empty_like(a, dtype, order, subok, shape)
    out[...] = fill_value
    return out


def zeros_like(
    a: ndarray, dtype: Any = None, order: str = "K", subok: None = None, shape: Any = None
) -> ndarray:
    return full_like(a, 0, dtype, order, subok, shape)


def ones_like(
    a: ndarray, dtype: Any = None, order: str = "K", subok: None = None, shape: Any = None
) -> ndarray:
    return full_like(a, 1, dtype, order, subok, shape)


def _numbers(*values: Any) -> None:
    for value in values:
        if isinstance(value, ndarray | np.ndarray):
            raise TypeError(f"a number is wanted, got {type(value)}")


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    _numbers(start, stop, step)
    bounds = (0, start) if stop is None else (start, stop)
    return apply(lambda: np.arange(*bounds, step, dtype=dtype))


def linspace(
    start: Any, stop: Any, num: int = 50, endpoint: bool = True, *, dtype: Any = None
) -> ndarray:
    _numbers(start, stop)
    return apply(lambda: np.linspace(start, stop, num, endpoint, dtype=dtype))


def eye(N: int, M: Any = None, k: int = 0, dtype: Any = float, order: str = "C") -> ndarray:
    return apply(lambda: np.eye(N, M, k, dtype), out=ndarray((N, N if M is None else M), dtype))


def identity(n: int, dtype: Any = float) -> ndarray:
    return eye(n, dtype=dtype)


def tri(N: int, M: Any = None, k: int = 0, dtype: Any = float) -> ndarray:
    return apply(lambda: np.tri(N, M, k, dtype))


def tril(m: ndarray, k: int = 0) -> ndarray:
    return apply(lambda a: np.tril(a, k), m)


def triu(m: ndarray, k: int = 0) -> ndarray:
    return apply(lambda a: np.triu(a, k), m)


def diag(v: ndarray, k: int = 0) -> ndarray:
    arrays_only(v)
    return v.diagonal(k) if v.ndim == 2 else apply(lambda a: np.diag(a, k), v)


def from_dlpack(array: Any) -> ndarray:
    if isinstance(array, ndarray):
        return array._view(array._host.view())
    kind, _ = array.__dlpack_device__()
    if kind not in (2, 13):  # kDLCUDA, kDLCUDAManaged
        raise BufferError("CuPy takes over memory of a CUDA device only")
    raise BufferError("there is no CUDA memory to take over here")


def asnumpy(
    a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True
) -> HostArray:
    arrays_only(a)
    return a.get(stream, order, out, blocking)


def get_array_module(*args: Any) -> Any:
    import sys

    return sys.modules["cupy"] if any(isinstance(x, ndarray) for x in args) else np


# ---- Joining and shaping ------------------------------------------------------------------------


def concatenate(
    tup: Any, axis: Any = 0, out: Any = None, *, dtype: Any = None, casting: str = "same_kind"
) -> ndarray:
    arrays_only(*tup)
    return apply(lambda *a: np.concatenate(a, axis, dtype=dtype, casting=casting), *tup, out=out)


def stack(
    tup: Any, axis: int = 0, out: Any = None, *, dtype: Any = None, casting: str = "same_kind"
) -> ndarray:
    arrays_only(*tup)
    return apply(lambda *a: np.stack(a, axis, dtype=dtype, casting=casting), *tup, out=out)


def vstack(tup: Any, *, dtype: Any = None, casting: str = "same_kind") -> ndarray:
    arrays_only(*tup)
    return apply(lambda *a: np.vstack(a, dtype=dtype, casting=casting), *tup)


def hstack(tup: Any, *, dtype: Any = None, casting: str = "same_kind") -> ndarray:
    arrays_only(*tup)
    return apply(lambda *a: np.hstack(a, dtype=dtype, casting=casting), *tup)


def broadcast_to(array: ndarray, shape: Any) -> ndarray:
    arrays_only(array)
    return array._view(np.broadcast_to(array._host, shape))


def moveaxis(a: ndarray, source: Any, destination: Any) -> ndarray:
    arrays_only(a)
    return a._view(np.moveaxis(a._host, source, destination))


def expand_dims(a: ndarray, axis: Any) -> ndarray:
    arrays_only(a)
    return a._view(np.expand_dims(a._host, axis))


def flip(a: ndarray, axis: Any = None) -> ndarray:
    arrays_only(a)
    return a._view(np.flip(a._host, axis))


def roll(a: ndarray, shift: Any, axis: Any = None) -> ndarray:
    arrays_only(a)
    return apply(lambda x: np.roll(x, shift, axis), a)


def tile(A: ndarray, reps: Any) -> ndarray:
    arrays_only(A)
    return apply(lambda a: np.tile(a, reps), A)


def repeat(a: ndarray, repeats: Any, axis: Any = None) -> ndarray:
    arrays_only(a)
    return a.repeat(repeats, axis)


def copyto(dst: ndarray, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    arrays_only(dst, *([] if where is None else [where]))
    if where is None:
        apply(lambda s: np.broadcast_to(s, dst.shape), src, out=dst, casting=casting)
        return
    # The kernel of where(mask, source, destination): the destination's dtype is kept.
    apply(
        lambda d, s, mask: np.where(mask, s, d).astype(d.dtype), dst, src, where,
        out=dst, casting=casting,
    )  # fmt: skip


# ---- Choosing, sorting, searching ---------------------------------------------------------------


def where(condition: ndarray, x: Any = None, y: Any = None) -> Any:
    arrays_only(condition)
    if x is None and y is None:
        return condition.nonzero()
    return apply(np.where, condition, x, y)


def take_along_axis(a: ndarray, indices: ndarray, axis: int) -> ndarray:
    arrays_only(a, indices)
    return apply(lambda x, i: np.take_along_axis(x, i, axis), a, indices)


def put_along_axis(arr: ndarray, indices: ndarray, values: Any, axis: int) -> None:
    arrays_only(arr, indices)

    def put(a: HostArray, i: HostArray, v: Any) -> HostArray:
        if np.any(np.diff(np.sort(i % a.shape[axis], axis), axis=axis) == 0):
            raise IndexError("an element is assigned twice: which value stays is undefined")
        result = a.copy()
        np.put_along_axis(result, i, v, axis)
        return result

    apply(put, arr, indices, values, out=arr)


def sort(a: ndarray, axis: Any = -1, kind: Any = None) -> ndarray:
    arrays_only(a)
    result = a.copy()
    result.sort(axis)
    return result


def partition(a: ndarray, kth: int, axis: int = -1) -> ndarray:
    arrays_only(a)
    return apply(lambda x: np.partition(x, kth, axis), a)


def searchsorted(a: ndarray, v: Any, side: str = "left", sorter: Any = None) -> ndarray:
    arrays_only(a)
    if sorter is not None:
        raise NotImplementedError("searchsorted(sorter=) is not in the stand-in")
    return apply(lambda x, y: np.searchsorted(x, y, side), a, v)


def flatnonzero(a: ndarray) -> ndarray:
    arrays_only(a)
    return a.ravel().nonzero()[0]


def unique(
    ar: ndarray,
    return_index: bool = False,
    return_inverse: bool = False,
    return_counts: bool = False,
    axis: None = None,
) -> Any:
    arrays_only(ar)
    state.counters.sorts += 1
    state.read("unique")
    wanted = (True, return_index, return_inverse, return_counts)
    results = [
        apply(lambda a, i=i: np.unique(a, True, True, True)[i].reshape(-1), ar)
        for i in range(4)
        if wanted[i]
    ]
    return results[0] if len(results) == 1 else tuple(results)


def bincount(x: ndarray, weights: Any = None, minlength: Any = None) -> ndarray:
    arrays_only(x)
    state.read("bincount: is x negative?")
    state.read("bincount: the largest x")
    operands = [x] if weights is None else [x, weights]
    return apply(lambda *a: np.bincount(*a, minlength=minlength or 0), *operands)


def count_nonzero(a: ndarray, axis: Any = None) -> ndarray:
    arrays_only(a)
    return apply(lambda x: np.count_nonzero(x, axis=axis), a)


# ---- Element by element -------------------------------------------------------------------------


def _ufunc(name: str) -> Callable[..., ndarray]:
    function = getattr(np, name)

    def kernel(*args: Any, out: Any = None, dtype: Any = None) -> ndarray:
        if len(args) != function.nin:
            raise TypeError(f"{name} takes {function.nin} operands")
        if dtype is None:
            return apply(function, *args, out=out)
        return apply(lambda *a: function(*a, dtype=dtype), *args, out=out)

    kernel.__name__ = name
    return kernel


UFUNCS = state.words(
    "absolute add arctan2 bitwise_and bitwise_or ceil cos divide equal exp expm1 floor "
    "floor_divide fmin greater greater_equal isfinite isinf isnan ldexp left_shift less less_equal "
    "log log10 log1p log2 logical_and logical_not logical_or maximum minimum multiply negative "
    "not_equal power reciprocal remainder right_shift rint sign sin sqrt square subtract tanh "
    "true_divide"
)


def clip(a: ndarray, a_min: Any, a_max: Any, out: Any = None) -> ndarray:
    arrays_only(a)
    return a.clip(a_min, a_max, out=out)


# ---- Products -----------------------------------------------------------------------------------


def matmul(x1: ndarray, x2: ndarray, out: Any = None) -> ndarray:
    return product(np.matmul, x1, x2, out=out)


def dot(a: ndarray, b: ndarray, out: Any = None) -> ndarray:
    return product(np.dot, a, b, out=out)


def vdot(a: ndarray, b: ndarray) -> ndarray:
    return product(np.vdot, a, b)


def tensordot(a: ndarray, b: ndarray, axes: Any = 2) -> ndarray:
    return product(lambda x, y: np.tensordot(x, y, axes), a, b)


def outer(a: ndarray, b: ndarray, out: Any = None) -> ndarray:
    return product(np.outer, a, b, out=out)


def norm(x: ndarray, ord: Any = None, axis: Any = None, keepdims: bool = False) -> ndarray:
    """`cupy.linalg.norm`, of vectors and of Frobenius."""
    arrays_only(x)
    spectral = ord is not None and (x.ndim if axis is None else np.size(axis)) == 2
    if spectral and ord not in ("fro", 1, np.inf):
        raise NotImplementedError(f"norm {ord!r} is not in the stand-in: it needs an SVD")
    return apply(lambda a: np.linalg.norm(a, ord, axis, keepdims), x)


def eigh(a: ndarray, UPLO: str = "L") -> tuple[ndarray, ndarray]:
    """`cupy.linalg.eigh` of one matrix."""
    values, vectors = np.linalg.eigh(_one_matrix(a), UPLO)
    return apply(lambda _: values, a), apply(lambda _: vectors, a)


def eigvalsh(a: ndarray) -> ndarray:
    """`cupy.linalg.eigvalsh` of one matrix."""
    values = np.linalg.eigvalsh(_one_matrix(a))
    return apply(lambda _: values, a)


def svd(a: ndarray, full_matrices: bool = True, compute_uv: bool = True) -> Any:
    """`cupy.linalg.svd` of one matrix."""
    matrix = _one_matrix(a)
    found = np.linalg.svd(matrix, full_matrices=full_matrices, compute_uv=compute_uv)
    if not compute_uv:
        return apply(lambda _: found, a)
    return tuple(apply(lambda _, part=part: part, a) for part in found)


def _one_matrix(a: ndarray) -> Any:
    """Its values; cuSOLVER's workspace and status are read by the host, which a graph cannot."""
    arrays_only(a)
    if a.ndim != 2:
        raise NotImplementedError("stacks are not in the stand-in")
    if state.is_capturing():
        raise RuntimeError("cudaErrorStreamCaptureUnsupported")
    return host(a)


# ---- Functions that are methods -----------------------------------------------------------------


def _method(name: str) -> Callable[..., Any]:
    """cupy.name(a, ...) is a.name(...); a NumPy array would be computed on the host."""
    function = getattr(ndarray, name)

    def call(a: ndarray, *args: Any, **kwargs: Any) -> Any:
        arrays_only(a)
        return function(a, *args, **kwargs)

    call.__name__ = name
    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


METHODS = state.words(
    "all any argmax argmin cumprod cumsum diagonal max mean min nonzero prod ravel reshape squeeze "
    "sum swapaxes take transpose"
)


def argsort(a: ndarray, axis: Any = -1, kind: Any = None) -> ndarray:
    arrays_only(a)
    return a.argsort(axis)

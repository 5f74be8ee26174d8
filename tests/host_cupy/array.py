"""`cupy.ndarray` of the stand-in: NumPy values that only CuPy's ways lead to."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from host_cupy import memory, state
from host_cupy.array_parts import Flags, HostArray, fit, join_key, refuse_duplicates, split_key
from host_cupy.memory import BaseMemory, MemoryPointer
from host_cupy.operators import binary, compared, reduction

_SCALARS = (bool, int, float, complex, np.generic)
_KINDS = "biufc"


def checked_dtype(dtype: Any) -> np.dtype[Any]:
    result = np.dtype(dtype)
    if result.kind not in _KINDS:
        raise ValueError(f"Unsupported dtype {result}")
    return result


def host(x: Any) -> Any:
    """The values of an operand of a kernel: a device array's, or a scalar."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, _SCALARS):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def arrays_only(*operands: Any) -> None:
    for x in operands:
        if not isinstance(x, ndarray):
            raise TypeError(f"a cupy.ndarray is wanted, got {type(x)}")


def apply(
    compute: Callable[..., Any],
    *operands: Any,
    out: ndarray | None = None,
    casting: Any = "same_kind",
) -> ndarray:
    """One kernel of CuPy's own: `compute` of the operands' values, into a C-ordered array.

    While a stream is capturing nothing is stored: `compute` only tells the shape.
    """
    values = [host(x) for x in operands]
    state.capture_of(state.stream_pointer())  # work on a stream that may not have it
    with np.errstate(all="ignore"):
        result = np.asarray(compute(*values))
    if out is None:
        out = ndarray(result.shape, result.dtype)
    elif not isinstance(out, ndarray):
        raise TypeError("out must be a cupy.ndarray")
    elif np.broadcast_shapes(out.shape, result.shape) != out.shape:
        raise ValueError(f"out has shape {out.shape}, the result {result.shape}")
    target = out._host
    state.counters.array_operations += out.size > 0
    if not np.can_cast(result.dtype, target.dtype, casting):
        raise TypeError(f"Cannot cast {result.dtype} to {target.dtype} with casting {casting!r}")
    if not state.is_capturing():
        np.copyto(target, result, casting="unsafe")
        return out

    def again() -> None:
        with np.errstate(all="ignore"):
            np.copyto(target, compute(*values), casting="unsafe")

    state.enqueue(again)
    return out


class ndarray:  # noqa: N801
    """See `cupy.ndarray`."""

    __slots__ = ("__weakref__", "_host", "_memory", "_range", "base")
    _apply = staticmethod(apply)
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        shape: Any,
        dtype: Any = float,
        memptr: MemoryPointer | None = None,
        strides: Any = None,
        order: Any = "C",
    ) -> None:
        dtype = checked_dtype(dtype)
        shape = (operator.index(shape),) if np.isscalar(shape) else tuple(shape)
        shape = tuple(operator.index(n) for n in shape)
        if strides is None:
            size, counts = dtype.itemsize, [1] * len(shape)
            places = range(len(shape)) if order == "F" else reversed(range(len(shape)))
            for i in places:
                counts[i], size = size, size * max(1, shape[i])
            strides = tuple(counts)
        nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if nbytes:
            nbytes = dtype.itemsize + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if memptr is None:
            memptr = memory.alloc(nbytes)
        self._memory: BaseMemory = memptr.mem
        raw = memptr.mem._buffer(memptr.ptr, nbytes) if nbytes else np.empty(0, np.uint8)
        self._host: HostArray = np.ndarray(shape, dtype, raw, strides=strides)
        self.base: ndarray | None = None
        self._range = (memory.accounts.arrays, memptr.ptr, nbytes) if nbytes else None
        if self._range:
            memory.accounts.arrays.add(memptr.ptr, nbytes)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if getattr(self, "_range", None) and not is_finalizing():
            ranges, *mine = self._range
            ranges.remove(*mine)

    def _view(self, values: HostArray) -> ndarray:
        """Another array on the same memory."""
        result = object.__new__(ndarray)
        result._host, result._memory, result._range = values, self._memory, None
        result.base = self if self.base is None else self.base
        return result

    def _view_or_copy(self, reorder: Callable[[HostArray], HostArray]) -> ndarray:
        """A view where NumPy makes one of it, else a kernel."""
        if self.size == 0:
            return self._view(reorder(self._host))
        values = reorder(self._host)
        if np.may_share_memory(values, self._host):
            return self._view(values)
        return apply(reorder, self)

    # ---- What is known without the device -------------------------------------------------------

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)

    @property
    def flags(self) -> Flags:
        return Flags(self._host.flags, self.base is None)

    @property
    def data(self) -> MemoryPointer:
        if self._memory.ptr == 0:
            return MemoryPointer(self._memory, 0)
        return MemoryPointer(self._memory, self._host.ctypes.data - self._memory.ptr)

    @property
    def device(self) -> Any:
        from host_cupy.cuda import Device

        return Device(0)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __contains__(self, other: Any) -> bool:
        raise TypeError("`in` would read the array element by element")

    # ---- Refused --------------------------------------------------------------------------------

    def __array__(self, *arguments: Any, **options: Any) -> HostArray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} of a cupy.ndarray: use the array's library")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        # What a NumPy scalar on the left of an operator comes to.
        scalar = len(inputs) == 2 and isinstance(inputs[0], np.generic)
        if scalar and method == "__call__" and not options and ufunc.__name__ in _OPERATORS:
            return apply(ufunc, *inputs)
        raise TypeError(f"numpy.{ufunc.__name__} of a cupy.ndarray: use the array's library")

    # ---- The host waits -------------------------------------------------------------------------

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> HostArray:
        if not blocking:
            raise NotImplementedError("the stand-in copies to the host in blocking mode only")
        state.read("get")
        if out is None:
            return self._host.copy(order="C" if order is None else order)
        if out.shape != self.shape or out.dtype != self.dtype:
            raise TypeError("out must have the array's shape and dtype")
        out[...] = self._host
        return out

    def item(self) -> Any:
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def _scalar(self) -> Any:
        if self.ndim != 0:
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
        return self.get()[()]

    def __float__(self) -> float:
        return float(self._scalar())

    def __int__(self) -> int:
        return int(self._scalar())

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError("The truth value of an array is ambiguous. Use a.any() or a.all()")
        return bool(self.get().item())

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get(), spec)

    # ---- Copies ---------------------------------------------------------------------------------

    def set(self, arr: HostArray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype or arr.shape != self.shape:
            raise TypeError("the shapes and dtypes must be the same")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        state.send("set")
        self._host[...] = arr

    def copy(self, order: str = "C") -> ndarray:
        return self.astype(self.dtype, order=order)

    def astype(
        self,
        dtype: Any,
        order: str = "K",
        casting: Any = None,
        subok: Any = None,
        copy: bool = True,
    ) -> ndarray:
        if casting is not None or subok is not None:
            raise TypeError("casting and subok are not supported yet")
        dtype, flags = checked_dtype(dtype), self._host.flags
        fits = order == "K" or (order == "C" and flags.c_contiguous)
        if not copy and dtype == self.dtype and (fits or (order == "F" and flags.f_contiguous)):
            return self
        out = _like(self, dtype, order)
        return apply(lambda a: a, self, out=out, casting="unsafe")

    def view(self, dtype: Any = None) -> ndarray:
        return self._view(self._host.view() if dtype is None else self._host.view(dtype))

    def fill(self, value: Any) -> None:
        if not isinstance(value, _SCALARS):
            raise TypeError(f"fill takes a scalar, got {type(value)}")
        apply(lambda: self.dtype.type(value), out=self, casting="unsafe")

    # ---- Views ----------------------------------------------------------------------------------

    @property
    def T(self) -> ndarray:  # noqa: N802
        return self._view(self._host.T)

    def reshape(self, *shape: Any, order: str = "C", copy: bool | None = None) -> ndarray:
        if copy is not None:
            raise NotImplementedError("reshape(copy=) is not in the stand-in")
        return self._view_or_copy(lambda a: a.reshape(*shape, order=order))

    def ravel(self, order: str = "C") -> ndarray:
        return self._view_or_copy(lambda a: a.ravel(order))

    def flatten(self, order: str = "C") -> ndarray:
        return apply(lambda a: a.flatten(order), self)

    def transpose(self, *axes: Any) -> ndarray:
        return self._view(self._host.transpose(*axes))

    def swapaxes(self, axis1: int, axis2: int) -> ndarray:
        return self._view(self._host.swapaxes(axis1, axis2))

    def squeeze(self, axis: Any = None) -> ndarray:
        return self._view(self._host.squeeze(axis))

    def diagonal(self, offset: int = 0, axis1: int = 0, axis2: int = 1) -> ndarray:
        view = self._host.diagonal(offset, axis1, axis2)
        view.flags.writeable = self._host.flags.writeable  # a writable view, unlike NumPy's
        return self._view(view)

    # ---- Elements -------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> ndarray:
        plain, indices = split_key(key, ndarray)
        if not indices:
            return self._view(self._host[plain + (() if Ellipsis in plain else (...,))])
        return apply(lambda a, *i: a[join_key(plain, i)], self, *indices)

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(value, ndarray | bool | int | float | complex | np.generic):
            raise TypeError(f"Unsupported type {type(value)}: only scalars and device arrays")
        plain, indices = split_key(key, ndarray)
        if not indices:
            target = self[key]
            if isinstance(value, ndarray):
                if (
                    value.size
                    and value.data.ptr == target.data.ptr
                    and value._host.strides == (target._host.strides)
                ):
                    return  # as CuPy: x[...] += y ends here
                apply(lambda v: fit(v, target.shape), value, out=target, casting="unsafe")
            else:
                target.fill(value)
            return
        state.counters.array_operations += 1
        values = host(value)
        arrays = [i._host for i in indices]

        def store() -> None:
            joined = join_key(plain, arrays)
            if isinstance(value, ndarray) and value.size > 1:
                refuse_duplicates(self.shape, joined)
            with np.errstate(all="ignore"):
                self._host[joined] = values

        state.enqueue(store)

    # ---- Operators ------------------------------------------------------------------------------

    __add__, __radd__, __iadd__ = binary(np.add)
    __sub__, __rsub__, __isub__ = binary(np.subtract)
    __mul__, __rmul__, __imul__ = binary(np.multiply)
    __truediv__, __rtruediv__, __itruediv__ = binary(np.true_divide)
    __floordiv__, __rfloordiv__, __ifloordiv__ = binary(np.floor_divide)
    __mod__, __rmod__, __imod__ = binary(np.remainder)
    __pow__, __rpow__, __ipow__ = binary(np.power)
    __and__, __rand__, __iand__ = binary(np.bitwise_and)
    __or__, __ror__, __ior__ = binary(np.bitwise_or)
    __xor__, __rxor__, __ixor__ = binary(np.bitwise_xor)
    __lshift__, __rlshift__, __ilshift__ = binary(np.left_shift)
    __rshift__, __rrshift__, __irshift__ = binary(np.right_shift)
    __lt__, __le__ = compared(np.less), compared(np.less_equal)
    __gt__, __ge__ = compared(np.greater), compared(np.greater_equal)
    __eq__, __ne__ = compared(np.equal), compared(np.not_equal)

    def __neg__(self) -> ndarray:
        return apply(np.negative, self)

    def __pos__(self) -> ndarray:
        return apply(np.positive, self)

    def __abs__(self) -> ndarray:
        return apply(np.absolute, self)

    def __invert__(self) -> ndarray:
        return apply(np.invert, self)

    def __matmul__(self, other: Any) -> ndarray:
        return product(np.matmul, self, other)

    def dot(self, b: ndarray, out: ndarray | None = None) -> ndarray:
        return product(np.dot, self, b, out=out)

    # ---- Reductions, scans, sorting -------------------------------------------------------------

    sum, prod, mean = reduction("sum"), reduction("prod"), reduction("mean")
    max, min = reduction("max"), reduction("min")
    any, all = reduction("any"), reduction("all")
    argmax, argmin = reduction("argmax"), reduction("argmin")

    def cumsum(self, axis: Any = None, dtype: Any = None, out: Any = None) -> ndarray:
        return apply(lambda a: np.cumsum(a, axis, dtype), self, out=out)

    def cumprod(self, axis: Any = None, dtype: Any = None, out: Any = None) -> ndarray:
        return apply(lambda a: np.cumprod(a, axis, dtype), self, out=out)

    def clip(self, min: Any = None, max: Any = None, out: Any = None) -> ndarray:
        def cut(a: HostArray, *bounds: Any) -> Any:
            rest = iter(bounds)
            return np.clip(a, *(None if b is None else next(rest) for b in (min, max)))

        return apply(cut, self, *(b for b in (min, max) if b is not None), out=out)

    def argsort(self, axis: Any = -1) -> ndarray:
        _thrust()
        return apply(lambda a: np.argsort(a, axis, kind="stable"), self)

    def sort(self, axis: int = -1) -> None:
        if not self.flags.c_contiguous:
            raise NotImplementedError("Sorting non-contiguous array is not supported.")
        _thrust()
        apply(lambda a: np.sort(a, axis, kind="stable"), self, out=self)

    def nonzero(self) -> tuple[ndarray, ...]:
        state.read("nonzero")
        return tuple(apply(lambda a, i=i: np.nonzero(a)[i], self) for i in range(self.ndim))

    def take(self, indices: Any, axis: Any = None, out: Any = None) -> ndarray:
        arrays_only(indices)
        return apply(lambda a, i: np.take(a, i, axis), self, indices, out=out)

    def repeat(self, repeats: int, axis: Any = None) -> ndarray:
        repeats = operator.index(repeats)
        return apply(lambda a: np.repeat(a, repeats, axis), self)

    # ---- Exchange -------------------------------------------------------------------------------

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "version": 3,
            "strides": None if self.flags.c_contiguous else self.strides,
            "data": (self.data.ptr, False),
            "stream": 1,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # kDLCUDA

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("memory of the stand-in is not CUDA memory: nothing can take it over")


ndarray.__module__ = "cupy"
_OPERATORS = frozenset(
    state.words(
        "add subtract multiply divide true_divide floor_divide remainder power bitwise_and "
        "bitwise_or bitwise_xor left_shift right_shift less less_equal greater greater_equal equal "
        "not_equal"
    )
)


def product(compute: Callable[..., Any], *operands: Any, out: ndarray | None = None) -> ndarray:
    """What CuPy leaves to cuBLAS."""
    arrays_only(*operands)
    state.refuse_library("cuBLAS")
    return apply(compute, *operands, out=out)


def _thrust() -> None:
    state.counters.sorts += 1
    state.refuse_capture("Thrust, which waits for the GPU in older versions")


def _like(a: ndarray, dtype: Any, order: str, shape: Any = None) -> ndarray:
    if shape is not None:
        return ndarray(shape, dtype, order="C" if order in "KA" else order)
    flags = a._host.flags
    if order in "KA" and (flags.c_contiguous or flags.f_contiguous):
        order = "C" if flags.c_contiguous else "F"
    if order in "CF":
        return ndarray(a.shape, dtype, order=order)
    if order == "A":
        return ndarray(a.shape, dtype)
    # K: the axes in the order of the strides
    axes = sorted(range(a.ndim), key=lambda i: -abs(a.strides[i]))
    kept = ndarray(tuple(a.shape[i] for i in axes), dtype)
    return kept.transpose(tuple(np.argsort(axes)))

"""Arrays at the door: NumPy, CuPy and torch in, the matrix's own library inside, and back.

Algorithms take their array module from the data (`devices.namespace`). Right-hand sides of any of
the three libraries, shapes (N,) and (N, k), are turned once, at the door, into an (N, k) array of
the matrix's own library (`as_columns`) and back. Data changes library by DLPack, without a copy.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr.devices import (
    AnyArray,
    Array,
    HostArray,
    device_of,
    is_array,
    is_torch,
    library_of,
    namespace,
)
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, ShapeError

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.devices import AnyDtype

# A right-hand side, and what is returned for it: of the same library and shape.
Vectors = TypeVar("Vectors", bound=AnyArray)

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def check_dtype(dtype: AnyDtype, name: str) -> np.dtype[Any]:
    """float32 or float64, of NumPy's dtype, its name in either byte order, or torch's dtype.

    Raises:
        DtypeError: any other dtype.
    """
    wanted = DtypeError(f"{name} must be float32 or float64, got {dtype}")
    try:
        said = str(dtype).removeprefix("torch.") if library_of(dtype) == "torch" else dtype
        found: np.dtype[Any] = np.dtype(said).newbyteorder("=")
    except TypeError:
        raise wanted from None
    if found not in FLOATS:
        raise wanted
    return found


def as_array(x: Any, name: str) -> Array:
    """A NumPy or CuPy view of a float32/float64 array or torch tensor, no copy where possible.

    Subclasses of NumPy's array (np.matrix, np.memmap) are taken as plain arrays, and another byte
    order is turned into the machine's.

    Raises:
        DtypeError: not an array, or not of a real floating dtype.
        DeviceError: a tensor that is neither on the CPU nor on a GPU.
        ArgumentError: a masked array that hides entries.
    """
    if is_torch(x):
        check_dtype(x.dtype, f"{name}.dtype")
        x = _view_of_tensor(x, name)
    elif not is_array(x):
        raise DtypeError(
            f"{name} must be a NumPy, CuPy or torch array, got {type(x).__module__}."
            f"{type(x).__qualname__}"
        )
    elif isinstance(x, np.ndarray):
        x = plain(x, name)
    dtype = check_dtype(x.dtype, f"{name}.dtype")
    return x if x.dtype == dtype else x.astype(dtype)


def plain(x: HostArray, name: str) -> HostArray:
    """An array of a subclass of NumPy's as NumPy's own, no copy.

    Raises:
        ArgumentError: a masked array that hides entries.
    """
    if isinstance(x, np.ma.MaskedArray):
        hidden = int(np.ma.getmaskarray(x).sum())
        if hidden:
            raise ArgumentError(
                f"{name} is a masked array with {hidden} masked entries, of which nothing is "
                f"known; pass one without, such as {name}.filled(0.0)"
            )
        return np.asarray(x.data)
    return np.asarray(x)


def _view_of_tensor(x: torch.Tensor, name: str) -> Array:
    if x.device.type not in ("cpu", "cuda"):
        raise DeviceError(f"{name} is on {x.device.type}; only cpu and cuda can be used")
    if x.layout is not sys.modules["torch"].strided:
        raise DtypeError(
            f"{name} must be a dense tensor, got one of layout {x.layout}; pass {name}.to_dense()"
        )
    try:
        x = x.detach()
        # force: a conjugated or negated view has no NumPy form without a copy
        return x.numpy(force=True) if x.device.type == "cpu" else _cupy_view(x, name)
    except (RuntimeError, TypeError) as e:  # of a transform, of a mode that has no numbers
        raise DtypeError(f"{name} is a torch tensor whose numbers cannot be read: {e}") from e


def _cupy_view(tensor: torch.Tensor, name: str) -> Array:
    try:
        return importlib.import_module("cupy").from_dlpack(tensor)
    except ImportError as e:
        raise DeviceError(f"{name} is on cuda, and CuPy cannot be imported: {e}") from e


def check_finite(x: Array, name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ArgumentError: an entry is not finite.
    """
    xp = namespace(x)
    # One pass and no temporary of x's size: a sum is finite unless a term is not (or it overflows).
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not bool(xp.isfinite(xp.sum(x)))
    if suspicious and not bool(xp.isfinite(x).all()):
        bad = int(x.size - xp.isfinite(x).sum())
        raise ArgumentError(f"{name} has {bad} entries that are NaN or infinite")


def as_columns(
    x: Vectors, n: int, dtype: np.dtype[Any], device: str, name: str
) -> tuple[Array, Callable[[Array], Vectors]]:
    """Bring a right-hand side to an (n, k) array of the matrix's library and dtype.

    Args:
        x: (n,) or (n, k), NumPy, CuPy or torch, float32 or float64.
        n: the rows wanted.
        dtype: the matrix's dtype.
        device: the matrix's device.
        name: what error messages call x.

    Returns:
        The (n, k) array, and a function that gives an (n, k) result x's shape and library.

    Raises:
        ShapeError: x is not (n,) or (n, k).
        DtypeError: x is not a real floating array.
        DeviceError: x lies on another device than the matrix.
        ArgumentError: x has NaN or infinite entries. Checked on the CPU alone: on a GPU the check
            would wait for it, and the result shows the NaN.
    """
    if (is_torch(x) or hasattr(x, "dtype")) and device_of(x) != device:
        raise DeviceError(f"{name} is on {device_of(x)}, the matrix is on {device}")
    native = as_array(x, name)
    if native.ndim not in (1, 2) or native.shape[0] != n:
        raise ShapeError(f"{name} must have shape ({n},) or ({n}, k), got {tuple(native.shape)}")
    on_cpu = device == "cpu"
    if on_cpu:
        check_finite(native, name)
    columns = native[:, None] if native.ndim == 1 else native
    if columns.dtype != dtype:
        with np.errstate(over="ignore"):
            columns = columns.astype(dtype)
        if on_cpu:
            check_finite(columns, f"{name} as {dtype}")

    def restore(result: Array) -> Any:
        result = result[:, 0] if native.ndim == 1 else result
        return tensor_of(result) if is_torch(x) else result

    return columns, restore


def tensor_of(x: Array) -> torch.Tensor:
    """A tensor that shares x's memory, where torch can."""
    if isinstance(x, np.ndarray) and not (x.flags.writeable and all(s >= 0 for s in x.strides)):
        x = x.copy()
    tensor: torch.Tensor = sys.modules["torch"].from_dlpack(x)
    return tensor


def power_of_two(size: float, dtype: DTypeLike = np.float64) -> float:
    """One between size and half of it, itself and its inverse normal numbers; 1 of zero."""
    if not size:
        return 1.0
    most = np.finfo(dtype).maxexp - 2
    exponent = int(np.frexp(size)[1]) - 1
    return float(np.ldexp(1.0, min(max(exponent, -most), most)))

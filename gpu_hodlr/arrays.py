"""Arrays at the door: NumPy, CuPy and torch in, the matrix's own library inside, and back.

Algorithms take their array module from the data (`devices.namespace`). Right-hand sides of any of
the three libraries, shapes (N,) and (N, k), are turned once, at the door, into an (N, k) array of
the matrix's own library (`as_columns`) and back. Data changes library by DLPack, without a copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr.devices import AnyArray, Array, device_of, is_array, is_torch, namespace
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, ShapeError

if TYPE_CHECKING:
    import torch

# A right-hand side, and what is returned for it: of the same library and shape.
Vectors = TypeVar("Vectors", bound=AnyArray)

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def check_dtype(dtype: DTypeLike, name: str) -> np.dtype[Any]:
    """A float32 or float64 NumPy dtype.

    Raises:
        DtypeError: any other dtype.
    """
    wanted = DtypeError(f"{name} must be float32 or float64, got {dtype}")
    try:
        found: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise wanted from None
    if found not in FLOATS:
        raise wanted
    return found


def as_array(x: Any, name: str) -> Array:
    """A NumPy or CuPy view of a float32/float64 array or torch tensor, no copy where possible.

    Raises:
        DtypeError: not an array, or not of a real floating dtype.
    """
    if is_torch(x):
        check_dtype(str(x.dtype).removeprefix("torch."), f"{name}.dtype")
        if x.device.type not in ("cpu", "cuda"):
            raise DeviceError(f"{name} is on {x.device.type}; only cpu and cuda can be used")
        # force: a conjugated or negated view has no NumPy form without a copy
        x = x.detach()
        x = x.numpy(force=True) if x.device.type == "cpu" else _cupy_view(x, name)
    elif not is_array(x):
        raise DtypeError(
            f"{name} must be a NumPy, CuPy or torch array, got {type(x).__module__}."
            f"{type(x).__qualname__}"
        )
    check_dtype(x.dtype, f"{name}.dtype")
    return x


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
        if is_torch(x):
            return importlib.import_module("torch").from_dlpack(result)
        return result

    return columns, restore


def power_of_two(size: float, dtype: DTypeLike = np.float64) -> float:
    """One between size and half of it, itself and its inverse normal numbers; 1 of zero."""
    if not size:
        return 1.0
    most = np.finfo(dtype).maxexp - 2
    exponent = int(np.frexp(size)[1]) - 1
    return float(np.ldexp(1.0, min(max(exponent, -most), most)))

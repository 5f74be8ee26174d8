"""Which array library, which device: the only place that knows NumPy, CuPy and torch arrays apart.

Algorithms take their array module from the data (`namespace`). Right-hand sides of any of the
three libraries, shapes (N,) and (N, k), are turned once, at the door, into an (N, k) array of the
matrix's own library (`as_columns`) and back.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from gpu_hodlr.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    MemoryEstimateError,
    ShapeError,
)

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray: both libraries run the same lines
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def _library(x: object) -> str:
    return type(x).__module__.partition(".")[0]


def is_torch(x: object) -> bool:
    """Whether x is a torch tensor (torch is not imported for the question)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def namespace(x: object) -> ModuleType:
    """The array module (numpy or cupy) that x belongs to."""
    return importlib.import_module("cupy") if _library(x) == "cupy" else np


def device_of(x: Any) -> str:
    """The device of an array: "cpu" or "cuda"."""
    if is_torch(x):
        return str(x.device.type)
    return "cuda" if _library(x) == "cupy" else "cpu"


def resolve_device(device: str | None, *data: object) -> str:
    """The device to work on: the one asked for, or else the one the data is on.

    Raises:
        ArgumentError: an unknown device name.
        DeviceError: CUDA was asked for (or the data is there) and cannot be used.
    """
    if device is None:
        device = "cuda" if any(device_of(x) == "cuda" for x in data) else "cpu"
    if device not in ("cpu", "cuda"):
        raise ArgumentError(f"device must be 'cpu', 'cuda' or None, got {device!r}")
    if device == "cuda":
        raise DeviceError(
            "device 'cuda': this version has no CuPy implementation of the batched primitives yet; "
            "use device='cpu' (and move CUDA data to the host yourself)"
        )
    return device


def check_dtype(dtype: Any, name: str) -> np.dtype[Any]:
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
    elif not (_library(x) == "cupy" or isinstance(x, np.ndarray)):
        raise DtypeError(
            f"{name} must be a NumPy, CuPy or torch array, got {type(x).__module__}."
            f"{type(x).__qualname__}"
        )
    check_dtype(x.dtype, f"{name}.dtype")
    return x


def _cupy_view(tensor: Any, name: str) -> Array:
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
    x: Any, n: int, dtype: np.dtype[Any], device: str, name: str
) -> tuple[Array, Callable[[Array], Any]]:
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
        ArgumentError: x has NaN or infinite entries.
    """
    if (is_torch(x) or hasattr(x, "dtype")) and device_of(x) != device:
        raise DeviceError(f"{name} is on {device_of(x)}, the matrix is on {device}")
    native = as_array(x, name)
    if native.ndim not in (1, 2) or native.shape[0] != n:
        raise ShapeError(f"{name} must have shape ({n},) or ({n}, k), got {tuple(native.shape)}")
    check_finite(native, name)
    columns = native[:, None] if native.ndim == 1 else native
    if columns.dtype != dtype:
        with np.errstate(over="ignore"):
            columns = columns.astype(dtype)
        check_finite(columns, f"{name} as {dtype}")

    def restore(result: Array) -> Any:
        result = result[:, 0] if native.ndim == 1 else result
        if is_torch(x):
            return importlib.import_module("torch").from_dlpack(result)
        return result

    return columns, restore


def to_host(x: Array) -> np.ndarray[Any, Any]:
    """Copy x to a NumPy array, or return it as it is."""
    host: np.ndarray[Any, Any] = x.get() if _library(x) == "cupy" else np.asarray(x)
    return host


def free_bytes() -> int:
    """Host memory that can still be allocated, in bytes (a very large number where unknown)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 1 << 62


def check_memory(needed: int, what: str, lower: str) -> None:
    """Refuse a job before it allocates more than is free.

    Args:
        needed: estimated bytes.
        what: what they are for.
        lower: what the user can lower.

    Raises:
        MemoryEstimateError: more is needed than is free.
    """
    free = free_bytes()
    if needed > free:
        raise MemoryEstimateError(
            f"{what} needs about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; lower {lower}"
        )

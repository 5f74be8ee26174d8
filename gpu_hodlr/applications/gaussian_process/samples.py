"""Tables of samples at the door: what scikit-learn's estimators take, and CuPy's and torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import issparse

from gpu_hodlr.arrays import as_array, check_finite, plain, tensor_of
from gpu_hodlr.devices import Array, device_of, is_array, is_torch, move
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, ShapeError


def as_table(x: Any, name: str) -> Array:
    """(n, d) float64, finite, of an array or tensor, where it is; lists and frames on the host.

    Raises:
        DtypeError, ShapeError, ArgumentError: it is none: sparse, complex, of strings, of another
            shape, empty, NaN or infinite.
    """
    found = as_numbers(x, name)
    if found.ndim != 2:
        raise ShapeError(
            f"{name}: Expected 2D array, (n_samples, n_features), got {tuple(found.shape)}. "
            f"Reshape your data: {name}.reshape(-1, 1) of one feature, or {name}.reshape(1, -1) of "
            "one sample"
        )
    n, d = found.shape
    if not n:
        raise ShapeError(f"{name}: Found array with 0 sample(s) (shape={tuple(found.shape)})")
    if not d:
        raise ShapeError(
            f"{name}: Found array with 0 feature(s) (shape={tuple(found.shape)}) while a minimum "
            "of 1 is required."
        )
    check_finite(found, name)
    return found


def as_targets(y: Any, n: int) -> Array:
    """(n,) float64, finite; of a column with a warning.

    Raises:
        DtypeError, ShapeError, ArgumentError: see `as_table`.
    """
    if y is None:
        raise ArgumentError("requires y to be passed, but the target y is None")
    found = as_numbers(y, "y")
    if found.ndim == 2 and found.shape[1] == 1:
        _warn_of_column()
        found = found[:, 0]
    if found.shape != (n,):
        raise ShapeError(f"y must have shape ({n},), one number a sample, got {tuple(found.shape)}")
    check_finite(found, "y")
    return found


def as_numbers(x: Any, name: str) -> Array:
    """A float64 array of any shape.

    Raises:
        DtypeError: it cannot be.
    """
    if issparse(x):
        raise DtypeError(f"{name} is a sparse matrix; a dense array is wanted: {name}.toarray()")
    if is_torch(x):
        return as_array(x if x.dtype.is_floating_point else x.double(), name).astype(np.float64)
    on_gpu = is_array(x) and device_of(x) != "cpu"
    found: Any = x if on_gpu else plain(np.asanyarray(x), name)
    if found.dtype.kind == "c":
        raise ArgumentError(f"{name}: Complex data not supported")
    try:
        return found.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        kind = DtypeError if isinstance(error, TypeError) else ArgumentError
        raise kind(f"{name} must be numbers: {error}") from error


def on_device(x: Array, name: str, device: str, *, moves: bool) -> Array:
    """X on the device.

    Args:
        x: an array.
        name: for the error.
        device: where it is wanted.
        moves: whether the user has named a device that all goes to.

    Raises:
        DeviceError: it is elsewhere, and nobody said that it may be copied.
    """
    if device_of(x) == device:
        return x
    if not moves:
        raise DeviceError(f"{name} is on {device_of(x)}, the process on {device}")
    return move(x, device)


def like(found: Array, x: Any) -> Any:
    """A result where x is, of its library; of lists and frames NumPy's."""
    wanted = device_of(x) if is_array(x) or is_torch(x) else "cpu"
    found = move(found, wanted)
    return tensor_of(found) if is_torch(x) else found


def feature_names(x: Any) -> Any:
    """Names of the columns of a data frame, an array of objects; None of others."""
    columns = getattr(x, "columns", None)
    if columns is None or not all(isinstance(name, str) for name in columns):
        return None
    return np.asarray(columns, dtype=object)


def _warn_of_column() -> None:
    """As scikit-learn does, where it is.

    Warns:
        UserWarning: scikit-learn's kind of it.
    """
    import warnings

    try:
        from sklearn.exceptions import DataConversionWarning as Kind
    except ImportError:
        Kind = UserWarning
    warnings.warn(
        "A column-vector y was passed when a 1d array was expected: its one column is taken",
        Kind,
        stacklevel=4,
    )

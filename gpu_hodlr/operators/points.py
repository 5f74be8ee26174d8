"""Points and what belongs to them, at the door: coordinates, length scales, noise of every row."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr.arrays import as_array, check_finite
from gpu_hodlr.checks import check_number
from gpu_hodlr.devices import (
    AnyArray,
    Array,
    HostArray,
    device_of,
    is_array,
    namespace,
    namespace_on,
    to_host,
)
from gpu_hodlr.errors import ArgumentError, DeviceError, ShapeError


def as_points(points: AnyArray, name: str) -> Array:
    """Points (N, d), or (N,) on a line, as a finite (N, d) array of their library.

    Raises:
        ShapeError, DtypeError, ArgumentError: another shape, not real floating, NaN or infinite.
    """
    found = as_array(points, name)
    if found.ndim == 1:
        found = found[:, None]
    if found.ndim != 2 or found.shape[1] == 0:
        raise ShapeError(f"{name} must have shape (N, d), got {tuple(found.shape)}")
    check_finite(found, name)
    return found


def nearest_to_origin(points: Array) -> Array:
    """(d,) the point of the bounding box that is nearest to the origin, float64.

    Taken from all of them it makes no coordinate larger, so that it costs no digit; and of points
    far from the origin, such as map coordinates, it keeps those that scaling would round away.
    """
    xp = namespace(points)
    low, high = (x.astype(np.float64) for x in (points.min(axis=0), points.max(axis=0)))
    return xp.maximum(low, 0.0) + xp.minimum(high, 0.0)


def check_numbers(value: Any, name: str, count: int) -> float | HostArray:
    """A number > 0, or an array or list of so many, copied.

    Raises:
        ShapeError, DtypeError, ArgumentError: other numbers, not real, or not > 0 and finite.
    """
    if is_array(value) and value.ndim == 0:
        value = value.item()
    if not (is_array(value) or isinstance(value, (list, tuple))):
        return check_number(value, name, positive=True)
    numbers = list(value) if isinstance(value, (list, tuple)) else to_host(as_array(value, name))
    found = np.array([check_number(number, name, positive=True) for number in np.ravel(numbers)])
    if np.shape(numbers) != (count,):
        raise ShapeError(f"{name} must be a number or ({count},), got {np.shape(numbers)}")
    return found


def check_noise(value: Any, name: str, n: int, dtype: np.dtype[Any], device: str) -> Array:
    """What is added to the diagonal: (1,) of a number, or (N,), >= 0, copied.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: another shape, not real, on another
            device, negative, NaN or infinite.
    """
    if not is_array(value) or value.ndim == 0:
        number = check_number(value.item() if is_array(value) else value, name)
        return namespace_on(device).full(1, number, dtype)
    found = as_array(value, name)
    if found.shape != (n,):
        raise ShapeError(f"{name} must be a number or ({n},), got {tuple(found.shape)}")
    if device_of(found) != device:
        raise DeviceError(f"{name} is on {device_of(found)}, the points are on {device}")
    with np.errstate(over="ignore"):
        found = found.astype(dtype, copy=True)
    check_finite(found, name)
    least = float(found.min())
    if least < 0:
        raise ArgumentError(f"{name} must be >= 0, got {least}")
    return found

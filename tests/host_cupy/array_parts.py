"""Parts of the stand-in's `ndarray` that need no device: its flags, its indices."""

from __future__ import annotations

from typing import Any

import numpy as np

from host_cupy import state

HostArray = np.ndarray[Any, Any]


class Flags:
    def __init__(self, flags: Any, owns: bool) -> None:
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.owndata = owns

    def __getitem__(self, name: str) -> bool:
        return bool(getattr(self, name.lower()))


def fit(values: HostArray, shape: tuple[int, ...]) -> HostArray:
    while values.ndim > len(shape) and values.shape[0] == 1:
        values = values[0]
    return np.broadcast_to(values, shape)


def split_key(key: Any, array: type) -> tuple[tuple[Any, ...], list[Any]]:
    """The parts of an index, None-marked where a device array stands, and those arrays."""
    parts = list(key) if isinstance(key, tuple) else [key]
    indices, masks = [], 0
    for place, part in enumerate(parts):
        if isinstance(part, array):
            if part.dtype.kind not in "biu":
                raise IndexError(f"arrays used as indices must be int or bool, not {part.dtype}")
            masks += part.dtype.kind == "b"
            indices.append(part)
            parts[place] = _Place
        elif isinstance(part, bool | np.bool_) or not (
            part is None or part is Ellipsis or isinstance(part, slice | int | np.integer)
        ):
            raise IndexError(f"an index of type {type(part)} is a hidden copy to the device")
    if masks > 1:
        raise IndexError("more than one boolean array in an index")
    if masks:
        state.read("a boolean mask")
    return tuple(parts), indices


class _Place:
    """Where an index array goes."""


def join_key(plain: tuple[Any, ...], indices: Any) -> tuple[Any, ...]:
    rest = iter(indices)
    return tuple(next(rest) if part is _Place else part for part in plain)


def refuse_duplicates(shape: tuple[int, ...], key: tuple[Any, ...]) -> None:
    places = np.arange(int(np.prod(shape))).reshape(shape)[key].ravel()
    if len(np.unique(places)) < places.size:
        raise IndexError("an element is assigned twice: which value stays is undefined in CuPy")

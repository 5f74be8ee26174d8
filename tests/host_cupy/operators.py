"""Operators and reductions of the stand-in's `ndarray`, as methods made of NumPy's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from host_cupy.array_parts import HostArray


def binary(function: Callable[..., Any]) -> tuple[Any, Any, Any]:
    def known(self: Any, other: Any) -> bool:
        if isinstance(other, np.ndarray | list | tuple):
            raise TypeError(f"Unsupported type {type(other)}")
        return isinstance(other, type(self) | bool | int | float | complex | np.generic)

    def forward(self: Any, other: Any) -> Any:
        return self._apply(function, self, other) if known(self, other) else NotImplemented

    def backward(self: Any, other: Any) -> Any:
        return self._apply(function, other, self) if known(self, other) else NotImplemented

    def in_place(self: Any, other: Any) -> Any:
        return (
            self._apply(function, self, other, out=self) if known(self, other) else NotImplemented
        )

    return forward, backward, in_place


def compared(function: Callable[..., Any]) -> Any:
    def compare(self: Any, other: Any) -> Any:
        return self._apply(function, self, other)

    return compare


def reduction(name: str) -> Any:
    function = getattr(np, name)

    def reduce(
        self: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False
    ) -> Any:
        return self._apply(
            lambda a: function(a, axis=axis, dtype=dtype, keepdims=keepdims), self, out=out
        )

    def select(self: Any, axis: Any = None, out: Any = None, keepdims: Any = False) -> Any:
        return self._apply(lambda a: function(a, axis=axis, keepdims=keepdims), self, out=out)

    def place(
        self: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False
    ) -> Any:
        def find(a: HostArray) -> Any:
            found = function(a, axis=axis, keepdims=keepdims)
            return found if dtype is None else found.astype(dtype)

        return self._apply(find, self, out=out)

    if name in ("sum", "prod", "mean"):
        return reduce
    return place if name.startswith("arg") else select

"""A property that is made at its first use and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class once(Generic[T]):  # noqa: N801  used like functools.cached_property
    """`functools.cached_property` without the lock that Python 3.11 holds while it is made.

    That lock is one for all objects of a class: what sends messages between ranks that are threads
    of one process would wait in it for ever.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make, self.__doc__ = make, make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value: T = self._make(instance)
        instance.__dict__[self._name] = value  # found before this, which has no __set__
        return value

"""Work of a product or solve that a GPU may do beside what follows it."""

from __future__ import annotations

import importlib
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from gpu_hodlr.devices import Array, namespace


class Branch(Protocol):
    """What is called `with` it waits for all that was called before, and nothing for that.

    Several blocks of one branch are done in their order. Before anything uses their results,
    `join` makes what follows wait for them; it must be called, in the function that made the
    branch. Nothing may be written in a block that what follows reads, or the reverse.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def join(self) -> None:
        """What is called from now on waits for the branch."""


class _Inline:
    """On the CPU: everything is done when its call returns."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def join(self) -> None:
        """Nothing to wait for."""


def branch(like: Array) -> Branch:
    """A new branch, for work on arrays like this one.

    On a GPU it is a stream forked from the current one while a function is captured into a graph
    (`replay.Replay`): the graph's launches that do not wait for each other run side by side. Called
    launch by launch the work is in one row, and takes as long as its launches.
    """
    if namespace(like) is np:
        return _Inline()
    made: Branch = importlib.import_module("gpu_hodlr.batched.cupy_branches").Forked()
    return made

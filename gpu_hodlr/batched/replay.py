"""A function of one array that a GPU replays as a CUDA graph; on the CPU just the function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.devices import Array, namespace

if TYPE_CHECKING:
    from gpu_hodlr.batched.cupy_graphs import Graphs


class Replay:
    """Calls a function (n, k) -> (n, k), captured once for each (shape, dtype), then replayed.

    On a GPU the launches of a product take longer than the work of a small one; a graph costs one
    launch. The function must always be the same one, of data that does not move and that its
    owner keeps; it may not wait for the GPU, copy from the host, nor send messages. It is not kept:
    an owner that holds its own method here would hold itself, and its memory, until the garbage
    collector runs.

    Args:
        captured: whether to; on many ranks a function sends messages, which no graph can hold.
    """

    def __init__(self, captured: bool = True) -> None:
        self._captured = captured
        self._graphs: Graphs | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which live on the GPU: they are captured anew."""
        return {"_captured": self._captured, "_graphs": None}

    def __call__(self, function: Callable[[Array], Array], x: Array) -> Array:
        """function(x), on the current stream."""
        if namespace(x) is np or not self._captured:
            return function(x)
        if self._graphs is None:
            self._graphs = importlib.import_module("gpu_hodlr.batched.cupy_graphs").Graphs()
        return self._graphs(function, x)

"""A function of one array that a GPU replays as a CUDA graph; on the CPU just the function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr.devices import Array, namespace


class Replayed:
    """`function` (n, k) -> (n, k), captured once for each (shape, dtype) and then replayed.

    On a GPU the launches of a product take longer than the work of a small one; a graph costs one
    launch. The function may not wait for the GPU nor copy from the host.

    Args:
        function: without side effects, of data that does not move.
    """

    def __init__(self, function: Callable[[Array], Array]) -> None:
        self.function = function
        self._graphs: Any = None

    def __call__(self, x: Array) -> Array:
        """The function of x, on the current stream."""
        if namespace(x) is np:
            return self.function(x)
        if self._graphs is None:
            graphs = importlib.import_module("gpu_hodlr.batched.cupy_graphs")
            self._graphs = graphs.Graphs(self.function)
        return self._graphs(x)

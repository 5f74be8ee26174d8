"""Kernel sources built for the host, and launches of them under several schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_cuda import runner
from host_cupy import HostCupy

from gpu_hodlr import kernel_sources as sources

# The sanitizers judge by what orders two accesses, not by which came first: one schedule will do.
SCHEDULES = (1,) if runner.SANITIZER else (0, 1, 2, 3)
DTYPES = (np.float32, np.float64)

needs_compiler = pytest.mark.skipif(
    not runner.has_compiler(),
    reason="no g++: kernel sources cannot be executed on the host",
)


def built_for_host(
    folder: Path, names: Sequence[str] | None = None
) -> dict[str, runner.HostKernels]:
    """Kernel sources, all by default; libraries are kept in the folder."""
    names = sources.source_names() if names is None else names
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(
            lambda name: runner.HostKernels(name, sources.read_source(name), folder), names
        )
        return dict(zip(names, built, strict=True))


def under_schedules(launch: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a launch, which must be the same to the bit under every schedule."""
    first, *others = (launch(*arguments, **options, seed=seed) for seed in SCHEDULES)
    for other in others:
        pairs = zip(first, other, strict=True) if isinstance(first, tuple) else [(first, other)]
        for a, b in pairs:
            np.testing.assert_array_equal(a, b)
    return first


def assert_one_launch(stand_in: HostCupy, work: Callable[[], object]) -> None:
    """Of a call that was made before: nothing else on the GPU, nothing sent and no wait."""
    work()
    stand_in.counters.reset()
    work()
    c = stand_in.counters
    assert (c.launches, c.array_operations, c.host_to_device) == (1, 0, 0)
    assert c.synchronizations == 0


def padded_index(rng: np.random.Generator, nodes: int, m: int, n: int) -> np.ndarray:
    """Indices below n, some of them -1."""
    index = rng.integers(0, n, (nodes, m))
    index[rng.random((nodes, m)) < 0.15] = -1
    return index

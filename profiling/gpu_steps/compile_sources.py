"""All kernel sources compiled side by side, and what the compiler made of every kernel."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cupy

from gpu_hodlr.batched.cuda import _COMPILER
from gpu_hodlr.kernel_sources import read_source
from gpu_steps.entry_points import all_entry_points
from gpu_steps.report import Report


def run(report: Report) -> None:
    start = time.perf_counter()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        futures = {
            source: pool.submit(_compiled, source, kernels)
            for source, kernels in all_entry_points().items()
        }
        for source, future in futures.items():
            with report.case(source) as found:
                found.update(future.result())
    report.row(wall_seconds=round(time.perf_counter() - start, 2), sources=len(futures))


def _compiled(source: str, kernels: list[str]) -> dict[str, Any]:
    """Seconds, and (registers, local bytes) of every kernel."""
    start = time.perf_counter()
    cupy.cuda.Device(0).use()  # a new thread has no context yet
    module = cupy.RawModule(code=read_source(source), options=_COMPILER)
    attributes = {kernel: module.get_function(kernel).attributes for kernel in kernels}
    seconds = time.perf_counter() - start
    made = {
        kernel: (found["num_regs"], found["local_size_bytes"])
        for kernel, found in attributes.items()
    }
    return {
        "seconds": round(seconds, 2),
        "most_registers": max(registers for registers, _ in made.values()),
        "most_local_bytes": max(local for _, local in made.values()),
        "registers_and_local_bytes": made,
    }

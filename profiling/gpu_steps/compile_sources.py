"""All kernel sources compiled as the package does it, and what the compiler made of each kernel."""

from __future__ import annotations

import time

import cupy
import numpy as np

import gpu_hodlr as gh
from gpu_hodlr.batched import cuda_modules
from gpu_hodlr.errors import DeviceError
from gpu_steps.entry_points import all_entry_points
from gpu_steps.report import Report


def run(report: Report) -> None:
    start = time.perf_counter()
    with report.case("all sources") as found:
        cuda_modules.compile_all()  # by several threads
        found["seconds"] = round(time.perf_counter() - start, 2)
    for source, kernels in all_entry_points().items():
        with report.case(source) as found:
            try:
                module = cuda_modules.module(source)
            except DeviceError as error:
                print(error)  # with the compiler's log
                raise
            attributes = {name: module.get_function(name).attributes for name in kernels}
            made = {
                name: (of["num_regs"], of["local_size_bytes"]) for name, of in attributes.items()
            }
            found.update(
                most_registers=max(registers for registers, _ in made.values()),
                most_local_bytes=max(local for _, local in made.values()),
                registers_and_local_bytes=made,
            )
    with report.case("small matrix", n=256) as found:
        found["off"] = _small_matrix()


def _small_matrix() -> float:
    """How far off a compression, its product and a solve are: the first work of all libraries."""
    x = np.linspace(0, 1, 256)
    matrix = np.exp(-np.abs(x[:, None] - x))
    K = gh.compress(matrix, rtol=1e-8, leaf_size=32, device="cuda")
    v = np.cos(np.arange(256.0))[:, None]
    b = K @ cupy.asarray(v)
    off = float(np.linalg.norm(b.get() - matrix @ v) / np.linalg.norm(matrix @ v))
    back = K.factorize(1.0).solve(b + cupy.asarray(v)).get()
    off = max(off, float(np.linalg.norm(back - v) / np.linalg.norm(v)))
    if not off < 1e-6:
        raise AssertionError(f"product and solve are off by {off:.3g}")
    return off

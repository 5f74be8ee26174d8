"""Rates in one process: copy and GEMM, every kernel on level shapes, every job of the matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np
import roofline
from network_data import load, operator

import gpu_hodlr as gh
from gpu_steps.kernel_calls import DEEP, LEVELS, TINY, Call, Inputs, calls, decompositions
from gpu_steps.report import Report

TYPES = (np.float64, np.float32)
KERNEL_N = {"full": 131_072, "small": 120}
REPEATS = {"full": 3, "small": 1}
COPY_BYTES = {"full": 1 << 30, "small": 1 << 16}
GEMM_STACK = {"full": 512, "small": 1}
COLUMNS = {"full": (1, 8, 64), "small": (1, 9)}
CUT = {"side": 4, "hidden": 4, "samples": 60}


def run(report: Report) -> None:
    rates = {}
    for dtype in TYPES:
        name = np.dtype(dtype).name
        with report.case("rates", dtype=name) as found:
            rates[name] = (
                roofline.copy_bandwidth("cuda", np.dtype(dtype), COPY_BYTES[report.size]),
                roofline.gemm_rate("cuda", np.dtype(dtype), GEMM_STACK[report.size]),
            )
            found["copy_GB_per_s"], found["gemm_GF_per_s"] = (r / 1e9 for r in rates[name])
    if "float64" not in rates:
        return
    _job(report, "mnist", "float64")
    _job(report, "kernel", "float64")
    for level in (TINY,) if report.small else LEVELS:
        _kernels(report, level, "float64", rates["float64"])
    if "float32" in rates:
        _kernels(report, TINY if report.small else LEVELS[0], "float32", rates["float32"])
    if not report.small:
        _job(report, "enco", "float64")
        _job(report, "kernel", "float32")
        made = decompositions(DEEP, Inputs(np.float64))
        _call_rows(report, made, DEEP, "float64", rates["float64"])


def _kernels(report: Report, level: Any, dtype: str, rates: tuple[float, float]) -> None:
    """A row for every primitive on the shapes of a level."""
    made = calls(level, np.dtype(dtype).type, COLUMNS[report.size])
    _call_rows(report, made, level, dtype, rates)


def _call_rows(
    report: Report, made: Iterator[Call], level: Any, dtype: str, rates: tuple[float, float]
) -> None:
    """Rates of the calls, what a call does on the host included."""
    shape = {"nodes": level.nodes, "m": level.m, "s": level.s, "r": level.r}
    with report.case("kernels", dtype=dtype, **shape):
        for call in made:
            with report.case(call.name, dtype=dtype, **shape) as found:
                seconds = roofline.median_seconds(call.work, "cuda", REPEATS[report.size])
                found.update(
                    kernels=call.kernels,
                    microseconds=1e6 * seconds,
                    GB_per_s=call.bytes / seconds / 1e9,
                    GF_per_s=call.flops / seconds / 1e9,
                    share_of_copy=call.bytes / seconds / rates[0],
                    share_of_gemm=call.flops / seconds / rates[1],
                )
    cupy.get_default_memory_pool().free_all_blocks()


def _job(report: Report, matrix: str, dtype: str) -> None:
    """Product, factor, solve, and compression by phase, as roofline.py measures them."""
    size = report.size
    with report.case("jobs", matrix=matrix, dtype=dtype) as found:
        op, options = _operator(matrix, dtype, report)
        found.update(
            roofline.measure(
                op, options, repeats=REPEATS[size], copy_bytes=COPY_BYTES[size],
                gemm_stack=GEMM_STACK[size],
            )
        )  # fmt: skip


def _operator(matrix: str, dtype: str, report: Report) -> tuple[gh.Operator, dict[str, Any]]:
    if matrix == "kernel":
        op, options = roofline.matrix(matrix, KERNEL_N[report.size], dtype, "cuda")
    else:
        op = operator(load(matrix, **(CUT if report.small else {})), dtype, "cuda")
        options = roofline.table_options(matrix)
    return op, {**options, "leaf_size": 30} if report.small else options

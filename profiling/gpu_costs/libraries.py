"""Work of cuBLAS, cuSOLVER and CuPy's own operations, from the arguments of their interfaces."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from gpu_costs.gpus import Gpu
from gpu_costs.steps import Step
from gpu_costs.work import Work

_TILES = ((128, 128, 1.0), (128, 64, 0.9), (64, 64, 0.6), (32, 32, 0.3))  # rows, columns, share
_TILE_THREADS, _TILE_SHARED = 256, 100 * 1024
_LEAST_DEPTH = 256  # of a part, where few tiles are split along the depth
_PANEL = 32  # unknowns that cuBLAS's and cuSOLVER's small kernels do at a time
_PANEL_STEPS = 3.0  # dependent steps of a panel: factor or invert, apply, update
_SMALL_RATE = 0.2  # share of the peak of their small kernels
_SORT_PASSES = 16.0  # of a radix sort of 64-bit keys, read and written
_SORTS = {"argsort", "sort", "unique"}
_EIGEN = {"eigh": 9.0, "eigvalsh": 4.0, "svd": 20.0}  # operations / n^3
_EIGEN_RATE, _EIGEN_CHAIN = 0.05, 6.0  # of LAPACK's algorithms by cuSOLVER; steps a column


class UnknownCallError(KeyError):
    """A function of cuBLAS or cuSOLVER without a cost model."""

    def __str__(self) -> str:
        return str(self.args[0])


def gemm_work(gpu: Gpu, m: float, n: float, k: float, count: float, itemsize: int) -> Work:
    """C (m, n) = A (m, k) B (k, n), so many of them, by the tiles that are fastest."""
    moved = count * itemsize * (m * k + k * n + m * n)
    found = []
    for rows, columns, rate in _TILES:
        tiles = count * math.ceil(m / rows) * math.ceil(n / columns)
        parts = max(1, min(int(gpu.multiprocessors // max(tiles, 1)), int(k // _LEAST_DEPTH)))
        found.append(
            Work(
                bytes=moved + (parts - 1) * count * m * n * itemsize,
                flops=2 * tiles * rows * columns * k, blocks=tiles * parts, threads=_TILE_THREADS,
                shared=_TILE_SHARED, rate=rate, matrix=True, itemsize=itemsize,
            )
        )  # fmt: skip
    return min(found, key=lambda work: work.seconds(gpu))


def gemv_work(m: float, n: float, count: float, itemsize: int) -> Work:
    """A matrix (m, n) with a vector, so many of them: each matrix once."""
    return Work(
        bytes=count * itemsize * (m * n + m + n), flops=2 * count * m * n,
        blocks=count * math.ceil(max(m, n) / 128), itemsize=itemsize,
    )  # fmt: skip


def _gemm_batched(gpu: Gpu, x: list[float], v: int) -> Work:
    return gemm_work(gpu, *x[3:6], x[-1], v)


def _gemm(gpu: Gpu, x: list[float], v: int) -> Work:
    return gemm_work(gpu, *x[3:6], 1, v)


def _gemm_ex(gpu: Gpu, x: list[float], v: int) -> Work:
    """(..., count, compute type, algorithm)."""
    return gemm_work(gpu, *x[3:6], x[-3], v)


def _gemv_batched(gpu: Gpu, x: list[float], v: int) -> Work:
    return gemv_work(x[2], x[3], x[-1], v)


def _trsm_batched(gpu: Gpu, x: list[float], v: int) -> Work:
    """(handle, side, uplo, op, diag, m, n, ..., count): order m from the left, else n."""
    order, others = (x[5], x[6]) if x[1] == 0 else (x[6], x[5])
    count = x[-1]
    return Work(
        bytes=count * v * (order**2 / 2 + 2 * order * others), flops=count * order**2 * others,
        blocks=count * math.ceil(others / 64), threads=128, rate=_SMALL_RATE, itemsize=v,
        chain=_PANEL_STEPS * math.ceil(order / _PANEL),
    )  # fmt: skip


def _potrf_batched(gpu: Gpu, x: list[float], v: int) -> Work:
    """(handle, uplo, n, ..., count)."""
    n, count = x[2], x[-1]
    return Work(
        bytes=count * n**2 * v, flops=count * n**3 / 3, blocks=count, threads=128,
        rate=_SMALL_RATE, itemsize=v, chain=n / 4 + _PANEL_STEPS * math.ceil(n / _PANEL),
    )  # fmt: skip


# By name without "cublas", the letter of the type and "_v2"; arguments by their place.
CALLS: dict[str, Callable[[Gpu, list[float], int], Work]] = {
    "gemm": _gemm,
    "gemmStridedBatched": _gemm_batched,
    "gemmStridedBatchedEx": _gemm_ex,
    "gemvStridedBatched": _gemv_batched,
    "potrfBatched": _potrf_batched,
    "trsmBatched": _trsm_batched,
}
_TYPE_OF_A, _ITEMSIZES = 8, {0: 4, 1: 8, 2: 2, 14: 2}  # of GemmEx; float, double, half, bfloat16
_FULL_NAME = re.compile(r"(?:cublas)?(?:([SDsd])(?=[a-z])|(?=Gemm))(\w+?)(?:_v2)?")


def library_work(step: Step, gpu: Gpu) -> Work:
    """Of a call of cuBLAS or cuSOLVER, or of CuPy's own products by cuBLAS.

    Raises:
        UnknownCallError: there is no cost model of it.
    """
    if step.operands:
        return _cupy_product(step, gpu).times(step.times)
    found = _FULL_NAME.fullmatch(step.name)
    letter, name = found.groups() if found else (None, step.name)
    name = name[:1].lower() + name[1:]
    if name not in CALLS:
        raise UnknownCallError(f"library call {step.name} has no cost model: add one to CALLS")
    places = range(max(int(place) for place in step.numbers) + 1)
    values = [step.numbers.get(str(place), 0.0) for place in places]
    if letter is None:
        itemsize = _ITEMSIZES.get(int(values[_TYPE_OF_A]), 8)
    else:
        itemsize = 4 if letter in "Ss" else 8
    return CALLS[name](gpu, values, itemsize).times(step.times)


def _cupy_product(step: Step, gpu: Gpu) -> Work:
    """What CuPy gives to cuBLAS: (..., m, k) with (..., k, n), whatever it was written as."""
    out, v = step.operands["out"], step.itemsize
    a = step.operands["in0"]
    b = step.operands.get("in1", a)
    m, n = (out.shape[-2], out.shape[-1]) if len(out.shape) > 1 else (max(1, out.size), 1)
    count = out.size / (m * n) if out.size else 1.0
    if step.name in ("matmul", "dot"):
        depth = float(a.shape[-1])
    else:  # |A| |B| = k^2 |C| count
        depth = math.sqrt(a.size * b.size / max(1.0, out.size * count))
    if min(m, n) == 1:
        return gemv_work(max(m, n), depth, count, v)
    return gemm_work(gpu, m, n, depth, count, v)


def array_work(step: Step) -> Work:
    """Of an operation of CuPy's own: its operands once, in as many blocks as they fill."""
    moved, v = float(step.nbytes), step.itemsize
    if step.name in _EIGEN:
        n = min(step.operands["in0"].shape[-2:])
        return Work(
            bytes=moved, flops=_EIGEN[step.name] * n**3, blocks=max(1.0, n / 32), rate=_EIGEN_RATE,
            chain=_EIGEN_CHAIN * n, itemsize=v,
        ).times(step.times)  # fmt: skip
    if step.name in _SORTS:
        moved *= _SORT_PASSES
    values = max((x.size for x in step.operands.values()), default=1)
    return Work(bytes=moved, blocks=max(1.0, math.ceil(values / 1024))).times(step.times)

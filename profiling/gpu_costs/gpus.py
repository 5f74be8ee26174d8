"""What is assumed of a GPU, each number with where it comes from; none was measured here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any


def _assumed(why: str, default: Any = None) -> Any:
    metadata = {"why": why}
    return (
        field(metadata=metadata) if default is None else field(default=default, metadata=metadata)
    )


@dataclass(frozen=True)
class Gpu:
    """A GPU and the host in front of it; `assumptions` prints why each number is what it is."""

    name: str = _assumed("")
    copy: float = _assumed("bytes/s read and written by a large copy: 90 % of the data sheet")
    memory: float = _assumed("bytes of device memory, data sheet")
    multiprocessors: int = _assumed("data sheet, SXM", 132)
    vector64: float = _assumed("float64 operations/s without tensor cores, data sheet", 33.5e12)
    vector32: float = _assumed("float32 operations/s, data sheet", 67e12)
    gemm64: float = _assumed("float64 operations/s of a large DGEMM, 90 % of 67e12", 60e12)
    gemm32: float = _assumed("float32 operations/s of a large SGEMM, 75 % of 67e12; no TF32", 50e12)
    gemm16: float = _assumed("operations/s of a large GEMM in bfloat16, 75 % of 990e12", 740e12)
    cache: float = _assumed("bytes of L2, data sheet", 50e6)
    cache_copy: float = _assumed("bytes/s of L2, all multiprocessors together", 5.5e12)
    processor_copy: float = _assumed("bytes/s one multiprocessor draws: 64 a cycle", 1.1e11)
    thread_copy: float = _assumed(
        "bytes/s one thread draws: 64 bytes under way for 0.6 us, so that a multiprocessor with few"
        " threads does not draw all it could",
        64 / 0.6e-6,
    )
    threads: int = _assumed("threads a multiprocessor holds", 2048)
    blocks: int = _assumed("thread blocks a multiprocessor holds", 32)
    shared: int = _assumed("bytes of shared memory of a multiprocessor", 228 * 1024)
    barrier: float = _assumed(
        "s of a dependent step inside a thread block: a barrier, a reduction over warps, a load"
        " from L2",
        1.2e-6,
    )
    least: float = _assumed("s from a kernel's start to its end, at least", 2.0e-6)
    node: float = _assumed("s between two dependent kernels of a CUDA graph", 1.0e-6)
    gap: float = _assumed("s between two kernels launched one by one, the queue full", 1.2e-6)
    latency: float = _assumed("s from a launch by the host to the kernel's start", 4.0e-6)
    launch: float = _assumed(
        "s of the host for a raw kernel by CuPy, the package's checks, views and allocations around"
        " it included",
        14e-6,
    )
    call: float = _assumed(
        "s of the host for a call of cuBLAS or cuSOLVER by ctypes, likewise", 18e-6
    )
    operation: float = _assumed("s of the host for an operation of CuPy's own, likewise", 14e-6)
    replay: float = _assumed("s of the host for the launch of a graph", 10e-6)
    replayed_node: float = _assumed("s more for each of its nodes", 0.05e-6)
    wait: float = _assumed("s of the host to read a value once the GPU is done", 18e-6)
    send: float = _assumed("s of the host for a copy to the device, staged in pinned memory", 15e-6)
    pcie: float = _assumed("bytes/s between host and device, pageable host memory", 12e9)
    mark: float = _assumed("s of the host to record an event or wait for one on a stream", 1.5e-6)
    host_share: float = _assumed(
        "share of the seconds that the host's own work took where it was recorded (NumPy's sorts"
        " and searches between the calls, one core)",
        1.0,
    )

    def vector(self, itemsize: int) -> float:
        """Operations a second without tensor cores."""
        return self.vector64 if itemsize == 8 else self.vector32

    def gemm(self, itemsize: int) -> float:
        """Operations a second of a large GEMM."""
        return {8: self.gemm64, 4: self.gemm32}.get(itemsize, self.gemm16)

    def assumptions(self) -> list[tuple[str, Any, str]]:
        """Name, value and why, of every number."""
        return [
            (f.name, getattr(self, f.name), f.metadata["why"]) for f in fields(self)
            if f.name != "name"
        ]  # fmt: skip


_H100 = Gpu("H100", copy=3.0e12, memory=80e9)
GPUS = {
    "H100": _H100,
    "H200": replace(_H100, name="H200", copy=4.3e12, memory=141e9),
}

MODELLED = (
    "a kernel takes the longest of: its bytes at the copy bandwidth, or at L2's where a pass reads"
    " again what fits there; the bytes of the busiest multiprocessor at what its threads draw; its"
    " operations likewise; its dependent steps times the barrier, for each wave of thread blocks",
    "a kernel of one block a matrix occupies as many multiprocessors as there are matrices",
    "a GEMM is cut into tiles of 128 x 128, 128 x 64, 64 x 64 or 32 x 32, whichever is fastest;"
    " they reach 1, 0.9, 0.6 and 0.3 of the rate; the edges of tiles count in full; few tiles are"
    " split along the depth, down to 256 a part",
    "the host issues steps one after the other while the GPU is at work; it waits where the code"
    " reads a value; the nodes of a graph start without it",
    "streams run side by side as their events allow, but not faster than the sum of their work",
    "a step starts when all that it waits for has ended, and a gap more, or `node` in a graph:"
    " branches overlap, and a graph takes its longest path. depth is the number of steps on the"
    " longest path, chain what these would take without work, least and node each",
    "compiled kernels, memory pools and graphs are there: as in a second run",
)

"""What one step asks of a GPU's multiprocessors, and the seconds that it takes there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gpu_costs.gpus import Gpu

_WARP = 32


@dataclass(frozen=True)
class Work:
    """Bytes, operations, and how they are spread over thread blocks.

    Attributes:
        bytes: read and written in device memory, each once.
        flops: operations.
        blocks: thread blocks; the work is spread over them evenly.
        threads: of a block.
        shared: bytes of shared memory of a block.
        chain: dependent steps of a block, one barrier each.
        again: bytes that are read or written again, from L2 where `footprint` fits there.
        footprint: bytes that have to stay in L2 for that.
        rate: share of the peak that the inner loop reaches.
        matrix: whether the peak is that of a GEMM.
        itemsize: of the numbers.
    """

    bytes: float = 0.0
    flops: float = 0.0
    blocks: float = math.inf
    threads: int = 256
    shared: int = 0
    chain: float = 0.0
    again: float = 0.0
    footprint: float = 0.0
    rate: float = 1.0
    matrix: bool = False
    itemsize: int = 8

    def times(self, factor: float) -> Work:
        """So many times as much, side by side."""
        return replace(
            self, bytes=self.bytes * factor, flops=self.flops * factor,
            blocks=self.blocks * factor, again=self.again * factor,
            footprint=self.footprint * factor,
        )  # fmt: skip

    def resident(self, gpu: Gpu) -> int:
        """Blocks that a multiprocessor holds at a time."""
        threads = _WARP * -(-self.threads // _WARP)
        by_shared = gpu.shared // self.shared if self.shared else gpu.blocks
        return max(1, min(gpu.threads // threads, by_shared, gpu.blocks))

    def seconds(self, gpu: Gpu) -> float:
        """Of a kernel on an idle GPU, from its start to its end."""
        peak = self.rate * (gpu.gemm if self.matrix else gpu.vector)(self.itemsize)
        cached = self.footprint <= gpu.cache
        in_memory = self.bytes + (0.0 if cached else self.again)
        in_cache = self.bytes + self.again
        shares = [in_memory / gpu.copy, in_cache / gpu.cache_copy, self.flops / peak]
        if math.isfinite(self.blocks):
            blocks = max(1.0, self.blocks)
            each = math.ceil(blocks / gpu.multiprocessors)  # of the busiest multiprocessor
            resident = self.resident(gpu)
            threads = self.threads * min(each, resident)
            drawn = min(gpu.processor_copy, threads * gpu.thread_copy)
            waves = math.ceil(blocks / (gpu.multiprocessors * resident))
            shares += [
                each * in_cache / blocks / drawn,
                each * self.flops / blocks / (peak / gpu.multiprocessors),
                waves * self.chain * gpu.barrier,
            ]
        return gpu.least + max(shares)

    def share_of_device(self, gpu: Gpu) -> float:
        """Seconds that it would take were the whole GPU at work: what side by side cannot beat."""
        peak = self.rate * (gpu.gemm if self.matrix else gpu.vector)(self.itemsize)
        again = 0.0 if self.footprint <= gpu.cache else self.again
        return max(
            (self.bytes + again) / gpu.copy, (self.bytes + self.again) / gpu.cache_copy,
            self.flops / peak,
        )  # fmt: skip

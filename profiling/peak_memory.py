"""How much memory a benchmark's process takes."""

from __future__ import annotations

import re
from pathlib import Path

from gpu_hodlr.devices import namespace_on


def resident(peak: bool = True) -> int:
    """Bytes of this process, as Linux counts them: the most so far, or now.

    `getrusage` tells the most of the process that started this one where that is more: until exec a
    child has its parent's memory.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^Vm{'HWM' if peak else 'RSS'}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def memory_peak(device: str) -> float:
    """Bytes: the resident peak so far, or what CuPy's pool has taken and not given back."""
    if device == "cpu":
        return resident()
    return float(namespace_on(device).get_default_memory_pool().total_bytes())

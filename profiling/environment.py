"""What a benchmark ran on, for its JSON file."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu_hodlr.batched.threads import num_threads

PACKAGES = ("gpu-hodlr", "numpy", "scipy", "torch", "cupy-cuda12x", "cupy-cuda13x")


def environment() -> dict[str, object]:
    """Date, processor, threads, GPU (none in this version) and package versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "threads": num_threads(),
        "gpu": None,
        "python": platform.python_version(),
        "packages": versions,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()

"""What a benchmark ran on, for its JSON file."""

from __future__ import annotations

import datetime
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from threadpoolctl import threadpool_info

from gpu_hodlr.batched.threads import num_threads
from gpu_hodlr.devices import gpu_name, namespace_on, resolve_device
from gpu_hodlr.errors import DeviceError

PACKAGES = (
    "gpu-hodlr",
    "numpy",
    "scipy",
    "torch",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "mpi4py",
    "mpich",
)


def environment() -> dict[str, object]:
    """Date, processor, threads, GPU (None where there is none to use) and versions.

    BLAS with the kernels it has chosen: the variable OPENBLAS_CORETYPE makes it take others.
    """
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
        "blas": _blas(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _blas() -> list[str]:
    """NumPy's and SciPy's, one where they have the same, such as "openblas 0.3.31 SkylakeX"."""
    parts = "internal_api", "version", "architecture"
    return sorted(
        {
            " ".join(str(library[part]) for part in parts if library.get(part))
            for library in threadpool_info()
            if library["user_api"] == "blas"
        }
    )


def _gpu() -> dict[str, object] | None:
    """Name, memory and versions of the current GPU."""
    try:
        resolve_device("cuda")
    except DeviceError:
        return None
    cupy = namespace_on("cuda")
    runtime = cupy.cuda.runtime
    return {
        "name": gpu_name("cuda"),
        "compute_capability": cupy.cuda.Device().compute_capability,
        "memory_GB": runtime.memGetInfo()[1] / 1e9,
        "driver": _driver(),
        "cuda_of_driver": _cuda(runtime.driverGetVersion()),
        "cuda": _cuda(runtime.runtimeGetVersion()),
        "cupy": cupy.__version__,
    }


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> str | None:
    """The NVIDIA driver's version, as Linux tells it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()

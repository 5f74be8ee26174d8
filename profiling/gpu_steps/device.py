"""The machine: card, driver, versions, loaded libraries, and whether the device can be chosen."""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from gpu_steps.report import Report, Skipped

MODULES = (
    "numpy", "scipy", "threadpoolctl", "cupy", "torch", "mpi4py", "pytest", "xdist", "hypothesis",
    "matplotlib", "tqdm",
)  # fmt: skip
TOOLS = ("nvidia-smi", "ncu", "compute-sanitizer", "g++", "mpirun")
# Where they lie when they are not on the PATH.
_FOLDERS = (
    "/usr/local/cuda/bin",
    "/opt/nvidia/nsight-compute/*",
    "/usr/local/cuda/compute-sanitizer",
)
_CARD = (
    "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current,"
    "mig.mode.current,compute_mode"
)
_LIBRARY = re.compile(
    r"lib(?:cuda|cudart|cublas|cublasLt|cusolver|cusparse|nvrtc|nccl|openblas|mkl_rt|gomp|mpi)\b"
    r"|libscipy_openblas"
)


def run(report: Report) -> None:
    report.row(system=platform.platform(), python=platform.python_version())
    with report.case("card") as found:
        found.update(_card())
    for name in MODULES:
        with report.case("module", name=name) as found:
            start = time.perf_counter()
            module = importlib.import_module(name)
            found["seconds"] = round(time.perf_counter() - start, 2)
            found["version"] = str(getattr(module, "__version__", ""))
            found["path"] = str(getattr(module, "__file__", ""))
    report.row(tools={name: find_tool(name) for name in TOOLS})
    for name, ask in (("gpu_hodlr", _gpu_hodlr), ("CuPy", _cupy), ("torch", _torch)):
        with report.case(f"device of {name}") as found:
            found.update(ask())
    report.row(libraries=_loaded())


def find_tool(name: str) -> str | None:
    """The path of a program, on the PATH or where NVIDIA installs it."""
    found = shutil.which(name)
    if found is None:
        folders = (Path("/").glob(f"{folder[1:]}/{name}") for folder in _FOLDERS)
        found = next((str(path) for paths in folders for path in sorted(paths)), None)
    return found


def _card() -> dict[str, Any]:
    """What nvidia-smi says."""
    program = find_tool("nvidia-smi")
    if program is None:
        raise Skipped("nvidia-smi is not there")
    done = subprocess.run(
        [program, f"--query-gpu={_CARD}", "--format=csv,noheader"],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Skipped(f"nvidia-smi: {(done.stderr or done.stdout).strip()[:200]}")
    first = done.stdout.strip().splitlines()[0]
    return dict(zip(_CARD.split(","), (part.strip() for part in first.split(",")), strict=True))


def _torch() -> dict[str, Any]:
    import torch

    there = torch.cuda.is_available()
    found = {"cuda": torch.version.cuda, "available": there}
    return found | ({"name": torch.cuda.get_device_name(0)} if there else {})


def _cupy() -> dict[str, Any]:
    import cupy

    runtime, device = cupy.cuda.runtime, cupy.cuda.Device(0)
    free, total = runtime.memGetInfo()
    attributes = device.attributes
    wanted = ("MultiProcessorCount", "MaxSharedMemoryPerBlockOptin", "L2CacheSize", "ClockRate",
              "MemoryClockRate", "GlobalMemoryBusWidth")  # fmt: skip
    return {
        "runtime": runtime.runtimeGetVersion(),
        "driver": runtime.driverGetVersion(),
        "compute_capability": device.compute_capability,
        "free_GB": free / 1e9,
        "total_GB": total / 1e9,
        "attributes": {name: attributes[name] for name in wanted if name in attributes},
    }


def _gpu_hodlr() -> dict[str, Any]:
    """The package's own choice, and what benchmarks note of the machine."""
    from environment import environment

    import gpu_hodlr
    from gpu_hodlr.devices import gpu_name, resolve_device
    from gpu_hodlr.kernel_sources import source_folder

    return {
        "device": resolve_device("cuda"),
        "gpu": gpu_name("cuda"),
        "package": str(Path(gpu_hodlr.__file__).parent),
        "kernels": str(source_folder()),
        "environment": environment(),
    }


def _loaded() -> dict[str, str]:
    """The libraries of CUDA and BLAS that this process holds, and where they come from."""
    paths = {line.split(maxsplit=5)[5].strip() for line in _maps() if line.count("/")}
    return {Path(path).name: path for path in sorted(paths) if _LIBRARY.match(Path(path).name)}


def _maps() -> list[str]:
    try:
        return Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []

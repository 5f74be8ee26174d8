"""NVRTC of the packages nvidia-cuda-nvrtc (13) and nvidia-cuda-nvrtc-cu12, side by side.

It compiles CUDA sources without a GPU or a driver. CUDA 13 dropped sm_70 (Volta), hence both.

    python -m host_cuda.nvrtc CUDA ARCHITECTURE FOLDER

compiles all kernel sources and prints {name: [compiled, log]}: NVRTC takes turns in a process. What
a source came to is kept in the folder, and asked for again where source or compiler is another.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path

from host_cuda.runner import built

from gpu_hodlr import kernel_sources

OPTIONS = (b"-std=c++17", b"--ptxas-options=-v")
PACKAGES = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}


@cache
def library(major: int) -> ctypes.CDLL | None:
    """The run-time compiler of a CUDA version, or None where its package is not installed."""
    try:
        installed = files(PACKAGES[major]) or []
    except PackageNotFoundError:
        return None
    for file in installed:
        if file.name.startswith(f"libnvrtc-builtins.so.{major}"):
            ctypes.CDLL(str(file.locate()))  # which some versions look for in the system alone
    for file in installed:
        if file.name == f"libnvrtc.so.{major}":
            return ctypes.CDLL(str(file.locate()))
    return None


def compile_source(major: int, name: str, source: str, architecture: int) -> tuple[bool, str]:
    """Whether a source compiles for sm_<architecture>, and the log with registers and spills."""
    nvrtc = library(major)
    assert nvrtc is not None
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"-arch=sm_{architecture}".encode(), *OPTIONS]
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None
    )
    assert created == 0, created
    failed = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*options)
    )
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return not failed, log.value.decode()


def outcome(major: int, name: str, architecture: int, folder: Path) -> tuple[bool, str]:
    """What `compile_source` gives for a kernel source."""
    source = kernel_sources.read_source(name)
    of = version(PACKAGES[major]), repr(OPTIONS), source
    digest = hashlib.sha256("\0".join(of).encode()).hexdigest()[:16]
    path = built(
        folder / f"{name}-sm_{architecture}-{digest}.json",
        lambda partial: partial.write_text(
            json.dumps(compile_source(major, name, source, architecture))
        ),
    )
    return tuple(json.loads(path.read_text()))


def main(major: str, architecture: str, folder: str) -> None:
    """Print, as JSON, whether each kernel source compiles, and the log."""
    print(json.dumps({
        name: outcome(int(major), name, int(architecture), Path(folder))
        for name in kernel_sources.source_names()
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])

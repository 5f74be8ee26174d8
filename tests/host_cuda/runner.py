"""Kernel source executed on the host: builds kernel sources with g++ and launches by name.

This is not a GPU run: see host_cuda.h for what it shows and what it cannot.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SANITIZER", "HostExecutionError", "HostKernels", "built", "has_compiler"]

COMPILER = os.environ.get("CXX") or "g++"
SANITIZER = os.environ.get("HOST_CUDA_SANITIZER", "")  # "", "address" or "thread"
_FOLDER = Path(__file__).parent
_HEADERS = "".join(p.read_text(encoding="utf-8") for p in sorted(_FOLDER.glob("*.h")))
_ENTRY_POINT = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?'
                          r"(\w+)\(([^)]*)\)")  # fmt: skip
_BARRIER = re.compile(r"__sync(?:threads|warp)\(")
_DTYPES = {
    "float": np.float32,
    "double": np.float64,
    "int": np.int32,
    "long long": np.int64,
    "unsigned char": np.uint8,
    "unsigned short": np.uint16,
}
_GUARD = 64  # values of poison on both sides of every array


class HostExecutionError(RuntimeError):
    """Executing a kernel source on the host showed a bug of the kernel or of its launch."""


def has_compiler() -> bool:
    """Whether a C++ compiler is there."""
    return shutil.which(COMPILER) is not None


def _run(command: Sequence[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def built(path: Path, build: Callable[[Path], object]) -> Path:
    """A file, made by `build` where it is not there: once, and whole, whoever else wants it too."""
    if not path.exists():
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                partial = path.with_suffix(f".{os.getpid()}")
                build(partial)
                partial.replace(path)
    return path


class HostKernels:
    """The kernels of one source, to be executed on the host.

    Args:
        name: of the source.
        source: CUDA C++ with nothing left to include.
        cache: folder of the built libraries; a library is named by the hash of what it is made of.
    """

    def __init__(self, name: str, source: str, cache: Path) -> None:
        self.name = name
        self._source = source
        expanded = _run([COMPILER, "-E", "-P", "-x", "c++", "-"], self._source)
        self._parameters = {
            kernel: [self._dtype(parameter) for parameter in parameters.split(",")]
            for kernel, parameters in _ENTRY_POINT.findall(re.sub(r"\s+", " ", expanded))
        }
        self._library = ctypes.CDLL(str(self._build(cache)))
        self._library.host_cuda_error.restype = ctypes.c_char_p

    @staticmethod
    def _dtype(parameter: str) -> tuple[type[np.generic], bool]:
        """The dtype of a parameter and whether it is an array."""
        kind = re.sub(r"\bconst\b|\*|\w+\s*$", "", parameter).strip()
        return _DTYPES[kind], "*" in parameter

    def _build(self, cache: Path) -> Path:
        exports = "".join(f"HOST_CUDA_EXPORT({kernel})\n" for kernel in self.kernels)
        line = f'#line 1 "{self.name}.cu with its header inlined"'
        unit = f'#include "cuda_language.h"\n{line}\n{self._source}\n{exports}'
        flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas",
                 "-fno-strict-aliasing", "-ffp-contract=off", "-x", "c++"]  # fmt: skip
        if SANITIZER:
            flags += ["-g", f"-fsanitize={SANITIZER}"]
        ingredients = [COMPILER, *flags, _HEADERS, unit]
        digest = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]
        command = [COMPILER, *flags, f"-I{_FOLDER}", "-", "-o"]
        return built(
            cache / f"{self.name}-{digest}.so", lambda path: _run([*command, str(path)], unit)
        )

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the entry points."""
        return tuple(self._parameters)

    @property
    def num_barriers(self) -> int:
        """Barriers in the source, which `removed_barrier` numbers in their order."""
        return len(_BARRIER.findall(self._source))

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        shared_bytes: int = 0,
        seed: int = 0,
        removed_barrier: int = -1,
    ) -> None:
        """Execute a kernel's source on the host, under the schedule that the seed gives.

        Args:
            kernel: name of the entry point.
            grid: blocks, one to three dimensions.
            block: threads a block, likewise.
            arguments: C-ordered arrays of the parameters' dtypes, written in place (None for a
                null pointer); numbers.
            shared_bytes: dynamic shared memory.
            seed: of the schedule; 0 runs warps and lanes in order.
            removed_barrier: number of a barrier to leave out, a planted bug.

        Raises:
            HostExecutionError: a barrier that not all threads reach, a write past an array.
        """
        parameters = self._parameters[kernel]
        assert len(arguments) == len(parameters), (kernel, len(arguments), len(parameters))
        values, guarded = [], []
        for argument, (dtype, is_array) in zip(arguments, parameters, strict=True):
            if is_array and argument is None:
                values.append(ctypes.c_void_p(0))
            elif is_array:
                guarded.append(_Guarded(argument, dtype))
                values.append(ctypes.c_void_p(guarded[-1].inner.ctypes.data))
            else:
                values.append(np.ctypeslib.as_ctypes_type(dtype)(argument))
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        shape = [*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block))]
        self._library.host_cuda_schedule(ctypes.c_uint64(seed), ctypes.c_int(removed_barrier))
        failed = getattr(self._library, f"{kernel}_on_host")(
            (ctypes.c_uint * 6)(*shape), ctypes.c_size_t(shared_bytes), pointers
        )
        if failed:
            raise HostExecutionError(f"{kernel}: {self._library.host_cuda_error().decode()}")
        for array in guarded:
            array.copy_back(kernel)


class _Guarded:
    """A copy of an array between two stretches of poison, to see writes past its ends."""

    def __init__(self, array: np.ndarray[Any, Any], dtype: type[np.generic]) -> None:
        assert array.dtype == dtype, (array.dtype, dtype)
        assert array.flags.c_contiguous
        # The address sanitizer wants the exact size instead: it sees reads as well.
        self._guard = 0 if SANITIZER == "address" else _GUARD
        self._array = array
        self._whole = np.empty(array.size + 2 * self._guard, dtype)
        self._whole.view(np.uint8)[:] = 0xFF
        self.inner = self._whole[self._guard : self._guard + array.size]
        self.inner[:] = array.reshape(-1)

    def copy_back(self, kernel: str) -> None:
        """Return the values to the caller's array; the poison must be untouched."""
        ends = self._whole[: self._guard], self._whole[self._guard + self._array.size :]
        if not all((end.view(np.uint8) == 0xFF).all() for end in ends):
            raise HostExecutionError(f"{kernel}: a write past the ends of an array")
        if self._array.flags.writeable:
            self._array.reshape(-1)[:] = self.inner

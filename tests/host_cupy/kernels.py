"""`cupy.RawModule` of the stand-in: launches of kernel sources executed on the host."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from host_cuda import runner
from host_cuda.runner import HostKernels

from gpu_hodlr import kernel_sources
from host_cupy import state
from host_cupy.array import ndarray
from host_cupy.state import CUDADriverError

_PLAIN_SHARED, _MOST_SHARED = 48 * 1024, 227 * 1024
_LARGEST = ((2**31 - 1, 65535, 65535), (1024, 1024, 64))  # grid, block
_OPTIONS = {"--std=c++17", "-std=c++17"}
# What CuPy passes for a Python number, by the parameter's type.
_FITTING: dict[type, tuple[type, ...]] = {
    np.int32: (np.int32,),
    np.int64: (np.int64, int),
    np.float32: (np.float32,),
    np.float64: (np.float64, float),
}
_lock = threading.Lock()  # the executor runs one kernel at a time


@dataclass(frozen=True)
class _Parameter:
    dtype: type
    is_array: bool
    is_constant: bool


class CompileException(Exception):  # noqa: N818
    """As `cupy.cuda.compiler`'s."""


class _Module:
    """A source: read when it is compiled, built for the host when a function is asked for.

    It is built under the name that the kernel tests build it by.
    """

    def __init__(self, code: str, folder: Path) -> None:
        self._code, self._folder = code, folder
        self._lock = threading.Lock()
        self._kernels: HostKernels | None = None
        try:
            expanded = runner._run([runner.COMPILER, "-E", "-P", "-x", "c++", "-"], code)
        except RuntimeError as e:
            raise CompileException(str(e)) from e
        declared = runner._ENTRY_POINT.findall(re.sub(r"\s+", " ", expanded))
        self.parameters = {
            kernel: [
                _Parameter(*HostKernels._dtype(one), "const " in one) for one in text.split(",")
            ]
            for kernel, text in declared
        }
        # Of a kernel on the device, whatever object it is reached by.
        self.dynamic_shared = dict.fromkeys(self.parameters, _PLAIN_SHARED)

    def kernels(self) -> HostKernels:
        with self._lock:
            if self._kernels is None:
                names = kernel_sources.source_names()
                same = (n for n in names if kernel_sources.read_source(n) == self._code)
                self._kernels = HostKernels(next(same, "raw_module"), self._code, self._folder)
            return self._kernels


class _Build:
    """Where libraries are built and what has been; the schedule kernels are executed under."""

    folder: Path
    schedule: int = 0
    modules: ClassVar[dict[str, _Module]] = {}
    _lock = threading.Lock()

    def module(self, code: str) -> _Module:
        with self._lock:
            if code not in self.modules:
                self.modules[code] = _Module(code, self.folder)
            return self.modules[code]

    def forget_launches(self) -> None:
        """A new process: what was set for kernels is gone."""
        for module in self.modules.values():
            module.dynamic_shared = dict.fromkeys(module.parameters, _PLAIN_SHARED)


build = _Build()


class RawKernel:
    def __init__(self, module: _Module, name: str) -> None:
        self._module, self._kernels, self.name = module, module.kernels(), name
        self._parameters = module.parameters[name]

    @property
    def attributes(self) -> dict[str, int]:
        """What a compiler for a GPU would say: nothing here, all of it 0."""
        names = (
            "binary_version const_size_bytes local_size_bytes max_threads_per_block num_regs "
            "ptx_version shared_size_bytes"
        )
        sizes = {"max_dynamic_shared_size_bytes": self.max_dynamic_shared_size_bytes}
        return dict.fromkeys(state.words(names), 0) | sizes

    @property
    def shared_size_bytes(self) -> int:
        return 0  # tests/host_cuda compiles no kernel with static shared memory

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._module.dynamic_shared[self.name]

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        if size > _MOST_SHARED:
            raise CUDADriverError(1, "CUDA_ERROR_INVALID_VALUE: invalid argument")
        self._module.dynamic_shared[self.name] = size

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
    ) -> None:
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError(f"{self.name}: grid and block are tuples")
        self._check_launch(grid, block, shared_mem)
        if len(args) != len(self._parameters):
            raise TypeError(
                f"{self.name}: {len(args)} arguments for {len(self._parameters)} parameters: "
                "the kernel would read past its arguments"
            )
        values = [
            self._checked(place, argument, parameter)
            for place, (argument, parameter) in enumerate(zip(args, self._parameters, strict=True))
        ]
        self._check_aliasing(args)
        state.counters.launches += 1
        state.enqueue(self._launch(grid, block, values, shared_mem))

    def _launch(
        self, grid: tuple[int, ...], block: tuple[int, ...], values: list[Any], shared: int
    ) -> Callable[[], None]:
        def work() -> None:
            with _lock:
                self._kernels.launch(
                    self.name, grid, block, values, shared_bytes=shared, seed=build.schedule
                )

        return work

    def _check_launch(self, grid: tuple[int, ...], block: tuple[int, ...], shared: int) -> None:
        for what, sizes, largest in zip(("grid", "block"), (grid, block), _LARGEST, strict=True):
            bad = any(not 0 < n <= most for n, most in zip(sizes, largest, strict=False))
            if bad or not 1 <= len(sizes) <= 3:
                raise CUDADriverError(1, f"CUDA_ERROR_INVALID_VALUE: {self.name}: {what} {sizes}")
        if np.prod(block) > 1024:
            raise CUDADriverError(1, f"CUDA_ERROR_INVALID_VALUE: {self.name}: block {block}")
        most = self.max_dynamic_shared_size_bytes
        if shared > most:
            raise CUDADriverError(
                1,
                f"CUDA_ERROR_INVALID_VALUE: {self.name}: {shared} bytes of shared memory, "
                f"{most} are allowed",
            )

    def _checked(self, place: int, argument: Any, parameter: _Parameter) -> Any:
        where, dtype = f"{self.name}: argument {place}", parameter.dtype
        if not parameter.is_array:
            if type(argument) not in _FITTING[dtype]:
                raise TypeError(f"{where} must be a {dtype.__name__}, not {type(argument)}")
            return argument
        if type(argument) is np.uint64 and argument == 0:  # 8 bytes of zeros: a null pointer
            return None
        if not isinstance(argument, ndarray):
            raise TypeError(f"{where} must be a cupy.ndarray, not {type(argument)}")
        if argument.dtype != dtype:
            raise TypeError(f"{where} must have dtype {dtype.__name__}, not {argument.dtype}")
        if not argument.flags.c_contiguous:
            raise ValueError(f"{where}: the kernel would take strides {argument.strides} for C")
        values = argument._host
        if parameter.is_constant:  # not written back: the executor works on copies
            values = values.view()
            values.flags.writeable = False
        return values

    def _check_aliasing(self, args: tuple[Any, ...]) -> None:
        """The executor copies arrays in and out: an output must not overlap anything."""
        arrays = [(i, a) for i, a in enumerate(args) if isinstance(a, ndarray)]
        for i, a in arrays:
            if self._parameters[i].is_constant:
                continue
            for j, b in arrays:
                if i != j and np.may_share_memory(a._host, b._host):
                    raise ValueError(f"{self.name}: arguments {i} and {j} overlap")


class RawModule:
    def __init__(
        self,
        *,
        code: str | None = None,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
    ) -> None:
        if code is None:
            raise TypeError("the stand-in compiles code only")
        if not isinstance(options, tuple) or set(options) - _OPTIONS:
            raise ValueError(f"options the stand-in does not know: {options}")
        if backend != "nvrtc":
            raise ValueError(f"the stand-in's backend is nvrtc, not {backend!r}")
        self.code, self.options, self.backend = code, options, backend

    def compile(self, log_stream: Any = None) -> None:
        state.refuse_capture("loading a kernel")
        self._compiled()

    def get_function(self, name: str) -> RawKernel:
        state.refuse_capture("loading a kernel")
        module = self._compiled()
        if name not in module.parameters:
            raise CUDADriverError(500, f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}")
        return RawKernel(module, name)

    def _compiled(self) -> _Module:
        """CuPy's cache: the same source is compiled once a device, if not by two at a time."""
        if self.code not in state.compiled:
            state.counters.compilations += 1
            build.module(self.code)
            state.compiled.add(self.code)
        return build.module(self.code)

"""CPU or CUDA: which device can be used, what moves data there, and how much memory is free."""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from gpu_hodlr.errors import ArgumentError, DeviceError, MemoryEstimateError

if TYPE_CHECKING:
    import cupy
    import torch
    from numpy.typing import DTypeLike

    AnyDtype: TypeAlias = DTypeLike | torch.dtype  # as users give them
    AnyDevice: TypeAlias = str | torch.device


class AnyArray(Protocol):
    """What comes in at the door: an array of NumPy, CuPy or torch."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of every axis."""

    @property
    def ndim(self) -> int:
        """The number of axes."""

    @property
    def dtype(self) -> object:
        """NumPy's dtype, or torch's."""

    @property
    def T(self) -> Any:  # noqa: N802
        """The transpose."""


class Array(Protocol):
    """numpy.ndarray or cupy.ndarray: what both have, so that both run the same lines."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def itemsize(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def flags(self) -> Any: ...
    @property
    def flat(self) -> Any: ...
    @property
    def data(self) -> Any: ...
    @property
    def T(self) -> Array: ...  # noqa: N802
    def __len__(self) -> int: ...
    def __iter__(self) -> Any: ...
    def __getitem__(self, key: Any, /) -> Array: ...
    def __setitem__(self, key: Any, value: Any, /) -> None: ...
    def __float__(self) -> float: ...
    def __int__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __neg__(self) -> Array: ...
    def __invert__(self) -> Array: ...
    def __abs__(self) -> Array: ...
    def __add__(self, other: Any, /) -> Array: ...
    def __radd__(self, other: Any, /) -> Array: ...
    def __sub__(self, other: Any, /) -> Array: ...
    def __rsub__(self, other: Any, /) -> Array: ...
    def __mul__(self, other: Any, /) -> Array: ...
    def __rmul__(self, other: Any, /) -> Array: ...
    def __truediv__(self, other: Any, /) -> Array: ...
    def __rtruediv__(self, other: Any, /) -> Array: ...
    def __floordiv__(self, other: Any, /) -> Array: ...
    def __mod__(self, other: Any, /) -> Array: ...
    def __pow__(self, other: Any, /) -> Array: ...
    def __rpow__(self, other: Any, /) -> Array: ...
    def __matmul__(self, other: Any, /) -> Array: ...
    def __rmatmul__(self, other: Any, /) -> Array: ...
    def __and__(self, other: Any, /) -> Array: ...
    def __or__(self, other: Any, /) -> Array: ...
    def __xor__(self, other: Any, /) -> Array: ...
    def __rshift__(self, other: Any, /) -> Array: ...
    def __lshift__(self, other: Any, /) -> Array: ...
    def __lt__(self, other: Any, /) -> Array: ...
    def __le__(self, other: Any, /) -> Array: ...
    def __gt__(self, other: Any, /) -> Array: ...
    def __ge__(self, other: Any, /) -> Array: ...
    def __iadd__(self, other: Any, /) -> Array: ...
    def __isub__(self, other: Any, /) -> Array: ...
    def __imul__(self, other: Any, /) -> Array: ...
    def __itruediv__(self, other: Any, /) -> Array: ...
    def __eq__(self, other: Any, /) -> Array: ...  # type: ignore[override]
    def __ne__(self, other: Any, /) -> Array: ...  # type: ignore[override]
    def all(self, axis: Any = None, *, keepdims: bool = False) -> Any: ...
    def any(self, axis: Any = None, *, keepdims: bool = False) -> Any: ...
    def argmax(self, axis: Any = None) -> Any: ...
    def argmin(self, axis: Any = None) -> Any: ...
    def argsort(self, axis: Any = -1) -> Array: ...
    def astype(self, dtype: Any, *, copy: bool = True) -> Array: ...
    def copy(self, order: Any = "C") -> Array: ...
    def cumsum(self, axis: Any = None, dtype: Any = None) -> Array: ...
    def diagonal(self, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Array: ...
    def fill(self, value: Any, /) -> None: ...
    def max(self, axis: Any = None, *, keepdims: bool = False) -> Any: ...
    def min(self, axis: Any = None, *, keepdims: bool = False) -> Any: ...
    def sum(self, axis: Any = None, dtype: Any = None, *, keepdims: bool = False) -> Any: ...
    def mean(self, axis: Any = None, *, keepdims: bool = False) -> Any: ...
    def ravel(self) -> Array: ...
    def repeat(self, repeats: Any, axis: Any = None) -> Array: ...
    @property
    def reshape(self) -> Callable[..., Array]: ...
    def swapaxes(self, axis1: int, axis2: int, /) -> Array: ...
    @property
    def transpose(self) -> Callable[..., Array]: ...
    def view(self, dtype: Any) -> Array: ...
    def tolist(self) -> Any: ...
    def item(self) -> Any: ...


HostArray = NDArray[Any]  # of NumPy
HostIndex = NDArray[np.signedinteger[Any]]  # int64 and intp are the same numbers, and two types

DEVICES = ("cpu", "cuda")
_UNKNOWN = 1 << 62  # bytes of memory
_LIMITS = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}  # and what counts for each
_WORKING_BYTES = 1 << 24  # of an intermediate made in parts: a GPU may take an eighth of its memory
_MOST_STEPS = 8  # of an iteration between two reads of a GPU
_INSTALL = "pip install 'gpu-hodlr[cuda12]' (or [cuda13], as the driver allows)"


def library_of(x: object) -> str:
    """The top-level package of x's type: "numpy", "cupy", "torch", ..."""
    return type(x).__module__.partition(".")[0]


def is_torch(x: object) -> TypeGuard[torch.Tensor]:
    """Whether x is a torch tensor (torch is not imported for the question)."""
    loaded = sys.modules.get("torch")
    return loaded is not None and isinstance(x, loaded.Tensor)


def is_array(x: object) -> TypeGuard[Any]:
    """Whether x is a NumPy, CuPy or torch array."""
    return is_torch(x) or isinstance(x, np.ndarray) or library_of(x) == "cupy"


def device_of(x: object) -> str:
    """The device of an array: "cpu" or "cuda"."""
    if is_torch(x):
        return str(x.device.type)
    return "cuda" if library_of(x) == "cupy" else "cpu"


def namespace(x: object) -> ModuleType:
    """The array module (numpy or cupy) that x belongs to."""
    return importlib.import_module("cupy") if library_of(x) == "cupy" else np


def namespace_on(device: str) -> ModuleType:
    """The array module whose arrays live on a device that `resolve_device` gave."""
    return importlib.import_module("cupy") if device == "cuda" else np


def device_kind(device: AnyDevice) -> str:
    """The kind of a device that a user gives, "cpu" or "cuda"; not checked."""
    return str(device).partition(":")[0]


def resolve_device(device: AnyDevice | None, *data: object) -> str:
    """The device to work on, "cpu" or "cuda": the one asked for, or else the one the data is on.

    Args:
        device: "cpu", "cuda", "cuda:0" or a torch.device. A number must be that of the current GPU.
        data: arrays.

    Raises:
        ArgumentError: an unknown device name.
        DeviceError: CUDA was asked for (or the data is there) and cannot be used, or is another GPU
            than the current one; says why.
    """
    if device is None:
        device = "cuda" if any(device_of(x) == "cuda" for x in data) else "cpu"
    said = str(device) if library_of(device) == "torch" else device
    if not isinstance(said, str) or not re.fullmatch(r"cpu(:0)?|cuda(:\d+)?", said):
        raise ArgumentError(
            f"device must be 'cpu', 'cuda', 'cuda:0' (or so), a torch.device or None, "
            f"got {device!r}"
        )
    kind, _, number = said.partition(":")
    if kind == "cuda":
        _require_cuda()
        current = int(namespace_on(kind).cuda.Device().id)
        if number and int(number) != current:
            raise DeviceError(
                f"device {said!r}: the current GPU is number {current}, and it is used; make the "
                f"other one current first, with cupy.cuda.Device({number}).use()"
            )
    return kind


@lru_cache(maxsize=1)
def _require_cuda() -> None:
    """Check once that CuPy, a driver, a GPU and the CUDA libraries are there.

    Raises:
        DeviceError: one of them is not; a failure is not remembered.
    """
    try:
        cupy = importlib.import_module("cupy")
    except Exception as e:  # a broken installation fails with more than ImportError
        raise DeviceError(
            f"device 'cuda' needs CuPy, which cannot be imported: {e}; {_INSTALL}; "
            "device='cpu' needs none"
        ) from e
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except Exception as e:
        problem = _driver_problem(runtime)
        raise DeviceError(f"device 'cuda': {problem} ({e}); device='cpu' needs none") from e
    if count == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise DeviceError(f"device 'cuda': no GPU is visible (CUDA_VISIBLE_DEVICES={visible})")
    try:
        cupy.cuda.device.get_cublas_handle()
        cuda_library("cusolver")
        cuda_library("nvrtc").getVersion()  # the first call loads it
    except Exception as e:
        raise DeviceError(
            f"device 'cuda': the CUDA libraries cannot be loaded: {e}; {_INSTALL}"
        ) from e


def cuda_library(name: str) -> ModuleType:
    """CuPy's binding of a CUDA library, such as "cusolver" or "nccl"; the library is loaded.

    An attribute of the package, not a submodule imported by its full name: CuPy finds the
    libraries of pip packages in the package's `__getattr__`, which such an import passes by.

    Raises:
        ImportError: the library is not there.
    """
    return getattr(importlib.import_module("cupy_backends.cuda.libs"), name)


def _driver_problem(runtime: ModuleType) -> str:
    """No driver, or one older than CuPy's CUDA."""
    wanted = runtime.runtimeGetVersion()
    try:
        found = runtime.driverGetVersion()
    except Exception:
        found = 0
    if found == 0:
        return "there is no NVIDIA driver on this machine"
    if found < wanted:
        old, new = (f"{v // 1000}.{v % 1000 // 10}" for v in (found, wanted))
        return f"the driver supports CUDA {old}, CuPy wants {new}: update the driver or change CuPy"
    return "no GPU can be used"


def move(x: Array, device: str) -> Array:
    """Copy an array to a device, or return it as it is when it is there."""
    if device_of(x) == device:
        return x
    return namespace_on(device).asarray(x) if device == "cuda" else to_host(x)


def to_host(x: Array) -> HostArray:
    """Copy x to a NumPy array, or return it as it is."""
    if library_of(x) == "cupy":
        return x.get()  # type: ignore[attr-defined]
    return np.asarray(x)


def to_hosts(*arrays: Array) -> list[HostArray]:
    """`to_host` of several arrays of one type, for which the host waits once."""
    away = [x for x in arrays if library_of(x) == "cupy"]
    if len(away) < 2:
        return [to_host(x) for x in arrays]
    together = to_host(namespace(away[0]).concatenate([x.ravel() for x in away]))
    parts = iter(np.split(together, np.cumsum([x.size for x in away])[:-1]))
    return [next(parts).reshape(x.shape) if library_of(x) == "cupy" else to_host(x) for x in arrays]


def synchronize(device: str) -> None:
    """Wait until the work of the current stream is done; on the CPU it is when a call returns."""
    if device == "cuda":
        namespace_on(device).cuda.get_current_stream().synchronize()


def reads_wait(device: str) -> bool:
    """Whether the host waits where it reads a number, and then a GPU for the host."""
    return device != "cpu"


def launches_cost(device: str) -> bool:
    """Whether a call of a few operations takes as long as one of many: on a GPU it is a launch."""
    return device != "cpu"


def steps_between_reads(device: str, done: int) -> int:
    """Steps that an iteration makes before the host looks how far it has come.

    Where a look costs nothing it is made after each; else after a quarter of the steps made so far,
    and at most 8, so that few are made in vain.
    """
    return min(_MOST_STEPS, max(1, done // 4)) if reads_wait(device) else 1


def mark(device: str) -> float | cupy.cuda.Event:
    """A point in the work of the current stream, for `elapsed`; on the CPU the time.

    It does not wait: a GPU notes the time when it gets there.
    """
    if device == "cpu":
        return time.perf_counter()
    cuda = namespace_on(device).cuda
    event = cuda.Event()
    event.record(cuda.get_current_stream())
    return event


def elapsed(start: float | cupy.cuda.Event, end: float | cupy.cuda.Event) -> float:
    """Seconds between two marks of a device; waits until it has passed the second."""
    if isinstance(end, float):
        return float(end - start)
    if not end.done:
        end.synchronize()
    return float(namespace_on("cuda").cuda.get_elapsed_time(start, end)) / 1e3


def gpu_name(device: str) -> str | None:
    """What the current GPU calls itself; None on the CPU."""
    if device == "cpu":
        return None
    cuda = namespace_on(device).cuda
    name = cuda.runtime.getDeviceProperties(cuda.Device().id)["name"]
    return name.decode() if isinstance(name, bytes) else str(name)


def free_bytes(device: str = "cpu") -> int:
    """Memory that can still be allocated, in bytes (a very large number where unknown).

    On the GPU: what the driver has, and what the pool that CuPy takes it from holds unused. On the
    CPU: what the machine has, within the limits of the process (`ulimit -v`, `-d`) and of its
    control group.
    """
    if device == "cuda":
        cupy = namespace_on(device)
        pool: Any = getattr(cupy.cuda.get_allocator(), "__self__", None)
        if not hasattr(pool, "free_bytes"):  # a function, as while a graph is captured
            pool = cupy.get_default_memory_pool()
        return int(cupy.cuda.runtime.memGetInfo()[0]) + int(pool.free_bytes())
    return max(0, min(_free_on_machine(), _free_of_process(), _free_of_group()))


def _free_on_machine() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return _UNKNOWN


def _free_of_process() -> int:
    """What limits of address space and data leave, where there are any."""
    try:
        import resource

        limits = {name: resource.getrlimit(getattr(resource, name))[0] for name in _LIMITS}
        if all(limit == resource.RLIM_INFINITY for limit in limits.values()):
            return _UNKNOWN
        with open("/proc/self/status", encoding="ascii") as f:
            used = {line.split(":")[0]: line.split()[1] for line in f if line.startswith("Vm")}
        return min(
            limit - int(used[_LIMITS[name]]) * 1024
            for name, limit in limits.items()
            if limit != resource.RLIM_INFINITY
        )
    except (ImportError, OSError, KeyError):  # not on Linux
        return _UNKNOWN


def _free_of_group() -> int:
    """What the control group (version 2) leaves, as containers and Slurm set it."""
    try:
        with open("/proc/self/cgroup", encoding="ascii") as f:
            group = next(line[3:].strip() for line in f if line.startswith("0::"))
        folder = f"/sys/fs/cgroup{group}".rstrip("/")
        with open(f"{folder}/memory.max", encoding="ascii") as f:
            most = f.read().strip()
        if most == "max":
            return _UNKNOWN
        with open(f"{folder}/memory.current", encoding="ascii") as f:
            used = int(f.read())
        with open(f"{folder}/memory.stat", encoding="ascii") as f:
            cached = next(int(line.split()[1]) for line in f if line.startswith("inactive_file "))
        return int(most) - used + cached
    except (OSError, ValueError, StopIteration):
        return _UNKNOWN


def working_bytes(device: str) -> int:
    """How large an intermediate may be that can as well be made in parts."""
    return _WORKING_BYTES if device == "cpu" else max(_WORKING_BYTES, free_bytes(device) // 8)


def check_memory(needed: int, what: str, lower: str, device: str = "cpu") -> None:
    """Refuse a job before it allocates more than is free.

    Args:
        needed: estimated bytes.
        what: what they are for.
        lower: what the user can lower.
        device: where.

    Raises:
        MemoryEstimateError: more is needed than is free.
    """
    free = free_bytes(device)
    if needed > free:
        found = _found(free, device)
        raise MemoryEstimateError(
            f"{what} needs about {needed / 1e9:.3g} GB, {found}; lower {lower}"
        )


def _found(free: int, device: str) -> str:
    return f"{free / 1e9:.3g} GB are free{' on the GPU' if device == 'cuda' else ''}"


@contextmanager
def memory_errors(what: str, lower: str, device: str) -> Iterator[None]:
    """Say what ran out of memory, how much is free and what to lower.

    Raises:
        MemoryEstimateError: NumPy or CuPy could not allocate.
    """
    try:
        yield
    except MemoryError as e:
        found = _found(free_bytes(device), device)
        raise MemoryEstimateError(f"{what} ran out of memory: {e}; {found}; lower {lower}") from e

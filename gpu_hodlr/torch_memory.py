"""One pool of GPU memory for CuPy and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_hodlr.devices import namespace_on, resolve_device
from gpu_hodlr.errors import DeviceError

if TYPE_CHECKING:
    import cupy


class TorchPool:
    """CuPy's allocator on torch's caching allocator, whose streams are CuPy's.

    Named as `cupy.cuda.MemoryPool` is where the package asks a pool for something.
    """

    def __init__(self) -> None:
        cuda = namespace_on("cuda").cuda
        self._allocator = cuda.PythonFunctionAllocator(_allocate, _free)

    def malloc(self, size: int) -> cupy.cuda.MemoryPointer:
        """As CuPy's allocators."""
        return self._allocator.malloc(size)

    def free_bytes(self) -> int:
        """What torch holds of the driver and nobody uses."""
        from torch import cuda

        return int(cuda.memory_reserved() - cuda.memory_allocated())


def _allocate(size: int, device: int) -> int:
    """An address, of memory in the order of CuPy's current stream.

    Raises:
        MemoryError: torch cannot; torch's own exception is none.
    """
    from torch import cuda

    if size == 0:
        return 0
    stream = namespace_on("cuda").cuda.get_current_stream().ptr
    try:
        return int(cuda.caching_allocator_alloc(size, device, stream))
    except cuda.OutOfMemoryError as e:
        raise MemoryError(str(e)) from e


def _free(address: int, device: int) -> None:
    from torch import cuda

    if address:
        cuda.caching_allocator_delete(address)


def is_shared() -> bool:
    """Whether CuPy takes its memory from torch, by `use_torch_allocator`."""
    allocator = namespace_on("cuda").cuda.get_allocator()
    return isinstance(getattr(allocator, "__self__", None), TorchPool)


def use_torch_allocator(use: bool = True) -> None:
    """Let CuPy, and with it this package, take its GPU memory from torch: one pool for both.

    Otherwise each keeps what it has freed for itself, and may lack what the other one holds. For
    the whole process. Arrays keep the memory they have; what CuPy's own pool holds unused goes back
    to the driver.

    Args:
        use: False: CuPy's own pool again.

    Raises:
        DeviceError: no GPU can be used, by CuPy or by torch; says why.

    Example:
        >>> import contextlib
        >>> with contextlib.suppress(gh.errors.DeviceError):  # where there is no GPU
        ...     gh.use_torch_allocator()
        ...     gh.use_torch_allocator(False)
    """
    resolve_device("cuda")
    cupy = namespace_on("cuda")
    pool = cupy.get_default_memory_pool()
    if not use:
        cupy.cuda.set_allocator(pool.malloc)
        return
    try:
        import torch
    except ImportError as e:
        raise DeviceError(f"torch, which is to give CuPy its memory, is missing: {e}") from e
    if not torch.cuda.is_available():
        raise DeviceError(
            f"torch {torch.__version__} cannot use the GPU, which CuPy can: torch.cuda."
            "is_available() is False; install torch with CUDA"
        )
    torch.cuda.init()
    if not is_shared():
        cupy.cuda.set_allocator(TorchPool().malloc)
    pool.free_all_blocks()

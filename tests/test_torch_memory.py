"""CuPy's memory from torch's pool: on the stand-in for CuPy, and a pretended `torch.cuda`.

Not a GPU run. Without a GPU the refusals are the real ones.
"""

import gc
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
from host_cupy import HostCupy, memory, state
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr import devices
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import DeviceError, MemoryEstimateError
from gpu_hodlr.torch_memory import is_shared

torch = pytest.importorskip("torch")


class Pool:
    """torch's caching allocator: blocks by stream, of memory of the stand-in."""

    def __init__(self) -> None:
        self.held: dict[int, memory.Memory] = {}
        self.used: dict[int, int] = {}  # addresses, and the streams they were asked for on
        self.limit = 1 << 40

    def alloc(self, size: int, device: int, stream: int) -> int:
        assert device == 0
        if size + self.reserved() > self.limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        block = memory.Memory(size)
        self.held[block.ptr] = block
        self.used[block.ptr] = stream
        return block.ptr

    def delete(self, address: int) -> None:
        del self.used[address]  # and held all the same

    def reserved(self) -> int:
        return sum(block.size for block in self.held.values())

    def allocated(self) -> int:
        return sum(self.held[address].size for address in self.used)


@pytest.fixture
def pool(stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    pool = Pool()
    for name, value in {
        "is_available": lambda: True, "init": lambda: None,
        "caching_allocator_alloc": pool.alloc, "caching_allocator_delete": pool.delete,
        "memory_reserved": pool.reserved, "memory_allocated": pool.allocated,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    gh.use_torch_allocator()
    yield pool
    gh.use_torch_allocator(False)


def test_every_array_is_torchs_memory(stand_in: HostCupy, pool: Pool):
    """Of products, factors and graphs; CuPy's own pool stays empty, and all of it goes back."""
    cupy, own = stand_in.cupy, stand_in.cupy.get_default_memory_pool()
    matrix = toeplitz(120)
    K = gh.compress(matrix, "hss", rtol=1e-6, leaf_size=15, device="cuda")
    F, v = K.factorize(0.5), cupy.asarray(np.random.default_rng(0).standard_normal((120, 2)))
    for _ in range(3):
        np.testing.assert_allclose(to_host(K @ v), matrix @ to_host(v), atol=1e-4)
        solved = to_host(F.solve(v))
    np.testing.assert_allclose(
        to_host(K.to_dense()) @ solved + 0.5 * solved, to_host(v), atol=1e-10
    )
    assert own.total_bytes() == 0
    assert pool.allocated() > 0
    del K, F, v
    gc.collect()
    assert pool.allocated() == 0
    assert pool.reserved() > 0


def test_memory_belongs_to_the_current_stream(stand_in: HostCupy, pool: Pool):
    """As torch must know whose work it waits for before another stream gets it."""
    cupy, stream = stand_in.cupy, stand_in.cupy.cuda.Stream(non_blocking=True)
    first = cupy.empty(10)
    with stream:
        second = cupy.empty(10)
    assert [pool.used[x.data.ptr] for x in (first, second)] == [0, stream.ptr]
    assert cupy.empty(0).size == 0


def test_what_torch_holds_unused_is_free(stand_in: HostCupy, pool: Pool):
    cupy = stand_in.cupy
    before = devices.free_bytes("cuda")
    x = cupy.empty(1 << 16)
    assert devices.free_bytes("cuda") == before - x.nbytes
    del x
    assert devices.free_bytes("cuda") == before
    with cupy.cuda.using_allocator(lambda size: None):  # as while a graph is captured
        assert devices.free_bytes("cuda") <= before


def test_torch_out_of_memory_says_what_to_lower(stand_in: HostCupy, pool: Pool):
    """It is no MemoryError by itself."""
    K = gh.compress(toeplitz(60), "hss", leaf_size=15, device="cuda")
    v = stand_in.cupy.ones((60, 3))
    pool.limit = pool.reserved()
    with pytest.raises(MemoryEstimateError, match=r"a product ran out of memory: CUDA.*lower the"):
        K @ v
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        stand_in.cupy.empty(1 << 20)


def test_back_to_cupys_own_pool(stand_in: HostCupy, pool: Pool):
    cupy = stand_in.cupy
    assert is_shared()
    x = cupy.ones(5)
    gh.use_torch_allocator()  # again: nothing changes
    gh.use_torch_allocator(False)
    assert not is_shared()
    y = cupy.ones(5)
    assert cupy.get_default_memory_pool().used_bytes() == 512
    assert x.data.ptr in pool.used
    assert y.data.ptr not in pool.used
    np.testing.assert_array_equal(to_host(x), to_host(y))
    del x
    assert pool.allocated() == 0


def test_cupys_unused_memory_goes_back_to_the_driver(
    stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch
):
    own = stand_in.cupy.get_default_memory_pool()
    x = stand_in.cupy.empty(1000)
    del x
    assert own.total_bytes() > 0
    for name in ("is_available", "init"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    gh.use_torch_allocator()
    assert own.total_bytes() == 0
    gh.use_torch_allocator(False)


def test_a_torch_without_cuda_is_refused(stand_in: HostCupy):
    """The torch that is installed here has none."""
    if torch.cuda.is_available():
        pytest.skip("torch can use a GPU")
    before = stand_in.cupy.cuda.get_allocator()
    with pytest.raises(DeviceError, match=r"torch \S+ cannot use the GPU.*install torch"):
        gh.use_torch_allocator()
    assert stand_in.cupy.cuda.get_allocator() == before
    assert not is_shared()


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="device 'cuda'"):
        gh.use_torch_allocator()


@pytest.mark.gpu
def test_on_a_gpu_torch_counts_cupys_arrays(gpu: ModuleType):
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    gh.use_torch_allocator()
    try:
        before = torch.cuda.memory_allocated()
        x = gpu.ones(1 << 20)
        assert torch.cuda.memory_allocated() >= before + x.nbytes
        K = gh.compress(toeplitz(120), "hss", rtol=1e-6, leaf_size=15, device="cuda")
        for _ in range(3):
            product = K @ x[:120]
        np.testing.assert_allclose(to_host(product), to_host(K.to_dense()).sum(axis=1), atol=1e-11)
        del x
        assert torch.cuda.memory_allocated() < before + (1 << 23)
    finally:
        gh.use_torch_allocator(False)


def test_the_stand_in_takes_device_memory_alone(stand_in: HostCupy):
    buffer = np.zeros(1000, np.uint8)
    allocator = stand_in.cupy.cuda.PythonFunctionAllocator(
        lambda size, device: buffer.ctypes.data, lambda address, device: None
    )
    with pytest.raises(state.CUDARuntimeError, match="not device memory"):
        allocator.malloc(10)

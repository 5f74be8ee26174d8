"""The stand-in for CuPy itself (tests/host_cupy): its strictness, its BLAS, captures, memory."""

import ctypes
import gc
import importlib
import inspect
import re
import sys
from types import ModuleType

import numpy as np
import pytest
from host_cuda import runner
from host_cupy import installed
from host_cupy.blas import Blas, address
from host_cupy.fixtures import host_library_folder, stand_in  # noqa: F401
from host_cupy.state import CUDADriverError, CUDARuntimeError


@pytest.fixture
def cp(stand_in) -> ModuleType:  # noqa: F811
    return stand_in.cupy


# ---- Being CuPy -------------------------------------------------------------------------------


def test_it_is_found_as_cupy_and_leaves_no_trace(host_library_folder) -> None:  # noqa: F811
    before = {k: v for k, v in sys.modules.items() if k.partition(".")[0].startswith("cupy")}
    load = ctypes.CDLL
    with installed(host_library_folder) as host:
        cupy = importlib.import_module("cupy")
        assert cupy is host.cupy
        assert type(cupy.zeros(3)).__module__ == "cupy"
        with pytest.raises(ImportError):  # not before the package has found its library
            importlib.import_module("cupy_backends.cuda.libs.cusolver")
        devices = importlib.import_module("gpu_hodlr.devices")
        assert devices.resolve_device("cuda") == "cuda"
        assert importlib.import_module("cupy_backends.cuda.libs.cusolver").spotrfBatched
        assert ctypes.CDLL("libcublas.so.12").cublasSetStream_v2
        with pytest.raises(AttributeError):
            _ = cupy.fft
        with pytest.raises(ImportError):
            importlib.import_module("cupy.fft")
    after = {k: v for k, v in sys.modules.items() if k.partition(".")[0].startswith("cupy")}
    assert after == before
    assert ctypes.CDLL is load
    for name, module in sys.modules.items():
        if name.startswith("gpu_hodlr"):
            assert getattr(module, "cupy", None) is not cupy


def public(module: ModuleType) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def parameters(function: object) -> set[str] | None:
    """Names of parameters by the signature, or by a docstring that begins with it."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        text = (getattr(function, "__doc__", None) or "").partition("\n")[0]
        stated = re.match(r"[\w.]+\((.*)\)", text)
        if not stated:
            return None
        return {
            part.split("=")[0].split()[-1] for part in stated[1].split(",") if part.strip("*/ ")
        }
    if any(p.kind is p.VAR_POSITIONAL or p.kind is p.VAR_KEYWORD for p in found):
        return None
    return {p.name for p in found}


def test_every_name_and_parameter_exists_in_cupy(host_library_folder) -> None:  # noqa: F811
    real = pytest.importorskip("cupy", reason="the real CuPy is not installed")
    with installed(host_library_folder) as host:
        mine = host.cupy
    spaces = [("", real, mine)]
    for path in ("cuda", "random", "linalg", "cuda.runtime", "cuda.device", "cuda.memory",
                 "cuda.stream", "cuda.graph", "cuda.driver", "cuda.compiler"):  # fmt: skip
        theirs, ours = real, mine
        for part in path.split("."):
            theirs, ours = getattr(theirs, part), getattr(ours, part)
        spaces.append((path, theirs, ours))
    compared = 0
    for path, theirs, ours in spaces:
        pairs = [(name, value, getattr(theirs, name, None)) for name, value in public(ours).items()]
        for name, value, twin in list(pairs):
            assert hasattr(theirs, name), (path, name)
            if inspect.isclass(value) and not issubclass(value, np.generic | BaseException):
                for method, body in public(value).items():
                    assert hasattr(twin, method), (path, name, method)
                    pairs.append((f"{name}.{method}", body, getattr(twin, method, None)))
        for name, value, twin in pairs:
            wanted, known = parameters(value), parameters(twin)
            error = inspect.isclass(value) and issubclass(value, BaseException)
            if callable(value) and not error and wanted is not None and known is not None:
                assert wanted - {"self"} <= known, (path, name, wanted - known)
                compared += 1
    assert compared > 100


# ---- Strictness of arrays ---------------------------------------------------------------------


def test_nothing_turns_into_numpy_unseen(cp) -> None:
    a, b = cp.asarray(np.arange(6.0)), np.ones(6)
    for hidden in (
        lambda: np.asarray(a),
        lambda: np.sqrt(a),
        lambda: np.einsum("i,i", a, a),
        lambda: np.concatenate([a, a]),
        lambda: b[cp.arange(3)],
        lambda: a + b,
        lambda: b + a,
        lambda: b @ a,
        lambda: a < b,
        lambda: a * [1.0] * 6,
        lambda: cp.maximum(a, b),
        lambda: cp.sqrt(b),
        lambda: cp.sum(b),
        lambda: cp.where(b > 0, a, 0.0),
        lambda: cp.concatenate([a, b]),
        lambda: cp.empty_like(b),
        lambda: cp.ascontiguousarray(b),
        lambda: a.__setitem__(slice(None), b),
        lambda: a.__setitem__(0, np.ones(())),
        lambda: a.fill(b),
        lambda: cp.full(3, cp.ones(())) if False else cp.full(3, b),
    ):
        with pytest.raises(TypeError):
            hidden()


@pytest.mark.parametrize("index", [[0, 1], np.array([0, 1]), np.array([True] * 4), True])
def test_indices_are_device_arrays(cp, index) -> None:
    a = cp.zeros((4, 2))
    with pytest.raises(IndexError):
        a[index]
    with pytest.raises(IndexError):
        a[index] = 1.0
    with pytest.raises(IndexError):
        a[cp.asarray([4])]
    with pytest.raises(IndexError, match="twice"):
        a[cp.asarray([1, 1])] = cp.ones((2, 2))
    with pytest.raises(TypeError):
        a[: cp.asarray(2)]


def test_waiting_is_counted(cp, stand_in) -> None:  # noqa: F811
    a = cp.asarray(np.arange(4.0))
    counters = stand_in.counters
    counters.reset()
    total = a.sum()
    assert isinstance(total, cp.ndarray)
    assert total.shape == ()
    assert isinstance(a[1], cp.ndarray)
    assert isinstance(np.float64(2) * total, cp.ndarray)
    assert counters.synchronizations == 0
    assert float(total) == 6.0
    assert int(total) == 6
    assert bool(total)
    assert total.item() == 6.0
    assert a.tolist() == [0, 1, 2, 3]
    assert a.get().sum() == 6
    assert counters.synchronizations == 6
    assert a[a > 1].shape == (2,)
    a[a > 1] = 0.0
    cp.nonzero(a)
    cp.cuda.Device().synchronize()
    assert counters.synchronizations == 10
    assert counters.host_to_device == 0
    assert counters.array_operations > 0
    with pytest.raises(ValueError, match="ambiguous"):
        bool(a)


def test_memory_starts_as_nan_and_results_are_c_ordered(cp) -> None:
    assert np.isnan(cp.empty(5).get()).all()
    assert (cp.empty(5, np.int64).get() == -1).all()
    a = cp.asarray(np.arange(24.0).reshape(2, 3, 4))
    turned = a.swapaxes(1, 2)
    assert turned.base is a
    assert not turned.flags.c_contiguous
    assert turned.data.ptr == a.data.ptr
    assert a[1].data.ptr == a.data.ptr + 12 * 8
    assert (turned * 2).flags.c_contiguous
    assert turned.copy().flags.c_contiguous
    assert turned.astype(np.float32).strides == (48, 4, 16)
    assert cp.empty_like(turned).strides == turned.strides
    assert a.reshape(6, 4).base is a
    assert turned.reshape(-1).base is None
    a.diagonal(0, 1, 2)[...] = -1.0
    assert a.get()[1, 2, 2] == -1


def test_einsum_has_the_layout_of_cupy(cp) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 4, 5)), rng.random((3, 5, 2))
    A, B = cp.asarray(a), cp.asarray(b)
    for subscripts, contiguous in (("nij,njk->nik", True), ("nij,njk->nki", False),
                                   ("nij,njk->ink", False)):  # fmt: skip
        result = cp.einsum(subscripts, A, B)
        np.testing.assert_allclose(result.get(), np.einsum(subscripts, a, b))
        assert result.flags.c_contiguous == contiguous, subscripts
    assert cp.einsum("nij->jin", A).base is A
    np.testing.assert_allclose(cp.einsum("nij,nij->n", A, A).get(), (a * a).sum((1, 2)))
    np.testing.assert_allclose(cp.einsum("nij->n", A).get(), a.sum((1, 2)))


def test_random_numbers_are_seeded(cp) -> None:
    def draw(dtype):
        generator = cp.random.Generator(cp.random.Philox4x3210(5))
        return generator.standard_normal((100, 2), dtype=dtype).get()

    np.testing.assert_array_equal(draw(np.float32), draw(np.float32))
    assert draw(np.float64).dtype == np.float64
    with pytest.raises(TypeError):
        draw(np.int32)


# ---- Raw kernels ------------------------------------------------------------------------------

SCALE = r"""
extern "C" __global__ void scale(const double* x, double* y, double factor, long long n, int step) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] = factor * x[i * step];
}
"""


def test_kernels_and_their_arguments(cp, stand_in) -> None:  # noqa: F811
    kernel = cp.RawModule(code=SCALE, options=("--std=c++17",)).get_function("scale")
    x, y = cp.asarray(np.arange(40.0)), cp.empty(40)
    good = (x, y, 3.0, 40, np.int32(1))
    kernel((2,), (32,), good)
    np.testing.assert_array_equal(y.get(), 3 * np.arange(40.0))
    part = cp.asarray(np.zeros((3, 40)))
    kernel((2,), (32,), (x, part[1], 2.0, np.int64(40), np.int32(1)))
    np.testing.assert_array_equal(part.get()[:, 1], [0, 2, 0])
    assert stand_in.counters.launches == 2
    bad = {0: (np.zeros(40), x.astype(np.float32), cp.zeros(80)[::2], None, y),
           2: (1, np.float32(1)), 3: (np.int32(40), 40.0), 4: (1, np.int64(1))}  # fmt: skip
    for place, values in bad.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match="argument"):
                kernel((2,), (32,), (*good[:place], value, *good[place + 1 :]))
    with pytest.raises(TypeError, match="4 arguments"):
        kernel((2,), (32,), good[:4])
    for grid, block in (((0,), (32,)), ((1, 65536), (32,)), ((1,), (1025,)), ((1,), (64, 32)),
                        ((2**31,), (32,)), ((1,), (1, 1, 65))):  # fmt: skip
        with pytest.raises(CUDADriverError):
            kernel(grid, block, good)
    with pytest.raises(CUDADriverError, match="shared"):
        kernel((2,), (32,), good, shared_mem=50_000)
    kernel.max_dynamic_shared_size_bytes = 50_000
    kernel((2,), (32,), good, shared_mem=50_000)
    with pytest.raises(CUDADriverError):
        kernel.max_dynamic_shared_size_bytes = 228 * 1024
    with pytest.raises(CUDADriverError, match="NOT_FOUND"):
        cp.RawModule(code=SCALE).get_function("shrink")
    with pytest.raises(runner.HostExecutionError, match="past the ends"):
        kernel((2,), (32,), (x, cp.empty(39), 1.0, 40, np.int32(1)))


# ---- Captures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_capture_records_everything_and_replays_it_in_order(cp, stand_in, dtype) -> None:  # noqa: F811
    blas = Blas(cp, dtype)
    kernel = cp.RawModule(code=SCALE).get_function("scale")
    x, y = cp.asarray(np.ones(8)), cp.zeros(8)
    a = cp.asarray(np.eye(2, dtype=blas.dtype))
    pool, stream = cp.cuda.MemoryPool(), cp.cuda.Stream(non_blocking=True)

    def work():
        z = x + 1.0
        kernel((1,), (32,), (z, y, 2.0, 8, np.int32(1)))
        y[1:3] = -1.0
        b = y.astype(blas.dtype)
        c = cp.empty((2, 4), blas.dtype)
        one, zero = blas.number(1.0), blas.number(0.0)
        status = blas(
            "gemm_v2", 0, 0, 4, 2, 2, one, address(b), 4, address(a), 2, zero, address(c), 4
        )
        assert status == 0
        return c * 10.0

    with stream, cp.cuda.using_allocator(pool.malloc):
        warm = work().get().ravel()
        total = pool.total_bytes()
        y.fill(0.0)
        stand_in.counters.reset()
        stream.begin_capture()
        assert stream.is_capturing()
        result = work()
        graph = stream.end_capture()
    assert not stream.is_capturing()
    assert pool.total_bytes() == total
    assert (y.get() == 0).all()
    assert np.isnan(result.get()).all()
    np.testing.assert_array_equal(warm, [40, -10, -10, 40, 40, 40, 40, 40])
    for value in (1.0, 4.0):
        x.fill(value)
        graph.launch(stream)
        want = np.full(8, 20 * (value + 1))
        want[1:3] = -10
        np.testing.assert_array_equal(result.get().ravel(), want)
    assert stand_in.counters.graph_launches == 2
    assert stand_in.counters.launches == 1
    assert stand_in.counters.library_calls == 1


def test_what_a_capture_refuses(cp, stand_in) -> None:  # noqa: F811
    handle = cp.cuda.device.get_cublas_handle()
    a = cp.asarray(np.eye(3))
    b = a > 0
    with pytest.raises(RuntimeError, match="default"):
        cp.cuda.Stream.null.begin_capture()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        held = cp.empty((50, 3))
        del held
        gc.collect()
        stream.begin_capture()
        a += 1.0
        for refused, kind in (
            (lambda: a.get(), RuntimeError),
            (lambda: bool(b[0, 0]), RuntimeError),
            (lambda: cp.asarray(np.ones(3)), RuntimeError),
            (lambda: a[b], RuntimeError),
            (lambda: a.set(np.ones((3, 3))), RuntimeError),
            (lambda: a @ a, NotImplementedError),
            (lambda: cp.einsum("ij,jk->ik", a, a), NotImplementedError),
            (lambda: cp.argsort(a), CUDARuntimeError),
            (lambda: cp.empty(1 << 20), CUDARuntimeError),
            (lambda: cp.RawModule(code=SCALE).get_function("scale"), CUDARuntimeError),
            (lambda: cp.cuda.device.get_cusolver_handle(), CUDARuntimeError),
        ):
            with pytest.raises(kind):
                refused()
        assert cp.cuda.device.get_cublas_handle() == handle
        with cp.cuda.Stream(), pytest.raises(CUDARuntimeError):
            cp.add(a, 1.0)
        assert stream.end_capture() is not None
        assert a.get()[0, 0] == 1.0
        stream.begin_capture()
        with pytest.raises(CUDARuntimeError):
            stream.synchronize()
        with pytest.raises(CUDARuntimeError, match="previous error"):
            stream.end_capture()
    assert float(a[0, 0]) == 1.0


# ---- Memory -----------------------------------------------------------------------------------


def test_the_pool_follows_live_arrays(cp) -> None:
    pool = cp.get_default_memory_pool()
    used, total = pool.used_bytes(), pool.total_bytes()
    a = cp.empty(1000)
    view = a[10:]
    assert pool.used_bytes() == used + 8192
    del a
    assert pool.used_bytes() == used + 8192
    del view
    assert pool.used_bytes() == used
    b, c = cp.empty(100), cp.empty(100)  # both from the block that was freed
    assert pool.total_bytes() == total + 8192
    assert b.data.ptr != c.data.ptr
    with cp.cuda.Stream():
        d = cp.empty(100)  # free blocks belong to a stream
        assert pool.total_bytes() == total + 8192 + 1024
    del b, c, d
    pool.free_all_blocks()
    assert pool.total_bytes() == used
    for _ in range(50):
        e = cp.ones((10, 10)) @ cp.ones((10, 10)) + 1.0
        del e
    assert pool.used_bytes() == used


def test_memory_ends(host_library_folder) -> None:  # noqa: F811
    with installed(host_library_folder, capacity=1 << 20) as host:
        cp = host.cupy
        pool = cp.get_default_memory_pool()
        assert cp.cuda.runtime.memGetInfo() == (1 << 20, 1 << 20)
        a = cp.empty(1 << 19, np.int8)
        with pytest.raises(cp.cuda.memory.OutOfMemoryError):
            cp.empty((1 << 19) + 1, np.int8)
        assert issubclass(cp.cuda.memory.OutOfMemoryError, MemoryError)
        del a
        b = cp.empty(1 << 20, np.int8)  # what is free goes back first
        del b
        pool.free_all_blocks()
        pool.set_limit(size=1 << 10)
        with pytest.raises(MemoryError, match="limit"):
            cp.empty(1 << 11, np.int8)


def test_addresses_in_one_block(cp) -> None:
    block = cp.cuda.alloc(4096)

    with cp.cuda.using_allocator(lambda size: block + 512):
        a = cp.ones(10)
    assert a.data.ptr == block.ptr + 512
    with cp.cuda.using_allocator(lambda size: block + 4000), pytest.raises(CUDARuntimeError):
        cp.ones(100)
    assert cp.empty(0).data.ptr == 0

"""What only a GPU has: graphs, streams, DLPack, device memory, and how it fails.

Each body runs on the host stand-in for CuPy (not a GPU run, see tests/host_cupy), where launches,
copies and waits are counted, and with `pytest -m gpu` on a GPU.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy, installed
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr import devices
from gpu_hodlr.arrays import as_array
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import DeviceError, MemoryEstimateError


def compressed(n: int = 200, dtype: Any = np.float64, **options: Any) -> gh.HSSMatrix:
    matrix = toeplitz(n).astype(dtype)
    return gh.compress(matrix, rtol=1e-6, leaf_size=n // 8, device="cuda", **options)


def columns(cupy: ModuleType, n: int, k: int, seed: int = 0, dtype: Any = np.float64) -> Any:
    return cupy.asarray(np.random.default_rng(seed).standard_normal((n, k)).astype(dtype))


# --- devices ---------------------------------------------------------------------------------


def test_host_data_is_moved_when_asked(cupy: ModuleType):
    """device="cuda" with NumPy data; the default stays on the CPU."""
    assert gh.compress(toeplitz(60), leaf_size=10).device == "cpu"
    K = compressed()
    assert K.device == "cuda"
    assert isinstance(K @ columns(cupy, 200, 2), cupy.ndarray)
    back = gh.KernelOperator(np.linspace(0, 1, 50)).to("cuda").to("cpu")
    assert back.device == "cpu"
    assert isinstance(back.points, np.ndarray)


def test_right_hand_sides_on_the_host_are_refused(cupy: ModuleType):
    K = compressed()
    F = K.factorize(0.1)
    b = np.ones(200)
    for call in (K.matmat, F.solve, F.sqrt_matmat, F.sqrt_solve, lambda x: gh.cg(K, x)):
        with pytest.raises(DeviceError, match="on cpu, the matrix is on cuda"):
            call(b)
    host = gh.compress(toeplitz(60), leaf_size=10)
    with pytest.raises(DeviceError, match="on cuda, the matrix is on cpu"):
        host @ cupy.ones(60)


def test_a_function_must_stay_on_its_device(cupy: ModuleType):
    matrix = cupy.asarray(toeplitz(60))
    op = gh.FunctionOperator(60, matmat=lambda v: matrix @ v, device="cuda")
    K = gh.compress(op, leaf_size=10, rtol=1e-6)
    np.testing.assert_allclose(to_host(K.to_dense()), toeplitz(60), atol=1e-4)
    wrong = gh.FunctionOperator(60, matmat=lambda v: to_host(matrix @ v), device="cuda")
    with pytest.raises(DeviceError, match="matmat must give arrays on cuda"):
        wrong @ cupy.ones(60)
    with pytest.raises(DeviceError, match="cannot be moved to cuda"):
        gh.compress(gh.FunctionOperator(60, matmat=lambda v: v), device="cuda")


def test_files_can_be_loaded_to_the_gpu(cupy: ModuleType, tmp_path: Any):
    K = compressed()
    K.save(tmp_path / "m.npz")
    host, device = gh.load(tmp_path / "m.npz"), gh.load(tmp_path / "m.npz", device="cuda")
    v = columns(cupy, 200, 3)
    assert (host.device, device.device) == ("cpu", "cuda")
    np.testing.assert_allclose(host @ to_host(v), to_host(device @ v), atol=1e-13)


def test_samples_are_reproducible(cupy: ModuleType):
    F = compressed().factorize(0.1)
    first, again, other = (to_host(F.sample(3, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


# --- graphs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 8, 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_replayed_products_and_solves_follow_their_input(cupy: ModuleType, dtype: Any, k: int):
    K = compressed(dtype=dtype)
    F = K.factorize(0.5)
    accuracy = 1e-12 if dtype == np.float64 else 1e-4
    dense = to_host(K.to_dense()).astype(np.float64)
    for seed in range(3):
        v = columns(cupy, 200, k, seed, dtype)
        product, solution = K @ v, F.solve(v)
        host = to_host(v).astype(np.float64)
        np.testing.assert_allclose(to_host(product), dense @ host, atol=100 * accuracy)
        residual = dense @ to_host(solution) + 0.5 * to_host(solution) - host
        np.testing.assert_allclose(residual, 0, atol=100 * accuracy)


def test_results_of_a_graph_are_the_callers(cupy: ModuleType):
    """A later replay does not write into an earlier result."""
    K = compressed()
    v, w = columns(cupy, 200, 1, 0), columns(cupy, 200, 1, 1)
    K @ v
    first = K @ v
    kept = to_host(first).copy()
    K @ w
    np.testing.assert_array_equal(to_host(first), kept)


def test_more_shapes_than_graphs_are_kept(cupy: ModuleType):
    K = compressed(120)
    dense = to_host(K.to_dense())
    for k in (*range(1, 12), 1, 2):
        v = columns(cupy, 120, k, k)
        np.testing.assert_allclose(to_host(K @ v), dense @ to_host(v), atol=1e-11)


def test_a_replay_is_one_launch_and_waits_for_nothing(stand_in: HostCupy):
    """After the first call: one graph; no copy from the host, no wait, no cudaMalloc."""
    K = compressed()
    F = K.factorize(0.1)
    v = columns(stand_in.cupy, 200, 1)
    for call in (K.matmat, F.solve):
        call(v)
        call(v)
        counters = stand_in.counters
        counters.reset()
        call(v)
        assert counters.graph_launches == 1
        assert counters.launches == counters.library_calls == 0
        assert counters.synchronizations == counters.host_to_device == 0
        assert counters.device_allocations == 0
        assert counters.array_operations == 2  # the input in, the output out


def test_the_first_product_waits_for_nothing_either(stand_in: HostCupy):
    K = compressed()
    v = columns(stand_in.cupy, 200, 1)
    stand_in.counters.reset()
    K @ v
    assert stand_in.counters.synchronizations == stand_in.counters.host_to_device == 0


def test_a_graph_that_would_hold_too_much_memory_is_not_made(stand_in: HostCupy):
    K = compressed()
    v = columns(stand_in.cupy, 200, 4)
    devices_free = devices.free_bytes("cuda")
    with pytest.MonkeyPatch.context() as patch:
        graphs = importlib.import_module("gpu_hodlr.batched.cupy_graphs")
        patch.setattr(graphs, "free_bytes", lambda device: 1000)
        first = K @ v
        stand_in.counters.reset()
        np.testing.assert_array_equal(to_host(K @ v), to_host(first))
        assert stand_in.counters.graph_launches == 0
    assert devices_free > 1000


def test_a_callers_own_graph_may_hold_a_product(cupy: ModuleType):
    K = compressed()
    v = columns(cupy, 200, 1)
    want = to_host(K @ v)
    stream = cupy.cuda.Stream(non_blocking=True)
    pool = cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        K._matmat(v)  # fills the pool: nothing is allocated while capturing
        stream.synchronize()
        stream.begin_capture()
        result = K @ v
        graph = stream.end_capture()
        v *= 2.0
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_allclose(to_host(result), 2 * want, rtol=1e-12)


# --- schedules -------------------------------------------------------------------------------


def test_every_schedule_of_threads_gives_the_same_bits(host_library_folder: Path):
    """All kernels from entries to a solve, executed in several orders of their threads."""
    points = np.random.default_rng(0).random((90, 2))
    results = []
    for schedule in range(4):
        with installed(host_library_folder, schedule=schedule) as host:
            op = gh.KernelOperator(host.cupy.asarray(points), "matern32", 0.5, 0.1)
            K = gh.compress(op, rtol=1e-4, leaf_size=25, ordering="gram")
            F = K.factorize(0.1)
            wide, narrow = (columns(host.cupy, 90, k) for k in (9, 3))
            found = (K @ wide, K @ narrow, F.solve(wide), F.solve(narrow), F.sample(2))
            results.append([to_host(x) for x in found])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(got, want)


# --- streams and memory ----------------------------------------------------------------------


def test_products_on_several_streams(cupy: ModuleType):
    K = compressed()
    vectors = [columns(cupy, 200, 1, seed) for seed in range(4)]
    want = [to_host(K @ v) for v in vectors]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in vectors]
    cupy.cuda.Device().synchronize()
    for _ in range(3):
        results = []
        for stream, v in zip(streams, vectors, strict=True):
            with stream:
                results.append(K @ v)
        cupy.cuda.Device().synchronize()
        for got, expected in zip(results, want, strict=True):
            np.testing.assert_array_equal(to_host(got), expected)


def test_memory_is_flat_over_many_products(cupy: ModuleType):
    K = compressed()
    F = K.factorize(0.1)
    v = columns(cupy, 200, 2)
    for _ in range(2):
        K @ v, F.solve(v)
    pool = cupy.get_default_memory_pool()
    used, held = pool.used_bytes(), pool.total_bytes()
    for _ in range(50):
        K @ v, F.solve(v)
    assert pool.used_bytes() == used
    assert pool.total_bytes() == held


def test_compression_leaves_no_memory_behind(stand_in: HostCupy):
    compressed()
    pool = stand_in.cupy.get_default_memory_pool()
    used = pool.used_bytes()
    for _ in range(3):
        compressed()
    assert pool.used_bytes() <= used


def test_out_of_memory_says_what_to_lower(stand_in: HostCupy):
    """What the pool cannot give becomes an error with what is free and what to lower."""
    pool = stand_in.cupy.get_default_memory_pool()
    op = gh.DenseOperator(stand_in.cupy.asarray(toeplitz(300)))
    pool.free_all_blocks()
    pool.set_limit(size=pool.total_bytes() + 300 * 200 * 8)
    with pytest.raises(MemoryEstimateError, match=r"GPU; lower leaf_size"):
        gh.compress(op, leaf_size=40)
    pool.set_limit(size=0)
    K = gh.compress(op, leaf_size=40)
    v = stand_in.cupy.ones((300, 100))
    pool.free_all_blocks()
    pool.set_limit(size=pool.total_bytes() + 1)
    kept = fill(stand_in.cupy)  # what lies free between the arrays of K
    with pytest.raises(MemoryEstimateError, match="GPU; lower the columns of v"):
        K @ v
    with pytest.raises(MemoryEstimateError, match="GPU; lower max_rank"):
        K.factorize(1.0)
    del kept


def fill(cupy: ModuleType) -> list[Any]:
    """Arrays that leave no room for another."""
    arrays = []
    with suppress(MemoryError):
        while True:
            arrays.append(cupy.empty(2000))
    return arrays


def test_memory_is_estimated_first(stand_in: HostCupy):
    points = stand_in.cupy.asarray(np.random.default_rng(0).random((4000, 2)))
    op = gh.KernelOperator(points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "free_bytes", lambda device="cpu": 10**6)
        with pytest.raises(MemoryEstimateError, match="are free on the GPU; lower leaf_size"):
            gh.compress(op)
        with pytest.raises(MemoryEstimateError, match="are free on the GPU"):
            op.to_dense()


# --- the number of launches ------------------------------------------------------------------


def launches_by_leaf_size(stand_in: HostCupy, n: int, leaf_size: int, work: Any) -> tuple[int, int]:
    """Depth of the tree, and launches of all kinds."""
    points = np.random.default_rng(0).random((n, 2))
    op = gh.KernelOperator(stand_in.cupy.asarray(points), "laplace", 0.4, 0.5)
    options = {"rtol": 1e-9, "max_rank": 16, "leaf_size": leaf_size}  # the cap rules: one sweep
    K = gh.compress(op, **options)
    stand_in.counters.reset()
    work(op, K, options)
    c = stand_in.counters
    return K.tree.depth, c.launches + c.library_calls + c.array_operations


@pytest.mark.filterwarnings("ignore::gpu_hodlr.errors.RankCapWarning")
@pytest.mark.parametrize(
    ("work", "a_level"),
    [
        (lambda op, K, options: gh.compress(op, sampler="products+entries", **options), 75),
        (lambda op, K, options: K._factor(K.structure, 1.0), 40),
        (lambda op, K, options: K._matmat(op.points[:, :1]), 6),
        (lambda op, K, options: K._matmat(op.points.repeat(8, axis=1)), 22),
    ],
    ids=["compress", "factorize", "product", "wide product"],
)
def test_launches_grow_with_the_levels_and_not_with_n(
    stand_in: HostCupy, work: Callable[..., Any], a_level: int
):
    """So many for one more level at most; as many for twice the matrix with as many levels."""
    depth, few = launches_by_leaf_size(stand_in, 256, 32, work)
    deeper, more = launches_by_leaf_size(stand_in, 512, 32, work)
    same, as_many = launches_by_leaf_size(stand_in, 512, 64, work)
    assert (deeper, same) == (depth + 1, depth)
    assert more - few <= a_level
    assert as_many == few


# --- torch -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_torch_tensors_go_in_and_out_without_a_copy(gpu: ModuleType):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    K = compressed()
    v = torch.randn(200, 3, dtype=torch.float64, device="cuda")
    product = K @ v
    assert product.device.type == "cuda"
    assert torch.allclose(product, torch.from_dlpack(K.to_dense()) @ v)
    view = as_array(v, "v")
    assert isinstance(view, gpu.ndarray)
    assert view.data.ptr == v.data_ptr()


@pytest.mark.gpu
def test_gauss_newton_matrix_of_a_network_on_the_gpu(gpu: ModuleType):
    torch = pytest.importorskip("torch")
    from network_cases import case

    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    model, inputs, targets = case("deep", "cross_entropy")
    want = gh.GGNOperator(model, "cross_entropy", inputs, targets).to_dense()
    op = gh.GGNOperator(model.cuda(), "cross_entropy", inputs.cuda(), targets.cuda())
    assert op.device == "cuda"
    np.testing.assert_allclose(to_host(op.to_dense()), want, atol=1e-12)
    v = torch.randn(op.shape[0], 5, dtype=torch.float64, device="cuda")
    np.testing.assert_allclose((op @ v).cpu().numpy(), want @ v.cpu().numpy(), atol=1e-11)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("name", ["two layers", "deep", "wide output, activated"])
def test_gauss_newton_matrix_on_the_gpu(cupy: ModuleType, name: str, loss: str):
    """A network evaluated by torch on the CPU, its matrix on the GPU."""
    pytest.importorskip("torch")
    from network_cases import case

    model, inputs, targets = case(name, loss)
    host = gh.GGNOperator(model, loss, inputs, targets)
    op = gh.GGNOperator(model, loss, inputs, targets, device="cuda")
    want = host.to_dense()
    scale = np.abs(want).max()
    np.testing.assert_allclose(to_host(op.to_dense()), want, atol=1e-13 * scale)
    np.testing.assert_allclose(to_host(op.diagonal()), np.diagonal(want), atol=1e-13 * scale)
    v = columns(cupy, op.shape[0], 5)
    np.testing.assert_allclose(to_host(op @ v), want @ to_host(v), atol=1e-12 * scale)
    K = gh.compress(op, rtol=1e-6, leaf_size=8, max_rank=op.shape[0])
    dense = to_host(K.to_dense())
    assert np.linalg.norm(dense - want) <= 3e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("ordering", ["natural", "gram", "angle", "geometric", "random"])
def test_every_ordering(cupy: ModuleType, ordering: str):
    """The tree of the GPU is the CPU's: distances differ by rounding only."""
    points = np.random.default_rng(1).random((150, 2))
    host = gh.KernelOperator(points, "gaussian", 0.3)
    trees = [
        gh.compress(op, rtol=1e-4, leaf_size=20, ordering=ordering).tree
        for op in (host, host.to("cuda"))
    ]
    np.testing.assert_array_equal(trees[0].leaves >= 0, trees[1].leaves >= 0)
    for left, right in zip(trees[0].leaves, trees[1].leaves, strict=True):
        np.testing.assert_array_equal(np.sort(left), np.sort(right))


# --- what is missing -------------------------------------------------------------------------


def fake_cupy(**runtime: Any) -> ModuleType:
    """A CuPy that fails at a certain place."""

    def fails(*args: Any) -> Any:
        raise RuntimeError("libcublas.so.12: cannot open shared object file")

    module = ModuleType("cupy")
    calls = {"getDeviceCount": lambda: 1, "runtimeGetVersion": lambda: 12090,
             "driverGetVersion": lambda: 12090} | runtime  # fmt: skip
    device = SimpleNamespace(get_cublas_handle=fails)
    module.cuda = SimpleNamespace(runtime=SimpleNamespace(**calls), device=device)  # type: ignore[attr-defined]
    return module


def raising(text: str) -> Callable[[], int]:
    def call() -> int:
        raise RuntimeError(text)

    return call


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "needs CuPy, which cannot be imported.*pip install"),
        (
            fake_cupy(getDeviceCount=raising("no"), driverGetVersion=lambda: 0),
            "there is no NVIDIA driver",
        ),
        (
            fake_cupy(getDeviceCount=raising("no"), driverGetVersion=lambda: 11040),
            r"supports CUDA 11\.4, CuPy wants 12\.9: update the driver",
        ),
        (fake_cupy(getDeviceCount=lambda: 0), "no GPU is visible.*CUDA_VISIBLE_DEVICES"),
        (fake_cupy(), "CUDA libraries cannot be loaded: libcublas.*pip install"),
    ],
    ids=["no CuPy", "no driver", "old driver", "no GPU", "no libraries"],
)
def test_why_cuda_cannot_be_used(monkeypatch: pytest.MonkeyPatch, found: Any, words: str):
    """The reason, and what to do; the default still works on the CPU."""
    devices._require_cuda.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", found)
    with pytest.raises(DeviceError, match=words):
        gh.compress(toeplitz(20), leaf_size=5, device="cuda")
    assert gh.compress(toeplitz(20), leaf_size=5).device == "cpu"


@pytest.mark.parametrize("library", ["cusolver", "nvrtc"])
def test_a_library_that_is_missing(
    stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch, library: str
):
    """cuSOLVER where its binding is looked up, NVRTC at its first call."""
    package = importlib.import_module("cupy_backends.cuda.libs")

    def missing(*name: str) -> Any:
        raise ImportError(f'Failure finding "lib{library}.so"')

    if library == "nvrtc":
        monkeypatch.setattr(package.nvrtc, "getVersion", missing)
    else:
        monkeypatch.setattr(package, "__getattr__", missing)
    devices._require_cuda.cache_clear()
    with pytest.raises(DeviceError, match=f"libraries cannot be loaded.*lib{library}.so"):
        devices.resolve_device("cuda")

"""The raw CUDA kernels without a GPU: compiled by NVRTC, and their source executed on the host.

Nothing here is a GPU run. tests/host_cuda/host_cuda.h says what executing a kernel's source on
the host shows and what it cannot.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from host_cuda import factor_launches, launches, nvrtc, runner
from host_cuda.planted_bugs import JOBS, SEEDS
from kernel_cases import DTYPES, built_for_host, needs_compiler, padded_index, under_schedules

from gpu_hodlr import batched
from gpu_hodlr import kernel_sources as sources
from gpu_hodlr.errors import ArgumentError, DeviceError

OTHERS = (
    75,
    80,
    86,
    89,
    100,
    120,
)  # no source asks for its architecture: one is enough for most runs
VOLTA_IS_OLD = "nvrtc: warning: Architectures prior to"
# One block of 512 threads a multiprocessor: a panel takes much of its shared memory anyhow, and of
# matrices too tall for shared memory there are few. And a tile of a wide product, which does more
# with each value the more of them it holds. And a step of a solve, whose nodes are large where
# blocks have so many threads.
MOST_REGISTERS = dict.fromkeys(
    ("householder_qr", "pivoted_qr", "block_sparse", "ulv_steps", "hodlr_steps"), 128
)
TESTS = Path(__file__).parent


# ---- The sources ------------------------------------------------------------------------------


def test_sources_are_found_and_self_contained() -> None:
    assert {"basis_products", "pivoted_qr", "rows"} <= set(sources.source_names())
    for name in sources.source_names():
        text = sources.read_source(name)
        assert "#include" not in text
        assert 'extern "C" __global__' in text


def test_unknown_source_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"pivoted_qr.*got 'qr'"):
        sources.read_source("qr")


def test_missing_folder_is_a_device_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "gpu_hodlr" / "kernel_sources.py"))
    with pytest.raises(DeviceError, match="kernel sources are missing"):
        sources.source_folder()


# ---- Compiled by NVRTC ------------------------------------------------------------------------


def _compile_all(cuda: int, folder: Path, architecture: int) -> dict[str, tuple[bool, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "host_cuda.nvrtc", str(cuda), str(architecture), str(folder)],
        capture_output=True, text=True, cwd=TESTS, timeout=300, check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("cuda", "architectures"),
    [
        (13, (90,)),
        pytest.param(12, (70,), marks=pytest.mark.slow),
        pytest.param(13, OTHERS, marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_for_every_architecture_without_spills(
    cuda: int, architectures: tuple[int, ...], pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    if nvrtc.library(cuda) is None:
        pytest.skip(f"{nvrtc.PACKAGES[cuda]} is not installed: kernels cannot be compiled")
    cache = getattr(pytestconfig, "cache", None)
    folder = cache.mkdir("nvrtc") if cache else tmp_path
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(partial(_compile_all, cuda, folder), architectures))
    jobs = [
        ((name, architecture), *outcome)
        for architecture, by_name in zip(architectures, found, strict=True)
        for name, outcome in by_name.items()
    ]
    for job, compiled, log in jobs:
        assert compiled, (job, log)
        assert "warning" not in log.replace(VOLTA_IS_OLD, ""), (job, log)
        kernels = re.findall(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            log,
            re.DOTALL,
        )
        assert len(kernels) >= 2, (job, log)
        for kernel, *waste, registers in kernels:
            assert waste == ["0", "0", "0"], (job, kernel, "stack, spills", waste)
            assert int(registers) <= MOST_REGISTERS.get(job[0], 80), (job, kernel, registers)


# ---- Kernel source executed on the host -------------------------------------------------------


@pytest.fixture(scope="session")
def on_host(host_library_folder) -> dict[str, runner.HostKernels]:
    return built_for_host(host_library_folder)


def _samples(case: str, rng: np.random.Generator, nodes: int, m: int, s: int) -> np.ndarray:
    S = rng.standard_normal((nodes, m, s))
    if case == "rank deficient":
        rank = min(m, s) // 3
        S = rng.standard_normal((nodes, m, rank)) @ rng.standard_normal((nodes, rank, s))
    if case == "padded":
        S[:, m // 2 :: 2] = 0
        S[-1] = 0
    if case == "graded":
        S *= 10.0 ** -rng.uniform(0, 5, (nodes, m, 1))
    return S


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["random", "rank deficient", "padded", "graded"])
@pytest.mark.parametrize(
    ("m", "s", "threads"),
    [(20, 33, 96), (45, 18, 32), (32, 32, 64), (70, 75, 512), (1, 7, 96), (3, 1, 32)],
)
def test_pivoted_qr_on_host(on_host, dtype, case, m, s, threads) -> None:
    S = _samples(case, np.random.default_rng(m), 2, m, s).astype(dtype)
    pivots, r, tails, ranks = under_schedules(
        factor_launches.pivoted_qr, on_host["pivoted_qr"], S, threads=threads
    )
    for t in range(len(S)):
        np.testing.assert_array_equal(np.sort(pivots[t]), np.arange(m))
        is_pivoted_qr(S[t][pivots[t]].T, r[t], tails[t], ranks[t])
        if not S[t].any():
            np.testing.assert_array_equal(pivots[t], np.arange(m))
            assert ranks[t] == 0
            assert not r[t].any()


def is_pivoted_qr(A: np.ndarray, r: np.ndarray, tails: np.ndarray, rank: int) -> None:
    """Against the QR of A (s, m), columns in pivot order, in twice the digits where there are more.

    Householder QR gives the exact R of A + E, norm(E)_F <= c max(m, s) eps norm(A)_F (Higham,
    Accuracy and Stability of Numerical Algorithms, theorem 19.4; the constant c is small). So
    R^T R - A^T A is within 2 of that, times norm(A)_F. With A = [A1, A2], A2 = A1 W + Z, Z
    orthogonal to A1, a tail is norm(Z - E1 W + E2)_F^2 to first order: in its root off norm(Z)_F by
    (1 + norm(W)) norm(E)_F at most. Norms of columns are brought forward from step to step, and
    formed anew where sqrt(eps) of them is left: the largest is taken to within as much.
    """
    s, m = A.shape
    eps, exact = float(np.finfo(A.dtype).eps), A.astype(np.float64)
    norm = float(np.linalg.norm(exact))
    backward = 4 * max(m, s) * eps * norm
    assert not np.tril(r, -1).any()
    mine = r.astype(np.float64)
    np.testing.assert_allclose(mine.T @ mine, exact.T @ exact, rtol=0, atol=2 * backward * norm)
    R = np.linalg.qr(exact, mode="r")
    left = np.cumsum((R**2)[::-1], axis=0)[::-1]  # squared norms of the columns, a step a row
    steps = min(int(np.count_nonzero(np.abs(np.diagonal(R)) > 10 * backward)), len(R))
    for k in range(steps):
        assert left[k, k] >= (1 - 4 * eps**0.5) * left[k, k:].max(), k
    assert rank >= steps
    assert len(tails) == min(m, s) + 1
    off = np.inf
    for k in range(len(tails)):
        if k <= steps:  # beyond, tails are what rounding leaves, and at most the last one
            W = np.linalg.solve(R[:k, :k], R[:k, k:])
            off = backward * (1 + np.linalg.norm(W))
        Z = np.sqrt(left[k, k:].sum()) if k < len(R) else 0.0
        assert abs(np.sqrt(tails[k]) - Z) <= off, k
    assert (np.diff(tails) <= 0).all()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_pivoted_qr_stops_early_on_host(on_host, dtype) -> None:
    S = _samples("graded", np.random.default_rng(1), 3, 40, 24).astype(dtype)
    reference = batched.pivoted_qr(S)
    threshold = float(reference.tails[1, 9] * 0.5 + reference.tails[1, 10] * 0.5)
    expected = [np.count_nonzero(tail > threshold) for tail in reference.tails]
    for max_rank in (40, 7):
        pivots, r, tails, ranks = under_schedules(
            factor_launches.pivoted_qr,
            on_host["pivoted_qr"],
            S,
            threshold=threshold,
            max_rank=max_rank,
        )
        np.testing.assert_array_equal(ranks, np.minimum(expected, max_rank))
        for t, k in enumerate(ranks):
            np.testing.assert_array_equal(pivots[t, :k], reference.pivots[t, :k])
            np.testing.assert_array_equal(np.sort(pivots[t]), np.arange(40))
            np.testing.assert_array_equal(pivots[t, k:], np.sort(pivots[t, k:]))
            rtol = 1000 * np.finfo(dtype).eps
            np.testing.assert_allclose(tails[t, : k + 1], reference.tails[t, : k + 1], rtol=rtol)
            np.testing.assert_array_equal(tails[t, k:], tails[t, k])
            assert not r[t, k:].any()
            # The rows done give the interpolative decomposition and its error.
            T = np.linalg.solve(r[t, :k, :k], r[t, :k, k:]).T
            rest = S[t, pivots[t, k:]] - T @ S[t, pivots[t, :k]]
            assert np.linalg.norm(rest) ** 2 <= 10 * tails[t, k]


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float32, 1e-30), (np.float32, 1e30), (np.float64, 1e-140), (np.float64, 1e140)],
)
def test_pivoted_qr_of_tiny_and_huge_numbers_on_host(on_host, dtype, scale) -> None:
    S = (np.random.default_rng(2).standard_normal((1, 12, 20)) * scale).astype(dtype)
    pivots, r, tails, ranks = factor_launches.pivoted_qr(on_host["pivoted_qr"], S)
    reference = batched.pivoted_qr(S)
    assert ranks[0] == 12
    np.testing.assert_array_equal(pivots, reference.pivots)
    np.testing.assert_allclose(np.abs(r), np.abs(reference.r), rtol=1e-3, atol=1e-5 * scale)
    np.testing.assert_allclose(tails, reference.tails, rtol=1e-4)


@needs_compiler
def test_pivoted_qr_of_nan_shows_it_on_host(on_host) -> None:
    S = np.random.default_rng(3).standard_normal((2, 10, 6))
    S[0, 4, 2] = np.nan
    _, r, tails, _ = factor_launches.pivoted_qr(on_host["pivoted_qr"], S, threshold=1e-3)
    assert np.isnan(tails[0, :-1]).all()
    assert np.isfinite(tails[1]).all()
    assert np.isfinite(r[1]).all()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 40])
def test_rows_on_host(on_host, dtype, k) -> None:
    rng = np.random.default_rng(k)
    kernels, nodes, m, n = on_host["rows"], 5, 13, 50
    index = np.full(nodes * m, -1)
    index[rng.permutation(nodes * m)[:n]] = rng.permutation(n)
    index = index.reshape(nodes, m)
    x = rng.standard_normal((n, k)).astype(dtype)
    blocks = under_schedules(launches.gather_rows, kernels, x, index)
    np.testing.assert_array_equal(blocks, batched.gather_rows(x, index))
    stack = rng.standard_normal((nodes, m, k)).astype(dtype)
    for used in (index, np.where(index % 3 == 0, -1, index)):
        back = under_schedules(launches.scatter_rows, kernels, stack, used, n)
        np.testing.assert_array_equal(back, batched.scatter_rows(stack, used, n))
    order = np.argsort(rng.random((nodes, m)), axis=1)
    for chosen in (order, np.ascontiguousarray(order[:, :4])):
        permuted = under_schedules(launches.permute_rows, kernels, stack, chosen)
        np.testing.assert_array_equal(permuted, batched.permute_rows(stack, chosen))
    restored = under_schedules(launches.unpermute_rows, kernels, stack, order)
    np.testing.assert_array_equal(restored, batched.unpermute_rows(stack, order))
    y, row_of = rng.standard_normal((3, k)).astype(dtype), rng.integers(-1, 3, (4, 4))
    node, slot, slots = (rng.integers(0, *of) for of in ((nodes, 7), (4, 7), (4, index.shape)))
    scaled = under_schedules(
        launches.scaled_panels, kernels, x, y, node, slot, index, slots, row_of
    )
    by = row_of[slot[:, None], slots[node]]
    there = (index[node] >= 0) & (by >= 0)
    np.testing.assert_array_equal(scaled, np.where(there[:, :, None], x[index[node]] * y[by], 0))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "profile",
    ["gaussian", "laplace", "matern32", "matern52", "rational_quadratic", "spherical",
     "squared_distance"],
)  # fmt: skip
@pytest.mark.parametrize("d", [1, 3, 21])
def test_point_entries_on_host(on_host, dtype, profile, d) -> None:
    rng = np.random.default_rng(d)
    points = ((rng.standard_normal((60, d)) + 10) / (0.7 * d**0.5)).astype(dtype)
    points[7] = points[8]  # not the same index: no nugget
    rows, cols = padded_index(rng, 2, 35, 60), padded_index(rng, 2, 47, 60)
    cols[1] = -1
    cols[0, :20] = rows[0, :20]
    kernel = batched.PointKernel(profile, 0.8, 1.5)
    for nugget in (np.full(1, 0.25), np.linspace(0.1, 2.0, 60)):
        got = under_schedules(
            launches.point_entries, on_host["point_entries"], points, kernel, nugget.astype(dtype),
            rows, cols,
        )  # fmt: skip
        # NumPy's distances lose digits to the offset of the points: at float64 they are the truth.
        truth = batched.point_entries(points.astype(np.float64), kernel, nugget, rows, cols)
        scale = max(1.0, float(truth.max()))
        np.testing.assert_allclose(got, truth, rtol=0, atol=20 * np.finfo(dtype).eps * scale)
        assert not got[1].any()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("units", "n"), [(1, 20), (3, 1), (5, 37), (90, 18)])
def test_khatri_rao_entries_on_host(on_host, dtype, units, n) -> None:
    rng = np.random.default_rng(units)
    N, num_features = 90, 11
    features = rng.standard_normal((num_features, n)).astype(dtype)
    feature_of = rng.integers(0, num_features, N)
    # As many units as indices: every pair of a tile has its own row of G, staged 3 samples a time.
    unit_of = rng.permutation(N) if units == N else rng.integers(0, units, N)
    gram = rng.standard_normal((units, units, n)).astype(dtype)
    gram = gram + gram.swapaxes(0, 1)
    gram[units // 2, : units // 2] = gram[: units // 2, units // 2] = 0
    rows, cols = padded_index(rng, 2, 33, N), padded_index(rng, 2, 41, N)
    rows[1, 5:] = -1
    if units == N:
        rows[0] = rng.permutation(N)[:33]
    got = under_schedules(
        launches.khatri_rao_entries, on_host["khatri_rao_entries"],
        features, feature_of, unit_of, gram, rows, cols,
    )  # fmt: skip
    table = SimpleNamespace(rows=lambda u, others: gram[u, others])
    expected = batched.khatri_rao_entries(features, feature_of, unit_of, table, rows, cols)
    atol = 100 * np.finfo(dtype).eps * n**0.5
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


# ---- What the harness catches -----------------------------------------------------------------


def _called_barriers(name: str, noticed: dict) -> list[int]:
    """All barriers but the first, block_reduce's, where the kernel does not call that."""
    source = sources.read_source(name)
    return noticed["barriers"] if "= block_reduce<" in source else noticed["barriers"][1:]


@pytest.fixture(scope="module")
def noticed(on_host, host_library_folder) -> dict[str, dict]:
    """What `planted_bugs` says of every kernel, of one process."""
    done = subprocess.run(
        [sys.executable, "-m", "host_cuda.planted_bugs", str(host_library_folder), *JOBS],
        capture_output=True, text=True, cwd=TESTS, timeout=240, check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    return json.loads(done.stdout)


@needs_compiler
@pytest.mark.parametrize("name", sorted(JOBS))
def test_every_missing_barrier_is_noticed_on_the_host(name, noticed) -> None:
    """Each __syncthreads left out in turn changes a result, is reported, or crashes."""
    noticed = noticed[name]
    assert noticed["intact"] == 0
    counts = _called_barriers(name, noticed)
    assert counts
    assert min(counts) >= 1, f"noticed by so many of {len(SEEDS)} schedules: {counts}"


_BAD_KERNELS = """
extern "C" __global__ void divergent(int* x) { if (threadIdx.x < 7) __syncthreads(); x[0] = 1; }
extern "C" __global__ void two_barriers(int* x) {
    if (threadIdx.x < 32) __syncthreads(); else __syncthreads();
    x[0] = 1;
}
extern "C" __global__ void past_the_array(int* x) { x[blockDim.x] = threadIdx.x; }
extern "C" __global__ void past_the_shared_memory(int* x) {
    DYN_SHARED(shared);
    shared[4 * blockDim.x] = 1;
    x[0] = 1;
}
extern "C" __global__ void half_a_warp(int* x) {
    if (threadIdx.x % 32 < 16) x[0] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
extern "C" __global__ void endless(int* x) { while (x[0] == 0) __syncthreads(); }
"""


@needs_compiler
@pytest.mark.skipif(bool(runner.SANITIZER), reason="the sanitizer would end the process")
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent", "divergent barrier: 7 threads at a barrier; 57 threads finished"),
        ("two_barriers", "different barriers of the source"),
        ("past_the_array", "past the ends of an array"),
        ("past_the_shared_memory", "past the shared memory"),
        ("half_a_warp", "32 threads in a warp-wide call"),
        ("endless", "does not come to an end"),
    ],
)
def test_bad_kernels_are_reported_on_the_host(kernel, message, host_library_folder) -> None:
    kernels = runner.HostKernels("bad", _BAD_KERNELS, host_library_folder)
    with pytest.raises(runner.HostExecutionError, match=message):
        kernels.launch(kernel, (1,), (64,), (np.zeros(64, np.int32),), shared_bytes=256, seed=1)


# ---- Under the sanitizers, off by default -----------------------------------------------------

sanitize = pytest.mark.skipif(
    os.environ.get("GPU_HODLR_SANITIZE") != "1",
    reason="slow; GPU_HODLR_SANITIZE=1 executes kernel sources on the host under the sanitizers",
)


def _python_under(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    short = {"address": "asan", "thread": "tsan"}[sanitizer]
    library = subprocess.run(
        [runner.COMPILER, f"-print-file-name=lib{short}.so"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if not Path(library).is_file():
        pytest.skip(f"no lib{short}.so beside the compiler")
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, cwd=TESTS, timeout=1200,
        env={
            **os.environ,
            "LD_PRELOAD": library,
            "HOST_CUDA_SANITIZER": sanitizer,
            "ASAN_OPTIONS": "detect_leaks=0",
            "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )  # fmt: skip


@needs_compiler
@sanitize
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_kernel_sources_under_sanitizer(sanitizer) -> None:
    done = _python_under(
        sanitizer,
        "-m",
        "pytest",
        *map(str, TESTS.glob("test_kernels*.py")),
        "-k",
        "_on_host",
        "-p",
        "no:cacheprovider",
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert " passed" in done.stdout


@needs_compiler
@sanitize
@pytest.mark.parametrize("name", sorted(JOBS))
def test_thread_sanitizer_sees_every_missing_barrier(name, host_library_folder) -> None:
    """Under every schedule, in order too: the race is there even where the result is right."""
    done = _python_under("thread", "-m", "host_cuda.planted_bugs", str(host_library_folder), name)
    assert done.returncode == 0, done.stderr[-6000:]
    noticed = json.loads(done.stdout)[name]
    assert noticed["intact"] == 0
    assert set(_called_barriers(name, noticed)) == {len(SEEDS)}


@needs_compiler
@sanitize
@pytest.mark.parametrize("kernel", ["past_the_array", "past_the_shared_memory"])
def test_address_sanitizer_sees_bad_indices(kernel, host_library_folder) -> None:
    script = (
        "import sys, pathlib, numpy, test_kernels as t\n"
        "kernels = t.runner.HostKernels('bad', t._BAD_KERNELS, pathlib.Path(sys.argv[2]))\n"
        "x = numpy.zeros(64, numpy.int32)\n"
        "kernels.launch(sys.argv[1], (1,), (64,), (x,), shared_bytes=256)\n"
    )
    done = _python_under("address", "-c", script, kernel, str(host_library_folder))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert f"in {kernel}" in done.stderr

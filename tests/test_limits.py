"""No limit by shape: sizes at and around every limit of a GPU, a kernel or a library.

The stand-in for CuPy pretends a GPU with little shared memory, so that small matrices are past
its limits; kernel sources are executed on the host (not a GPU run).
"""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cuda import launches, runner
from host_cupy import HostCupy
from host_cupy import kernels as host_kernels
from kernel_cases import built_for_host, needs_compiler, under_schedules
from merge_cases import SHAPES, lists, merged
from stacks import close, stack

from gpu_hodlr import batched
from gpu_hodlr.batched import tall
from gpu_hodlr.devices import to_host

# --- kernels that do without shared memory ---------------------------------------------------


@pytest.fixture(scope="module")
def on_host(host_library_folder) -> dict[str, runner.HostKernels]:
    return built_for_host(host_library_folder)


@needs_compiler
@pytest.mark.parametrize("case", ["full", "low rank", "stopped", "zero"])
@pytest.mark.parametrize(("m", "s"), [(1, 1), (3, 40), (45, 18), (70, 75)])
def test_pivoted_qr_in_global_memory_is_the_one_in_shared_memory(on_host, dtype, case, m, s):
    S = stack(3, m, s, dtype=dtype)
    if case == "low rank":
        S[1] = S[1, :, :1] * S[1, :1]
    if case == "zero":
        S[0] = S[2] = 0
    options = {"max_rank": 9} if case == "stopped" else {}
    kernels = on_host["pivoted_qr"]
    want = launches.pivoted_qr(kernels, S, **options)
    got = under_schedules(launches.pivoted_qr, kernels, S, tall=True, **options)
    for mine, right in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, right)


@needs_compiler
@pytest.mark.parametrize(("m", "k"), [(1, 1), (9, 9), (33, 17), (70, 61), (130, 12)])
def test_full_qr_in_global_memory_is_the_one_in_shared_memory(on_host, dtype, m, k):
    a = stack(3, m, k, dtype=dtype)
    a[1] = 0
    kernels = on_host["householder_qr"]
    want = launches.householder_qr(kernels, a, sharers=2)
    got = under_schedules(launches.householder_qr, kernels, a, sharers=2, tall=True)
    for mine, right in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, right)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_long_lists_are_merged_where_they_are(on_host, dtype, shape):
    arguments = lists(*shape, dtype)
    got = under_schedules(
        launches.merge_smallest, on_host["merge_smallest"], *arguments, long=True
    )
    for mine, right in zip(got, merged(*arguments), strict=True):
        np.testing.assert_array_equal(mine, right)


# --- a GPU with little shared memory ---------------------------------------------------------

LITTLE = 48 * 1024  # bytes of a block: every GPU has as much


@pytest.fixture
def small_gpu(stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch) -> HostCupy:
    """The stand-in with the least shared memory that a GPU has."""
    monkeypatch.setitem(
        stand_in.cupy.cuda.Device.attributes, "MaxSharedMemoryPerBlockOptin", LITTLE
    )
    monkeypatch.setattr(host_kernels, "_MOST_SHARED", LITTLE)
    return stand_in


def longest(names: list[str], stand_in: HostCupy, work: Any) -> list[str]:
    """Names of the kernels among `names` that some work launches, in order."""
    launched: list[str] = []
    original = host_kernels.RawKernel.__call__

    def call(self: Any, *arguments: Any, **options: Any) -> None:
        launched.append(self.name)
        original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_kernels.RawKernel, "__call__", call)
        work()
    return [name for name in launched if any(name.startswith(one) for one in names)]


def rows_that_fit(dtype: Any, steps: int) -> int:
    """Rows up to which pivoted QR keeps its norms in `LITTLE` bytes."""
    item = np.dtype(dtype).itemsize
    return (LITTLE - 8 * (steps + 33) - item * steps) // (2 * item + 4)


@pytest.mark.parametrize("past", [-1, 0, 1, 700])
def test_pivoted_qr_of_many_rows(small_gpu: HostCupy, dtype: Any, past: int):
    s = 5
    m = rows_that_fit(dtype, s) + past
    S = stack(2, m, s, dtype=dtype)
    qr = batched.pivoted_qr(small_gpu.cupy.asarray(S))
    want = batched.pivoted_qr(S)
    np.testing.assert_array_equal(to_host(qr.pivots)[:, :s], want.pivots[:, :s])
    place = np.argsort(want.pivots, axis=1)
    place = np.take_along_axis(place, to_host(qr.pivots), axis=1)
    close(abs(qr.r), abs(np.take_along_axis(want.r, place[:, None], axis=2)), factor=10)
    np.testing.assert_allclose(to_host(qr.tails), want.tails, rtol=1e-3, atol=1e-2)

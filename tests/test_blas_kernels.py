"""The numerical tests and those of many ranks with the kernels OpenBLAS has for other processors.

Each in a process of its own, as OpenBLAS chooses its kernels when it is loaded. The stand-in for
CuPy is left out: what it calls of BLAS is NumPy's all the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg  # noqa: F401  its BLAS must be loaded to be found
from threadpoolctl import threadpool_info

ROOT = Path(__file__).parents[1]
EXPECTED = "GPU_HODLR_TEST_BLAS_KERNELS"  # in a child: those it is to have
THREADS = "GPU_HODLR_TEST_BLAS_THREADS"
NEEDED = {  # of the processor, as Linux names it
    "Haswell": {"avx2", "fma"},
    "Zen": {"avx2", "fma"},
    "SkylakeX": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "Prescott": {"pni"},
}
# OpenBLAS built for a list of processors has the kernels of another one for the rest, and says that
# one's name. Of a name that is none of these the kernels are not what was asked for.
NAMED = {"Zen": {"Zen", "Haswell"}, "Prescott": {"Prescott", "Katmai", "Core2", "Northwood"}}
FEW = ("test_rank_bits.py", "test_distributed.py::test_every_form_is_the_serial_one[3]")
MORE_RANKS = (  # than processors by far, with two threads each: these wait actively
    "test_distributed.py::test_every_form_is_the_serial_one[3]",
    "test_distributed.py::test_orderings_are_the_serial_ones[3]",
    "test_distributed.py::test_a_network_is_the_serial_one",
    "test_shared_ordering.py",
)
MANY = (
    "test_rank_bits.py",
    "test_distributed.py::test_every_form_is_the_serial_one[2]",
    "test_products.py",
    "test_batched.py",
    "test_tall.py",
    "test_factor.py",
    "test_hodlr.py",
    "test_low_rank.py",
    "test_random_matrices.py",
    "test_storage_dtype.py",
    "test_kernels.py::test_pivoted_qr_on_host",
)


def blas() -> list[dict[str, Any]]:
    """NumPy's and SciPy's."""
    return [library for library in threadpool_info() if library["user_api"] == "blas"]


@cache
def kernels_of(core: str) -> tuple[set[str], str]:
    """What OpenBLAS says that its kernels are when asked for these, and all that it prints."""
    done = subprocess.run(
        [sys.executable, "-c",
         "import test_blas_kernels as t; print(*(b['architecture'] for b in t.blas()))"],
        env={**os.environ, "OPENBLAS_CORETYPE": core, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT / "tests",
    )  # fmt: skip
    return set(done.stdout.split()), done.stdout + done.stderr


def start_with(core: str, threads: int, *tests: str) -> None:
    """The tests in a process with these kernels, which must pass; skipped where they cannot run."""
    if {library["internal_api"] for library in blas()} != {"openblas"}:
        pytest.skip("NumPy and SciPy have another BLAS than OpenBLAS")
    cpuinfo = Path("/proc/cpuinfo")
    has = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if missing := NEEDED[core] - has:
        pytest.skip(f"this processor cannot run OpenBLAS's {core}: no {', '.join(sorted(missing))}")
    names, said = kernels_of(core)
    assert names, said
    assert names <= NAMED.get(core, {core}), said
    if core == "Zen" and names == {"Haswell"}:
        pytest.skip("this OpenBLAS has Haswell's kernels for Zen")
    taken = f"{Path(__file__).name}::test_this_process_has_the_kernels_it_was_started_with"
    environment = {
        **os.environ,
        "OPENBLAS_CORETYPE": core,
        EXPECTED: " ".join(names),
        THREADS: str(threads),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-k", "not stand_in", "-m", "",
         "-p", "no:cacheprovider", "--tb=short",
         *(str(ROOT / "tests" / test) for test in (taken, *tests))],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(EXPECTED not in os.environ, reason="run by the tests below, in a child")
def test_this_process_has_the_kernels_it_was_started_with():
    threads = min(int(os.environ[THREADS]), len(os.sched_getaffinity(0)))
    for library in blas():
        assert library["architecture"] in os.environ[EXPECTED].split(), library
        assert library["num_threads"] == threads, library


@pytest.mark.slow
def test_ranks_with_another_processors_kernels():
    """Such as the tests have not run with so far."""
    now = {library.get("architecture") for library in blas()}
    start_with("Prescott" if "Haswell" in now else "Haswell", 1, *FEW)


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("core", NEEDED)
def test_with_the_kernels_of(core: str, threads: int):
    start_with(core, threads, *MANY, *(MORE_RANKS if threads == 1 else ()))

"""Functions of test modules, run by several ranks.

    python -m mpi_runs FOLDER MODULE:FUNCTION ...

is what every rank executes: FUNCTION(MPI.COMM_WORLD) of each; the results are pickled into FOLDER.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
# A rank that waits polls, and yields its processor to those that have one: more ranks than
# processors spend two thirds of their time so. Asleep they leave it to the rank they wait for.
YIELD = """
#include <time.h>
extern "C" int sched_yield() {
    const timespec pause{0, 20000};
    return nanosleep(&pause, nullptr);
}
"""


def mpirun() -> str:
    """The program; the test is skipped where there is none."""
    pytest.importorskip("mpi4py")
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("mpirun is not installed: pip install 'gpu-hodlr[mpi-local]'")
    return found


@cache
def waits_asleep() -> dict[str, str]:
    """The environment in which what calls sched_yield sleeps, where a compiler is there."""
    from host_cuda import runner  # ranks need none of it

    if not runner.has_compiler() or "LD_PRELOAD" in os.environ:
        return {}
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    library = str(Path(folder.name) / "waits_asleep.so")
    subprocess.run(
        [runner.COMPILER, "-O1", "-fPIC", "-shared", "-x", "c++", "-", "-o", library],
        input=YIELD, text=True, check=True,
    )  # fmt: skip
    return {"LD_PRELOAD": library}


def launch(
    ranks: int, *arguments: str, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """mpirun -n ranks python arguments; all of it is killed after `timeout` seconds."""
    paths = os.pathsep.join([str(TESTS), *sys.path])
    if os.environ.get("OPENBLAS_NUM_THREADS", "1") != "1":
        timeout *= 4  # BLAS's threads and the ranks wait actively, for the same processors
    process = subprocess.Popen(
        [mpirun(), "-n", str(ranks), sys.executable, "-W", "error", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, **waits_asleep(), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths,
             **environment},
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{ranks} ranks were still running after {timeout} s:\n{out}\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def on_ranks(ranks: int, function: Callable[[Any], Any], timeout: float = 60) -> list[Any]:
    """What a function of a test module gives on every rank."""
    return one_after_another(ranks, [function], timeout)[function]


def one_after_another(
    ranks: int, functions: Sequence[Callable[[Any], Any]], timeout: float = 60
) -> dict[Callable[[Any], Any], list[Any]]:
    """What each gives on every rank, in one start of mpirun: a second of every rank, and MPI's."""
    names = [f"{function.__module__}:{function.__name__}" for function in functions]
    with tempfile.TemporaryDirectory() as folder:
        done = launch(ranks, "-m", "mpi_runs", folder, *names, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        every = [
            pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(ranks)
        ]
    return dict(zip(functions, map(list, zip(*every, strict=True)), strict=True))


def main(folder: str, *names: str) -> None:
    from mpi4py import MPI

    warnings.simplefilter("error")
    comm, results = MPI.COMM_WORLD, []
    for name in names:
        module, _, function = name.partition(":")
        results.append(getattr(importlib.import_module(module), function)(comm))
    (Path(folder) / f"{comm.Get_rank()}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])

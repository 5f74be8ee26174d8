"""Functions of test modules, run by several ranks.

    python -m mpi_runs MODULE FUNCTION FOLDER

is what every rank executes: FUNCTION(MPI.COMM_WORLD), whose result is pickled into FOLDER.
"""

from __future__ import annotations

import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent


def mpirun() -> str:
    """The program; the test is skipped where there is none."""
    pytest.importorskip("mpi4py")
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("mpirun is not installed: pip install 'gpu-hodlr[mpi-local]'")
    return found


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
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
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
    with tempfile.TemporaryDirectory() as folder:
        done = launch(
            ranks, "-m", "mpi_runs", function.__module__, function.__name__, folder, timeout=timeout
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [
            pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(ranks)
        ]


def main(module: str, function: str, folder: str) -> None:
    from mpi4py import MPI

    warnings.simplefilter("error")
    comm = MPI.COMM_WORLD
    result = getattr(importlib.import_module(module), function)(comm)
    (Path(folder) / f"{comm.Get_rank()}.pickle").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

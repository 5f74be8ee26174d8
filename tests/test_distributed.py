"""Many ranks against one: mpirun is started with 1 to 4 of them."""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import distributed_cases as cases
import distributed_storage
import numpy as np
import pytest
from marks import but_slow
from mpi_runs import launch, on_ranks, one_after_another

import gpu_hodlr as gh
from gpu_hodlr import errors
from gpu_hodlr.distributed import OneRank, communicator, cuda_aware
from gpu_hodlr.distributed.deal import Deal

RANKS = (1, 2, 3, 4)
FUNCTIONS: dict[Callable[[Any], Any], tuple[int, ...]] = {  # on how many ranks each is run
    cases.communication: RANKS,
    cases.agreement: (1, 3),
    cases.unsendable: (2,),
    cases.orderings: (2, 3),
    cases.counted: (2, 3, 4),
    cases.refusals: (1, 3),
    distributed_storage.every_case: (1, 3),
}


@cache
def results(ranks: int) -> dict[Callable[[Any], Any], list[Any]]:
    """Of all of them, every rank's, of one start: who fails is in what mpirun prints."""
    functions = [function for function, numbers in FUNCTIONS.items() if ranks in numbers]
    return one_after_another(ranks, functions, timeout=100)


# --- communicators -----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", FUNCTIONS[cases.communication])
def test_communication(ranks: int):
    cases.check_counts(results(ranks)[cases.communication])


@pytest.mark.parametrize("ranks", FUNCTIONS[cases.agreement])
def test_agreement(ranks: int):
    assert results(ranks)[cases.agreement] == [None] * ranks


def test_an_exception_that_cannot_be_sent():
    assert results(2)[cases.unsendable] == [None] * 2


def test_what_is_no_communicator():
    assert isinstance(communicator(), OneRank)
    for wrong in ("world", 3, object()):
        with pytest.raises(errors.DtypeError, match="mpi4py"):
            communicator(wrong)
    with pytest.raises(errors.DtypeError, match="comm"):
        gh.compress(np.eye(50), comm=2)


def test_errors_can_be_sent():
    """Every public exception comes back from pickle as it was."""
    for name in dir(errors):
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, errors.GpuHodlrError):
            more = (0.5, 1e-3) if kind is errors.NotPositiveDefiniteError else ()
            again = pickle.loads(pickle.dumps(kind("said", *more)))
            assert type(again) is kind
            assert str(again) == "said"
            assert not more or (again.damping, again.rtol) == more


@pytest.mark.parametrize("value", ["0", "1"])
def test_cuda_awareness_by_override(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cuda_aware.OVERRIDE, value)
    assert cuda_aware.cuda_aware("Open MPI v5")[0] == (value == "1")
    monkeypatch.setenv(cuda_aware.OVERRIDE, "yes")
    with pytest.raises(errors.ArgumentError, match="0 or 1, got 'yes'"):
        cuda_aware.cuda_aware("")


@pytest.mark.parametrize(
    ("version", "variable"),
    [
        ("MPICH Version: 4.2", "MPIR_CVAR_ENABLE_GPU"),
        ("MPI VERSION : CRAY MPICH version 8", "MPICH_GPU_SUPPORT_ENABLED"),
        ("MVAPICH2 Version : 2.3", "MV2_USE_CUDA"),
    ],
)
def test_cuda_awareness_by_the_mpis_own_switch(
    version: str, variable: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cuda_aware, "_asked", lambda: None)
    for name in (cuda_aware.OVERRIDE, variable):
        monkeypatch.delenv(name, raising=False)
    assert not cuda_aware.cuda_aware(version)[0]
    monkeypatch.setenv(variable, "1")
    assert cuda_aware.cuda_aware(version) == (True, f"{variable}=1")
    assert not cuda_aware.cuda_aware("another MPI")[0]
    for said in (True, False):  # what the MPI says counts more
        monkeypatch.setattr(cuda_aware, "_asked", lambda said=said: said)
        assert cuda_aware.cuda_aware(version) == (said, "MPIX_Query_cuda_support")


def test_what_the_ranks_run_on_is_printed():
    done = launch(2, "-m", "gpu_hodlr.distributed")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(" on ")[0] for line in lines] == ["rank 0 of 2", "rank 1 of 2"]
    assert all("CUDA-aware: no" in line for line in lines)


# --- failure -----------------------------------------------------------------------------------

WAIT = """
import sys
from mpi4py import MPI
import numpy as np
import gpu_hodlr as gh
from gpu_hodlr.distributed import communicator
ranks = communicator(MPI.COMM_WORLD)
if ranks.rank == 1:
    {act}
ranks.alike(0)
"""


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("raise ValueError('the disk of this rank is full')", "the disk of this rank is full"),
        ("gh.load('nowhere.npz')", "nowhere.npz"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ""),
    ],
)
def test_one_rank_that_fails_ends_all(act: str, said: str):
    start = time.monotonic()
    done = launch(3, "-c", WAIT.format(act=act), timeout=40)
    assert done.returncode != 0
    assert time.monotonic() - start < 30  # a watchdog, not a timing: it would wait for ever
    assert said in done.stderr
    if said:
        assert "rank 1 of 3 failed" in done.stderr


KILLED = """
import os, signal, sys
from mpi4py import MPI
import gpu_hodlr as gh
from matrix_cases import toeplitz
comm = MPI.COMM_WORLD
options = dict(rtol=1e-6, leaf_size=20, comm=comm)
gh.compress(toeplitz(200), **options).save(sys.argv[1])
other = gh.compress(2 * toeplitz(200), **options)
if comm.rank == int(sys.argv[2]):
    os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
other.save(sys.argv[1])
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_leaves_the_older_file_whole(rank: int, tmp_path: Path):
    done = launch(2, "-c", KILLED, str(tmp_path / "m.npz"), str(rank), timeout=40)
    assert done.returncode != 0
    serial = gh.compress(cases.toeplitz(200), rtol=1e-6, leaf_size=20)
    np.testing.assert_allclose(
        gh.load(tmp_path / "m.npz").to_dense(), serial.to_dense(), rtol=0, atol=1e-12
    )


# --- matrices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", but_slow(RANKS, 3, 4))
def test_every_form_is_the_serial_one(ranks: int):
    for rank in on_ranks(ranks, cases.forms, timeout=100):
        assert rank == set(cases.CASES if ranks in (2, 3) else cases.FEW)


@pytest.mark.parametrize("ranks", FUNCTIONS[cases.orderings])
def test_orderings_are_the_serial_ones(ranks: int):
    assert results(ranks)[cases.orderings] == [None] * ranks


def test_a_network_is_the_serial_one():
    pytest.importorskip("torch")
    on_ranks(2, cases.network)


@pytest.mark.parametrize("ranks", FUNCTIONS[cases.counted])
def test_bytes_sent_and_kept(ranks: int):
    every = results(ranks)[cases.counted]
    sent = sum(seen["sent"] for seen in every)
    bound = 4 * every[0]["rank"] * every[0]["columns"] * 8 * ranks * math.log2(ranks)
    assert 0 < sent <= bound
    for seen in every:
        assert seen["messages"] == Deal(6, ranks).cut  # one a level from the cut up
        assert seen["rows"] == pytest.approx(1 / ranks, rel=0.26)
        assert seen["memory"] <= 1.25 * seen["rows"] + 0.05
        assert seen["factor"] <= 1.25 * seen["rows"] + 0.05


@pytest.mark.parametrize("ranks", FUNCTIONS[cases.refusals])
def test_refusals(ranks: int):
    assert results(ranks)[cases.refusals] == [None] * ranks


@pytest.mark.parametrize("ranks", FUNCTIONS[distributed_storage.every_case])
def test_files(ranks: int):
    assert all(all(rank.values()) for rank in results(ranks)[distributed_storage.every_case])


def test_import_starts_no_mpi(tmp_path: Path):
    done = launch(1, "-c", "import sys, gpu_hodlr.distributed; assert 'mpi4py' not in sys.modules")
    assert done.returncode == 0, done.stderr
    assert os.environ.get("PMI_RANK") is None

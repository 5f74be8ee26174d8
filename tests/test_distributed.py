"""Many ranks against one: mpirun is started with 1 to 4 of them."""

from __future__ import annotations

import math
import os
import pickle
import time
from pathlib import Path
from typing import Any

import distributed_cases as cases
import distributed_storage
import numpy as np
import pytest
from mpi_runs import launch, on_ranks

import gpu_hodlr as gh
from gpu_hodlr import errors
from gpu_hodlr.distributed import Halo, OneRank, Ownership, communicator, cuda_aware
from gpu_hodlr.distributed.ownership import cut_level, shares

RANKS = (1, 2, 3, 4)


# --- communicators -----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS)
def test_communication(ranks: int):
    every = on_ranks(ranks, cases.communication)
    assert len({seen["bits"] for seen in every}) == 1
    for rank, seen in enumerate(every):
        assert seen["inner"] == 24 * (ranks - 1)
        assert seen["outer"] == (8 * sum(p for p in range(ranks) if p != rank))


@pytest.mark.parametrize("ranks", [1, 3])
def test_agreement(ranks: int):
    on_ranks(ranks, cases.agreement)


def test_an_exception_that_cannot_be_sent():
    on_ranks(2, cases.unsendable)


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
ranks.barrier()
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
    assert time.monotonic() - start < 20  # a watchdog, not a timing: it would wait for ever
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


# --- ownership ---------------------------------------------------------------------------------


class Ranks(OneRank):
    """A rank of many that never sends."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def leaves(depth: int, m: int = 3) -> Any:
    """A tree's leaves in random order, some with padding."""
    rng = np.random.default_rng(depth)
    n = (1 << depth) * m - (1 << depth) // 2
    out = np.full((1 << depth, m), -1)
    real = np.ones(out.shape, bool)
    real[::2, -1] = False
    out[real] = rng.permutation(n)
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 13])
@pytest.mark.parametrize("depth", [4, 6])
def test_every_node_below_the_cut_has_one_owner(size: int, depth: int):
    tree = leaves(depth)
    owners = [Ownership(Ranks(rank, size), tree) for rank in range(size)]
    cut, above = owners[0].cut, []
    for level in range(depth + 1):
        parts = [np.arange(1 << level)[o.mine(level)] for o in owners]
        if level < cut:
            assert all(len(part) == 1 << level for part in parts)
            continue
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(1 << level))
        assert [len(part) for part in parts] == owners[0].counts(level)
        assert min(map(len, parts)) >= 1
        if level > cut:  # children belong to who has the parent
            for part, parents in zip(parts, above, strict=True):
                np.testing.assert_array_equal(np.unique(part // 2), parents)
        above = parts
    rows = owners[0].rows.of if size > 1 else [np.arange(owners[0].n)]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(owners[0].n))
    most = max(owners[0].counts(cut))
    assert most * size <= 1.25 * (1 << cut) or cut == depth


def test_more_ranks_than_leaves_are_refused():
    with pytest.raises(errors.ArgumentError, match="8 leaves cannot be spread over 9 ranks"):
        cut_level(3, 9)
    assert [cut_level(5, p) for p in (1, 2, 3, 4, 5, 6, 8)] == [0, 1, 3, 2, 3, 4, 3]


def test_a_rank_without_rows_is_refused():
    tree = np.array([[0], [1], [2], [-1]])
    with pytest.raises(errors.ArgumentError, match="no rows of 3"):
        Ownership(Ranks(0, 4), tree)


@pytest.mark.parametrize(("total", "ranks"), [(10, 3), (2, 4), (0, 2), (7, 1)])
def test_shares(total: int, ranks: int):
    parts = shares(total, ranks)
    assert len(parts) == ranks
    assert [i for part in parts for i in range(total)[part]] == list(range(total))
    assert max(p.stop - p.start for p in parts) - min(p.stop - p.start for p in parts) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_halos_cover_every_pair_on_both_sides(size: int):
    rng = np.random.default_rng(size)
    pairs = np.unique(np.sort(rng.integers(0, 32, (80, 2)), axis=1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    owners = [Ownership(Ranks(rank, size), leaves(5)) for rank in range(size)]
    halos = [Halo(o, pairs, 5) for o in owners]
    stacks = [np.arange(32)[o.mine(5)] for o in owners]
    sides = 0
    for rank, halo in enumerate(halos):
        if size == 1:
            np.testing.assert_array_equal(halo.pairs, pairs)
            continue
        received = [
            stacks[p][halos[p]._sent[rank]] for p in range(size)
        ]  # what the others would send
        assert [len(part) for part in received] == halo._counts
        extended = np.concatenate([stacks[rank], *received])
        np.testing.assert_array_equal(extended[halo.pairs], pairs[halo.chosen])
        sides += int((halo.pairs < len(stacks[rank])).sum())
    assert size == 1 or sides == pairs.size


# --- matrices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS)
def test_every_form_is_the_serial_one(ranks: int):
    for rank in on_ranks(ranks, cases.forms, timeout=100):
        assert set(rank) == set(cases.CASES if ranks in (2, 3) else cases.FEW)


@pytest.mark.parametrize("ranks", [2, 3])
def test_orderings_are_the_serial_ones(ranks: int):
    on_ranks(ranks, cases.orderings)


def test_a_network_is_the_serial_one():
    pytest.importorskip("torch")
    on_ranks(2, cases.network)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bytes_sent_and_kept(ranks: int):
    every = on_ranks(ranks, cases.counted)
    sent = sum(seen["sent"] for seen in every)
    bound = 4 * every[0]["rank"] * every[0]["columns"] * 8 * ranks * math.log2(ranks)
    assert 0 < sent <= bound
    for seen in every:
        assert seen["messages"] == 1  # what is known of the cut's nodes is gathered, once
        assert seen["rows"] == pytest.approx(1 / ranks, rel=0.26)
        assert seen["memory"] <= 1.25 * seen["rows"] + 0.05
        assert seen["factor"] <= 1.25 * seen["rows"] + (0.2 if ranks == 3 else 0.05)  # 8 nodes' top


@pytest.mark.parametrize("ranks", [1, 3])
def test_refusals(ranks: int):
    on_ranks(ranks, cases.refusals)


@pytest.mark.parametrize("ranks", [1, 3])
def test_files(ranks: int):
    assert all(all(rank.values()) for rank in on_ranks(ranks, distributed_storage.every_case))


def test_import_starts_no_mpi(tmp_path: Path):
    done = launch(1, "-c", "import sys, gpu_hodlr.distributed; assert 'mpi4py' not in sys.modules")
    assert done.returncode == 0, done.stderr
    assert os.environ.get("PMI_RANK") is None

"""Saving and loading a matrix that is spread over MPI ranks; each case is run on all of them."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr.errors import ArgumentError, FileFormatError
from gpu_hodlr.files import writing

N = 300
OPTIONS: dict[str, Any] = {"rtol": 1e-6, "leaf_size": 20, "seed": 3}
V = np.random.default_rng(0).standard_normal((N, 2))


@contextmanager
def folder(comm: Any) -> Iterator[Path]:
    """One for all ranks, gone afterwards."""
    path = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    try:
        yield Path(path)
    finally:
        comm.barrier()
        if comm.rank == 0:
            shutil.rmtree(path)


def compressed(comm: Any = None) -> gh.CompressedMatrix:
    return gh.compress(toeplitz(N), comm=comm, **OPTIONS)


def raised(job: Any) -> BaseException | None:
    try:
        job()
    except Exception as e:
        return e
    return None


def close(y: Any, z: Any, rtol: float = 1e-11) -> bool:
    return bool(np.abs(y - z).max() <= rtol * np.abs(z).max())


def names(path: Path, comm: Any) -> set[str]:
    """What is in a folder when every rank has come here."""
    comm.barrier()
    found = set(os.listdir(path))
    comm.barrier()
    return found


def case_the_same_ranks(comm: Any) -> bool:
    """The same bits, and a matrix that can be factored."""
    K = compressed(comm)
    with folder(comm) as path:
        K.save(path / "m")
        again = gh.load(path / "m", comm=comm)
        files = names(path, comm)
    expected = comm.bcast(K.report)
    arrays = zip(K.structure.arrays(), again.structure.arrays(), strict=True)
    indices = zip(K.structure.index_arrays(), again.structure.index_arrays(), strict=True)
    F, G = (matrix.factorize(1e-2) for matrix in (K, again))
    return (
        all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in (*arrays, *indices))
        and np.array_equal(again @ V, K @ V)
        and (again.report, again.ranks, again.dtype) == (expected, K.ranks, K.dtype)
        and again.num_stored == K.num_stored
        and np.array_equal(F.solve(V), G.solve(V))
        and len(files) == (comm.size + 1 if comm.size > 1 else 1)
    )


def case_other_numbers_of_ranks(comm: Any) -> bool:
    """From 1 to all ranks, which load, multiply, factor, and save for all to load."""
    K, exact = compressed(comm), compressed()
    good = True
    with folder(comm) as path:
        K.save(path / "m")
        for size in range(1, comm.size + 1):
            first = comm.rank < size
            few = comm.Split(first)
            part = gh.load(path / "m", comm=few)
            good &= close(part @ V, exact @ V)
            good &= close(part.factorize(1e-2).solve(V), exact.factorize(1e-2).solve(V), 1e-8)
            part.save(path / f"{first}{size}")
            few.Free()
            comm.barrier()
            for copy in [f"True{size}", f"False{size}"][: 1 + (size < comm.size)]:
                good &= np.array_equal(gh.load(path / copy, comm=comm) @ V, K @ V)
    return good


def case_factors(comm: Any) -> bool:
    """The same bits on as many ranks, and the same factor on fewer."""
    few, good = comm.Split(comm.rank == 0), True
    for scheme, budget in (("hss", 0.0), ("hodlr", 0.0), ("lowrank", 0.0), ("fmm", 0.1)):
        options = {**OPTIONS, "max_rank": N, "budget": budget}
        F = gh.compress(toeplitz(N), scheme, comm=comm, **options).factorize(1e-2)
        with folder(comm) as path:
            F.save(path / "F")
            again = gh.load(path / "F", comm=comm)
            part = gh.load(path / "F", comm=few)
            files = names(path, comm)
        x = F.solve(V)
        good &= np.array_equal(again.solve(V), x) and close(part.solve(V), x, 1e-7)
        good &= again.damping == 1e-2 and type(again) is type(F)
        good &= len(files) == (comm.size + 1 if comm.size > 1 else 1)
        if hasattr(F, "logdet"):
            good &= again.logdet() == F.logdet()
            good &= np.array_equal(again.sample(2, seed=1), F.sample(2, seed=1))
    few.Free()
    return good


def case_different_files(comm: Any) -> bool:
    """Every rank is told when the paths of a save, or the matrices they load, are not the same."""
    K = compressed(comm)
    with folder(comm) as path:
        for name in "ab":
            K.save(path / name)
        before = names(path, comm)
        own = path / ("a" if comm.rank == 0 else "b")
        loading = raised(lambda: gh.load(own, comm=comm))
        saving = raised(lambda: K.save(own))
        unchanged = names(path, comm) == before
    if comm.size == 1:
        return loading is None and saving is None
    return isinstance(loading, ArgumentError) and isinstance(saving, ArgumentError) and unchanged


def case_a_serial_file(comm: Any) -> bool:
    exact = compressed()
    with folder(comm) as path:
        if comm.rank == 0:
            exact.save(path / "m")
        comm.barrier()
        K = gh.load(path / "m", comm=comm)
        K.save(path / "m")
        whole = gh.load(path / "m")
    arrays = zip(whole.structure.arrays(), exact.structure.arrays(), strict=True)
    return (
        close(K @ V, exact @ V)
        and np.array_equal(whole @ V, exact @ V)
        and all(np.array_equal(a, b) for a, b in arrays)
    )


def case_narrow_blocks(comm: Any) -> bool:
    """float32 blocks of a float64 matrix."""
    K = gh.compress(toeplitz(N), storage_dtype="float32", comm=comm, **OPTIONS)
    with folder(comm) as path:
        K.save(path / "m")
        again = gh.load(path / "m", comm=comm)
    types = again.dtype == np.float64 and again.structure.dtype == np.float32
    return types and np.array_equal(again @ V, K @ V)


def case_saving_again(comm: Any) -> bool:
    """The files of the older matrix go."""
    K = compressed(comm)
    with folder(comm) as path:
        K.save(path / "m")
        before = names(path, comm)
        (K if comm.size == 1 else gh.load(path / "m", comm=comm)).save(path / "m")
        after = names(path, comm)
    return len(after) == len(before) and (comm.size == 1 or before & after == {"m"})


def case_one_rank_fails(comm: Any) -> bool:
    """Each in turn, in the middle of its file: the older matrix stays, and nothing else."""
    K, good = compressed(comm), True
    with folder(comm) as path:
        K.save(path / "m")
        before = names(path, comm)
        for rank in range(comm.size):

            def full(f: Any, rank: int = rank, **arrays: Any) -> None:
                f.write(b"PK\x03\x04 half a file")
                raise OSError(28, f"no space left for rank {rank}")

            with mock.patch.object(writing.np, "savez", full if comm.rank == rank else np.savez):
                error = raised(lambda: K.save(path / "m"))
            good &= isinstance(error, OSError) and f"rank {rank}" in str(error)
            good &= names(path, comm) == before
            good &= np.array_equal(gh.load(path / "m", comm=comm) @ V, K @ V)
    return good


def case_the_index_fails(comm: Any) -> bool:
    K = compressed(comm)
    with folder(comm) as path:
        K.save(path / "m")
        before = names(path, comm)
        with mock.patch.object(writing.os, "replace", side_effect=PermissionError("no")):
            error = raised(lambda: K.save(path / "m"))
        unchanged = names(path, comm) == before
        again = gh.load(path / "m", comm=comm)
    return isinstance(error, PermissionError) and unchanged and np.array_equal(again @ V, K @ V)


def case_no_such_folder(comm: Any) -> bool:
    K = compressed(comm)
    with folder(comm) as path:
        error = raised(lambda: K.save(path / "nowhere" / "m"))
        missing = raised(lambda: gh.load(path / "m", comm=comm))
    return isinstance(error, FileNotFoundError) and isinstance(missing, FileNotFoundError)


def case_damaged_parts(comm: Any) -> bool:
    """A rank's file missing, cut off, or of another save: every rank names it."""
    K, good = compressed(comm), True
    with folder(comm) as path:
        for name in ("m", "other"):
            K.save(path / name)
        files = sorted(names(path, comm))
        mine = [name for name in files if name.startswith("m.")]
        others = [name for name in files if name.startswith("other.")]
        for file, other in zip(mine, others, strict=True):
            content = (path / file).read_bytes()
            for damaged in (None, content[:-300], (path / other).read_bytes()):
                comm.barrier()
                if comm.rank == 0 and damaged is None:
                    (path / file).unlink()
                elif comm.rank == 0:
                    (path / file).write_bytes(damaged)
                comm.barrier()
                error = raised(lambda: gh.load(path / "m", comm=comm))
                good &= isinstance(error, FileFormatError) and file in str(error)
            comm.barrier()
            if comm.rank == 0:
                (path / file).write_bytes(content)
            comm.barrier()
            good &= np.array_equal(gh.load(path / "m", comm=comm) @ V, K @ V)
    return good


def case_more_ranks_than_leaves(comm: Any) -> bool:
    """A matrix of one leaf."""
    with folder(comm) as path:
        if comm.rank == 0:
            gh.compress(toeplitz(20), leaf_size=20).save(path / "m")
        comm.barrier()
        error = raised(lambda: gh.load(path / "m", comm=comm))
    return isinstance(error, ArgumentError) if comm.size > 1 else error is None


def every_case(comm: Any) -> dict[str, bool]:
    """All of the above."""
    cases = {name: case for name, case in globals().items() if name.startswith("case_")}
    return {name: case(comm) for name, case in cases.items()}

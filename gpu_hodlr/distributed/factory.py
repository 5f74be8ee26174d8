"""From what a user gives to the ranks that are used."""

from __future__ import annotations

import sys
import time
import traceback
from functools import cache
from types import TracebackType
from typing import Any

from gpu_hodlr.devices import cuda_library, library_of
from gpu_hodlr.distributed.cuda_aware import NCCL, cuda_aware, local_device, switch
from gpu_hodlr.distributed.host_mpi import HostMPI, watched
from gpu_hodlr.distributed.messages import Communicator
from gpu_hodlr.distributed.one_rank import OneRank
from gpu_hodlr.errors import DtypeError

_PATIENCE = 1.0  # seconds


def communicator(comm: Any = None, device: str = "cpu") -> Communicator:
    """The ranks to work with.

    The first time an mpi4py communicator of several ranks is seen it is duplicated, so that our
    messages do not mix with others', and from then on an exception that nothing catches ends all
    ranks. On "cuda" every rank takes the GPU of its number on the node.

    Args:
        comm: None (one rank), an mpi4py communicator, or a Communicator, which is returned.
        device: "cpu" or "cuda", where the arrays are.

    Raises:
        DtypeError: something else.
    """
    if comm is None:
        return OneRank()
    if isinstance(comm, Communicator):
        return comm
    if library_of(comm) != "mpi4py" or not hasattr(comm, "Allgatherv"):
        raise DtypeError(f"comm must be an mpi4py communicator, got {type(comm).__name__}")
    if comm.Get_size() == 1:
        return OneRank()
    known: dict[str, Communicator] | None = comm.Get_attr(_keyval())
    if known is None:
        known = {}
        comm.Set_attr(_keyval(), known)
    if device not in known:
        with watched():
            known[device] = _made(comm.Dup(), device)
    return known[device]


@cache
def _keyval() -> int:
    """Of the attribute by which a communicator remembers what was made of it."""
    from mpi4py import MPI

    _abort_on_exceptions()
    return int(MPI.Comm.Create_keyval())


def _made(comm: Any, device: str) -> Communicator:
    if device != "cuda":
        return HostMPI(comm)
    import cupy
    from mpi4py import MPI

    from gpu_hodlr.distributed.device_mpi import DeviceMPI, NcclCollectives, NcclDeviceMPI

    gpu = local_device(comm)
    cupy.cuda.Device(gpu).use()
    aware = cuda_aware(MPI.Get_library_version())[0]
    if _nccl_can(comm, (MPI.Get_processor_name(), gpu)):
        nccl = cuda_library("nccl")
        name = comm.bcast(nccl.get_unique_id() if comm.Get_rank() == 0 else None)
        ranks = nccl.NcclCommunicator(comm.Get_size(), name, comm.Get_rank())
        return (NcclDeviceMPI if aware else NcclCollectives)(comm, ranks)
    return (DeviceMPI if aware else HostMPI)(comm)


def _nccl_can(comm: Any, gpu: tuple[str, int]) -> bool:
    """Whether NCCL is there and wanted on all ranks, and every rank has a GPU of its own."""
    wanted = switch(NCCL) is not False and _has_nccl()
    every = comm.allgather((wanted, gpu))
    return all(one for one, _ in every) and len({place for _, place in every}) == len(every)


def _has_nccl() -> bool:
    try:
        cuda_library("nccl")
    except ImportError:
        return False
    return True


def _abort_on_exceptions() -> None:
    """An exception that nothing catches ends all ranks: the others would wait for ever."""
    from mpi4py import MPI

    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        world = MPI.COMM_WORLD
        text = "".join(traceback.format_exception(kind, error, trace))
        head = f"rank {world.Get_rank()} of {world.Get_size()} failed, all are ended:\n"
        sys.stderr.write(head + text)
        sys.stderr.flush()
        if before is not sys.__excepthook__:
            before(kind, error, trace)
        sys.stdout.flush()
        time.sleep(_PATIENCE)  # mpirun must have read the message before it is told to end
        world.Abort(1)

    sys.excepthook = hook

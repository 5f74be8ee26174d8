"""From what a user gives to the ranks that are used."""

from __future__ import annotations

import sys
import time
import traceback
from functools import cache
from types import TracebackType
from typing import Any

from gpu_hodlr.devices import cuda_library, library_of
from gpu_hodlr.distributed.cuda_aware import NCCL, cuda_aware, local_device, number_on_node, switch
from gpu_hodlr.distributed.host_mpi import HostMPI, watched
from gpu_hodlr.distributed.messages import Communicator
from gpu_hodlr.distributed.one_rank import OneRank
from gpu_hodlr.errors import DtypeError

_PATIENCE = 1.0  # seconds


def communicator(comm: Any = None, device: str = "cpu") -> Communicator:
    """The ranks to work with.

    The first time an mpi4py communicator of several ranks is seen it is duplicated, so that our
    messages do not mix with others', and from then on an exception that nothing catches ends all
    ranks. On "cuda" every rank takes the GPU of its number on the node; where one has none, all are
    told.

    Args:
        comm: None (one rank), an mpi4py communicator, or a Communicator, which is returned.
        device: "cpu" or "cuda", where the arrays are.

    Raises:
        DtypeError: something else.
        ArgumentError: the device differs between ranks.
        Exception: a rank cannot use its GPU.
    """
    if comm is None:
        return OneRank()
    if isinstance(comm, Communicator):
        return comm
    if library_of(comm) != "mpi4py" or not hasattr(comm, "Allgatherv"):
        raise DtypeError(f"comm must be an mpi4py communicator, got {type(comm).__name__}")
    if comm.Get_size() == 1:
        return OneRank()
    known: dict[bool, Communicator] | None = comm.Get_attr(_keyval())
    if known is None:
        with watched():
            known = {False: HostMPI(comm.Dup())}
        comm.Set_attr(_keyval(), known)
    gpu = device == "cuda"
    host = known[False]
    if not host.alike(gpu):
        host.same(device=device)
    if gpu not in known:
        with watched():
            known[gpu] = _of_gpus(comm.Dup(), host)
    return known[gpu]


@cache
def _keyval() -> int:
    """Of the attribute by which a communicator remembers what was made of it."""
    from mpi4py import MPI

    _abort_on_exceptions()
    return int(MPI.Comm.Create_keyval())


def _of_gpus(comm: Any, host: Communicator) -> Communicator:
    """The ranks with a GPU each, of a communicator of their own.

    Args:
        comm: that.
        host: the same ranks, by which they tell each other what fails.
    """
    number = number_on_node(comm)
    with host.agreed():
        import cupy
        from mpi4py import MPI

        from gpu_hodlr.distributed.device_mpi import DeviceMPI, NcclCollectives, NcclDeviceMPI

        gpu = local_device(number)
        cupy.cuda.Device(gpu).use()
        aware = cuda_aware(MPI.Get_library_version())[0]
        wanted = switch(NCCL) is not False and _has_nccl()
        every = host.share((wanted, aware, (MPI.Get_processor_name(), gpu)))
    aware = all(one for _, one, _ in every)
    if all(one for one, _, _ in every) and len({place for *_, place in every}) == len(every):
        with host.agreed():
            nccl = cuda_library("nccl")
            name = host.bcast(nccl.get_unique_id() if host.rank == 0 else None)
        ranks = nccl.NcclCommunicator(host.size, name, host.rank)
        return (NcclDeviceMPI if aware else NcclCollectives)(comm, ranks)
    return (DeviceMPI if aware else HostMPI)(comm)


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

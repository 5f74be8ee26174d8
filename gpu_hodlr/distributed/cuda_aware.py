"""Whether an MPI takes GPU memory, and which GPU a rank works on."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from gpu_hodlr.errors import ArgumentError

OVERRIDE = "GPU_HODLR_CUDA_AWARE_MPI"
NCCL = "GPU_HODLR_NCCL"
_SWITCHES = {  # of the MPIs that cannot be asked, by what their version says
    "MVAPICH": ("MVP_USE_CUDA", "MV2_USE_CUDA"),
    "CRAY MPICH": ("MPICH_GPU_SUPPORT_ENABLED",),
    "MPICH": ("MPIR_CVAR_ENABLE_GPU", "MPICH_GPU_SUPPORT_ENABLED"),
}


def switch(name: str) -> bool | None:
    """An environment variable that is 0 or 1; None where it is not set.

    Raises:
        ArgumentError: it is something else.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ArgumentError(f"{name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def cuda_aware(version: str) -> tuple[bool, str]:
    """Whether MPI takes GPU memory, and how that is known.

    GPU_HODLR_CUDA_AWARE_MPI says it; else the MPI is asked (MPIX_Query_cuda_support: Open MPI and
    MPICH), and where it cannot be, the environment variable counts that turns it on.

    Args:
        version: `MPI.Get_library_version()`.

    Raises:
        ArgumentError: GPU_HODLR_CUDA_AWARE_MPI is neither 0 nor 1.
    """
    wanted = switch(OVERRIDE)
    if wanted is not None:
        return wanted, f"{OVERRIDE}={int(wanted)}"
    said = _asked()
    if said is not None:
        return said, "MPIX_Query_cuda_support"
    for name, variables in _SWITCHES.items():
        if name in version.upper():
            on = [v for v in variables if os.environ.get(v) == "1"]
            return bool(on), f"{on[0]}=1" if on else f"none of {', '.join(variables)} is 1"
    return False, "an unknown MPI"


def _asked() -> bool | None:
    """What the MPI itself says; None where it cannot be asked."""
    try:
        from mpi4py import MPI

        # The symbols of the library that mpi4py has loaded are not global.
        return bool(ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support())
    except (ImportError, OSError, AttributeError):
        return None


def number_on_node(comm: Any) -> int:
    """The number of a rank among those of its node; all ranks of the mpi4py communicator ask."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    number = int(node.Get_rank())
    node.Free()
    return number


def local_device(number: int) -> int:
    """The GPU of a rank with this number on its node, of as many as the node has."""
    import cupy

    return int(number % cupy.cuda.runtime.getDeviceCount())

"""`mpirun -n P python -m gpu_hodlr.distributed`: what every rank runs on, a line each."""

from __future__ import annotations

import importlib.util

from gpu_hodlr.devices import resolve_device
from gpu_hodlr.distributed.cuda_aware import cuda_aware, local_device, number_on_node
from gpu_hodlr.errors import DeviceError


def main() -> None:
    """Print a line a rank, in order."""
    if importlib.util.find_spec("mpi4py") is None:
        raise SystemExit("mpi4py is not installed: pip install 'gpu-hodlr[mpi]' (or [mpi-local])")
    from mpi4py import MPI

    world, version = MPI.COMM_WORLD, MPI.Get_library_version().splitlines()[0].strip("\x00 ")
    aware, why = cuda_aware(MPI.Get_library_version())
    number = number_on_node(world)
    try:
        resolve_device("cuda")
        gpu = f"GPU {local_device(number)}"
    except DeviceError as e:
        gpu = f"no GPU ({e})"
    line = (
        f"rank {world.Get_rank()} of {world.Get_size()} on {MPI.Get_processor_name()}: {gpu}; "
        f"{version}; CUDA-aware: {'yes' if aware else 'no'} ({why})"
    )
    lines = world.gather(line)
    if lines:
        print("\n".join(lines))


if __name__ == "__main__":
    main()

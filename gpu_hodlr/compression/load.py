"""Reading a compressed matrix or a factor of any scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.compressed import CompressedMatrix
from gpu_hodlr.compressed.report import report_of
from gpu_hodlr.devices import device_kind, resolve_device
from gpu_hodlr.distributed import ALONE, Communicator, communicator
from gpu_hodlr.factor import Solver
from gpu_hodlr.files import storage
from gpu_hodlr.files.archive import damage_named
from gpu_hodlr.files.writing import AnyPath
from gpu_hodlr.schemes import SCHEMES
from gpu_hodlr.structures import Structure

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDevice

_STRUCTURES = {scheme.structure.__name__: scheme.structure for scheme in SCHEMES.values()}
_MATRICES = {scheme.structure: scheme.matrix for scheme in SCHEMES.values()}
_FACTORS = {
    factor.__name__: factor for scheme in SCHEMES.values() for factor in scheme.matrix.factors
}


def load_structure(
    path: AnyPath, comm: Communicator = ALONE.comm
) -> tuple[Structure, dict[str, Any], np.dtype[Any]]:
    """`files.storage.load_structure` of the structures of every scheme."""
    return storage.load_structure(path, _STRUCTURES, comm)


def load(path: AnyPath, device: AnyDevice = "cpu", comm: Any = None) -> CompressedMatrix | Solver:
    """Read a compressed matrix or a factor that its `save` wrote, on any number of ranks.

    A factor is not made again: its arrays are read. Of a solver of an FMM form they are the form
    and its preconditioner, not the `info` of its last solve. On as many ranks as have saved it a
    factor has the same bits; on one rank and on others it is the same to rounding.

    Collective: all ranks call.

    Args:
        path: of the file; files do not depend on the device.
        device: "cpu" or "cuda", or a torch.device: where the matrix or factor is to be.
        comm: an mpi4py communicator: all its ranks call, and what is read is spread over them,
            however many have saved it.

    Raises:
        DeviceError: the device cannot be used.
        FileNotFoundError: there is no such file.
        FileFormatError: not such a file, damaged, or of a newer format version, or so is a rank's
            file that it names.
        ArgumentError: it cannot be spread over so many ranks, or they see different files.
        DtypeError, ArgumentError: no path.

    Example:
        >>> gh.compress(np.eye(4) + 1.0).save("matrix.npz")
        >>> gh.load("matrix.npz").trace()
        8.0
        >>> gh.load("matrix.npz").factorize(damping=1.0).save("factor.npz")
        >>> gh.load("factor.npz").solve(np.full(4, 6.0))
        array([1., 1., 1., 1.])
    """
    return load_with(path, device, comm)[0]


def load_with(
    path: AnyPath, device: AnyDevice, comm: Any
) -> tuple[CompressedMatrix | Solver, Mapping[str, Any]]:
    """See `load`; and what else was saved with a matrix."""
    ranks = communicator(comm, device_kind(device))
    with ranks.agreed():
        device = resolve_device(device)
    saved = storage.load_stored(path, {**_STRUCTURES, **_FACTORS}, ranks, device)
    if isinstance(saved.content, Solver):
        return saved.content, saved.more
    assert isinstance(saved.content, Structure)
    with ranks.agreed():
        with damage_named(path):
            report = report_of(saved.report)
        structure = saved.content.to(device)
    matrix: CompressedMatrix = _MATRICES[type(structure)](
        structure, report, saved.dtype, saved.scale
    )
    return matrix, saved.more

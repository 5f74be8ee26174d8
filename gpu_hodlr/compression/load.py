"""Reading a compressed matrix of any scheme."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from gpu_hodlr.compressed import CompressedMatrix, CompressionReport
from gpu_hodlr.devices import resolve_device
from gpu_hodlr.distributed import ALONE, Communicator, communicator
from gpu_hodlr.files import storage
from gpu_hodlr.files.archive import damage_named
from gpu_hodlr.schemes import SCHEMES
from gpu_hodlr.structures import Structure

_KINDS = {scheme.structure.__name__: scheme.structure for scheme in SCHEMES.values()}
_MATRICES = {scheme.structure: scheme.matrix for scheme in SCHEMES.values()}


def load_structure(
    path: str | os.PathLike[str], comm: Communicator = ALONE.comm
) -> tuple[Structure, dict[str, Any], np.dtype[Any]]:
    """`files.storage.load_structure` of the structures of every scheme."""
    return storage.load_structure(path, _KINDS, comm)


def load(path: str | os.PathLike[str], device: str = "cpu", comm: Any = None) -> CompressedMatrix:
    """Read a compressed matrix that its `save` wrote, on any number of ranks.

    Args:
        path: of the file; files do not depend on the device.
        device: "cpu" or "cuda", where the matrix is to be.
        comm: an mpi4py communicator: all its ranks call, and the matrix is spread over them,
            however many have saved it.

    Raises:
        DeviceError: the device cannot be used.
        FileNotFoundError: there is no such file.
        FileFormatError: not such a file, damaged, or of a newer format version, or so is a rank's
            file that it names.
        ArgumentError: the matrix cannot be spread over so many ranks, or they see different files.

    Example:
        >>> gh.compress(np.eye(4) + 1.0).save("matrix.npz")
        >>> gh.load("matrix.npz").trace()
        8.0
    """
    resolve_device(device)
    ranks = communicator(comm, device)
    structure, said, dtype = load_structure(path, ranks)
    with ranks.agreed():
        with damage_named(path):
            said["capped_levels"] = tuple(said["capped_levels"])
            report = CompressionReport(**said)
        structure = structure.to(device)
    matrix: CompressedMatrix = _MATRICES[type(structure)](structure, report, dtype)
    return matrix

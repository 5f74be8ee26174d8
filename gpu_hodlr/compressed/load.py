"""Reading a compressed matrix of any scheme."""

from __future__ import annotations

import os
from typing import Any

from gpu_hodlr.compressed.base import CompressedMatrix
from gpu_hodlr.compressed.fmm import FMMMatrix
from gpu_hodlr.compressed.hodlr import HODLRMatrix
from gpu_hodlr.compressed.hss import HSSMatrix
from gpu_hodlr.compressed.low_rank import LowRankMatrix
from gpu_hodlr.compressed.report import CompressionReport
from gpu_hodlr.devices import resolve_device
from gpu_hodlr.distributed import communicator
from gpu_hodlr.files.archive import damage_named
from gpu_hodlr.files.storage import load_structure
from gpu_hodlr.structures import HODLR, LowRank, Multipole, Structure, Telescope

_FORMATS: dict[type[Structure], type[CompressedMatrix]] = {
    Telescope: HSSMatrix,
    Multipole: FMMMatrix,
    HODLR: HODLRMatrix,
    LowRank: LowRankMatrix,
}


def matrix_of(
    structure: Structure, report: CompressionReport, dtype: object = None
) -> CompressedMatrix:
    """The compressed matrix that a structure is kept in."""
    return _FORMATS[type(structure)](structure, report, dtype)


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
    """
    resolve_device(device)
    ranks = communicator(comm, device)
    structure, said, dtype = load_structure(path, ranks)
    with ranks.agreed():
        with damage_named(path):
            said["capped_levels"] = tuple(said["capped_levels"])
            report = CompressionReport(**said)
        structure = structure.to(device)
    return matrix_of(structure, report, dtype)

"""Reading a compressed matrix of any scheme."""

from __future__ import annotations

import os

from gpu_hodlr.devices import resolve_device
from gpu_hodlr.formats.base import CompressedMatrix
from gpu_hodlr.formats.fmm import FMMMatrix
from gpu_hodlr.formats.hodlr import HODLRMatrix
from gpu_hodlr.formats.hss import HSSMatrix
from gpu_hodlr.formats.low_rank import LowRankMatrix
from gpu_hodlr.formats.report import CompressionReport
from gpu_hodlr.formats.storage import load_structure
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


def load(path: str | os.PathLike[str], device: str = "cpu") -> CompressedMatrix:
    """Read a compressed matrix that its `save` wrote.

    Args:
        path: of the file; files do not depend on the device.
        device: "cpu" or "cuda", where the matrix is to be.

    Raises:
        DeviceError: the device cannot be used.
        FileNotFoundError: there is no such file.
        FileFormatError: not such a file, damaged, or of a newer format version.
    """
    resolve_device(device)
    structure, report, dtype = load_structure(path)
    return matrix_of(structure.to(device), report, dtype)

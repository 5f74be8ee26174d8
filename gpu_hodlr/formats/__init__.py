"""Compressed matrices."""

from gpu_hodlr.formats.base import CompressedMatrix
from gpu_hodlr.formats.fmm import FMMMatrix
from gpu_hodlr.formats.hodlr import HODLRMatrix
from gpu_hodlr.formats.hss import HSSMatrix
from gpu_hodlr.formats.load import load, matrix_of
from gpu_hodlr.formats.low_rank import LowRankMatrix
from gpu_hodlr.formats.report import CompressionReport

__all__ = [
    "CompressedMatrix",
    "CompressionReport",
    "FMMMatrix",
    "HODLRMatrix",
    "HSSMatrix",
    "LowRankMatrix",
    "load",
    "matrix_of",
]

"""Compressed matrices."""

from gpu_hodlr.compressed.base import CompressedMatrix
from gpu_hodlr.compressed.fmm import FMMMatrix
from gpu_hodlr.compressed.hodlr import HODLRMatrix
from gpu_hodlr.compressed.hss import HSSMatrix
from gpu_hodlr.compressed.low_rank import LowRankMatrix
from gpu_hodlr.compressed.report import CompressionReport
from gpu_hodlr.compressed.structured import StructuredMatrix

__all__ = [
    "CompressedMatrix",
    "CompressionReport",
    "FMMMatrix",
    "HODLRMatrix",
    "HSSMatrix",
    "LowRankMatrix",
    "StructuredMatrix",
]

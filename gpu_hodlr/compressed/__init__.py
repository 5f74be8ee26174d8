"""Compressed matrices."""

from gpu_hodlr.compressed.fmm_matrix import FMMMatrix
from gpu_hodlr.compressed.hodlr_matrix import HODLRMatrix
from gpu_hodlr.compressed.hss_matrix import HSSMatrix
from gpu_hodlr.compressed.kfe_matrix import KFEMatrix
from gpu_hodlr.compressed.low_rank_matrix import LowRankMatrix
from gpu_hodlr.compressed.matrix import CompressedMatrix
from gpu_hodlr.compressed.report import CompressionReport
from gpu_hodlr.compressed.structured import StructuredMatrix

__all__ = [
    "CompressedMatrix",
    "CompressionReport",
    "FMMMatrix",
    "HODLRMatrix",
    "HSSMatrix",
    "KFEMatrix",
    "LowRankMatrix",
    "StructuredMatrix",
]

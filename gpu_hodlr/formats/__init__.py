"""Compressed matrices."""

from gpu_hodlr.formats.hss import HSSMatrix, load
from gpu_hodlr.formats.report import CompressionReport

__all__ = ["CompressionReport", "HSSMatrix", "load"]

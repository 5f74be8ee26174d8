"""From an operator, or from a file, to a compressed matrix."""

from gpu_hodlr.compression.compress import compress
from gpu_hodlr.compression.load import load

__all__ = ["compress", "load"]

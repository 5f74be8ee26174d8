"""From an operator to a compressed matrix."""

from gpu_hodlr.compression.compress import compress

__all__ = ["compress"]

"""From an operator to a compressed matrix."""

from gpu_hodlr.compress.compress import compress

__all__ = ["compress"]

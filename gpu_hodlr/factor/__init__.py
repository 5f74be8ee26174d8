"""Factorizations of compressed matrices."""

from gpu_hodlr.factor.ulv import IndefiniteError, ULVCholesky

__all__ = ["IndefiniteError", "ULVCholesky"]

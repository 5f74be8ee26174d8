"""Factorizations of compressed matrices."""

from gpu_hodlr.factor.multipole_solver import MultipoleSolver
from gpu_hodlr.factor.ulv import IndefiniteError, ULVCholesky

__all__ = ["IndefiniteError", "MultipoleSolver", "ULVCholesky"]

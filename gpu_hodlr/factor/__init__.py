"""Factorizations of compressed matrices."""

from gpu_hodlr.factor.cholesky import CholeskyFactor, IndefiniteError
from gpu_hodlr.factor.hodlr_cholesky import HODLRCholesky
from gpu_hodlr.factor.multipole_solver import MultipoleSolver
from gpu_hodlr.factor.ulv import ULVCholesky

__all__ = ["CholeskyFactor", "HODLRCholesky", "IndefiniteError", "MultipoleSolver", "ULVCholesky"]

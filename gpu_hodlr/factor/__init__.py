"""Factors of structures plus damping, and the solver of a structure that has none."""

from gpu_hodlr.factor.eigenbasis_factor import KFEFactor
from gpu_hodlr.factor.hodlr_cholesky import HODLRCholesky
from gpu_hodlr.factor.multipole_solver import MultipoleSolver
from gpu_hodlr.factor.refined import (
    RefinedFactor,
    RefinedHODLR,
    RefinedULV,
    RefinedWoodbury,
)
from gpu_hodlr.factor.solver import IndefiniteError, Solver, SymmetricFactor
from gpu_hodlr.factor.ulv import ULVCholesky
from gpu_hodlr.factor.woodbury import Woodbury

__all__ = [
    "HODLRCholesky",
    "IndefiniteError",
    "KFEFactor",
    "MultipoleSolver",
    "RefinedFactor",
    "RefinedHODLR",
    "RefinedULV",
    "RefinedWoodbury",
    "Solver",
    "SymmetricFactor",
    "ULVCholesky",
    "Woodbury",
]

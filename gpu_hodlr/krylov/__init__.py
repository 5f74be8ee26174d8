"""Krylov methods on anything that multiplies: conjugate gradients, minimal residuals, Lanczos."""

from gpu_hodlr.krylov.eigenvalues import eigsh
from gpu_hodlr.krylov.gradients import cg, conjugate_gradients
from gpu_hodlr.krylov.lanczos import extreme_eigenvalues
from gpu_hodlr.krylov.problem import CGInfo, Matrix, matrix_on, on_all
from gpu_hodlr.krylov.residuals import minimal_residuals, minres

__all__ = [
    "CGInfo",
    "Matrix",
    "cg",
    "conjugate_gradients",
    "eigsh",
    "extreme_eigenvalues",
    "matrix_on",
    "minimal_residuals",
    "minres",
    "on_all",
]

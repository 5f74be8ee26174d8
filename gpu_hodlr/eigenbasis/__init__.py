"""A network's matrix in the Kronecker-factored eigenbasis of its layers: the basis, and entries."""

from gpu_hodlr.eigenbasis.energies import Energies, energies
from gpu_hodlr.eigenbasis.khatri_rao import rotated, rotated_units
from gpu_hodlr.eigenbasis.kronecker import KroneckerBasis, LayerBasis
from gpu_hodlr.eigenbasis.root import LayerShape, rotated_root
from gpu_hodlr.eigenbasis.rotated import Rotated, Strip

__all__ = [
    "Energies",
    "KroneckerBasis",
    "LayerBasis",
    "LayerShape",
    "Rotated",
    "Strip",
    "energies",
    "rotated",
    "rotated_root",
    "rotated_units",
]

"""A network's matrix in the Kronecker-factored eigenbasis of its layers: the basis, and entries."""

from gpu_hodlr.eigenbasis.energies import Energies, energies
from gpu_hodlr.eigenbasis.kronecker import KroneckerBasis, LayerBasis
from gpu_hodlr.eigenbasis.rotated import Rotated, Strip, rotated

__all__ = ["Energies", "KroneckerBasis", "LayerBasis", "Rotated", "Strip", "energies", "rotated"]

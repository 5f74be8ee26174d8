"""The matrix that is sparse in a network's Kronecker-factored eigenbasis."""

from __future__ import annotations

from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.factor import KFEFactor
from gpu_hodlr.structures import RotatedSparse


class KFEMatrix(StructuredMatrix):
    """A symmetric matrix K~ = Q (D + S + S^T) Q^T, sparse in the Kronecker-factored eigenbasis.

    Made by `gpu_hodlr.compress` with scheme "kfe" of a network's matrix; see `StructuredMatrix` for
    its attributes. The tree is a single leaf.
    """

    factors = (KFEFactor,)
    structure: RotatedSparse

    def _factor(self, structure: RotatedSparse, damping: float) -> KFEFactor:
        return KFEFactor(structure, damping)

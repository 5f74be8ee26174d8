"""The matrix that is sparse in a network's Kronecker-factored eigenbasis."""

from __future__ import annotations

from typing import Any

from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.errors import InexactError
from gpu_hodlr.structures import RotatedSparse


class KFEMatrix(StructuredMatrix):
    """A symmetric matrix K~ = Q (D + S + S^T) Q^T, sparse in the Kronecker-factored eigenbasis.

    Made by `gpu_hodlr.compress` with scheme "kfe" of a network's matrix; see `StructuredMatrix` for
    its attributes. The tree is a single leaf.
    """

    structure: RotatedSparse

    def _factor(self, structure: RotatedSparse, damping: float) -> Any:
        raise InexactError("not yet")

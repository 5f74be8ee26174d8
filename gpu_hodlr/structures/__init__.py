"""Rank-structured symmetric matrices as plain stacks of arrays: what is stored, and its product."""

from gpu_hodlr.structures.hodlr_blocks import HODLR
from gpu_hodlr.structures.low_rank import LowRank
from gpu_hodlr.structures.multipole import Multipole
from gpu_hodlr.structures.nested import Level, NestedBases
from gpu_hodlr.structures.rotated_sparse import RotatedSparse
from gpu_hodlr.structures.structure import Structure
from gpu_hodlr.structures.telescope import Telescope

__all__ = [
    "HODLR",
    "Level",
    "LowRank",
    "Multipole",
    "NestedBases",
    "RotatedSparse",
    "Structure",
    "Telescope",
]

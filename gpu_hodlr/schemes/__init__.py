"""One scheme a file: what it needs, how much it will store, how its structure is made.

A new scheme is files of its own (structure, factor, matrix, and one here) and a line in `SCHEMES`.
"""

from gpu_hodlr.schemes import fmm, hodlr, hss, kfe, lowrank
from gpu_hodlr.schemes.job import Build, Job
from gpu_hodlr.schemes.lowrank import few_rows
from gpu_hodlr.schemes.prediction import BlockSampler
from gpu_hodlr.schemes.scheme import Sampling, Scheme, Sizes

SCHEMES = {scheme.name: scheme for scheme in (m.SCHEME for m in (hss, fmm, hodlr, lowrank, kfe))}

__all__ = ["SCHEMES", "BlockSampler", "Build", "Job", "Sampling", "Scheme", "Sizes", "few_rows"]

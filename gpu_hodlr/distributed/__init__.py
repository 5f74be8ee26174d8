"""Everything that is sent between ranks, and which rank has what."""

from gpu_hodlr.distributed.base import Communicator
from gpu_hodlr.distributed.factory import communicator
from gpu_hodlr.distributed.halo import Halo
from gpu_hodlr.distributed.one_rank import OneRank
from gpu_hodlr.distributed.ownership import ALONE, Ownership, shares
from gpu_hodlr.distributed.rows import Rows
from gpu_hodlr.distributed.siblings import Siblings

__all__ = [
    "ALONE",
    "Communicator",
    "Halo",
    "OneRank",
    "Ownership",
    "Rows",
    "Siblings",
    "communicator",
    "shares",
]

"""Everything that is sent between ranks, and which rank has what."""

from gpu_hodlr.distributed.bisection_layout import BisectionLayout
from gpu_hodlr.distributed.deal import Deal
from gpu_hodlr.distributed.factory import communicator
from gpu_hodlr.distributed.halo import Halo
from gpu_hodlr.distributed.messages import Communicator
from gpu_hodlr.distributed.one_rank import OneRank
from gpu_hodlr.distributed.ordered_sum import OrderedSum
from gpu_hodlr.distributed.ownership import ALONE, Ownership, shares
from gpu_hodlr.distributed.rows import Rows
from gpu_hodlr.distributed.siblings import Siblings
from gpu_hodlr.distributed.transfers import Transfers, each_rank, joined

__all__ = [
    "ALONE",
    "BisectionLayout",
    "Communicator",
    "Deal",
    "Halo",
    "OneRank",
    "OrderedSum",
    "Ownership",
    "Rows",
    "Siblings",
    "Transfers",
    "communicator",
    "each_rank",
    "joined",
    "shares",
]

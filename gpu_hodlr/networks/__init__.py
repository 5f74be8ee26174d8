"""Networks of torch: their losses, and the curvature matrices of what they compute."""

from gpu_hodlr.networks.khatri_rao import GGNOperator

__all__ = ["GGNOperator"]

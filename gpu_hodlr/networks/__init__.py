"""Networks of torch: their losses, and the curvature matrices of what they compute."""

from gpu_hodlr.networks.fisher import FisherOperator
from gpu_hodlr.networks.ggn import GGNOperator
from gpu_hodlr.networks.hessian import HessianOperator
from gpu_hodlr.networks.sample_gradients import SampleGradients

__all__ = ["FisherOperator", "GGNOperator", "HessianOperator", "SampleGradients"]

"""Losses as sums over samples: values, Hessians in the outputs, their roots, drawn gradients."""

from gpu_hodlr.networks.losses.cross_entropy import CrossEntropy
from gpu_hodlr.networks.losses.elementwise import Elementwise
from gpu_hodlr.networks.losses.loss import Loss, Targets
from gpu_hodlr.networks.losses.read import LOSSES, read_loss

__all__ = ["LOSSES", "CrossEntropy", "Elementwise", "Loss", "Targets", "read_loss"]

"""Pruning of networks: which weights, or units, cost least, and what the others make good."""

from gpu_hodlr.applications.pruning.surgery import Pruning, prune

__all__ = ["Pruning", "prune"]

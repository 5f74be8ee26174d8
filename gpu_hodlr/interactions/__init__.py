"""Who is beside whom: neighbours, near leaves, and the far pairs of every level."""

from gpu_hodlr.interactions.lists import InteractionLists, interaction_lists, partners
from gpu_hodlr.interactions.neighbours import Neighbours, nearest_neighbours, nearest_points
from gpu_hodlr.interactions.votes import check_budget, leaf_votes, least_budget, near_leaves

__all__ = [
    "InteractionLists",
    "Neighbours",
    "check_budget",
    "interaction_lists",
    "leaf_votes",
    "least_budget",
    "near_leaves",
    "nearest_neighbours",
    "nearest_points",
    "partners",
]

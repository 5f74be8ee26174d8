"""Orderings: from a matrix to a cluster tree whose off-diagonal blocks have low rank."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.operators import Operator, SketchColumns
from gpu_hodlr.ordering.auto import cheapest
from gpu_hodlr.ordering.metric import Metric, metric_permutation
from gpu_hodlr.ordering.natural import natural_tree
from gpu_hodlr.ordering.points import geometric_permutation
from gpu_hodlr.tree import ClusterTree, balanced_offsets, num_leaves

__all__ = ["ORDERINGS", "build_tree", "check_ordering"]

ORDERINGS = ("natural", "gram", "angle", "geometric", "random", "auto")


def build_tree(
    operator: Operator,
    ordering: str,
    leaf_size: int,
    seed: int,
    tolerance: float,
    sketch: SketchColumns | None = None,
    comm: Communicator = ALONE.comm,
) -> tuple[ClusterTree, str]:
    """The cluster tree of a matrix.

    natural: the matrix's own order, leaves aligned with its runs (a layer's units). gram, angle:
    recursive bisection by the distances |phi_i - phi_j|^2 = K_ii + K_jj - 2 K_ij and
    1 - K_ij^2 / (K_ii K_jj), K = Phi^T Phi (Yu, Levitt, Reiz, Biros, SC17, section 2.1; there
    orthogonal columns are near, here they are far); of a K that may be indefinite those of K^2,
    whose phi_i are the columns of K, from 32 products. geometric: k-d tree of the points. random: a
    random permutation. auto: geometric where there are points, else the one of natural, gram and
    angle with the lowest ranks on a few leaves.

    Args:
        operator: the matrix.
        ordering: one of ORDERINGS.
        leaf_size: rows a leaf, see `tree.num_leaves`; natural leaves may be 25 % larger.
        seed: of every random choice.
        tolerance: absolute Frobenius error the compression aims at (used by auto).
        sketch: of the matrix, if there is one (used by auto).
        comm: the ranks; they share the work and get the same tree.

    Returns:
        The tree and the name of the ordering used.

    Raises:
        ArgumentError: an unknown ordering, or one this matrix has no data for.
    """
    with comm.agreed():
        return _tree(operator, ordering, leaf_size, seed, tolerance, sketch, comm)


def _tree(
    operator: Operator,
    ordering: str,
    leaf_size: int,
    seed: int,
    tolerance: float,
    sketch: SketchColumns | None,
    comm: Communicator,
) -> tuple[ClusterTree, str]:
    """See `build_tree`."""
    check_ordering(operator, ordering)
    names = _candidates(operator, leaf_size) if ordering == "auto" else (ordering,)
    trees = _trees(operator, names, num_leaves(operator.shape[0], leaf_size), seed, comm)
    if len(names) == 1:
        return trees[names[0]], names[0]
    best = cheapest(operator, trees, seed, tolerance, sketch, comm)
    return trees[best], best


def check_ordering(operator: Operator, ordering: str) -> None:
    """Refuse an ordering before any work.

    Raises:
        ArgumentError: it is unknown, or this matrix has no data for it.
    """
    if ordering not in ORDERINGS:
        raise ArgumentError(f"ordering must be one of {', '.join(ORDERINGS)}, got {ordering!r}")
    if ordering == "geometric" and operator.points is None:
        raise ArgumentError(
            "ordering 'geometric' needs points: use a KernelOperator, or FunctionOperator(points=)"
        )
    if ordering in ("gram", "angle") and not (operator.definite or operator.has_products):
        raise ArgumentError(
            f"ordering {ordering!r} takes K for inner products, or of a K that declares definite = "
            f"False products for them: {type(operator).__name__} has none"
        )


def _candidates(operator: Operator, leaf_size: int) -> tuple[str, ...]:
    if operator.points is not None:
        return ("geometric",)
    known = operator.definite or operator.has_products
    if operator.has_entries and known and operator.shape[0] > leaf_size:
        return ("natural", "gram", "angle")
    return ("natural",)


def _trees(
    operator: Operator, names: tuple[str, ...], parts: int, seed: int, comm: Communicator
) -> dict[str, ClusterTree]:
    """One tree a name."""
    n = operator.shape[0]
    metric = Metric(operator, seed, comm=comm) if {"gram", "angle"} & set(names) else None
    trees = {}
    for name in names:
        if name == "natural":
            trees[name] = natural_tree(operator.runs(), parts)
            continue
        if name == "random":
            permutation = np.random.default_rng(seed).permutation(n)
        elif metric is None:
            points = operator.coordinates
            assert points is not None
            permutation = geometric_permutation(points, parts, comm)
        else:
            permutation = metric_permutation(metric, name, parts, seed, comm)
        trees[name] = ClusterTree.from_permutation(permutation, balanced_offsets(n, parts))
    return trees

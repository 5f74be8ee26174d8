"""What every scheme is given to build its structure, and what it must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from gpu_hodlr.devices import to_host
from gpu_hodlr.distributed import Ownership
from gpu_hodlr.once import once
from gpu_hodlr.operators import Operator, SketchRows
from gpu_hodlr.schemes.near_field import NearField, near_field
from gpu_hodlr.schemes.rotated_ranks import RotatedRanks
from gpu_hodlr.structures import Structure
from gpu_hodlr.tree import ClusterTree

_SEARCHED = ("near_field", "rotated")  # made once


@dataclass(frozen=True)
class Job:
    """A matrix to compress.

    Attributes:
        operator: the matrix.
        tree: its cluster tree.
        owners: which rank has what of the tree.
        ordering: the one the tree was made by.
        sketch: products with random columns; None where only entries are to be used.
        entries: whether entries may be asked for.
        columns: of a sample, at first and at most.
        max_rank: cap of the rank.
        budget: share of N^2 for a near field.
        seed: of every random choice.
        tail: "diagonal" where that of what is left out is to be kept, else "none".
        grows: asked before a sketch gets more columns, (columns now, columns then).
    """

    operator: Operator
    tree: ClusterTree
    owners: Ownership
    ordering: str
    sketch: SketchRows | None
    entries: bool
    columns: tuple[int, int]
    max_rank: int
    budget: float
    seed: int
    tail: str = "none"
    grows: Callable[[int, int], None] | None = None

    def having(self, **changes: Any) -> Job:
        """The same with other attributes, such as another cap; what was searched stays."""
        other = replace(self, **changes)
        searched = {name: vars(self)[name] for name in _SEARCHED if name in vars(self)}
        vars(other).update(searched)
        return other

    @property
    def points(self) -> Any:
        """(N, d) coordinates of the rows, a host array of float64; None where there are none."""
        points = self.operator.coordinates
        if points is None:
            return None
        return to_host(points).astype(np.float64, copy=False)  # their sums are centers of nodes

    @once
    def near_field(self) -> NearField:
        """Who is near whom; searched once, at its first use."""
        return near_field(
            self.operator, self.tree, self.ordering, self.budget, self.seed, self.owners.comm
        )

    @once
    def rotated(self) -> RotatedRanks:
        """K in a network's eigenbasis; formed once."""
        return RotatedRanks(self.operator, self.max_rank, self.seed, self.owners)


class Build(Protocol):
    """One scheme at work on a job; what is drawn and searched once serves every run."""

    @property
    def num_samples(self) -> int:
        """Columns of the sample at the end."""

    @property
    def neighbour_recall(self) -> float | None:
        """Of a search for neighbours; None where there was none."""

    def run(self, tolerance: float, first: bool) -> tuple[Structure, tuple[int, ...]]:
        """A structure, and the levels (root = 0) that `max_rank` stopped short.

        Args:
            tolerance: absolute Frobenius error aimed at.
            first: whether it is the first run.
        """

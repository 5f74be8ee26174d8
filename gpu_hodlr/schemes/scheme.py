"""What a scheme is: one kind of compressed matrix, and how it is made of an operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from gpu_hodlr.compressed import StructuredMatrix
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.operators import Operator
from gpu_hodlr.schemes.job import Build, Job
from gpu_hodlr.schemes.prediction import BlockSampler
from gpu_hodlr.structures import Structure


class Sampling(Enum):
    """What is read of an operator."""

    PRODUCTS_AND_ENTRIES = "products+entries"
    ENTRIES = "entries"
    PRODUCTS = "products"

    @property
    def products(self) -> bool:
        """Whether products are made."""
        return self is not Sampling.ENTRIES

    @property
    def entries(self) -> bool:
        """Whether entries are asked for."""
        return self is not Sampling.PRODUCTS


# Of rtol, aimed at by nested bases: interpolation from both sides amplifies their errors, by about
# two (measured on networks and point kernels); columns show an error less surely than Gaussians.
_NESTED_AIM = {
    Sampling.PRODUCTS_AND_ENTRIES: 0.5,
    Sampling.PRODUCTS: 0.5,
    Sampling.ENTRIES: 0.4,
}


@dataclass(frozen=True)
class Sizes:
    """What the memory of a compression follows.

    Attributes:
        n: N.
        leaf: rows of a leaf.
        columns: of a sample.
        budget: share of N^2 for a near field.
        max_rank: cap of the rank.
        sampling: what is read.
        twice: whether a basis is multiplied by after the random columns.
        few_rows: whether K = A^T A is decomposed by A A^T.
    """

    n: int
    leaf: float
    columns: int
    budget: float
    max_rank: int
    sampling: Sampling
    twice: bool = False
    few_rows: bool = False

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return round(math.log2(self.n / self.leaf))

    @property
    def typical_rank(self) -> int:
        """Of a block, where nothing is known: a fifth of the columns, as is usual."""
        return min(self.columns // 5, self.max_rank)


@dataclass(frozen=True)
class Scheme:
    """One kind of compressed matrix.

    Attributes:
        name: what `compress` calls it.
        structure: what is stored.
        matrix: what the structure is kept in.
        build: makes a structure of a job.
        predict: storage / N^2 from sampled blocks, for an absolute error; None out of reach.
        memory: numbers in memory at the peak, for each of the N rows, within a factor of 1.5 where
            samples have the columns said; measured.
        aim: share of rtol that is aimed at; None: what nested bases need.
        accepted: times rtol: beyond it another pass with a tighter tolerance is made.
        promised: times rtol: beyond it the user is warned, where max_rank was not hit.
        needs_entries: whether there is no way without.
        products_only: whether products are all that is used.
        near_field: whether it has dense blocks off the diagonal, as many as `budget` allows.
        has_tail: whether it can keep the diagonal of what it leaves out.
        whole: whether K is one block, for which an ordering does nothing.
        needs_eigenbasis: whether K must be a network's; random columns are not drawn for it.
        cheap_without_entries: whether "auto" tries it first where there are products alone; others
            only if no cheap one keeps rtol.
    """

    name: str
    structure: type[Structure]
    matrix: type[StructuredMatrix]
    build: Callable[[Job], Build]
    predict: Callable[[BlockSampler, float], float | None]
    memory: Callable[[Sizes], float]
    aim: float | None = None
    accepted: float = 2.0
    promised: float = 3.0
    needs_entries: bool = False
    products_only: bool = False
    near_field: bool = False
    has_tail: bool = False
    whole: bool = False
    cheap_without_entries: bool = False
    needs_eigenbasis: bool = False

    def keeps(self, error: float, capped: bool, rtol: float) -> bool:
        """Whether an error is what was promised, so that the user need not be warned."""
        return error <= (rtol if capped else self.promised * rtol)

    def share(self, sampling: Sampling) -> float:
        """Of rtol, what is aimed at."""
        return _NESTED_AIM[sampling] if self.aim is None else self.aim

    def check(self, operator: Operator, sampling: Sampling, sampler: str) -> Sampling:
        """How the scheme samples an operator that would be sampled so.

        Args:
            operator: the matrix.
            sampling: what suits the operator.
            sampler: what the user asked for.

        Raises:
            ArgumentError: it cannot.
        """
        if self.needs_entries and not sampling.entries:
            raise ArgumentError(
                f"scheme {self.name!r} needs entries, with sampler 'products' there are none"
            )
        if self.needs_eigenbasis and not operator.has_eigenbasis:
            raise ArgumentError(
                f"scheme {self.name!r} needs the Kronecker-factored eigenbasis of a network, "
                "which a GGNOperator or FisherOperator has with entries='khatri-rao' (of Linear "
                f"layers) or 'root'; {operator.said} has none: take another scheme"
            )
        if not self.products_only:
            return sampling
        if sampler == Sampling.ENTRIES.value or not operator.has_products:
            raise ArgumentError(f"scheme {self.name!r} needs products, there are none to use")
        return Sampling.PRODUCTS

    def considered(self, job: Job) -> bool:
        """Whether "auto" considers it."""
        if self.needs_eigenbasis:
            return job.operator.has_eigenbasis
        if not job.entries:
            return not self.needs_entries
        return (job.budget > 0 or not self.near_field) and (
            job.operator.has_products or not self.products_only
        )

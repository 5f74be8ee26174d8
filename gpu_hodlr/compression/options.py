"""What the user asks of a compression, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.arrays import check_dtype
from gpu_hodlr.bases import FIRST_COLUMNS, samples_for
from gpu_hodlr.batched.stored import FLOAT32, WIDTHS
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.compression import spectral
from gpu_hodlr.compression.probe import EVERY_ROW, LEAST_ROWS, MOST_ROWS, VECTORS
from gpu_hodlr.compression.tolerance import DEFAULT_RTOL
from gpu_hodlr.distributed import Communicator
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.interactions import check_budget
from gpu_hodlr.operators import Operator
from gpu_hodlr.ordering import check_ordering
from gpu_hodlr.schemes import SCHEMES, Sampling

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDevice, AnyDtype

NAMES = (*SCHEMES, "auto")
SAMPLERS = ("auto", *(sampling.value for sampling in Sampling))
TAILS = ("none", "diagonal")
CAP = 256  # of the rank, by default
_FLOAT32_RTOL = 1e-4  # from which on float32 is enough for a compression
_AFFORDABLE = 1e12  # operations of all products together: seconds on any machine
_CHEAP = 1e9  # operations to measure the spectral error: under a second
_ASKED = 30.0  # times as many, where a damping was given


def _size(dtype: np.dtype[Any]) -> int:
    return dtype.itemsize


@dataclass(frozen=True)
class Options:
    """The arguments of `compress`, see there.

    Attributes:
        may_raise: whether `max_rank` may be more for what "auto" finds within reach.
    """

    scheme: str
    rtol: float | None
    atol: float | None
    damping: float | None
    max_rank: int
    leaf_size: int
    ordering: str
    budget: float
    seed: int
    dtype: AnyDtype | None
    storage_dtype: AnyDtype | None
    device: AnyDevice | None
    sampler: str
    tail: str = "none"
    may_raise: bool = False

    def same(self, ranks: Communicator) -> None:
        """Refuse options that differ between ranks.

        Raises:
            ArgumentError: on every rank; names the argument.
        """
        ranks.same(**vars(self))

    def check(self, operator: Operator) -> None:
        """Refuse options that cannot be used for an operator.

        Raises:
            ArgumentError, DtypeError: names the argument.
        """
        if self.scheme not in NAMES:
            raise ArgumentError(f"scheme must be one of {', '.join(NAMES)}, got {self.scheme!r}")
        for name in ("rtol", "atol"):
            if getattr(self, name) is not None:
                check_number(getattr(self, name), name)
        if self.damping is not None:
            check_number(self.damping, "damping", positive=True)
        check_count(self.max_rank, "max_rank")
        check_count(self.leaf_size, "leaf_size")
        check_count(self.seed, "seed", least=0)
        check_ordering(operator, self.ordering)
        if self.sampler not in SAMPLERS:
            raise ArgumentError(
                f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}"
            )
        for what, has in (
            ("products", operator.has_products), ("entries", operator.has_entries),
        ):  # fmt: skip
            if what in self.sampler and not has:
                raise ArgumentError(
                    f"sampler {self.sampler!r} needs {what}; this operator has none"
                )
        takes_budget = self.scheme == "auto" or SCHEMES[self.scheme].near_field
        if check_budget(self.budget) > 0 and not takes_budget:
            raise ArgumentError(
                f"budget is for scheme 'fmm', got {self.budget} with scheme {self.scheme!r}"
            )

        self._check_tail(operator)

    def _check_tail(self, operator: Operator) -> None:
        """See `check`."""
        if self.tail not in TAILS:
            raise ArgumentError(f"tail must be one of {', '.join(TAILS)}, got {self.tail!r}")
        if self.tail == "none":
            return
        if self.scheme != "auto" and not SCHEMES[self.scheme].has_tail:
            raise ArgumentError(
                f"tail is for scheme 'lowrank', got {self.tail!r} with scheme {self.scheme!r}"
            )
        if not operator.has_diagonal and operator.shape[0] > EVERY_ROW:
            raise ArgumentError(
                f"tail 'diagonal' needs the diagonal of K, which {type(operator).__name__} gives "
                f"by {operator.shape[0]} products alone: write _diagonal or _block, or give "
                "FunctionOperator(diagonal=)"
            )

    def dtypes(self, operator: Operator) -> tuple[np.dtype[Any], np.dtype[Any], str]:
        """Of the matrix, of what it stores, and what its far field is kept in.

        Raises:
            DtypeError: not float32 or float64, nor of a far field bfloat16 or tfloat32.
            ArgumentError: the stored one is wider; there is no far field.
        """
        wanted = operator.dtype if self.dtype is None else check_dtype(self.dtype, "dtype")
        if self.storage_dtype is None:
            return wanted, wanted, wanted.name
        kind = str(self.storage_dtype).removeprefix("torch.")
        if kind in WIDTHS:
            if self.scheme in SCHEMES and SCHEMES[self.scheme].needs_eigenbasis:
                raise ArgumentError(
                    f"storage_dtype {kind} is for blocks of a far field, which scheme "
                    f"{self.scheme!r} has not: take float32"
                )
            return wanted, FLOAT32, kind
        stored = check_dtype(self.storage_dtype, "storage_dtype")
        if stored.itemsize > wanted.itemsize:
            raise ArgumentError(f"storage_dtype {stored} is wider than the matrix's dtype {wanted}")
        return wanted, stored, stored.name

    def working(self, operator: Operator) -> np.dtype[Any]:
        """Of samples and bases while a matrix is compressed, and measured in the operator's own.

        float32 where no more is stored and rtol has room for its rounding.
        """
        stored = self.dtypes(operator)[1]
        by_rtol = self.atol is None and self.damping is None
        rtol = DEFAULT_RTOL if self.rtol is None else self.rtol
        names = tuple(SCHEMES) if self.scheme == "auto" else (self.scheme,)
        rotated = operator.has_eigenbasis and any(SCHEMES[x].needs_eigenbasis for x in names)
        enough = by_rtol and rtol >= _FLOAT32_RTOL and not rotated
        return min(stored, operator.dtype, key=_size) if enough else operator.dtype

    def sampling(self, operator: Operator) -> Sampling:
        """What is read of the operator.

        Products miss nothing: taken unless they cost very much, or 100 times the entries.

        Raises:
            ArgumentError: the scheme cannot do with it.
        """
        found = self._cheapest(operator)
        return (
            found
            if self.scheme == "auto"
            else SCHEMES[self.scheme].check(operator, found, self.sampler)
        )

    def _cheapest(self, operator: Operator) -> Sampling:
        if self.sampler != "auto":
            return Sampling(self.sampler)
        if not operator.has_entries:
            return Sampling.PRODUCTS
        if operator.points is None and self.products_affordable(operator):
            return Sampling.PRODUCTS_AND_ENTRIES
        return Sampling.ENTRIES

    @property
    def error_asked(self) -> bool:
        """Whether there is an error to be kept that no damping alone came to."""
        return self.damping is None or self.rtol is not None or self.atol is not None

    @property
    def sketched(self) -> bool:
        """Whether products with random columns are of use to the ordering and what is built.

        One block needs no ordering, and draws its own.
        """
        if self.scheme == "auto":
            return True
        scheme = SCHEMES[self.scheme]
        return not (scheme.needs_eigenbasis or scheme.whole)

    def products_affordable(self, operator: Operator, columns: int | None = None) -> bool:
        """Whether products with so many vectors, a whole sample by default, may be made.

        Not where they cost very much, and 100 times the entries that a compression reads; of
        point kernels, whose products are made of all entries, as much as those.
        """
        if not operator.has_products:
            return False
        n = operator.shape[0]
        most = samples_for(min(self.max_rank, n))
        by_entries = n * (self.leaf_size + 3.0 * most) * operator.entry_cost
        limit = by_entries if operator.points is not None else max(_AFFORDABLE, 100 * by_entries)
        return (most if columns is None else columns) * operator.product_cost <= limit

    def measured_by_products(self, operator: Operator, sampling: Sampling) -> bool:
        """Whether errors are measured with products: wherever they are made or affordable."""
        return sampling.products or self.products_affordable(operator, VECTORS)

    def probe_rows(self, columns: int) -> int:
        """Rows that errors are measured with where there are only entries.

        Half as many entries as a compression reads that begins with so many columns.
        """
        half = (int(self.leaf_size) + 3 * columns) // 2
        return min(max(LEAST_ROWS, half), MOST_ROWS)

    def spectral_by_products(self, operator: Operator, sampling: Sampling) -> bool:
        """Whether the spectral error is measured with products.

        Where they are made anyhow; else where they cost no more than a compression that reads
        entries, or seconds of it where a damping depends on it.
        """
        if sampling.products or self.sampler != "auto":
            return sampling.products
        n = operator.shape[0]
        read = n * (self.leaf_size + 3.0 * samples_for(min(self.max_rank, n)))
        entries = operator.points is not None or not operator.has_products
        limit = read * operator.entry_cost
        if operator.has_products:
            limit = max(limit, _CHEAP)
        if self.damping is not None:
            limit *= _ASKED
        one = n * n * operator.entry_cost if entries else spectral.COLUMNS * operator.product_cost
        return spectral.PRODUCTS * one <= limit

    def sample_sizes(self, n: int) -> tuple[int, int]:
        """Columns at first and at most."""
        limit = samples_for(min(self.max_rank, max(1, n // 2)))
        return min(FIRST_COLUMNS, limit), limit

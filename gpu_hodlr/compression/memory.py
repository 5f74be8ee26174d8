"""Memory that a compression will need, compared with what is free before it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gpu_hodlr.compression.options import Options
from gpu_hodlr.compression.probe import columns_at_once
from gpu_hodlr.devices import check_memory, free_bytes
from gpu_hodlr.distributed import Communicator
from gpu_hodlr.operators import Operator
from gpu_hodlr.schemes import SCHEMES, Sampling, Scheme, Sizes, few_rows

_STRIPS = 1 << 25  # entries that a product made of all entries holds at a time
_COPIES = 1  # of them: they are formed in the cache
_ORDERING = 5.5e6  # numbers in which "auto" compares orderings, whatever N
_MEASURED = 5  # copies of the columns that rows are compared in


def needed(
    operator: Operator, options: Options, scheme: Scheme, sampling: Sampling, columns: int
) -> int:
    """Bytes at the peak of building a scheme, samples having so many columns.

    What the user's own functions need for themselves is not known.
    """
    n = operator.shape[0]
    leaf = n / (1 << max(0, -(-n // int(options.leaf_size)) - 1).bit_length())
    used = Sampling.PRODUCTS if scheme.products_only else sampling
    twice = not operator.definite or options.tail != "none"
    sizes = Sizes(
        n, leaf, columns, options.budget, int(options.max_rank), used, twice,
        few_rows=few_rows(operator, int(options.max_rank)) is not None,
    )  # fmt: skip
    rows = scheme.memory(sizes)
    if not options.measured_by_products(operator, sampling):
        rows = max(rows, leaf + _MEASURED * columns_at_once(n, options.probe_rows(columns)))
    total = max(n * rows, _ORDERING if options.ordering == "auto" and not scheme.whole else 0)
    if used.products and operator.product_cost >= operator.entry_cost * n**2 > 0:
        total += _COPIES * min(n**2, _STRIPS)
    return int(total) * options.working(operator).itemsize


def check(
    operator: Operator, options: Options, sampling: Sampling, columns: int, ranks: int
) -> None:
    """Refuse a compression that will not fit, before any work; with "auto", if no scheme does.

    Raises:
        MemoryEstimateError: more is needed than is free.
    """
    every = [SCHEMES[options.scheme]] if options.scheme in SCHEMES else [
        scheme for scheme in SCHEMES.values()
        if operator.has_eigenbasis or not scheme.needs_eigenbasis
    ]  # fmt: skip
    least = min(needed(operator, options, scheme, sampling, columns) for scheme in every)
    _compare(operator, options, least // ranks)


def largest_cap(
    operator: Operator, options: Options, scheme: Scheme, sampling: Sampling, ranks: Communicator
) -> int:
    """The cap of the rank doubled while it is at most N / 8, and there is memory for its samples.

    The same on every rank. A global low-rank form of so many columns would store no less.
    """
    cap, free = options.max_rank, free_bytes(operator.device)
    while not scheme.whole and 16 * cap <= operator.shape[0]:
        raised = replace(options, max_rank=2 * cap)
        columns = raised.sample_sizes(operator.shape[0])[1]
        if needed(operator, raised, scheme, sampling, columns) // ranks.size > free:
            break
        cap *= 2
    return min(ranks.share(cap))


def growth(
    operator: Operator, options: Options, scheme: Scheme, sampling: Sampling, ranks: int
) -> Callable[[int, int], None]:
    """(columns now, columns then) -> `check` of what a longer sketch needs more."""

    def grows(now: int, then: int) -> None:
        more = needed(operator, options, scheme, sampling, then)
        more -= needed(operator, options, scheme, sampling, now)
        _compare(operator, options, more // ranks)

    return grows


def _compare(operator: Operator, options: Options, total: int) -> None:
    near = "budget, " if options.budget > 0 else ""
    check_memory(
        total,
        f"compressing a matrix of order {operator.shape[0]}",
        f"{near}leaf_size, or use dtype float32",
        operator.device,
    )

"""What the commands that compare the schemes share: options, the near field's budget, rows."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from gpu_hodlr.cli.measure import Preset, Result
from gpu_hodlr.cli.options import list_of, non_negative, positive
from gpu_hodlr.cli.summary import fixed, scientific
from gpu_hodlr.compression.options import NAMES
from gpu_hodlr.interactions import check_budget, least_budget
from gpu_hodlr.operators import Operator
from gpu_hodlr.schemes import SCHEMES, Sampling
from gpu_hodlr.tree import num_leaves

OF_NETWORKS = tuple(name for name, scheme in SCHEMES.items() if scheme.needs_eigenbasis)
COMPARED = tuple(name for name in SCHEMES if name not in OF_NETWORKS)  # "auto" is one of them


def add_scheme_options(
    parser: argparse.ArgumentParser,
    default: Preset,
    max_rank: str | None = None,
    leaf_size: str | None = None,
    networks: bool = False,
) -> None:
    """Add --scheme, --max-rank, --leaf-size and --budget.

    Args:
        parser: of the sub-command.
        default: where the options' defaults stand.
        max_rank: what its default is where that depends on something; the option is None then.
        leaf_size: the same.
        networks: whether the matrix may be a network's; the default of --scheme is None then, see
            `compared`.
    """
    names = NAMES if networks else (*COMPARED, "auto")
    usual = ",".join(COMPARED) + (f"; of a network {','.join(OF_NETWORKS)} too" if networks else "")
    parser.add_argument(
        "--scheme",
        type=list_of(names),
        default=None if networks else list(COMPARED),
        metavar="NAMES",
        help=f"separated by commas, of {', '.join(names)} (default {usual})",
    )
    parser.add_argument(
        "--max-rank",
        type=positive,
        default=None if max_rank else default.max_rank,
        metavar="RANK",
        help=f"largest rank of a block (default {max_rank or default.max_rank})",
    )
    parser.add_argument(
        "--leaf-size",
        type=positive,
        default=None if leaf_size else default.leaf_size,
        metavar="ROWS",
        help=f"rows of a dense diagonal block (default {leaf_size or default.leaf_size})",
    )
    parser.add_argument(
        "--budget",
        type=non_negative,
        metavar="SHARE",
        help="share of N^2 that the near field of fmm, and of auto if it takes fmm, may have"
        f" (default {default.budget:g}, or the least useful one if that is more)",
    )


def compared(asked: list[str] | None, op: Operator) -> list[str]:
    """The schemes that were asked for, else all that the matrix can be compressed in but "auto".

    Raises:
        ArgumentError: the matrix cannot be compressed in one that was asked for.
    """
    if asked is None:
        return [*COMPARED, *(OF_NETWORKS if op.has_eigenbasis else ())]
    for name in asked:
        if name != "auto":
            SCHEMES[name].check(op, Sampling.PRODUCTS_AND_ENTRIES, "auto")
    return asked


def near_budget(scheme: str, asked: float | None, usual: float, n: int, leaf_size: int) -> float:
    """The near field's budget: what was asked for, else the usual one or the least useful.

    Raises:
        ArgumentError: no near field can have the budget that was asked for.
    """
    if scheme not in ("fmm", "auto"):
        return 0.0
    leaves = num_leaves(n, leaf_size)
    return max(usual, least_budget(leaves)) if asked is None else check_budget(asked, leaves)


def near_budgets(
    schemes: Iterable[str], asked: float | None, usual: float, n: int, leaf_size: int
) -> dict[str, float]:
    """The budget of every scheme: what is wrong with one is said before any work."""
    return {s: near_budget(s, asked, usual, n, leaf_size) for s in schemes}


def row_of(scheme: str, result: Result) -> dict[str, str]:
    """The cells of a row that say how a compression went, by the scheme that was asked for."""
    spent = result.compress_cpu_seconds if result.device == "cpu" else result.compress_seconds
    return {
        "scheme": f"AUTO {result.scheme}" if scheme == "auto" else result.scheme,
        "N": f"{result.size:,}",
        "%K": f"{100 * result.storage_fraction:.3g}",
        "error": scientific(result.error),
        "rank": str(max(result.ranks, default=0)),
        "Comp s": fixed(spent, 2),
        "note": "cap" if result.rank_cap_hit else "",
    }


def notes_of(what: str, result: Result) -> list[str]:
    """Lines with all that is to be said of a result."""
    said = [*([result.choice] if result.choice else []), *result.notes]
    return [f"note: {what}: {line}" for line in said]

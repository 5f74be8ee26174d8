"""How results are written: numbers, text tables, rows that come one by one, JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANKS = "largest rank a level, leaves first"
LEFT = ("matrix", "scheme", "prior", "inputs", "note", RANKS)  # columns set flush left
ONLY_DRAWN = ("leaf_sizes", "block_ranks", "far_pairs", "near_pairs", "density")  # of a Result


def scientific(value: float | None) -> str:
    """Two digits and a short exponent: 2.7e-2."""
    if value is None or not math.isfinite(value) or value == 0:
        return "-" if value is None else f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def fixed(value: float | None, digits: int) -> str:
    """So many digits after the point."""
    return "-" if value is None else f"{value:.{digits}f}"


def iterations(count: int | None, maxiter: int) -> str:
    """A number of CG iterations, or that it is more than the limit."""
    if maxiter == 0:
        return ""
    return f">{maxiter}" if count is None else str(count)


@dataclass(frozen=True)
class Columns:
    """A text table whose rows can be printed before the next is known.

    Attributes:
        widths: of the columns, by name.
    """

    widths: Mapping[str, int]

    @property
    def header(self) -> str:
        """The names of the columns."""
        return self.line({name: name for name in self.widths})

    def line(self, row: Mapping[str, str]) -> str:
        """A row; cells that are not there are empty, and a longer one moves the rest."""
        cells = (
            row.get(name, "").ljust(width) if name in LEFT else row.get(name, "").rjust(width)
            for name, width in self.widths.items()
        )
        return "  ".join(cells).rstrip()


def align(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a text table; columns empty in every row are left out."""
    columns = [name for name in columns if any(row.get(name) for row in rows)]
    table = Columns(
        {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in columns}
    )
    body = [table.line(row) for row in rows]
    return "\n".join([table.header, "-" * max(map(len, [table.header, *body])), *body])


def write_json(
    path: Path, args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], **more: object
) -> None:
    """The options and all results, unrounded; a number that is not finite becomes null."""
    options = {k: v for k, v in vars(args).items() if k != "run"}
    kept = [{k: v for k, v in row.items() if k not in ONLY_DRAWN} for row in rows]
    document = _plain({"options": options, "results": kept} | more)
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    """A value as JSON can hold it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

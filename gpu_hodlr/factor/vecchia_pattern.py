"""How large a sparse inverse factor is to be, and which rows condition on which."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_hodlr.devices import Array, HostArray, HostIndex, namespace
from gpu_hodlr.factor.vecchia_entries import Triples

_SHORT = 1 << 16  # columns that 16 bits are enough for
_WORK = 3e10  # operations of the head, and of all other rows: some ten seconds of a core
_HEAD_SHARE = 0.45  # of the entries; from 0.3 to 0.6 CG takes about as many iterations
_LOW_RANK_SHARE = 0.25  # of the numbers, where not all is kept; up to 0.5 it matters little


@dataclass(frozen=True)
class Pattern:
    """What a sparse inverse factor may take, and what of its pattern is given.

    Attributes:
        numbers: stored at most, where the pattern is not given; an index counts by its bytes, of 8
            that are a number.
        neighbours: of a row, at most; None: as many as fit.
        head: rows that condition on each other; None: what has a fixed share of the entries.
        whole: whether all of a low-rank part is kept, whatever it takes.
    """

    numbers: int
    neighbours: int | None = None
    head: int | None = None
    whole: bool = True

    def kept(self, C: HostArray, M: int) -> NDArray[np.bool_]:
        """Which columns (r,) of the low-rank part are, as Woodbury's formula has them.

        Those of positive C alone can be.
        """
        room = len(C) if self.whole else int(_LOW_RANK_SHARE * self.numbers) // max(M, 1)
        kept = np.zeros(len(C), bool)
        kept[np.argsort(-C, kind="stable")[:room]] = True
        return kept & (C > 0)

    def entries(self, M: int, rank: int) -> int:
        """How many entries there is room for beside a low-rank part of a rank."""
        index = np.dtype(index_type(M)).itemsize / 8
        return max(int((self.numbers - (rank + 0.5) * M) / (1 + index)), 0)

    def head_of(self, M: int, entries: int) -> int:
        """Rows of the head, the rows of all M whose triangle has its share of the entries."""
        if self.head is not None:
            return min(self.head, M)
        fits = math.isqrt(int(2 * _HEAD_SHARE * entries))
        return min(fits, int((1.5 * _WORK) ** (1 / 3)), M)

    def neighbours_of(self, counts: HostIndex, entries: int) -> int:
        """The most neighbours of a row.

        Args:
            counts: how many every row behind the head could have.
            entries: that all rows behind the head may have, themselves counted.
        """
        if self.neighbours is not None:
            return self.neighbours
        having = np.cumsum(np.bincount(counts)[::-1])[::-1][1:]  # rows with 1, 2, ... neighbours
        m = np.arange(1, len(having) + 1.0)
        taken = len(counts) + np.cumsum(having)
        work = np.cumsum(having * ((m + 1) ** 3 - m**3)) / 3
        return int(np.count_nonzero((taken <= entries) & (work <= _WORK)))


def index_type(M: int) -> Any:
    """Of the columns of M."""
    return np.uint16 if M <= _SHORT else np.int32


def neighbours(batches: Iterable[Triples], most: int) -> tuple[Array, Array]:
    """The strongest of every row: places of the row and of its neighbour, by row.

    Args:
        batches: see `Entries.correlations`.
        most: of a row.
    """
    parts = [_strongest(batch, most) for batch in batches]
    xp = namespace(parts[0][0])
    every = tuple(xp.concatenate(list(each)) for each in zip(*parts, strict=True))
    later, earlier, _ = _strongest((every[0], every[1], every[2]), most)
    return later, earlier


def _strongest(batch: Triples, most: int) -> Triples:
    """The strongest of every row, in descending order; of equal ones the first."""
    later, earlier, strength = batch
    xp = namespace(later)
    order = xp.argsort(-strength, kind="stable")
    order = order[xp.argsort(later[order], kind="stable")]
    later = later[order]
    taken = xp.nonzero(xp.arange(len(later)) - xp.searchsorted(later, later) < most)[0]
    order = order[taken]
    return later[taken], earlier[order], strength[order]

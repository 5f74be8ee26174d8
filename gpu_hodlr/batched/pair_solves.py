"""Solves with the levels of a HODLR factor, W = [[Z, Q P^T], [0, I]] for every pair of siblings.

Few right-hand sides on a GPU are one launch a level (kernels/hodlr_steps.cu), which leaves the next
level's sums over all rows: those are what a level has to wait for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.batched.branches import branch
from gpu_hodlr.batched.level_products import NARROW
from gpu_hodlr.batched.tall import inner
from gpu_hodlr.devices import Array, namespace

# Q^T x of even nodes and P^T x of odd ones, None where they are not needed: (pairs, r, k), or parts
# of them (pairs, parts, r, k).
Sums = tuple[Array, Array | None]


class Level(Protocol):
    """A level of pairs, see `Pairs`."""

    @property
    def Y(self) -> Array:  # noqa: N802
        """See `Pairs`."""

    def by_pieces(self, x: Array) -> Array:
        """All rows of x as (pieces of nodes, rows, k), a view."""

    def sums(self, x: Array) -> tuple[Array, Array]:
        """Q^T and P^T times the even and the odd nodes' rows of x (nodes, rows, k)."""

    def even_sums(self, x: Array) -> Array:
        """The first of `sums`."""

    def add(self, x: Array, even: Array, odd: Array | None = None) -> None:
        """In place, Q even to the rows of the even nodes, and P odd to those of the odd ones."""


@dataclass(frozen=True)
class Pairs:
    """For every pair of siblings W = [[Z, Q P^T], [0, I]], Z = I + Q (Y - I) Q^T.

    Attributes:
        Q: (pairs, rows, r) orthonormal columns.
        P: (pairs, rows, r).
        Y: (pairs, r, r) lower Cholesky factor of I - P^T P.
        chunk: see `inner`.
    """

    Q: Array
    P: Array
    Y: Array
    chunk: int

    def by_pieces(self, x: Array) -> Array:
        """See `Level`."""
        pairs, rows, _ = self.Q.shape
        return x.reshape(2 * pairs, rows, x.shape[2])

    def sums(self, x: Array) -> tuple[Array, Array]:
        """See `Level`."""
        aside = branch(x)
        with aside:
            odd = inner(self.P, x[1::2], self.chunk)
        even = self.even_sums(x)
        aside.join()
        return even, odd

    def even_sums(self, x: Array) -> Array:
        """See `Level`."""
        return inner(self.Q, x[0::2], self.chunk)

    def add(self, x: Array, even: Array, odd: Array | None = None) -> None:
        """See `Level`."""
        aside = branch(x)
        if odd is not None:
            with aside:
                batched.matmul(self.P, odd, add_to=x[1::2])
        batched.matmul(self.Q, even, add_to=x[0::2])
        aside.join()


@dataclass(frozen=True)
class Turn:
    """W^-1 of a level, or W^-T."""

    level: Level
    transpose: bool = False

    def sums(self, x: Array) -> Sums:
        """What it needs of x (nodes, rows, k)."""
        x = self.level.by_pieces(x)
        return (self.level.even_sums(x), None) if self.transpose else self.level.sums(x)

    def apply(self, x: Array, sums: Sums) -> None:
        """In place to x, whose sums these are."""
        even, odd = _whole(sums[0]), None if sums[1] is None else _whole(sums[1])
        x = self.level.by_pieces(x)
        if odd is None:
            t = batched.solve_triangular(self.level.Y, even, transpose=True)
            self.level.add(x, t - even, -t)
        else:
            t = batched.solve_triangular(self.level.Y, even - odd)
            self.level.add(x, t - even)


def _whole(sums: Array) -> Array:
    return sums if sums.ndim == 3 else sums.sum(axis=1)


def solve(turns: Sequence[Turn], x: Array) -> None:
    """In place, one after the other to x (nodes, rows, k) of all rows, at any level's division.

    Neighbouring turns are of one level, or of two that follow each other in the tree.
    """
    applied: Turn | None = None
    sums: Sums | None = None
    for following in (*turns, None):
        sums = _advance(applied, sums, following, x)
        applied = following


def solve_leaves(C: Array, b: Array, leaves: Array) -> Array:
    """C^-1 of the rows of b (n, k) by leaves, (leaves, m, k).

    Args:
        C: (leaves, m, m) lower triangles.
        b: see above.
        leaves: (leaves, m) rows of b, padding -1.
    """
    kernels = _triangular(C, b)
    if kernels is None:
        return batched.solve_triangular(C, batched.gather_rows(b, leaves))
    x = namespace(b).empty((*leaves.shape, b.shape[1]), b.dtype)
    return kernels.solve_narrow(C, b, False, x, leaves)


def solve_leaves_transposed(C: Array, x: Array, leaves: Array, n: int) -> Array:
    """C^-T x as rows (n, k), all of them in the leaves, for x (leaves, m, k)."""
    kernels = _triangular(C, x)
    if kernels is None:
        x = batched.solve_triangular(C, x, transpose=True)
        return batched.scatter_rows(x, leaves, n, every=True)
    out = namespace(x).empty((n, x.shape[2]), x.dtype)
    return kernels.solve_narrow(C, x, True, out, leaves)


def _triangular(C: Array, x: Array) -> ModuleType | None:
    """The module of the raw kernel, on a GPU, where x is narrow."""
    if namespace(x) is np:
        return None
    linalg = importlib.import_module("gpu_hodlr.batched.cupy_linalg")
    return linalg if x.size and linalg.solves_narrow(C, x) else None


def _advance(
    applied: Turn | None, sums: Sums | None, following: Turn | None, x: Array
) -> Sums | None:
    """Apply a turn by its sums; then the sums of the turn after it."""
    kernels = _kernels(applied, following, x)
    if kernels is not None:
        return kernels.advance(applied, sums, following, x)
    if applied is not None and sums is not None:
        applied.apply(x, sums)
    return None if following is None else following.sums(x)


def _kernels(applied: Turn | None, following: Turn | None, x: Array) -> ModuleType | None:
    """The raw kernels, where x is narrow, on a GPU and of the levels' type, and they fit."""
    turns = [turn for turn in (applied, following) if turn is not None]
    if namespace(x) is np or not 0 < x.shape[2] <= NARROW or not x.flags.c_contiguous:
        return None
    if not turns or not all(isinstance(turn.level, Pairs) for turn in turns):
        return None  # pairs whose rows lie on several ranks
    kernels = importlib.import_module("gpu_hodlr.batched.cupy_pair_solves")
    return kernels if kernels.fits(applied, following, x) else None

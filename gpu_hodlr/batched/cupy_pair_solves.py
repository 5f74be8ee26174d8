"""A level of a narrow HODLR solve on a GPU, one launch; kernels/hodlr_steps.cu."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cupy
import numpy as np

from gpu_hodlr.batched.cuda import NULL, launch, most_shared, narrow
from gpu_hodlr.batched.pair_solves import Pairs, Sums, Turn
from gpu_hodlr.devices import Array

_BLOCKS = 264  # two for each of a large GPU's multiprocessors
_TILE = 2048  # values of x that a block holds at a time
Pointer = Array | np.uint64


@dataclass(frozen=True)
class _Side:
    """The level of a turn, or none."""

    Q: Pointer = NULL
    P: Pointer = NULL
    Y: Pointer = NULL
    nodes: int = 0
    r: int = 0


def _side(turn: Turn | None) -> _Side:
    if turn is None:
        return _Side()
    level = turn.level
    assert isinstance(level, Pairs)
    Q, P, Y = (cupy.ascontiguousarray(a) for a in (level.Q, level.P, level.Y))
    return _Side(Q, P, Y, 2 * len(Q), Q.shape[2])


@dataclass(frozen=True)
class _Shape:
    """How the rows of x (n, k) are divided: nodes of the finer level, and chunks of them."""

    n: int
    k: int
    itemsize: int
    applied: _Side
    following: _Side

    @property
    def nodes(self) -> int:
        """Of the finer level."""
        return max(self.applied.nodes, self.following.nodes)

    @property
    def rows(self) -> int:
        """Of such a node."""
        return self.n // self.nodes

    @property
    def chunk(self) -> int:
        """Rows of a block, a multiple of 32.

        A block reads its rows of the bases, the parts that the other blocks left of the node's
        sums, longest / chunk of them, and Y: the sum is least at about the square root of
        k longest. Fewer blocks than the GPU has room for read more slowly, and more of them do the
        same again.
        """
        longest = max(self.n // side.nodes for side in (self.applied, self.following) if side.nodes)
        least = max(math.isqrt(self.k * longest), self.n // _BLOCKS, self.applied.r // 2)
        return 32 * -(-max(1, min(least, self.rows)) // 32)

    @property
    def chunks(self) -> int:
        """Blocks a node."""
        return -(-self.rows // self.chunk)

    def shift(self, side: _Side) -> int:
        """How often a node of the finer level goes into one of the side's, a power of two."""
        return (self.nodes // side.nodes).bit_length() - 1 if side.nodes else 0

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        width = 1 << (self.k - 1).bit_length()
        tiles = 2 * -(-self.applied.r // 32) + -(-self.following.r // 32)
        tiles += -(-min(self.chunk, _TILE // width) // 32)
        return self.itemsize * (4224 + 32 * width * tiles)


def _shape(applied: Turn | None, following: Turn | None, x: Array) -> _Shape:
    return _Shape(x.shape[0] * x.shape[1], x.shape[2], x.itemsize, _side(applied), _side(following))


def fits(applied: Turn | None, following: Turn | None, x: Array) -> bool:
    """Whether levels are of x's type, and a block can hold their vectors."""
    types = {turn.level.Y.dtype for turn in (applied, following) if turn is not None}
    shared = _shape(applied, following, x).shared
    return types == {x.dtype} and shared <= most_shared(cupy.cuda.Device().id)


def advance(
    applied: Turn | None, sums: Sums | None, following: Turn | None, x: Array
) -> Sums | None:
    """See `pair_solves._advance`."""
    at = _shape(applied, following, x)
    old, new, k = at.applied, at.following, at.k
    w, p = (None, None) if sums is None else (_parts(part) for part in sums)
    shifts = at.shift(old), at.shift(new)
    left = _left(following, new, at.chunks << shifts[1], x)
    threads = 32 * min(16, max(2, at.chunk // 4))
    launch(
        "hodlr_steps", narrow("hodlr_step", x.dtype, k), (at.nodes * at.chunks,), (threads,),
        (old.Q, old.P, old.Y, _pointer(w), _pointer(p), new.Q, new.P,
         *(_pointer(part) for part in left or (None, None)), x, at.rows, at.chunk, *shifts,
         old.r, 1 if w is None else w.shape[1], new.r, k),
        at.shared,
    )  # fmt: skip
    return left


def _pointer(x: Array | None) -> Pointer:
    return NULL if x is None else x


def _parts(part: Array | None) -> Array | None:
    """Sums as (pairs, parts, r, k)."""
    if part is None:
        return None
    return cupy.ascontiguousarray(part if part.ndim == 4 else part[:, None])


def _left(following: Turn | None, side: _Side, parts: int, x: Array) -> Sums | None:
    """Room for the sums of a turn."""
    if following is None:
        return None
    shape = (side.nodes // 2, parts, side.r, x.shape[2])
    even = cupy.empty(shape, x.dtype)
    return even, None if following.transpose else cupy.empty(shape, x.dtype)

"""A sparse inverse factor that is positive definite by construction: Vecchia's approximation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import Communicator
from gpu_hodlr.distributed.ownership import shares
from gpu_hodlr.factor.solver import IndefiniteError
from gpu_hodlr.factor.vecchia_entries import Entries, Triples
from gpu_hodlr.factor.vecchia_pattern import Pattern, index_type, neighbours
from gpu_hodlr.structures import RotatedSparse
from gpu_hodlr.structures.dealt_rows import (
    DealtRows,
    check_rows,
    cuts_by_work,
    gathered,
    number_of_parts,
    own_rows,
)
from gpu_hodlr.structures.stored import Part

_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of what is off the diagonal of a block, tried in turn
_NAMES = "lengths", "columns", "values", "cuts", "X", "w"  # in a file


@dataclass(frozen=True)
class Vecchia:
    """N^T N, an approximate inverse of B = R + P C P^T + damping I, (M, M).

    N = (I - X diag(w) X^T) L. Row i of the sparse L conditions on the few neighbours of i that are
    most strongly correlated with it among those of larger diagonal: it is the last row of the
    inverse Cholesky factor of their block of R + damping I (Vecchia, J. R. Stat. Soc. B 50 (1988);
    Kolotilina and Yeremin, SIAM J. Matrix Anal. Appl. 14 (1993); Schaefer, Katzfuss and Owhadi,
    SIAM J. Sci. Comput. 43 (2021): of all L with this pattern the nearest in the Kullback-Leibler
    divergence). The rows of largest diagonal, the head, condition on each other. X and w are those
    of the low-rank part: with L P C^1/2 = X diag(s) Y^T it is w = 1 - (1 + s^2)^-1/2. What there is
    no room for of it, or has C < 0, belongs to R. On many ranks the rows of L are dealt out.

    Attributes:
        L: (M, M).
        X: (M, r) orthonormal columns.
        w: (r,).
        logdet: of the inverse of N^T N, float64.
        head: how many rows it has.
    """

    L: DealtRows
    X: Array
    w: Array
    logdet: float
    head: int

    @property
    def nbytes(self) -> int:
        """Of the arrays on this rank."""
        L = self.L
        return int(sum(a.nbytes for a in (L.starts, L.columns, L.values, self.X, self.w)))

    def num_stored(self) -> int:
        """Numbers of all ranks, an index counted by its bytes, of 8 that are a number."""
        entries, M = self.L.entries(), self.L.size
        return int(entries + self.X.size + (self.L.columns.itemsize * entries + 4 * M) // 8)

    def half(self, v: Array) -> Array:
        """N v, (M, k), on every rank."""
        return self._reduced(self.L.matmul(v))

    def half_transposed(self, v: Array) -> Array:
        """N^T v, (M, k), on every rank."""
        return self.L.transposed_matmul(self._reduced(v))

    def apply(self, v: Array) -> Array:
        """N^T N v, (M, k), on every rank."""
        return self.half_transposed(self.half(v))

    def diagonal(self) -> Array:
        """Of N^T N, (M,)."""
        squares, xp = replace(self.L, values=self.L.values**2), namespace(self.X)
        diagonal = squares.transposed_matmul(xp.ones((self.L.size, 1), self.X.dtype))[:, 0]
        if len(self.w):
            turned = self.L.transposed_matmul(self.X)
            diagonal = diagonal - (turned * turned) @ (self.w * (2 - self.w))
        return diagonal

    def _reduced(self, v: Array) -> Array:
        """(I - X diag(w) X^T) v."""
        if not len(self.w):
            return v
        inner = batched.matmul(self.X[None], v[None], transpose_a=True)
        inner *= self.w[:, None]
        return v - batched.matmul(self.X[None], inner)[0]

    # --- files ---------------------------------------------------------------------------------

    def pack(self, prefix: str) -> dict[str, Any]:
        """The arrays by names with a prefix, those of all ranks brought together."""
        arrays = (*self.L.gathered(), self.L.cuts, self.X, self.w)
        return {prefix + name: to_host(a) for name, a in zip(_NAMES, arrays, strict=True)}

    def about(self) -> dict[str, Any]:
        """Numbers."""
        return {"logdet": self.logdet, "head": self.head}

    @classmethod
    def read(cls, part: Part, prefix: str, M: int, dtype: np.dtype[Any]) -> Self:
        """What `pack` and `about` gave.

        Raises:
            KeyError, TypeError, ValueError: it cannot be.
        """
        lengths, columns, values, cuts, X, w = (part[prefix + name] for name in _NAMES)
        if {a.dtype for a in (values, X, w)} != {np.dtype(dtype)}:
            raise ValueError(f"the inverse is not of type {dtype}")
        if w.ndim != 1 or X.shape != (M, len(w)):
            raise ValueError(f"X {X.shape} and w {w.shape} do not fit {M} coordinates")
        check_rows(lengths, columns, values, cuts, M)
        logdet, head = float(part.about["logdet"]), int(part.about["head"])
        if not math.isfinite(logdet) or not 0 <= head <= M:
            raise ValueError(f"log-determinant {logdet} and head {head} cannot be")
        every = part.placed(lengths), part.placed(columns), part.placed(values)
        L = DealtRows.part_of(*every, cuts, part.owners.comm)
        return cls(L, part.placed(X), part.placed(w), logdet, head)


@batched.one_blas_thread()
def vecchia(form: RotatedSparse, damping: float, pattern: Pattern) -> Vecchia:
    """Of the matrix in the eigenbasis, and the damping.

    Collective: all ranks call.

    Args:
        form: the matrix.
        damping: >= 0.
        pattern: of L.

    Raises:
        IndefiniteError: the diagonal is not positive.
    """
    M, comm = form.basis.size, form.owners.comm
    xp = namespace(form.D)
    kept = pattern.kept(to_host(form.C), M)
    columns = xp.asarray(np.nonzero(kept)[0])
    R = Entries(form, damping, xp.asarray(np.nonzero(~kept)[0]))
    if not bool((R.diagonal > 0).all()):
        raise IndefiniteError
    entries = pattern.entries(M, len(columns))
    head = pattern.head_of(M, entries)
    counts = _counts(R, head, comm)
    most = pattern.neighbours_of(to_host(counts), entries - head * (head + 1) // 2)
    L, logdet = _Rows(R, head, counts, most).dealt(comm)
    factor = Vecchia(L, form.P[:, :0], form.C[:0], logdet, head)
    return _with_low_rank(factor, form.P[:, columns], form.C[columns])


def _counts(R: Entries, head: int, comm: Communicator) -> Array:
    """How many neighbours every row behind the head could have, in their order."""
    xp, M = namespace(R.diagonal), len(R.diagonal)
    own = shares(M - head, comm.size)
    first, last = (head + end for end in (own[comm.rank].start, own[comm.rank].stop))
    counts = xp.zeros(last - first, np.int64)
    for later, _, _ in R.correlations(xp.arange(first, last)):
        counts += xp.bincount(later - first, minlength=last - first)
    return comm.allgather(counts, [part.stop - part.start for part in own])


class _Rows:
    """The rows of L.

    Args:
        R: the matrix.
        head: rows that condition on each other.
        counts: how many neighbours every row behind the head could have, in their order.
        most: how many it may have.
    """

    def __init__(self, R: Entries, head: int, counts: Array, most: int) -> None:
        xp = namespace(counts)
        self._R, self._head, self._most = R, head, most
        self._lengths = xp.empty(len(R.order), np.int64)  # of every row, in the order
        self._lengths[:head] = xp.arange(1, head + 1)
        self._lengths[head:] = xp.minimum(counts, most) + 1

    def dealt(self, comm: Communicator) -> tuple[DealtRows, float]:
        """L, and the log-determinant of (L^T L)^-1."""
        lengths = self._lengths[self._R.place]
        xp, M = namespace(lengths), len(lengths)
        work = np.cumsum(to_host(lengths))
        parts = number_of_parts(int(work[-1]) if M else 0, max(M, 1))
        cuts = np.unique(cuts_by_work(work, parts)) if parts > 1 else np.array([0, M])
        if len(cuts) > 2:
            rows = own_rows(cuts, comm)
        else:  # all have all of it in the end, but each makes some
            edges = cuts_by_work(work, comm.size)
            rows = slice(edges[comm.rank], edges[comm.rank + 1])
        columns, values, diagonal = self._made(rows)
        own = lengths[rows]
        logs = xp.log(comm.allgather(diagonal.astype(np.float64), comm.share(len(own))))
        if len(cuts) == 2:
            own, columns, values = gathered(comm, own, columns, values)
        starts = xp.concatenate([xp.zeros(1, np.int64), xp.cumsum(own)])
        return DealtRows(starts, columns, values, cuts, comm), -2.0 * float(logs.sum())

    def _made(self, rows: slice) -> tuple[Array, Array, Array]:
        """Columns and values of some rows, one row's after the other's, and their diagonal."""
        R, head = self._R, self._head
        xp = namespace(R.diagonal)
        places = xp.sort(R.place[rows])
        pieces = [self._of_head(places[places < head]), *self._of_rest(places[places >= head])]
        row, column, value = (xp.concatenate(list(each)) for each in zip(*pieces, strict=True))
        order = xp.argsort(row, kind="stable")
        row, column, value = row[order], column[order], value[order]
        return column.astype(index_type(len(R.order))), value, value[row == column]

    def _of_head(self, places: Array) -> Triples:
        """Coordinates of row and column, and values, of rows of the head at some places."""
        R, xp = self._R, namespace(places)
        top = R.order[: self._head]
        lower = _cholesky(R, top[None]) if len(places) else batched.identities(1, 0, R.diagonal)
        inverse = batched.solve_triangular(lower, batched.identities(1, len(lower[0]), lower))[0]
        i, j = xp.nonzero(xp.arange(len(inverse)) <= places[:, None])
        return top[places[i]], top[j], inverse[places[i], j]

    def _of_rest(self, places: Array) -> Iterator[Triples]:
        """The same of rows behind the head."""
        R, xp = self._R, namespace(places)
        later, earlier = neighbours(R.correlations(places), self._most)
        lengths = self._lengths[places] - 1
        starts = xp.searchsorted(later, places)
        on_host = to_host(lengths)
        for width, some in _by_width(on_host):
            of, entries = xp.asarray(some), int(on_host[some].sum()) + len(some)
            nth = xp.arange(width)
            slot = xp.minimum(starts[of][:, None] + nth, max(len(earlier) - 1, 0))
            before = xp.where(nth < lengths[of][:, None], R.order[earlier[slot]], -1)
            index = xp.concatenate([before, R.order[places[of]][:, None]], axis=1)
            value = _last_rows(R, index)
            # Where index >= 0; how many that is the host knows, and need not wait for.
            ends = xp.cumsum(lengths[of] + 1)
            i = xp.searchsorted(ends, xp.arange(entries), side="right")
            left = ends[i] - xp.arange(entries)  # in the row, the last of which is its own
            j = xp.where(left > 1, lengths[of][i] + 1 - left, width)
            yield index[i, -1], index[i, j], value[i, j]


def _by_width(lengths: HostIndex) -> Iterator[tuple[int, HostIndex]]:
    """Powers of two, or 0, and which rows are no longer than each, and longer than the last."""
    widths = np.where(lengths > 0, 1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), 0)
    for width in np.unique(widths):
        yield int(width), np.nonzero(widths == width)[0]


def _last_rows(R: Entries, index: Array) -> Array:
    """(b, m) last rows of the inverse Cholesky factors of the blocks of (b, m) coordinates."""
    xp = namespace(index)
    rows = xp.empty(index.shape, R.diagonal.dtype)
    step = batched.columns_at_once(rows, 4 * 8 * index.shape[1] ** 2)
    for start in range(0, len(index), step):
        part = slice(start, start + step)
        lower = _cholesky(R, index[part])
        last = xp.zeros((*rows[part].shape, 1), rows.dtype)
        last[:, -1] = 1
        rows[part] = batched.solve_triangular(lower, last, transpose=True)[:, :, 0]
    return rows


def _cholesky(R: Entries, index: Array) -> Array:
    """(b, m, m) Cholesky factors of principal submatrices of R + damping I.

    Where a block is not positive definite, which a threshold may do to it, all that is off its
    diagonal is made smaller until it is.
    """
    blocks = R.blocks(index)
    xp, m = namespace(blocks), blocks.shape[1]
    result = xp.empty_like(blocks)
    left = xp.arange(len(blocks))
    for share in _SHARES:
        some = blocks[left]
        scaled = some * blocks.dtype.type(share)
        at = xp.arange(m)
        scaled[:, at, at] = some[:, at, at]
        lower, info = batched.cholesky(scaled)
        failed = to_host(info) != 0
        done = xp.asarray(np.nonzero(~failed)[0])
        result[left[done]] = lower[done]
        left = left[xp.asarray(np.nonzero(failed)[0])]
        if not len(left):
            break
    return result


def _with_low_rank(factor: Vecchia, P: Array, C: Array) -> Vecchia:
    """The same of a matrix with P C P^T more (Woodbury)."""
    if not len(C):
        return factor
    xp = namespace(P)
    Z = factor.half(xp.ascontiguousarray(P)) * xp.sqrt(C)
    squares, vectors = xp.linalg.eigh(Z.T @ Z)
    squares = xp.maximum(squares, 0)
    kept = xp.nonzero(squares > 0)[0]
    X = Z @ (vectors[:, kept] / xp.sqrt(squares[kept]))
    w = 1 - 1 / xp.sqrt(1 + squares[kept])
    more = float(xp.log1p(squares.astype(np.float64)).sum())
    return replace(factor, X=xp.ascontiguousarray(X), w=w, logdet=factor.logdet + more)

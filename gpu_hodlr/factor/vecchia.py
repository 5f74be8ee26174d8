"""A sparse inverse factor that is positive definite by construction: Vecchia's approximation."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.factor.solver import IndefiniteError
from gpu_hodlr.structures import RotatedSparse

_WEAK = 3e-3  # correlations up to here are no reason to be a neighbour
_TOGETHER = 1 << 23  # entries
_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of what is off the diagonal of a block, tried in turn


@dataclass(frozen=True)
class Vecchia:
    """N^T N, an approximate inverse of B = R + P C P^T + damping I, (M, M).

    N = (I - X diag(w) X^T) L. Row i of the sparse L conditions on the few neighbours of i that are
    most strongly correlated with it among those of larger diagonal: it is the last row of the
    inverse Cholesky factor of their block of R + damping I (Vecchia, J. R. Stat. Soc. B 50 (1988);
    Kolotilina and Yeremin, SIAM J. Matrix Anal. Appl. 14 (1993); Schaefer, Katzfuss and Owhadi,
    SIAM J. Sci. Comput. 43 (2021): of all L with this pattern the nearest in the Kullback-Leibler
    divergence). The rows of largest diagonal, the head, condition on each other. X and w are those
    of the low-rank part: with L P C^1/2 = X diag(s) Y^T it is w = 1 - (1 + s^2)^-1/2.

    Attributes:
        starts: (M + 1,) see `batched.sparse_rows`, of L without the head; as the next two.
        columns: (entries,) int32.
        values: (entries,).
        head: (h,) coordinates.
        head_rows: (h, h) lower triangular.
        X: (M, r) orthonormal columns.
        w: (r,).
        logdet: of the inverse of N^T N, float64.
    """

    starts: Array
    columns: Array
    values: Array
    head: Array
    head_rows: Array
    X: Array
    w: Array
    logdet: float

    @classmethod
    def names(cls) -> list[str]:
        """Of the arrays."""
        return [f.name for f in fields(cls) if f.name != "logdet"]

    def arrays(self) -> dict[str, Array]:
        """By name."""
        return {name: getattr(self, name) for name in self.names()}

    def check(self, M: int, dtype: np.dtype[Any]) -> None:
        """Refuse arrays that do not fit together.

        Raises:
            ValueError: they do not.
        """
        h, r, entries = len(self.head), len(self.w), len(self.values)
        floats = (self.values, self.head_rows, self.X, self.w)
        if {a.dtype for a in floats} != {np.dtype(dtype)}:
            raise ValueError(f"the inverse is not of type {dtype}")
        shapes = {"starts": (M + 1,), "columns": (entries,), "head_rows": (h, h), "X": (M, r)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, wanted is {shape}")
        starts, columns = to_host(self.starts), to_host(self.columns)
        if starts[0] or (np.diff(starts) < 0).any() or starts[-1] != entries:
            raise ValueError("the rows of the inverse do not fit its entries")
        for index in (columns, to_host(self.head)):
            if index.size and (index.min() < 0 or index.max() >= M):
                raise ValueError("an entry of the inverse is outside")

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return int(sum(a.nbytes for a in self.arrays().values()))

    @cached_property
    def _sparse(self) -> batched.SparseRows:
        return batched.sparse_rows(self.starts, self.columns, self.values, len(self.starts) - 1)

    def half(self, v: Array) -> Array:
        """N v, (M, k)."""
        y = self._sparse.matmul(v)
        if len(self.head):
            y[self.head] = batched.matmul(self.head_rows[None], v[self.head][None])[0]
        return self._reduced(y)

    def half_transposed(self, v: Array) -> Array:
        """N^T v, (M, k)."""
        y = self._reduced(v)
        z = self._sparse.transposed_matmul(y)
        if len(self.head):
            top = batched.matmul(self.head_rows[None], y[self.head][None], transpose_a=True)
            z[self.head] += top[0]
        return z

    def apply(self, v: Array) -> Array:
        """N^T N v, (M, k)."""
        return self.half_transposed(self.half(v))

    def _reduced(self, v: Array) -> Array:
        """(I - X diag(w) X^T) v."""
        if not len(self.w):
            return v
        inner = batched.matmul(self.X[None], v[None], transpose_a=True)
        inner *= self.w[:, None]
        return v - batched.matmul(self.X[None], inner)[0]


def vecchia(form: RotatedSparse, damping: float, neighbours: int, head: int) -> Vecchia:
    """Of the matrix in the eigenbasis, and the damping; on many ranks the same on every one.

    Args:
        form: the matrix.
        damping: >= 0.
        neighbours: of a row of L, at most.
        head: rows that condition on each other.

    Raises:
        IndefiniteError: the diagonal is not positive.
    """
    R = _Entries(form, damping)
    if not bool((R.diagonal > 0).all()):
        raise IndefiniteError
    xp, M = namespace(R.diagonal), len(R.diagonal)
    order = xp.argsort(-R.diagonal)
    place = xp.empty_like(order)
    place[order] = xp.arange(M)
    top, rest = order[:head], order[head:]
    head_rows = _inverse_cholesky(R, top[None])[0]
    columns, values = _rows(R, rest, _neighbours(R, place, neighbours, len(top)))
    kept = columns >= 0
    lengths = xp.zeros(M, np.int64)
    lengths[rest] = kept.sum(axis=1)
    diagonal = xp.concatenate([head_rows.diagonal(), values[:, -1]]).astype(np.float64)
    by_row = xp.argsort(rest)
    columns, values, kept = columns[by_row], values[by_row], kept[by_row]
    factor = Vecchia(
        xp.concatenate([xp.zeros(1, np.int64), xp.cumsum(lengths)]),
        columns[kept].astype(np.int32), values[kept], top, head_rows,
        form.P[:, :0], form.C[:0], -2.0 * float(xp.log(diagonal).sum()),
    )  # fmt: skip
    return _with_low_rank(factor, form.P, form.C)


class _Entries:
    """The entries of R + damping I, R = D + S + S^T.

    Attributes:
        diagonal: (M,).
        key: (entries,) row M + column of every entry of S, ascending.
        value: (entries,).
    """

    def __init__(self, form: RotatedSparse, damping: float) -> None:
        xp = namespace(form.D)
        lengths, columns, self.value = form.all_rows()
        self.diagonal = form.D + form.D.dtype.type(damping)
        ends, M = xp.cumsum(lengths), len(lengths)
        self.key = xp.empty(len(columns), np.int64)
        for part in _parts(len(columns)):
            row = xp.searchsorted(ends, xp.arange(part.start, part.stop), side="right")
            self.key[part] = row * M + columns[part]

    def blocks(self, index: Array) -> Array:
        """(b, m, m) principal submatrices for (b, m) coordinates, -1 for rows of the identity."""
        xp, m = namespace(index), index.shape[1]
        i, j = index[:, :, None], index[:, None, :]
        key = xp.maximum(i, j) * len(self.diagonal) + xp.minimum(i, j)
        block = xp.zeros(key.shape, self.value.dtype)
        if len(self.key):
            slot = xp.minimum(xp.searchsorted(self.key, key), len(self.key) - 1)
            there = (self.key[slot] == key) & (i >= 0) & (j >= 0)
            block = xp.where(there, self.value[slot], 0)
        at = xp.arange(m)
        block[:, at, at] = xp.where(index >= 0, self.diagonal[index], 1)
        return block


def _parts(entries: int) -> list[slice]:
    """Parts of all entries that are worked on together; one at least."""
    return [slice(a, min(a + _TOGETHER, entries)) for a in range(0, max(entries, 1), _TOGETHER)]


def _inverse_cholesky(R: _Entries, index: Array) -> Array:
    """(b, m, m) inverses of the Cholesky factors of principal submatrices, lower triangular.

    Where a block is not positive definite, which a threshold may do to it, all that is off its
    diagonal is made smaller until it is.
    """
    blocks = R.blocks(index)
    xp, m = namespace(blocks), blocks.shape[1]
    result = batched.identities(len(blocks), m, blocks)
    left = xp.arange(len(blocks))
    for share in _SHARES:
        some = blocks[left]
        scaled = some * blocks.dtype.type(share)
        at = xp.arange(m)
        scaled[:, at, at] = some[:, at, at]
        lower, info = batched.cholesky(scaled)
        failed = to_host(info) != 0
        done = xp.asarray(np.nonzero(~failed)[0])
        result[left[done]] = batched.solve_triangular(
            lower[done], batched.identities(len(done), m, blocks)
        )
        left = left[xp.asarray(np.nonzero(failed)[0])]
        if not len(left):
            break
    return result


def _neighbours(R: _Entries, place: Array, count: int, head: int) -> Array:
    """(rows behind the head in their order, count) coordinates, -1 for none.

    Args:
        R: the matrix.
        place: (M,) of every coordinate in the order of the factor.
        count: how many at most.
        head: rows that have no neighbours here.
    """
    xp, M = namespace(place), len(place)
    scale = R.diagonal**-0.5
    kept: list[tuple[Array, Array, Array]] = []
    for part in _parts(len(R.key)):
        row, column = R.key[part] // M, R.key[part] % M
        strength = abs(R.value[part]) * scale[row] * scale[column]
        chosen = xp.nonzero(strength > _WEAK)[0]
        one, other = place[row[chosen]], place[column[chosen]]
        kept.append((xp.maximum(one, other), xp.minimum(one, other), strength[chosen]))
    later, earlier, strength = (xp.concatenate(list(each)) for each in zip(*kept, strict=True))
    found = xp.full((len(place) - head, count), -1)
    order = xp.argsort(-strength)
    order = order[xp.argsort(later[order], kind="stable")]  # a row's strongest first
    later, earlier = later[order], earlier[order]
    nth = xp.arange(len(later)) - xp.searchsorted(later, later)
    taken = (nth < count) & (later >= head)
    coordinate = xp.empty_like(place)
    coordinate[place] = xp.arange(len(place))
    found[later[taken] - head, nth[taken]] = coordinate[earlier[taken]]
    return found


def _rows(R: _Entries, rows: Array, neighbours: Array) -> tuple[Array, Array]:
    """Columns (rows, m + 1), -1 for none, and values of L; the last is the row's own."""
    xp = namespace(rows)
    index = xp.concatenate([neighbours, rows[:, None]], axis=1)
    values = xp.empty(index.shape, R.value.dtype)
    step = batched.columns_at_once(R.value, 4 * 8 * index.shape[1] ** 2)
    for start in range(0, len(index), step):
        part = slice(start, start + step)
        values[part] = _inverse_cholesky(R, index[part])[:, -1]
    return index, values


def _with_low_rank(factor: Vecchia, P: Array, C: Array) -> Vecchia:
    """The same of a matrix with P C P^T more (Woodbury)."""
    if not len(C):
        return factor
    xp = namespace(P)
    Z = factor.half(P) * xp.sqrt(C)
    squares, vectors = xp.linalg.eigh(Z.T @ Z)
    squares = xp.maximum(squares, 0)
    kept = squares > 0
    X = Z @ (vectors[:, kept] / xp.sqrt(squares[kept]))
    w = 1 - 1 / xp.sqrt(1 + squares[kept])
    more = float(xp.log1p(squares.astype(np.float64)).sum())
    return replace(factor, X=xp.ascontiguousarray(X), w=w, logdet=factor.logdet + more)

"""Entries of a matrix in the eigenbasis, for its sparse inverse factor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace, to_hosts
from gpu_hodlr.structures import RotatedSparse

_WEAK = 3e-3  # correlations up to here are no reason to be a neighbour
_TOGETHER = 1 << 23  # entries; a device takes as many as it has room for: it waits for each part
_ENTRY_BYTES = 80  # of one that is looked at, its places and its strength

Triples = tuple[Array, Array, Array]


class Entries:
    """R + damping I, R = D + S + S^T + F G^T; F G^T is what the low-rank part has behind a rank.

    Args:
        form: K.
        damping: >= 0.
        left: columns of P that are F G^T.

    Attributes:
        diagonal: (M,).
        order: (M,) coordinates, of largest diagonal first.
        place: (M,) of every coordinate in the order.
    """

    def __init__(self, form: RotatedSparse, damping: float, left: Array) -> None:
        xp = namespace(form.D)
        lengths, columns, self._value = form.rows.gathered()
        self._G = xp.ascontiguousarray(form.P[:, left])
        self._F = self._G * form.C[left]
        self.diagonal = form.D + (self._F * self._G).sum(axis=1) + form.D.dtype.type(damping)
        ends, M = xp.cumsum(lengths), len(lengths)
        self._key = xp.empty(len(columns), np.int64)
        for part in _parts(len(columns), self.diagonal):
            row = xp.searchsorted(ends, xp.arange(part.start, part.stop), side="right")
            self._key[part] = row * M + columns[part]
        self.order = xp.argsort(-self.diagonal)
        self.place = xp.empty_like(self.order)
        self.place[self.order] = xp.arange(M)

    def blocks(self, index: Array) -> Array:
        """(b, m, m) principal submatrices for (b, m) coordinates, -1 for rows of the identity."""
        xp, m = namespace(index), index.shape[1]
        i, j = index[:, :, None], index[:, None, :]
        there = (i >= 0) & (j >= 0)
        block = xp.zeros(there.shape, self.diagonal.dtype)
        if len(self._key):
            key = xp.maximum(i, j) * len(self.diagonal) + xp.minimum(i, j)
            slot = xp.minimum(xp.searchsorted(self._key, key), len(self._key) - 1)
            block = xp.where((self._key[slot] == key) & there, self._value[slot], block)
        if self._F.shape[1]:
            product = batched.matmul(self._F[index], self._G[index], transpose_b=True)
            block = xp.where(there, block + product, block)
        at = xp.arange(m)
        block[:, at, at] = xp.where(index >= 0, self.diagonal[index], 1)
        return block

    def correlations(self, places: Array) -> Iterator[Triples]:
        """Those that are not weak of the rows at some places with rows before them.

        Args:
            places: ascending.

        Yields:
            Places of the row and of the one before it, and the absolute value; once at least.
        """
        dense = self._F.shape[1] and len(places)
        return self._dense(places) if dense else self._sparse(places)

    def _sparse(self, places: Array) -> Iterator[Triples]:
        """Of the entries of S."""
        xp, M = namespace(places), len(self.place)
        wanted, scale = xp.zeros(M, bool), self.diagonal**-0.5
        wanted[places] = True
        for part in _parts(len(self._key), scale):
            row, column = self._key[part] // M, self._key[part] % M
            strength = abs(self._value[part]) * scale[row] * scale[column]
            later = xp.maximum(self.place[row], self.place[column])
            chosen = xp.nonzero((strength > _WEAK) & wanted[later])[0]
            earlier = xp.minimum(self.place[row], self.place[column])
            yield later[chosen], earlier[chosen], strength[chosen]

    def _dense(self, places: Array) -> Iterator[Triples]:
        """Of S + F G^T, some rows at a time."""
        xp, M = namespace(places), len(self.place)
        scale = self.diagonal[self.order] ** -0.5
        later, earlier, value = self._ordered(places)
        G = xp.ascontiguousarray(self._G[self.order])
        step = max(1, _together(scale) // max(M, 1))
        starts = np.arange(0, len(places), step)
        stops = np.minimum(starts + step, len(places))
        begins, ends = to_hosts(
            xp.searchsorted(later, places[xp.asarray(starts)]),
            xp.searchsorted(later, places[xp.asarray(stops - 1)], side="right"),
        )
        for start, stop, begin, end in zip(*map(list, (starts, stops, begins, ends)), strict=True):
            some, here = places[start:stop], slice(begin, end)
            rows = batched.matmul(self._F[self.order[some]][None], G[None], transpose_b=True)[0]
            at = xp.searchsorted(some, later[here]), earlier[here]
            rows[at] = rows[at] + value[here]
            strength = abs(rows) * scale[some][:, None] * scale
            before = xp.arange(M) < some[:, None]
            i, j = xp.nonzero((strength > _WEAK) & before)
            yield some[i], j, strength[i, j]

    def _ordered(self, places: Array) -> Triples:
        """Entries of S in the rows at some places: of row and column, and values, by rows."""
        xp, M = namespace(places), len(self.place)
        wanted = xp.zeros(M, bool)
        wanted[places] = True
        row, column = self._key // M, self._key % M
        later = xp.maximum(self.place[row], self.place[column])
        mine = xp.nonzero(wanted[later])[0]
        earlier = xp.minimum(self.place[row], self.place[column])[mine]
        later = later[mine]
        order = xp.argsort(later)
        return later[order], earlier[order], self._value[mine][order]


def _together(like: Array) -> int:
    return max(_TOGETHER, batched.columns_at_once(like, _ENTRY_BYTES))


def _parts(entries: int, like: Array) -> list[slice]:
    """Parts of all entries that are worked on together; one at least."""
    step = _together(like)
    return [slice(a, min(a + step, entries)) for a in range(0, max(entries, 1), step)]

"""Entries of a network's Gauss-Newton matrix in the Kronecker-factored eigenbasis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr import batched
from gpu_hodlr.devices import (
    Array,
    HostArray,
    HostIndex,
    check_memory,
    device_of,
    namespace,
    to_host,
)
from gpu_hodlr.eigenbasis.kronecker import KroneckerBasis, LayerBasis

if TYPE_CHECKING:
    from gpu_hodlr.networks.layers import Layer
    from gpu_hodlr.networks.output_hessian import OutputHessian

_SAME = 1e-12  # relative spread of what counts as constant
_UNITS = 16  # whose rows of G are formed together
_STRIPS = 6  # of a unit's rows, each with its own bound on the columns


@dataclass(frozen=True)
class Strip:
    """Entries K'[rows, columns] for rows of one unit and columns of a few units of one layer.

    Attributes:
        entries: (units, rows, columns).
        row: the first row, a coordinate of the basis.
        column: the first column of the first unit.
        stride: from a column of one unit to that of the next.
    """

    entries: Array
    row: int
    column: int
    stride: int


@dataclass(frozen=True)
class Rotated:
    """K' = Q^T K Q - P C P^T of K = A^T A, Q the Kronecker-factored eigenbasis.

    With unit a of a layer and feature i: (Q^T K Q)[(a, i), (b, j)] = sum_k x_i,k x_j,k G_ab,k, x
    the layers' inputs in their eigenvectors V, G_ab,k = sum_o c_a,o,k c_b,o,k, and c the rows of A
    in the units' eigenvectors U. |K'_ij| <= s_i s_j with s the roots of the diagonal.

    Attributes:
        basis: Q, and K outside its range.
        features: (g, n) a layer.
        roots: (n, units, o) c, of the units of all layers.
        d: (M,) the diagonal of K', float64.
        apart: whether the last layer's units are not coupled to one another.
        P: (M, r), what is taken off; None for nothing.
        C: (r,).
    """

    basis: KroneckerBasis
    features: tuple[Array, ...]
    roots: Array
    d: Array
    apart: bool
    P: Array | None = None
    C: Array | None = None

    @property
    def size(self) -> int:
        """M."""
        return self.basis.size

    def scaled(self, factor: float) -> Rotated:
        """That of factor * K, factor > 0."""
        root = self.roots.dtype.type(factor**0.5)
        return replace(
            self, basis=self.basis.scaled(factor), roots=self.roots * root, d=self.d * factor
        )

    def without(self, P: Array, C: Array) -> Rotated:
        """Less P C P^T, P (M, r) and C (r,), which leaves K' positive semi-definite."""
        taken = ((P * P) @ C).astype(np.float64)
        return replace(self, P=P, C=C, d=namespace(P).maximum(self.d - taken, 0.0))

    def astype(self, dtype: DTypeLike) -> Rotated:
        """With panels in another precision; the diagonal and the basis keep theirs."""
        if self.roots.dtype == dtype:
            return self
        P, C = (None if a is None else a.astype(dtype) for a in (self.P, self.C))
        features = tuple(x.astype(dtype) for x in self.features)
        return replace(self, features=features, roots=self.roots.astype(dtype), P=P, C=C)

    @cached_property
    def first_units(self) -> HostIndex:
        """(layers + 1,) the first unit of every layer among all."""
        return np.cumsum([0, *(layer.units for layer in self.basis.layers)])

    @cached_property
    def bounds(self) -> tuple[HostArray, ...]:
        """(units, g) a layer: the largest s of a unit from a feature on, so that it falls."""
        s = np.sqrt(to_host(self.d))
        firsts = self.basis.firsts
        by_unit = [
            s[a:b].reshape(layer.units, -1)
            for layer, a, b in zip(self.basis.layers, firsts[:-1], firsts[1:], strict=True)
        ]
        return tuple(np.maximum.accumulate(x[:, ::-1], axis=1)[:, ::-1] for x in by_unit)

    def gram(self, units: slice) -> Array:
        """G_ab,k for some units a and all b, (units, all, n)."""
        xp = namespace(self.roots)
        chosen = batched.matmul(self.roots[:, units], self.roots, transpose_b=True)
        return xp.ascontiguousarray(chosen.transpose(1, 2, 0))

    def block_rows(self, units: range, tau: float) -> Iterator[tuple[slice, Iterator[Strip]]]:
        """The rows of some units, each with all entries of block columns up to its own above tau.

        What the bound s_i s_j rules out is not computed: rows and columns end where it falls below
        tau. Entries that do not exceed it are among the others.
        """
        total = int(self.first_units[-1])
        for start in range(units.start // _UNITS * _UNITS, units.stop, _UNITS):
            # Whatever the units asked for, the same products, and so the same bits.
            G = self.gram(slice(start, min(start + _UNITS, total)))
            for unit in range(max(start, units.start), min(start + _UNITS, units.stop)):
                layer, row = self._place(unit)
                rows = slice(row, row + len(self.features[layer]))
                yield rows, self._unit_strips(unit, G[unit - start], tau)

    def work(self, tau: float) -> HostArray:
        """(units,) how many entries `block_rows` computes."""
        total = np.zeros(int(self.first_units[-1]))
        for unit in range(len(total)):
            for _, group, rows, columns in self._screened(unit, tau):
                total[unit] += (group.stop - group.start) * (rows.stop - rows.start) * columns
        return total

    def row_of(self, unit: int) -> int:
        """The first coordinate of a unit, or M after the last."""
        return self.size if unit == int(self.first_units[-1]) else self._place(unit)[1]

    def _place(self, unit: int) -> tuple[int, int]:
        """The layer of a unit, and its first coordinate."""
        layer = int(np.searchsorted(self.first_units, unit, side="right")) - 1
        own = unit - int(self.first_units[layer])
        return layer, int(self.basis.firsts[layer]) + own * len(self.features[layer])

    def _screened(self, unit: int, tau: float) -> Iterator[tuple[int, slice, slice, int]]:
        """(other layer, its units, rows, columns) of everything that may exceed tau."""
        layer, _ = self._place(unit)
        own = unit - int(self.first_units[layer])
        bound = self.bounds[layer][own]
        for other in range(layer + 1):
            last = own + 1 if other == layer else len(self.bounds[other])
            alone = self.apart and other == layer == len(self.features) - 1
            together = batched.columns_at_once(
                self.roots, self.roots.itemsize * len(bound) * self.bounds[other].shape[1]
            )
            for b in range(own if alone else 0, last, together):
                group = slice(b, min(b + together, last))
                most = self.bounds[other][group].max(axis=0, initial=0.0)
                for rows, columns in _strips(bound, most, tau):
                    yield other, group, rows, columns

    def _unit_strips(self, unit: int, G: Array, tau: float) -> Iterator[Strip]:
        layer, row = self._place(unit)
        for other, group, rows, columns in self._screened(unit, tau):
            first, f = int(self.first_units[other]), self.bounds[other].shape[1]
            g = G[first + group.start : first + group.stop]
            entries = self._panel(self.features[layer][rows], g, self.features[other][:columns])
            column = int(self.basis.firsts[other]) + group.start * f
            if self.P is not None:
                here = slice(row + rows.start, row + rows.stop)
                there = self.P[column : column + len(g) * f].reshape(len(g), f, -1)[:, :columns]
                entries -= self._taken(self.P[here], there)
            yield Strip(entries, row + rows.start, column, f)

    def _taken(self, left: Array, right: Array) -> Array:
        """P C P^T, (units, rows, columns), of rows (rows, r) and columns (units, columns, r)."""
        units, columns, r = right.shape
        flat = namespace(right).ascontiguousarray(right).reshape(1, units * columns, r)
        product = batched.matmul((left * self.C)[None], flat, transpose_b=True)[0]
        return product.reshape(len(left), units, columns).transpose(1, 0, 2)

    @staticmethod
    def _panel(x: Array, g: Array, y: Array) -> Array:
        """(units, rows, columns) sums over k of x_i,k g_b,k y_j,k: one GEMM."""
        scaled = (x[None] * g[:, None]).reshape(1, -1, x.shape[1])
        product = batched.matmul(scaled, y[None], transpose_b=True)
        return product.reshape(len(g), len(x), len(y))

    def rows(self, index: HostIndex) -> Array:
        """Whole rows of K', (rows, M)."""
        xp = namespace(self.d)
        result = xp.empty((len(index), self.size), self.roots.dtype)
        layers = np.searchsorted(self.basis.firsts, index, side="right") - 1
        for layer in np.unique(layers).tolist():
            mine = np.nonzero(layers == layer)[0]
            here = index[mine] - int(self.basis.firsts[layer])
            unit, feature = np.divmod(here, len(self.features[layer]))
            x = self.features[layer][xp.asarray(feature)]
            roots = self.roots[:, xp.asarray(int(self.first_units[layer]) + unit)]
            g = batched.matmul(roots, self.roots, transpose_b=True).transpose(1, 2, 0)
            block = xp.empty((len(mine), self.size), result.dtype)
            for other, y in enumerate(self.features):
                units = slice(*self.first_units[other : other + 2].tolist())
                columns = slice(*self.basis.firsts[other : other + 2].tolist())
                panel = (x[:, None] * g[:, units]).reshape(1, -1, x.shape[1])
                product = batched.matmul(panel, y[None], transpose_b=True)
                block[:, columns] = product.reshape(len(mine), -1)
            result[xp.asarray(mine)] = block
        if self.P is not None:
            result -= self._taken(self.P[xp.asarray(index)], self.P[None])[0]
        return result


def _strips(rows: HostArray, columns: HostArray, tau: float) -> Iterator[tuple[slice, int]]:
    """Strips of rows, and how many columns, where the product of two falling bounds exceeds tau."""
    if not len(columns) or not len(rows):
        return
    count = _above(rows, tau / columns[0] if columns[0] else np.inf)
    strips = min(_STRIPS, -(-count // 32))
    edges = np.arange(strips + 1) * count // max(strips, 1)
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        wide = _above(columns, tau / rows[start])
        if wide:
            yield slice(start, stop), wide


def _above(falling: HostArray, least: float) -> int:
    """How many of falling numbers exceed another."""
    return int(np.searchsorted(-falling, -least, side="left"))


def rotated(layers: Sequence[Layer], hessian: OutputHessian, down: Array | None) -> Rotated:
    """The rotated Gauss-Newton matrix of a network.

    V: eigenvectors of the second moment of a layer's inputs, without those it is 0 for. U of hidden
    units: those of the mean of G. U of the outputs: where the loss's Hessian is a constant c^2 I,
    any basis leaves the outputs apart, and the eigenvectors of W mean(T T^T) W^T leave no more of
    them coupled to the rest than W has columns; where it is diagonal and varies, the identity,
    which is exact; else as for hidden units.

    Args:
        layers: of the network.
        hessian: of the loss.
        down: (hidden units, inputs of the last layer, n) T, the derivatives of these inputs in the
            hidden units' pre-activations; None for a network of one layer.

    Raises:
        MemoryEstimateError: the roots do not fit.
    """
    xp, r, last = namespace(hessian.c), hessian.r, layers[-1]
    trained = [layer for layer in layers if layer.trained]
    features_of = [_range(layer.features @ layer.features.T) for layer in trained]
    features = tuple(
        xp.ascontiguousarray(V.T @ layer.features)
        for V, layer in zip(features_of, trained, strict=True)
    )
    constant = r is None and _is_constant(hessian.c)
    outputs = len(last.weight)
    kept = _coupled_outputs(last.weight, down) if constant else outputs
    hidden = 0 if down is None else len(down)
    check_memory(
        3 * (hidden + kept) * (kept if constant else outputs) * hessian.c.nbytes // outputs,
        "the network's Jacobian in the eigenbasis", "the number of samples",
        device_of(hessian.c),
    )  # fmt: skip
    if constant:
        roots, P = _roots_of_constant(hessian.c, last.weight, down, kept)
    else:
        roots, P = _roots(hessian, last.weight, down), None
    if not last.trained:
        roots = roots[:hidden]
    bases, first = [], 0
    for layer, V, x in zip(trained, features_of, features, strict=True):
        width, tail = len(layer.weight), None
        part = roots[first : first + width]
        if layer is last and r is None:
            U = P
        else:
            flat = part.reshape(len(part), -1)
            U = _eigenvectors(flat @ flat.T)
            part[:] = (U.T @ flat).reshape(part.shape)
        if layer is last and kept < width:
            tail = hessian.c[0, 0] ** 2 * (x**2).sum(axis=1)
        bases.append(LayerBasis(U, V, width, layer.bias, tail))
        first += width
    basis = KroneckerBasis(bases)
    return Rotated(
        basis, features, xp.ascontiguousarray(roots.transpose(2, 0, 1)),
        _diagonal(basis, features, roots), r is None and last.trained,
    )  # fmt: skip


def _is_constant(c: Array) -> bool:
    xp = namespace(c)
    lowest, highest = float(xp.min(c)), float(xp.max(c))
    return highest - lowest <= _SAME * abs(highest)


def _coupled_outputs(weight: Array, down: Array | None) -> int:
    """Of a constant Hessian: how many outputs, in the right basis, depend on hidden units."""
    return 0 if down is None else min(weight.shape)


def _roots(hessian: OutputHessian, weight: Array, down: Array | None) -> Array:
    """(I - r r^T) diag(c) J, (units, outputs, n), J the derivatives of outputs in all units."""
    xp, c = namespace(hessian.c), hessian.c
    hidden = 0 if down is None else len(down)
    roots = xp.zeros((hidden + len(c), *c.shape), c.dtype)
    for u in range(hidden):
        assert down is not None
        roots[u] = hessian.project(c * (weight @ down[u]))
    outputs = xp.arange(len(c))
    roots[hidden + outputs, outputs] = c
    for u in range(hidden, len(roots)):
        roots[u] = hessian.project(roots[u])
    return roots


def _roots_of_constant(
    c: Array, weight: Array, down: Array | None, count: int
) -> tuple[Array, Array]:
    """C P^T J, (units, count, n), and P (outputs, count), see `rotated`."""
    xp, n = namespace(c), c.shape[1]
    if down is None:
        return xp.zeros((0, 0, n), c.dtype), xp.zeros((len(c), 0), c.dtype)
    flat = down.transpose(1, 0, 2).reshape(down.shape[1], -1)
    moment = flat @ flat.T
    if count == len(weight):
        P = _eigenvectors(weight @ moment @ weight.T)
    else:  # P lies in the range of W
        Q, R = (a[0] for a in batched.full_qr(weight[None]))
        P = xp.ascontiguousarray(Q[:, :count] @ _eigenvectors(R @ moment @ R.T))
    outer = c[0, 0] * (P.T @ weight)
    roots = xp.zeros((len(down) + count, count, n), c.dtype)
    for u in range(len(down)):
        roots[u] = outer @ down[u]
    outputs = xp.arange(count)
    roots[len(down) + outputs, outputs] = c[0, 0]
    return roots, P


def _diagonal(basis: KroneckerBasis, features: Sequence[Array], roots: Array) -> Array:
    """(M,) sum_k x_i,k^2 G_aa,k, in float64."""
    xp = namespace(roots)
    squares = (roots * roots).sum(axis=1).astype(np.float64)
    parts, first = [], 0
    for layer, x in zip(basis.layers, features, strict=True):
        weights = squares[first : first + layer.units]
        parts.append((weights @ (x.astype(np.float64) ** 2).T).ravel())
        first += layer.units
    return xp.concatenate(parts)


def _range(symmetric: Array) -> Array:
    """Eigenvectors of what is not 0 to rounding, at least one."""
    xp = namespace(symmetric)
    values, vectors = xp.linalg.eigh((symmetric + symmetric.T) / 2)
    values = to_host(values)
    none = len(values) * float(np.finfo(values.dtype).eps) * float(values[-1])
    count = max(1, int((values > none).sum()))
    return xp.ascontiguousarray(vectors[:, : -count - 1 : -1])


def _eigenvectors(symmetric: Array) -> Array:
    """Eigenvectors as columns, of the largest eigenvalue first."""
    xp = namespace(symmetric)
    _, vectors = xp.linalg.eigh((symmetric + symmetric.T) / 2)
    return xp.ascontiguousarray(vectors[:, ::-1])

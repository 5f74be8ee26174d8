"""A network of Linear layers in the Kronecker-factored eigenbasis, by Khatri-Rao products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostIndex, check_memory, device_of, namespace, to_host
from gpu_hodlr.eigenbasis.kronecker import KroneckerBasis, LayerBasis, eigenvectors
from gpu_hodlr.eigenbasis.rotated import Panel, Rotated

if TYPE_CHECKING:
    from gpu_hodlr.networks.layers import Layer
    from gpu_hodlr.networks.output_hessian import OutputHessian
    from gpu_hodlr.networks.unit_products import TrainedLayer

_SAME = 1e-12  # relative spread of what counts as constant


@dataclass(frozen=True)
class RotatedLayers(Rotated):
    """K' by the layers' inputs and the units' derivatives.

    With unit a of a layer and feature i: (Q^T K Q)[(a, i), (b, j)] = sum_k x_i,k x_j,k G_ab,k, x
    the layers' inputs in their eigenvectors V, G_ab,k = sum_o c_a,o,k c_b,o,k, and c the rows of A
    in the units' eigenvectors U.

    Attributes:
        features: (g, n) a layer.
        roots: (n, units, o) c, of the units of all layers.
    """

    features: tuple[Array, ...]
    roots: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `Rotated`."""
        dtype: np.dtype[Any] = self.roots.dtype
        return dtype

    def scaled(self, factor: float) -> RotatedLayers:
        """See `Rotated`."""
        root = self.roots.dtype.type(factor**0.5)
        return replace(
            self, basis=self.basis.scaled(factor), roots=self.roots * root, d=self.d * factor
        )

    def _cast(self, dtype: DTypeLike) -> RotatedLayers:
        features = tuple(x.astype(dtype) for x in self.features)
        return replace(self, features=features, roots=self.roots.astype(dtype))

    def gram(self, units: slice) -> Array:
        """G_ab,k for some units a and all b, (units, all, n)."""
        xp = namespace(self.roots)
        chosen = batched.matmul(self.roots[:, units], self.roots, transpose_b=True)
        return xp.ascontiguousarray(chosen.transpose(1, 2, 0))

    def _panels(self, units: slice) -> Panel:
        G = self.gram(units)

        def panel(unit: int, rows: slice, other: int, group: slice, columns: int) -> Array:
            layer, _ = self._place(unit)
            first = int(self.first_units[other])
            g = G[unit - units.start][first + group.start : first + group.stop]
            return _panel(self.features[layer][rows], g, self.features[other][:columns])

        return panel

    def _rows(self, index: HostIndex) -> Array:
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
        return result


def _panel(x: Array, g: Array, y: Array) -> Array:
    """(units, rows, columns) sums over k of x_i,k g_b,k y_j,k: one GEMM."""
    scaled = (x[None] * g[:, None]).reshape(1, -1, x.shape[1])
    product = batched.matmul(scaled, y[None], transpose_b=True)
    return product.reshape(len(g), len(x), len(y))


def rotated(layers: Sequence[Layer], hessian: OutputHessian, down: Array | None) -> RotatedLayers:
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
        U = P if layer is last and r is None else _turned(part)
        if layer is last and kept < width:
            tail = hessian.c[0, 0] ** 2 * (x**2).sum(axis=1)
        bases.append(LayerBasis(U, V, width, layer.bias, tail))
        first += width
    basis = KroneckerBasis(bases)
    return RotatedLayers(
        basis, _diagonal(basis, features, roots), features,
        xp.ascontiguousarray(roots.transpose(2, 0, 1)), apart=r is None and last.trained,
    )  # fmt: skip


def rotated_units(layers: Sequence[TrainedLayer], root: Array) -> RotatedLayers:
    """Linear layers anywhere in a network in the eigenbasis of their inputs and of G.

    Args:
        layers: with their inputs (f, n).
        root: (units, rows, n) of G, of the layers' units in order.

    Raises:
        MemoryEstimateError: a second root does not fit.
    """
    xp = namespace(root)
    check_memory(
        3 * root.nbytes, "the units' root in the eigenbasis", "the number of samples",
        device_of(root),
    )  # fmt: skip
    features_of = [_range(layer.features @ layer.features.T) for layer in layers]
    features = tuple(
        xp.ascontiguousarray(V.T @ layer.features)
        for V, layer in zip(features_of, layers, strict=True)
    )
    roots, bases, first = root.copy(), [], 0
    for layer, V in zip(layers, features_of, strict=True):
        U = _turned(roots[first : first + layer.width])
        bases.append(LayerBasis(U, V, layer.width, layer.bias))
        first += layer.width
    basis = KroneckerBasis(bases)
    return RotatedLayers(
        basis, _diagonal(basis, features, roots), features,
        xp.ascontiguousarray(roots.transpose(2, 0, 1)),
    )  # fmt: skip


def _turned(part: Array) -> Array:
    """Eigenvectors of a layer's mean of G, in which its root (units, rows, n) is then."""
    flat = part.reshape(len(part), -1)
    U = eigenvectors(flat @ flat.T)
    part[:] = (U.T @ flat).reshape(part.shape)
    return U


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
        P = eigenvectors(weight @ moment @ weight.T)
    else:  # P lies in the range of W
        Q, R = (a[0] for a in batched.full_qr(weight[None]))
        P = xp.ascontiguousarray(Q[:, :count] @ eigenvectors(R @ moment @ R.T))
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

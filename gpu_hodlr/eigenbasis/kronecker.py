"""The Kronecker-factored basis Q = blockdiag(U_l x V_l) of a network's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostIndex, namespace


@dataclass(frozen=True)
class LayerBasis:
    """The basis of one layer's parameters W (w, f), the bias as last column where there is one.

    A parameter direction is U[:, a] V[:, i]^T. Outside the range of U an eigenspace of its own has
    K = tail[i] along every V[:, i]; outside that of V, K = null.

    Attributes:
        U: (w, r) orthonormal columns, r <= w; None for the identity, r = w.
        V: (f, g) orthonormal columns, g <= f.
        width: w.
        bias: whether the last feature is the bias, which in the user's order stands behind all
            weights.
        tail: (g,) eigenvalues outside the range of U; None where r = w.
        null: the eigenvalue outside the range of V; 0 where no diagonal was added to K.
    """

    U: Array | None
    V: Array
    width: int
    bias: bool
    tail: Array | None = None
    null: float = 0.0

    @property
    def units(self) -> int:
        """R."""
        return self.width if self.U is None else int(self.U.shape[1])

    @property
    def inputs(self) -> int:
        """F."""
        return int(self.V.shape[0])

    @property
    def features(self) -> int:
        """G."""
        return int(self.V.shape[1])

    @property
    def size(self) -> int:
        """Parameters of the layer, w f."""
        return self.width * self.inputs

    @property
    def coupled(self) -> int:
        """Coordinates in the basis, r g."""
        return self.units * self.features

    def arrays(self) -> list[Array]:
        """What is stored."""
        return [a for a in (self.U, self.V, self.tail) if a is not None]

    def mapped(self, change: Callable[[Array], Array]) -> LayerBasis:
        """The same of changed arrays."""
        U, tail = (None if a is None else change(a) for a in (self.U, self.tail))
        return replace(self, U=U, V=change(self.V), tail=tail)

    def orthonormal(self) -> LayerBasis:
        """The same with columns that are orthonormal to the square of what they were."""
        U = None if self.U is None else _orthonormal(self.U)
        return replace(self, U=U, V=_orthonormal(self.V))

    def scaled(self, factor: float) -> LayerBasis:
        """That of factor * K."""
        tail = self.tail
        tail = None if tail is None else tail * tail.dtype.type(factor)
        return replace(self, tail=tail, null=factor * self.null)

    def plus(self, e: Array) -> tuple[LayerBasis, Array]:
        """That of K + diag(e), e (w, f), as far as that is diagonal in the basis.

        Outside the range of U and of V it is the mean of e there. Where all of e is one number
        nothing is left out.

        Returns:
            The basis, and the diagonal of what is added in it, (r, g).
        """
        squares = self.V**2
        turned = e @ squares  # (w, g)
        inside, tail, null = turned, self.tail, self.null
        if self.U is not None:
            inside = (self.U**2).T @ turned
        if self.U is not None and tail is not None:
            missing = 1 - (self.U**2).sum(axis=1)
            tail = tail + missing @ turned / (self.width - self.units)
        if self.features < self.inputs:
            missing = 1 - squares.sum(axis=1)
            null += float((e @ missing).sum()) / (self.width * (self.inputs - self.features))
        return replace(self, tail=tail, null=null), inside

    def plus_number(self, number: float) -> LayerBasis:
        """That of K + number I."""
        tail = None if self.tail is None else self.tail + self.tail.dtype.type(number)
        return replace(self, tail=tail, null=self.null + number)

    def diagonal(self, inside: Array, outside: Callable[[Any], Any]) -> Array:
        """(w, f) of U x V diag(inside) (U x V)^T, inside (r, g), and a function of K outside."""
        squares = self.V**2
        diagonal = inside @ squares.T
        if self.U is not None:
            diagonal = self.U**2 @ diagonal
        if self.U is not None and self.tail is not None:
            missing = 1 - (self.U**2).sum(axis=1)
            diagonal = diagonal + missing[:, None] * (squares @ outside(self.tail))
        if self.features < self.inputs:
            number = diagonal.dtype.type(outside(self.null))
            diagonal = diagonal + number * (1 - squares.sum(axis=1))
        return diagonal

    def read(self, vt: Array) -> Array:
        """(k, w, f) matrices of the user's order (k, w f)."""
        if not self.bias:
            return vt.reshape(len(vt), self.width, self.inputs)
        cut = vt.shape[1] - self.width
        weights = vt[:, :cut].reshape(len(vt), self.width, self.inputs - 1)
        return namespace(vt).concatenate([weights, vt[:, cut:, None]], axis=2)

    def written(self, x: Array) -> Array:
        """(k, w f) in the user's order; the opposite of `read`."""
        if not self.bias:
            return x.reshape(len(x), self.size)
        weights, bias = x[:, :, :-1].reshape(len(x), self.size - self.width), x[:, :, -1]
        return namespace(x).concatenate([weights, bias], axis=1)

    def features_in(self, x: Array) -> Array:
        """X V, (k, w, g), for x (k, w, f)."""
        return _right(x, self.V, False)

    def features_out(self, x: Array) -> Array:
        """X V^T, (k, w, f), for x (k, w, g)."""
        return _right(x, self.V, True)

    def units_in(self, x: Array) -> Array:
        """U^T x, (k, r, g), for x (k, w, g)."""
        return x if self.U is None else _left(self.U, x, True)

    def units_out(self, x: Array) -> Array:
        """U x, (k, w, g), for x (k, r, g)."""
        return x if self.U is None else _left(self.U, x, False)


def eigenvectors(symmetric: Array) -> Array:
    """Eigenvectors as columns, of the largest eigenvalue first."""
    xp = namespace(symmetric)
    _, vectors = xp.linalg.eigh((symmetric + symmetric.T) / 2)
    return xp.ascontiguousarray(vectors[:, ::-1])


def _orthonormal(U: Array) -> Array:
    """U (3 I - U^T U) / 2: a step of Newton and Schulz (Higham, Functions of Matrices, 8.3)."""
    gram = batched.matmul(U[None], U[None], transpose_a=True)
    return 1.5 * U - 0.5 * batched.matmul(U[None], gram)[0]


def _right(x: Array, V: Array, transposed: bool) -> Array:
    k, w, f = x.shape
    to = V.shape[0] if transposed else V.shape[1]
    return batched.matmul(x.reshape(1, k * w, f), V[None], transpose_b=transposed).reshape(k, w, to)


def _left(U: Array, x: Array, transposed: bool) -> Array:
    # One matrix for a stack of k: a view of U with stride 0 is all that BLAS needs.
    many = namespace(x).broadcast_to(U, (len(x), *U.shape))
    return batched.matmul(many, x, transpose_a=transposed)


class KroneckerBasis:
    """Q (N, M), orthonormal columns, M <= N, in the user's order of rows; and K outside its range.

    Coordinates are ordered by layer, then unit, then feature. Q is never formed: a vector goes
    through two small products a layer (Grosse and Martens, ICML 2016; George et al., NeurIPS 2018).

    Args:
        layers: of the network.

    Attributes:
        layers: of the network.
        n: N.
        size: M.
        firsts: (layers + 1,) the first coordinate of every layer, and M.
    """

    def __init__(self, layers: Sequence[LayerBasis]) -> None:
        self.layers = tuple(layers)
        self.n = sum(layer.size for layer in layers)
        self.firsts = np.cumsum([0, *(layer.coupled for layer in layers)])
        self.size = int(self.firsts[-1])
        ends = np.cumsum([0, *(layer.size for layer in layers)])
        self._params = [slice(*params) for params in pairwise(ends.tolist())]

    def arrays(self) -> list[Array]:
        """What is stored."""
        return [a for layer in self.layers for a in layer.arrays()]

    def mapped(self, change: Callable[[Array], Array]) -> Self:
        """The same of changed arrays."""
        return type(self)([layer.mapped(change) for layer in self.layers])

    def orthonormal(self) -> Self:
        """The same with columns that are orthonormal to the square of what they were."""
        return type(self)([layer.orthonormal() for layer in self.layers])

    def scaled(self, factor: float) -> Self:
        """That of factor * K."""
        return type(self)([layer.scaled(factor) for layer in self.layers])

    def rotate(self, v: Array) -> Array:
        """Q^T v, (M, k), for v (N, k)."""
        return self._inside(v)[-1]

    def rotate_back(self, c: Array) -> Array:
        """Q c, (N, k), for c (M, k)."""
        ct = namespace(c).ascontiguousarray(c.T)
        parts = [
            layer.written(layer.features_out(layer.units_out(self._of(ct, i))))
            for i, layer in enumerate(self.layers)
        ]
        return namespace(c).concatenate(parts, axis=1).T

    def matmat(
        self,
        core: Callable[[Array], Array],
        v: Array,
        outside: Callable[[Any], Any] | None = None,
    ) -> Array:
        """Q core(Q^T v), and K, or a function of K, outside the range of Q: (N, k).

        Args:
            core: (M, k) -> (M, k).
            v: (N, k).
            outside: of eigenvalues, which core then has as well; None for K itself.
        """
        xp = namespace(v)
        before, turned, inside = self._inside(v)
        image = xp.ascontiguousarray(core(inside).T)
        given = xp.ascontiguousarray(inside.T)
        parts = []
        for i, layer in enumerate(self.layers):
            y, tail = self._of(image, i), layer.tail
            null = layer.null
            if outside is not None and layer.features < layer.inputs:
                null = float(outside(null))
            if tail is None:
                y = layer.units_out(y)
            else:
                tail = tail if outside is None else outside(tail)
                y = layer.units_out(y - self._of(given, i) * tail) + turned[i] * tail
            if null:
                number = y.dtype.type(null)
                y = layer.features_out(y - number * turned[i]) + number * before[i]
            else:
                y = layer.features_out(y)
            parts.append(layer.written(y))
        return xp.concatenate(parts, axis=1).T

    def diagonal(self, inside: Array, outside: Callable[[Any], Any]) -> Array:
        """The diagonal (N,) of what `matmat` applies where core is diag(inside), inside (M,)."""
        parts = [
            layer.written(layer.diagonal(self._of(inside[None], i)[0], outside)[None])[0]
            for i, layer in enumerate(self.layers)
        ]
        return namespace(inside).concatenate(parts)

    def plus(self, e: Array) -> tuple[Self, Array, bool]:
        """The basis of K + diag(e), e (N,), as far as that is diagonal in it.

        Returns:
            The basis, the diagonal (M,) of what is added in it, and whether that is all: e is one
            number in every layer.
        """
        xp, exact = namespace(e), True
        layers, inside = [], []
        for layer, params in zip(self.layers, self._params, strict=True):
            of_layer = layer.read(e[None, params])[0]
            number = float(of_layer[0, 0])
            if bool((of_layer == of_layer[0, 0]).all()):
                layers.append(layer.plus_number(number))
                inside.append(xp.full(layer.coupled, number, e.dtype))
            else:
                changed, added = layer.plus(of_layer)
                layers.append(changed)
                inside.append(added.reshape(layer.coupled))
                exact = False
        return type(self)(layers), xp.concatenate(inside), exact

    def lowest_outside(self) -> float:
        """The smallest eigenvalue of K outside the range of Q; infinity where there is none."""
        lowest = np.inf
        for layer in self.layers:
            if layer.tail is not None:
                lowest = min(lowest, float(layer.tail.min()))
            if layer.features < layer.inputs:
                lowest = min(lowest, layer.null)
        return lowest

    def log_outside(self, damping: float) -> float:
        """The log-determinant of K + damping I outside the range of Q."""
        total = 0.0
        for layer in self.layers:
            if layer.tail is not None:
                logs = namespace(layer.tail).log(layer.tail.astype(np.float64) + damping)
                total += (layer.width - layer.units) * float(logs.sum())
            empty = layer.width * (layer.inputs - layer.features)
            total += empty * float(np.log(layer.null + damping)) if empty else 0.0
        return total

    def _inside(self, v: Array) -> tuple[list[Array], list[Array], Array]:
        """Every layer's matrices x and x V, and Q^T v (M, k)."""
        xp = namespace(v)
        vt = xp.ascontiguousarray(v.T)
        before = [
            layer.read(vt[:, params])
            for layer, params in zip(self.layers, self._params, strict=True)
        ]
        turned = [layer.features_in(x) for layer, x in zip(self.layers, before, strict=True)]
        parts = [
            layer.units_in(x).reshape(len(vt), layer.coupled)
            for layer, x in zip(self.layers, turned, strict=True)
        ]
        return before, turned, xp.ascontiguousarray(xp.concatenate(parts, axis=1).T)

    def _of(self, ct: Array, layer: int) -> Array:
        """The (k, r, g) matrices of a layer in coordinates (k, M)."""
        part, basis = ct[:, self.firsts[layer] : self.firsts[layer + 1]], self.layers[layer]
        return part.reshape(len(ct), basis.units, basis.features)

    def shapes(self) -> HostIndex:
        """(layers, 3) of every layer width, inputs, and 1 where it has a bias."""
        shapes = [[layer.width, layer.inputs, layer.bias] for layer in self.layers]
        return np.array(shapes, np.int64)
